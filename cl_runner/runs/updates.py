"""What the stages of a run have learned, read from its folder without model or torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_runner.metrics.free_subspace import free_share
from cl_runner.runs.folder import RunDir
from cl_runner.runs.follow import is_number
from cl_runner.runs.shapes import read_metrics
from cl_runner.runs.state import NEXT, TENSORS, StageState

if TYPE_CHECKING:
    from cl_runner.metrics.free_subspace import Rows

PREFIX, SUFFIX = "base_model.model.", ".lora_A.weight"


def free_subspace(run: RunDir, names: Sequence[str]) -> float | None:
    """Percent of directions, mean over target layers, that the last stage leaves to later ones.

    What the method itself says is left (``Method.free_share``), else the input directions that no folded pair reads.
    None where there are neither: full fine-tuning, prompts.
    """
    if not names:
        return None
    said = _training(run, len(names) - 1, names[-1]).get("free_share")
    if said is not None:
        return 100 * float(said)
    folders = {name: run.stage_dir(index, name) for index, name in enumerate(names)}
    saved = StageState.read(folders[names[-1]]).answers.saved
    if not saved.pairs or saved.dense_stages:
        return None
    own = [_own_rows(folders[pair.stage], pair.stage, last=pair.stage == names[-1]) for pair in saved.pairs]
    return 100 * statistics.fmean(free_share([rows[target] for rows in own]) for target in own[0])


def _own_rows(folder: Path, name: str, last: bool) -> dict[str, Rows]:
    """Target → A (r, n) of a stage's own pair: of the last one as it answers, of others as later stages have it."""
    from safetensors.numpy import load_file

    state = StageState.read(folder)
    where, saved = ("adapter", state.answers.saved) if last or not state.next else (NEXT, state.next.saved)
    if saved.own != "adapter":
        before = "next." if where == NEXT else ""
        tensors = {
            key.removeprefix(before): t for key, t in load_file(folder / TENSORS).items() if key.startswith(before)
        }
        return {key[4:-2]: tensors[key] for key in tensors if key.startswith("own.") and key.endswith(".A")}
    tensors = load_file(folder / where / "adapter_model.safetensors")
    of_A = {k.removeprefix(PREFIX).removesuffix(SUFFIX): t for k, t in tensors.items() if k.endswith(SUFFIX)}
    at = next(i for i, pair in enumerate(saved.pairs) if pair.stage == name)
    found = {}
    for target, rows in of_A.items():
        start = sum(pair.rank_of(target) for pair in saved.pairs[:at])
        found[target] = rows[start : start + saved.pairs[at].rank_of(target)]
    return found


def update_norm(run: RunDir, names: Sequence[str]) -> float | None:
    """Mean over stages of ‖ΔW_t‖_F, all target layers together; None where a stage has none."""
    found: list[Any] = [_training(run, index, name).get("update_norm") for index, name in enumerate(names)]
    return statistics.fmean(found) if found and None not in found else None


def _training(run: RunDir, index: int, name: str) -> dict[str, Any]:
    found: dict[str, Any] = read_metrics(run.stage_dir(index, name))["training"]
    return found


def peak_megabytes(run: RunDir) -> float | None:
    """Peak memory of the device that the log has seen, in MB: of the GPU, or of the process."""
    return max((row["memory_mb"] for row in run.log_rows() if is_number(row.get("memory_mb"))), default=None)
