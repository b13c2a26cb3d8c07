"""A run that starts from somebody's adapter answers as PEFT has it, trains on or folds it, and goes on to the bit."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_runner.adapters.given import Given
from cl_runner.adapters.lora_folder import LoraFolder
from cl_runner.registry import KINDS
from tests import started
from tests.adapters import forks
from tests.breadth import narrowed
from tests.command_line import NANO, SMALL, call, tree
from tests.nano import nano_t5

T5 = nano_t5()
ON = {
    "t5": (T5, NANO),
    "llama": (started.LLAMA, ("--preset", "tiny-llama", "--data", "synthetic", *SMALL)),
}
R = ("--set", "adapter.r=4", "--set", "adapter.alpha=6")
STILL = ("--set", "training.lr=1e-30", "--set", "method.reference=true", "--set", "method.lambda1=0.5")
FILES = ("*.safetensors", "predictions.jsonl", "state.json", "adapter_config.json")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("from")
    (folder / "two.yaml").write_text(started.TWO)
    for family, (model, _) in ON.items():
        started.lora(folder / f"of-{family}", model, r=4, lora_alpha=8)
    return folder


def train(room: Path, family: str, name: str, *more: str, adapter: str = "") -> str:
    arguments = ("--order", "two.yaml", "--from", adapter or f"of-{family}", "--name", name, *ON[family][1], *more)
    result = call("train", *arguments, cwd=room)
    assert result.code == 0, result.err
    return result.err


@dataclass(frozen=True)
class Case:
    """method: with these settings. said: of what becomes of the adapter."""

    family: str
    method: str
    more: tuple[str, ...]
    said: str


CASES = {
    "a past pair": Case("t5", "olora", (), "folded into the base and does not train; olora keeps it as a past pair"),
    "trains on": Case("t5", "seqlora", R, "its pair trains on as the run's, and nothing is folded"),
    "another rank": Case("t5", "seqlora", (), "does not train, as its rank is 4, and 32 that of the run (adapter.r)"),
    "from the base": Case("llama", "merge", (), "what merge trains is beside it"),
    "trains on, llama": Case("llama", "seqlora", R, "its pair trains on as the run's, and nothing is folded"),
    "a past pair, llama": Case("llama", "olora", (), "olora keeps it as a past pair, and trains a new one at each"),
}


@pytest.fixture(scope="module", params=narrowed(CASES, ["a past pair", "trains on, llama"]))
def case(room: Path, request: pytest.FixtureRequest) -> tuple[Case, Path]:
    case = CASES[request.param]
    name = request.param.replace(" ", "-").replace(",", "")
    said = train(room, case.family, name, "--method", case.method, *case.more)
    lines = [line for line in said.splitlines() if line.startswith("starts from")]
    assert len(lines) == 1 and case.said in lines[0], said
    assert f"starts from of-{case.family}, a LoRA of rank 4 in" in lines[0]
    return case, room / "runs" / name


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_before_the_first_step_it_answers_as_peft_has_it(room: Path, case: tuple[Case, Path]) -> None:
    of, run = case
    model, whole = ON[of.family][0], of.family == "t5"
    theirs = started.logits(started.in_peft(model, room / f"of-{of.family}"), whole)
    assert (theirs - started.logits(started.base(model), whole)).abs().max() > 0.05
    close(started.committed(run, -1), theirs)


def test_a_stage_in_plain_peft_on_the_original_base_answers_as_the_run_did(case: tuple[Case, Path]) -> None:
    of, run = case
    for index, name in enumerate(["01-dbpedia", "02-amazon"]):
        adapter = started.in_peft(ON[of.family][0], run / "stages" / name / "adapter")
        close(started.committed(run, index), started.logits(adapter, of.family == "t5"))


def test_eval_and_verify_are_as_committed_without_the_folder(room: Path, case: tuple[Case, Path]) -> None:
    of, run = case
    folder = room / f"of-{of.family}"
    away = folder.rename(folder.with_name("away"))
    try:
        found = call("eval", str(run), "--stage", "1", "--json", cwd=room).json
        assert not any(found["differing_rows"].values())
        verified = call("verify", str(run), "--json", cwd=room)
        assert verified.code == 0
        assert any("is not there; the run has its copy in stages/00-from" in line for line in _unchecked(verified.json))
    finally:
        away.rename(folder)


def _unchecked(found: dict[str, Any]) -> list[str]:
    return [line for check in found["checks"] for line in check["unchecked"]]


def test_it_goes_on_to_the_bit(room: Path, case: tuple[Case, Path], cut: Callable[[], None], tmp_path: Path) -> None:
    """Cut off after stage 1, and gone on with by another process, the folder gone by then."""
    of, straight = case
    for folder in (room / f"of-{of.family}", room / "two.yaml"):
        (shutil.copytree if folder.is_dir() else shutil.copy)(folder, tmp_path / folder.name)
    arguments = ("train", "--order", "two.yaml", "--from", f"of-{of.family}", "--name", "it", *ON[of.family][1])
    arguments = (*arguments, "--method", of.method, *of.more)
    with pytest.MonkeyPatch.context() as patch:
        from cl_runner.training import run as running

        commit = running.commit

        def once(*given: Any) -> None:
            commit(*given)
            raise KeyboardInterrupt

        patch.setattr(running, "commit", once)
        assert call(*arguments, cwd=tmp_path).code == 130
    shutil.rmtree(tmp_path / f"of-{of.family}")
    assert call(*arguments, cwd=tmp_path).code == 0
    compared = 0
    for pattern in FILES:
        for file in straight.rglob(pattern):
            other = tmp_path / "runs" / "it" / file.relative_to(straight)
            assert other.read_bytes() == file.read_bytes(), file
            compared += 1
    assert compared >= 8


def test_a_penalty_sees_its_rows_from_the_first_stage_on(room: Path) -> None:
    """The first step's penalty is O-LoRA's of the folder's own A with the new one, which no step has moved."""
    train(room, "t5", "still", "--method", "olora", *STILL)
    run = room / "runs" / "still"
    row = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    both = load_file(run / "stages" / "01-dbpedia" / "adapter" / "adapter_model.safetensors")
    theirs = load_file(room / "of-t5" / "adapter_model.safetensors")
    total = 0.0
    for name, A in theirs.items():
        if ".lora_A." in name:
            new = both[name][len(A) :]
            assert torch.equal(both[name][: len(A)], A)
            total += sum(float((a.double() @ b.double()).abs()) for a in A for b in new)
    assert row["penalty"] == pytest.approx(0.5 * total, rel=1e-4)


def test_the_sum_of_past_updates_has_it(room: Path) -> None:
    """PS-LoRA's S after the first stage is it plus the stage's X, which merged is what it has of the larger entries."""
    train(room, "t5", "sum", "--method", "pslora")
    stage = room / "runs" / "sum" / "stages" / "01-dbpedia"
    S = load_file(stage / "state.safetensors")
    merged, given = LoraFolder(stage / "adapter"), LoraFolder(room / "of-t5")
    for layer in merged.shapes:
        M, theirs = merged.of(layer).whole(), given.of(layer).whole()
        X = S[f"method.{layer}"] - theirs
        assert float(theirs.norm()) > 1e-3 and 0 < float((X.abs() > theirs.abs()).double().mean()) < 1
        torch.testing.assert_close(M, torch.where(X.abs() > theirs.abs(), X, theirs), rtol=1e-4, atol=1e-6)


def test_analyze_tells_what_stages_changed_beside_it(room: Path, case: tuple[Case, Path]) -> None:
    """ΔW of the first stage is what its folder has over the adapter, whichever way the run holds that."""
    _, run = case
    found = call("analyze", str(run), "--json", cwd=room).json
    first = LoraFolder(run / "stages" / "01-dbpedia" / "adapter")
    given = LoraFolder(run / "stages" / "00-from" / "adapter")
    square = sum(
        float((first.of(layer).whole().double() - given.of(layer).whole().double()).square().sum())
        for layer in first.shapes
    )
    assert found["together"]["by_update"][0]["update_norm"] == pytest.approx(square**0.5, rel=1e-3)


LIKE = {
    "rslora": {"use_rslora": True},
    "ranks and alphas by layer": {
        "rank_pattern": {"block.0.layer.0.SelfAttention.q": 2}, "alpha_pattern": {"SelfAttention.v": 3},
    },
    "some of the layers": {"target_modules": ["EncDecAttention.q"]},
}  # fmt: skip


OTHERS = [("rslora", "seqlora"), ("ranks and alphas by layer", "olora")]


@pytest.mark.parametrize("of", narrowed([(how, method) for how in LIKE for method in ("olora", "seqlora")], OTHERS))
def test_other_loras(room: Path, tmp_path: Path, of: tuple[str, str]) -> None:
    how, method = of
    started.lora(tmp_path / "mine", T5, **{"r": 4, "lora_alpha": 8, **LIKE[how]})
    name = f"{method}-{how.replace(' ', '-')}"
    said = train(room, "t5", name, "--method", method, *R, adapter=str(tmp_path / "mine"))
    assert ("trains on as the run's" in said) == (method == "seqlora" and how == "rslora")
    theirs = started.logits(started.in_peft(T5, tmp_path / "mine"), True)
    close(started.committed(room / "runs" / name, -1), theirs)
    last = room / "runs" / name / "stages" / "02-amazon" / "adapter"
    close(started.committed(room / "runs" / name, 1), started.logits(started.in_peft(T5, last), True))


def test_a_folder_of_whole_matrices(room: Path, tmp_path: Path) -> None:
    """As a stage of ours is where pairs would be larger: A = I, which no method may keep off."""
    file = started.lora(tmp_path / "mine", T5, r=4, lora_alpha=8) / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".lora_A." in name]:
        A, B = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        tensors[name], tensors[name.replace("lora_A", "lora_B")] = torch.eye(A.shape[1]), 2.0 * B @ A
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    size = A.shape[1]
    (tmp_path / "mine" / "adapter_config.json").write_text(json.dumps({**config, "r": size, "lora_alpha": size}))
    said = train(room, "t5", "whole", "--method", "olora", adapter=str(tmp_path / "mine"))
    assert "a LoRA of whole matrices in" in said and "what olora trains is beside it" in said
    rows = [json.loads(line) for line in (room / "runs" / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["penalty"] is None or row["penalty"] == 0 for row in rows if row["stage"] == "dbpedia"] == [True] * 2
    theirs = started.logits(started.in_peft(T5, tmp_path / "mine"), True)
    close(started.committed(room / "runs" / "whole", -1), theirs)
    last = room / "runs" / "whole" / "stages" / "02-amazon" / "adapter"
    close(started.committed(room / "runs" / "whole", 1), started.logits(started.in_peft(T5, last), True))


def test_the_adapter_of_the_code_of_o_lora(room: Path, tmp_path: Path) -> None:
    """Two tasks' pairs in a pickle: both are past pairs, and the run's first is the third."""
    shapes = dict.fromkeys(LoraFolder(room / "of-t5").shapes, (192, 192))
    pairs = forks.random_pairs(shapes, 2, 4)
    folder = forks.write(tmp_path / "adapter", pairs, alpha=6.0)
    said = train(room, "t5", "third", "--method", "olora", *R, adapter=str(folder))
    assert "a LoRA of rank 8, the pairs of 2 tasks, in 6 layers" in said and "as 2 past pairs" in said
    run = room / "runs" / "third"
    state = json.loads((run / "stages" / "01-dbpedia" / "state.json").read_text())
    assert [pair["stage"] for pair in state["pairs"]] == ["from:1", "from:2", "dbpedia"]
    ours = started.base(T5)
    for layer in shapes:
        weight = ours.get_submodule(layer).weight
        weight.data = (weight.double() + forks.update(pairs, layer, 6.0)).float()
    close(started.committed(run, -1), started.logits(ours, True))
    for index, name in enumerate(["01-dbpedia", "02-amazon"]):
        adapter = started.in_peft(T5, run / "stages" / name / "adapter")
        close(started.committed(run, index), started.logits(adapter, True))


KINDS_BESIDE = [name for name in KINDS.ours if "update" in KINDS.get(name).offers and name != "lora"]


@pytest.mark.parametrize("kind", narrowed(KINDS_BESIDE, ["dora"]))
def test_other_kinds_stand_beside_it(room: Path, kind: str) -> None:
    layers = ("--set", "adapter.target_modules=[k,q,v,wo]") if kind == "ia3" else ()  # its own are without q
    train(room, "t5", kind, "--method", "inclora", "--set", f"adapter.kind={kind}", *layers)
    run = room / "runs" / kind
    close(started.committed(run, -1), started.logits(started.in_peft(T5, room / "of-t5"), True))
    for index, name in enumerate(["01-dbpedia", "02-amazon"]):
        adapter = started.in_peft(T5, run / "stages" / name / "adapter")
        close(started.committed(run, index), started.logits(adapter, True))


def test_all_that_plan_says_is_without_a_run(room: Path) -> None:
    before = tree(room)
    found = call("plan", "--order", "two.yaml", "--method", "olora", "--from", "of-t5", *NANO, "--json", cwd=room).json
    assert "olora keeps it as a past pair" in found["starts"]
    assert tree(room) == before


def test_a_future_that_begins_with_it(room: Path) -> None:
    """a0 is of the base with the adapter, and so is what an untrained task is answered with under pertask."""
    train(room, "t5", "future", "--method", "pertask", "--set", "eval.future=true")
    run = room / "runs" / "future"
    base = (run / "stages" / "00-base" / "predictions.jsonl").read_text().splitlines()
    first = (run / "stages" / "01-dbpedia" / "predictions.jsonl").read_text().splitlines()
    assert [line for line in base if '"amazon"' in line] == [line for line in first if '"amazon"' in line]
    plain = call("train", "--order", "two.yaml", "--method", "pertask", "--set", "eval.future=true", "--name", "plain",
                 *NANO, cwd=room)  # fmt: skip
    assert plain.code == 0
    assert base != (room / "runs" / "plain" / "stages" / "00-base" / "predictions.jsonl").read_text().splitlines()


def test_extended_it_still_has_it(room: Path) -> None:
    train(room, "t5", "short", "--method", "olora")
    (room / "three.yaml").write_text("name: three\ntasks: [dbpedia, amazon, agnews]\n")
    (room / "of-t5").rename(room / "gone")
    longer = call("train", "--extend", "short", "--order", "three.yaml", "--name", "longer", cwd=room)
    (room / "gone").rename(room / "of-t5")
    assert longer.code == 0, longer.err
    run = room / "runs" / "longer"
    adapter = started.in_peft(T5, run / "stages" / "03-agnews" / "adapter")
    close(started.committed(run, 2), started.logits(adapter, True))


# What is refused.


def _missing(folder: Path) -> None:
    shutil.rmtree(folder)


def _a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def _no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _broken(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def _config(**values: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return write


def _tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return write


def _other_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("encoder.block.0", "encoder.block.7"): t for name, t in tensors.items()}


def _other_shape(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t[:, :100].contiguous() if ".lora_A." in name else t for name, t in tensors.items()}


def _not_finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t * float("nan") for name, t in tensors.items()}


def _whole_module(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)}


def _peft(config: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        shutil.rmtree(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_peft_model(started.base(T5), config).save_pretrained(str(folder))

    return write


REFUSED = {
    "missing": (_missing, "does not exist"),
    "a file": (_a_file, "is no folder"),
    "not an adapter": (_no_config, "is no PEFT adapter"),
    "broken safetensors": (_broken, "is broken"),
    "DoRA": (_config(use_dora=True), "DoRA: .* needs the base, and a run starts from LoRA; merge it into its base"),
    "LoHa": (_peft(LoHaConfig(r=2, target_modules=["q"])), "is of the kind LOHA.*and a run starts from LoRA"),
    "AdaLoRA": (_peft(AdaLoraConfig(init_r=2, target_modules=["q"], total_step=9)), "is of the kind ADALORA"),
    "a module trained whole": (_tensors(_whole_module), r"lm_head.weight is left out, no part of a pair, so that"),
    "PiSSA as it began": (_config(init_lora_weights="pissa"), "began with a part of the weight"),
    "aLoRA": (_config(alora_invocation_tokens=[1]), "is added only after its invocation tokens"),
    "another base": (_tensors(_other_layer), "encoder.block.7.* which is no linear layer of the base"),
    "another width": (_tensors(_other_shape), "is 192 × 100, and 192 × 192 in the base"),
    "not finite": (_tensors(_not_finite), "holds values that are not finite"),
    "another rank": (_config(r=5), "has rank 4, and 5 in adapter_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_what_a_run_cannot_start_from_is_one_line_and_nothing_is_written(room: Path, tmp_path: Path, how: str) -> None:
    spoil, why = REFUSED[how]
    shutil.copytree(room / "of-t5", tmp_path / "mine")
    shutil.copy(room / "two.yaml", tmp_path)
    spoil(tmp_path / "mine")
    result = call("train", "--order", "two.yaml", "--method", "olora", "--from", "mine", *NANO, cwd=tmp_path)
    assert result.code == 2
    line = result.err.splitlines()[-1]
    assert line.startswith("cl-runner: model.adapter (--from): "), result.err
    assert re.search(why, line), line
    assert not (tmp_path / "runs").exists() and "Traceback" not in result.err


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--method", "seqft"), "seqft trains all weights of the model, beside which no adapter is folded"),
        (("--method", "progprompt"), "progprompt trains vectors before the input"),
        (("--method", "olora", "--set", "adapter.target_modules=q"), "adapts v too.*set adapter.target_modules=.q,v."),
    ],
)
def test_methods_and_layers_that_it_does_not_go_with(room: Path, more: tuple[str, ...], why: str) -> None:
    result = call("train", "--order", "two.yaml", "--from", "of-t5", *NANO, *more, "--name", "no", cwd=room)
    assert result.code == 2 and re.search(why, result.err.splitlines()[-1]), result.err
    assert not (room / "runs" / "no").exists()


def test_a_run_goes_on_with_the_adapter_that_it_started_from_alone(room: Path, tmp_path: Path) -> None:
    for name in ("of-t5", "two.yaml"):
        (shutil.copytree if (room / name).is_dir() else shutil.copy)(room / name, tmp_path / name)
    begin = ("train", "--order", "two.yaml", "--method", "olora", *NANO, "--name", "it")
    assert call(*begin, "--from", "of-t5", cwd=tmp_path).code == 0
    assert "was started with an adapter (--from)" in call(*begin, cwd=tmp_path).err
    shutil.copytree(tmp_path / "of-t5", tmp_path / "moved")
    assert call(*begin, "--from", "moved", cwd=tmp_path).code == 0  # where it lies does not count
    _config(lora_alpha=9)(tmp_path / "of-t5")
    changed = call(*begin, "--from", "of-t5", cwd=tmp_path)
    assert changed.code == 2 and "is not the adapter that the run runs/it started from" in changed.line
    verified = call("verify", "it", "--json", cwd=tmp_path)
    assert verified.code == 1
    assert any("model.adapter: " in line for check in verified.json["checks"] for line in check["differs"])
    other = ("train", "--order", "two.yaml", "--method", "olora", *NANO, "--name", "other")
    assert call(*other, cwd=tmp_path).code == 0
    assert "was started without an adapter" in call(*other, "--from", "moved", cwd=tmp_path).err


def test_a_copy_that_was_changed_is_refused(room: Path, tmp_path: Path) -> None:
    for name in ("of-t5", "two.yaml"):
        (shutil.copytree if (room / name).is_dir() else shutil.copy)(room / name, tmp_path / name)
    begin = ("train", "--order", "two.yaml", "--method", "olora", "--from", "of-t5", *NANO, "--name", "it")
    assert call(*begin, cwd=tmp_path).code == 0
    run = tmp_path / "runs" / "it"
    _config(lora_alpha=9)(run / "stages" / "00-from" / "adapter")
    verified = call("verify", "it", "--json", cwd=tmp_path)
    assert verified.code == 1
    shutil.rmtree(run / "stages" / "02-amazon")
    shutil.rmtree(run / "stages" / "01-dbpedia")
    again = call(*begin, cwd=tmp_path)
    assert again.code == 2 and "adapter_config.json is not what was committed" in again.err.splitlines()[-1]


def test_pairs_of_fewer_layers_and_rows_add_what_the_folder_adds(tmp_path: Path) -> None:
    started.lora(tmp_path / "mine", T5, r=4, lora_alpha=8, rank_pattern={"encoder.block.0.layer.0.SelfAttention.q": 2})
    shapes = dict.fromkeys([*LoraFolder(tmp_path / "mine").shapes, "one.more"], (192, 192))
    given = Given(tmp_path / "mine", shapes)
    [pair] = given.pairs()
    assert {A.shape for A in pair.A.values()} == {(4, 192)} and {B.shape for B in pair.B.values()} == {(192, 4)}
    assert not pair.update("one.more").any()
    for layer in given.folder.shapes:
        torch.testing.assert_close(pair.update(layer), given.folder.of(layer).whole(), rtol=1e-6, atol=1e-7)
