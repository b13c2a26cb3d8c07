"""What each stage has changed, in runs of every form: what its folder adds to the base, less what the last one did."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError
from cl_runner.models.base_weights import BaseWeights
from cl_runner.runs.folder import RunDir
from cl_runner.runs.stage_updates import StageChanges, stage_changes
from tests.adapters.families import off
from tests.adapters.tuners import SETTINGS
from tests.breadth import narrowed
from tests.command_line import NANO, call
from tests.nano import nano_t5

TASKS = ["dbpedia", "amazon", "agnews"]
LOHA = ("--set=adapter.kind=loha", *(f"--set=adapter.{name}={value}" for name, value in SETTINGS["loha"].items()))
QUICK = {
    "pairs of unlike rank and scale",
    "one pair that began with a part of the weight",
    "a pair for each",
    "pairs from the base, merged",
    "matrices",
}
RUNS: dict[str, tuple[str, ...]] = {
    "pairs": ("--method", "olora"),
    "pairs of unlike rank and scale": (
        "--method",
        "inclora",
        "--set=adapter.rank_pattern={v: 3}",
        "--set=adapter.alpha_pattern={q: 7}",
    ),
    "pairs as one matrix": ("--method", "inclora", "--set=adapter.r=64"),
    "pairs that begin with a part of the weight": ("--method", "inclora", "--set=adapter.init=pissa"),
    "one pair": ("--method", "seqlora"),
    "one pair that began with a part of the weight": ("--method", "seqlora", "--set=adapter.init=pissa"),
    "a pair for each": ("--method", "pertask"),
    "pairs from the base, merged": ("--method", "merge"),
    "terms that are kept": ("--method", "sdlora"),
    "terms that are folded": ("--method", "shared-basis"),
    "matrices": ("--method", "coso"),
    "another kind": ("--method", "inclora", *LOHA),
    "another copy goes on": ("--method", "inclora", "--set=options.slow_copy={beta: 0.5, answers: true}"),
    "all weights": ("--method", "seqft", "--set=training.lr=1e-3"),
}
FACTORS = {"pairs": [8, 8, 8], "one pair": [8, 16, 16], "terms that are kept": [8, 16, 24]}


def trained(cwd: Path, *given: str) -> Path:
    cwd.mkdir(exist_ok=True)
    (cwd / "three.yaml").write_text(f"name: three\ntasks: [{', '.join(TASKS)}]\n")
    rank = () if "--set=adapter.kind=ia3" in given else ("--set=adapter.r=8",)  # which has none
    result = call("train", "--order", "three.yaml", *NANO, *rank, *given, cwd=cwd)
    assert result.code == 0, result.err
    [run] = (cwd / "runs").iterdir()
    return run


def base() -> BaseWeights:
    return BaseWeights(ModelConfig(name=nano_t5()))


def found(run: Path) -> tuple[list[StageChanges], list[str]]:
    return stage_changes(RunDir(run), TASKS, base)


def added(folder: Path) -> dict[str, Tensor]:
    """Layer → what a plain PEFT folder, or a model folder beside the base, adds to it, fp64, by hand."""
    if (folder / "model.safetensors").exists():
        before = load_file(Path(nano_t5()) / "model.safetensors")
        after = load_file(folder / "model.safetensors")
        linear = [name for name in after if name.split(".")[-2] in ("q", "k", "v", "o", "wi", "wo")]
        return {name.removesuffix(".weight"): after[name].double() - before[name].double() for name in linear}
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    deltas = {}
    for name, A in tensors.items():
        if "lora_A" in name:
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            own = "^" + layer.replace(".", r"\.") + "$"
            alpha = config["alpha_pattern"].get(own, config["lora_alpha"])
            rank = config["rank_pattern"].get(own, config["r"])
            assert rank == len(A)
            deltas[layer] = alpha / rank * (tensors[name.replace("lora_A", "lora_B")].double() @ A.double())
    return deltas


def less(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {layer: delta - before[layer] if before else delta for layer, delta in after.items()}


@pytest.mark.parametrize("form", narrowed(RUNS, QUICK))
def test_a_stage_is_what_its_folder_adds_less_what_was_there(form: str, tmp_path: Path) -> None:
    run = trained(tmp_path, *RUNS[form])
    changes, skipped = found(run)
    assert not skipped and [each.name for each in changes] == TASKS
    assert [each.differs for each in changes] == [False, *[form.startswith("one pair")] * 2]
    if form in FACTORS:
        assert [[each.of(layer).rank for layer in each.shapes] for each in changes] == [
            [rank] * len(changes[0].shapes) for rank in FACTORS[form]
        ]
    before: dict[str, Tensor] = {}
    for index, each in enumerate(changes):
        stage = run / "stages" / f"{index + 1:02d}-{TASKS[index]}"
        goes_on = (
            stage / "next"
            if (stage / "next").exists() and index < 2
            else stage / ("model" if form == "all weights" else "adapter")
        )
        after = added(goes_on)
        wanted = less(after, before)
        before = {} if form == "a pair for each" else after
        assert each.from_base is (form == "a pair for each" or index == 0)
        assert all(off(each.total(layer).whole(), delta) < 1e-3 for layer, delta in after.items())
        assert each.shapes == {layer: tuple(delta.shape) for layer, delta in wanted.items()}
        for layer, delta in wanted.items():
            assert delta.norm() > 1e-6 and off(each.of(layer).whole(), delta) < 1e-3
        # Whose norm is of the new part, of a copy, or of the pair before it is merged.
        if form not in ("terms that are kept", "another copy goes on", "pairs from the base, merged"):
            norm = math.sqrt(sum(float(each.of(layer).whole().square().sum()) for layer in each.shapes))
            said = json.loads((stage / "metrics.json").read_text())["training"]["update_norm"]
            assert said is None if form == "all weights" else norm == pytest.approx(said, rel=1e-4)


def test_prompts_change_no_weight(tmp_path: Path) -> None:
    run = trained(tmp_path, "--method", "progprompt")
    changes, skipped = found(run)
    assert not changes
    assert skipped == ["stages 1 (dbpedia), 2 (amazon), 3 (agnews): soft prompts change no weight"]


KEPT = {
    "loha": LOHA,
    "dora": ("--set=adapter.kind=dora", "--set=adapter.r=4"),
    "ia3": ("--set=adapter.kind=ia3",),
    "lora-xs": ("--set=adapter.kind=lora-xs", "--set=adapter.r=4"),
}


def by_hand(kind: str, folder: Path) -> dict[str, Tensor]:
    """Layer → ΔW of a folder of PEFT's own for the kind, by its equation, fp64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if kind == "lora-xs":  # which PEFT has not
        return added(folder)
    weights = load_file(Path(nano_t5()) / "model.safetensors")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        layer, _, part = name.removeprefix("base_model.model.").partition(
            {"loha": ".hada_", "dora": ".lora_", "ia3": ".ia3_"}[kind]
        )
        parts.setdefault(layer, {})[part] = tensor.double()
    found = {}
    for layer, of in parts.items():
        W = weights[f"{layer}.weight"].double()
        if kind == "loha":
            found[layer] = config["alpha"] / config["r"] * (of["w1_a"] @ of["w1_b"]) * (of["w2_a"] @ of["w2_b"])
        elif kind == "ia3":
            assert layer.split(".")[-1] not in config["feedforward_modules"]
            found[layer] = (of["l"] - 1) * W
        else:
            direction = W + config["lora_alpha"] / config["r"] * of["B.weight"] @ of["A.weight"]
            found[layer] = (of["magnitude_vector"] / direction.norm(dim=1))[:, None] * direction - W
    return found


@pytest.mark.parametrize("kind", narrowed(KEPT, ["dora", "lora-xs"]))
def test_another_kind_that_stays_beside_the_weight(kind: str, tmp_path: Path) -> None:
    """Its folder is PEFT's own of the kind, and is merged into the base to tell."""
    only = ("--set=adapter.target_modules=[k, v]",) if kind == "ia3" else ()
    run = trained(tmp_path, "--method", "seqlora", *KEPT[kind], *only)
    changes, skipped = found(run)
    assert not skipped and [each.from_base for each in changes] == [True, False, False]
    after = [by_hand(kind, run / "stages" / f"{i + 1:02d}-{task}" / "adapter") for i, task in enumerate(TASKS)]
    for t, each in enumerate(changes):
        wanted = less(after[t], after[t - 1] if t else {})
        assert set(each.shapes) == set(wanted)
        for layer, delta in wanted.items():
            assert delta.norm() > 1e-7 and off(each.of(layer).whole(), delta) < 1e-3
            assert off(each.total(layer).whole(), after[t][layer]) < 1e-4


def test_another_kind_that_stays_cannot_be_told_without_the_base(tmp_path: Path) -> None:
    run = trained(tmp_path, "--method", "seqlora", *LOHA)

    def gone() -> BaseWeights:
        raise UserError("the base some/where is not on this machine")

    changes, skipped = stage_changes(RunDir(run), TASKS, gone)
    why = "the base some/where is not on this machine"
    assert not changes and skipped == [f"stages 1 (dbpedia), 2 (amazon), 3 (agnews): {why}"]


def test_weights_that_were_removed_and_a_base_that_is_gone(tmp_path: Path) -> None:
    run = trained(tmp_path, "--method", "seqft", "--set=output.keep_stages=2")
    changes, skipped = found(run)
    assert [each.name for each in changes] == ["agnews"]
    removed = "the model of dbpedia was removed (output.keep_stages)"
    assert skipped == [f"stages 1 (dbpedia), 2 (amazon): {removed}"]
    whole = trained(tmp_path / "whole", "--method", "seqft")
    changes, skipped = stage_changes(RunDir(whole), TASKS, lambda: BaseWeights(ModelConfig(name="some/where")))
    assert [each.name for each in changes] == ["amazon", "agnews"]
    assert skipped == ["stage 1 (dbpedia): the base some/where is not on this machine"]


def test_what_is_damaged_is_one_line_and_the_rest_goes_on(tmp_path: Path) -> None:
    run = trained(tmp_path, "--method", "seqlora")
    (run / "stages/02-amazon/adapter/adapter_model.safetensors").write_bytes(b"")
    (run / "stages/03-agnews/state.json").write_text("{}")
    changes, skipped = found(run)
    assert [each.name for each in changes] == ["dbpedia"]
    assert [line[: line.index(":")] for line in skipped] == ["stage 2 (amazon)", "stage 3 (agnews)"]
    assert "damaged" in skipped[0] and "state.json: own is not as a run writes it" in skipped[1]
    assert not any("\n" in line for line in skipped)
