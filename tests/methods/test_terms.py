"""Methods whose update is no LoRA pair: resumed to the bit, the same on two ranks, in bf16, answering as stored."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from cl_runner.atomic import read_json
from cl_runner.engine.process import Place
from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.tasks.task import Row, Task
from cl_runner.training import evaluation as scoring
from cl_runner.training.checkpoint import restore_stage, save_stage
from cl_runner.training.stage import StageRun
from tests.breadth import narrowed, wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import THREE, off, opposed
from tests.methods.test_carried import same
from tests.stages import Kind, tiny_model

OWN: dict[str, dict[str, Any]] = {
    "coso": {"method__rank": 6, "method__sketch": 8, "method__every": 2, "method__looks": 0, "method__lr": 0.02},
    "coso input": {"method__side": "input", "method__rotate": True, "method__threshold": 0.7, "method__lr": 0.02},
    "gorp": {"method__k": 3, "method__every": 2, "method__lr": 0.02},
    "gorp k": {"method__k": 6, "method__frame": "k", "method__threshold": 0.6, "method__lr": 0.02},
    "osft": {"method__preserve_first": 0.4, "method__lr": 0.02},
    "osft held": {"method__preserve_first": 0.5, "method__preserve_last": 0.99, "method__lr": 0.02},
    "shared-basis": {},
    "shared-basis block": {"method__form": "block", "method__shared_lr": 0.0},
    "shared-basis mixed": {"method__mixing": "similarity", "method__every": 2},
    "shared-basis sparse": {"method__sparse": 0.1, "method__pca": 1},
    "shared-basis support": {"method__support": 0.3, "method__non_negative": True},
    "sdlora": {},
    "oa": {"method__lambda1": 5.0, "method__tau": 0.3},
    "oliera": {"method__lambda1": 3.0, "method__lr": 0.02},
    "jumplora": {"method__lambda1": 20.0, "method__threshold": "block"},
    "sdlora reference": {"method__reference": True},
    "gainlora": {"method__renormalise": True, "method__gate": "linear"},
    "gainlora olora": {"method__branch": "olora"},
    "sapt": {"method__pseudo": 4, "method__pseudo_tokens": 6, "method__kappa": 2.0, "method__router_lr": 0.2},
    "sdlora reuse": {"method__reuse": 0.9, "method__rank_decay": [3, 1], "method__decay_every": 1, "adapter__r": 6},
}
PAIRS = ("oa", "shared-basis", "shared-basis block", "shared-basis sparse")  # folded as pairs
DROPPED: dict[str, Any] = {"dropout": 0.2, "adapter__dropout": 0.2, "training__epochs": 3}
# Folded whole and as pairs, kept, kept and mixed; their variants and relatives are for make test-wide.
QUICK = ["coso", "oa", "sdlora", "shared-basis mixed"]
every_method = pytest.mark.parametrize("name", narrowed(OWN, QUICK))


def opened(place: Place, name: str, **settings: Any) -> tuple[Any, Any]:
    return order_room(place, name.split()[0], **{**THREE, **OWN[name], **settings})


def learned(room: Any) -> dict[str, Tensor]:
    """ΔW of every target in all, folded and live, fp32."""
    terms = room.adapters.terms
    live = {target: term.update().detach() for target, term in terms.of.items()} if terms else {}
    found = {}
    for target, past in room.adapters.past.items():
        parts = [part for part in (past.sum, live.get(target)) if part is not None]
        found[target] = sum(parts[1:], parts[0])
    return found


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def farthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert list(ours) == list(theirs)
    return max(off(ours[name], theirs[name]) for name in ours)


def said(stage: StageRun, index: int) -> list[str]:
    """The stage's answers to its task's rows, with the answer given to some."""
    own = opposed(index)
    task = Task(name="a", kind="SC", instruction="Say.", metric="accuracy", labels=["x"])
    rows = [Row(f"a/{i}", "text", "x") for i in range(len(own.examples))]
    [scored] = scoring.evaluate(stage, {"a": scoring.TestSet(task, rows, own.examples)})
    return [row["output"] for row in scored.predictions]


def _resumed(place: Place, folder: str, name: str, kind: Kind) -> None:
    """Straight through, restarted at every stage, and every stage again to answer: the same bits."""
    straight, config = opened(place, name, kind=kind, **DROPPED)
    rundir = RunDir(Path(folder))
    answers = []
    for index in range(3):
        learn(straight, config, index, opposed(index))
        room, _ = opened(place, name, kind=kind, **DROPPED)
        if index:
            restored = StageRun(room, config, index - 1)
            restore_stage(rundir, restored, index - 1)
            restored.close()
        stage = learn(room, config, index, opposed(index)).stage
        assert equal(learned(room), learned(straight))
        assert same(room.method.state(), straight.method.state())
        assert all(bool(delta.any()) for delta in learned(room).values())
        answers.append(said(StageRun(room, config, index), index))
        commit(rundir, index, stage.plan.name, partial(save_stage, stage=stage))
    for index in range(3):
        room, _ = opened(place, name, kind=kind, **DROPPED)
        stage = StageRun(room, config, index, evaluating=True)
        restore_stage(rundir, stage, index)
        room.method.build(stage)
        assert said(stage, index) == answers[index]
    assert len({tuple(answer) for answer in answers}) > 1 or name == "osft"  # which leaves that word the likeliest


@every_method
def test_restarted_at_every_stage_and_asked_again_it_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    on_ranks(1, _resumed, str(tmp_path), name, "llama" if " " in name else "t5")


def _stored(place: Place, folder: str, name: str, kind: Kind) -> None:
    """Plain PEFT answers from every stage's folder as the model did."""
    room, config = opened(place, name, kind=kind, training__epochs=2)
    rundir = RunDir(Path(folder))
    for index in range(2):
        stage = learn(room, config, index, opposed(index)).stage
        commit(rundir, index, stage.plan.name, partial(save_stage, stage=stage))
        where = rundir.stage_dir(index, stage.plan.name)
        state = read_json(where / "state.json")
        assert state["megabytes"]["adapter"] > 0 and len(state["pairs"]) == (index + 1 if name in PAIRS else 0)
        room.adapters.condition = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            plain = PeftModel.from_pretrained(tiny_model(kind), where / "adapter").eval()
        batch = stage.make_batch(opposed(index).examples, ["a"] * 6, [1.0] * 6)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if kind == "t5":
            inputs["decoder_input_ids"] = batch.decoder_input_ids
        with torch.no_grad():
            ours, theirs = room.adapters.model(**inputs).logits, plain(**inputs).logits
            base = tiny_model(kind)(**inputs).logits
        assert off(theirs, ours) < 1e-5 < 1e-2 < off(base, ours)


@every_method
def test_each_stage_is_a_plain_peft_folder(name: str, tmp_path: Path) -> None:
    on_ranks(1, _stored, str(tmp_path), name, "t5" if " " in name else "llama")


def _ranks(place: Place) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Five rows in micro-batches of one: of two ranks with three each, one takes a row that does not count."""
    found = {}
    for number, name in enumerate(OWN):
        room, config = opened(
            place, name, kind="t5" if number % 2 else "llama", training__micro_batch=1, training__epochs=2
        )
        for index in range(2):
            learn(room, config, index, opposed(index, rows=5))
        found[name] = (learned(room), room.method.state().tensors)
    return found


@wide
def test_two_ranks_do_what_one_does() -> None:
    (alone,) = on_ranks(1, _ranks)
    first, second = on_ranks(2, _ranks)
    for name, (deltas, carried) in alone.items():
        assert equal(first[name][0], second[name][0]), name
        assert equal(first[name][1], second[name][1]), name
        assert farthest(first[name][0], deltas) < 1e-2, name
        assert [t.shape for t in first[name][1].values()] == [t.shape for t in carried.values()]


def _bf16(place: Place, base: torch.dtype) -> None:
    for name in OWN:
        # All rows in every step, those of sapt too, which has each twice.
        room, config = opened(place, name, bf16=True, training__epochs=2, training__global_batch=12)
        room.base.model.to(base)
        for index in range(2):
            outcome = learn(room, config, index, opposed(index))
        assert outcome.losses[-1] < outcome.losses[0], name
        assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in outcome.parameters.values())
        carried = room.method.state().tensors
        kept = [t for key, t in carried.items() if t.is_floating_point() and not key.startswith("memory.")]
        assert all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in kept)
        assert all(t.dtype == torch.float32 for t in learned(room).values())


@wide
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_in_bf16_what_trains_and_what_is_carried_is_fp32(base: torch.dtype) -> None:
    on_ranks(1, _bf16, base)


def _checkpointed(place: Place, name: str) -> None:
    found = []
    for on in (False, True):
        room, config = opened(place, name, training__activation_checkpointing=on, **DROPPED)
        for index in range(2):
            learn(room, config, index, opposed(index))
        found.append(learned(room))
    assert farthest(found[1], found[0]) < 1e-5


@wide
@every_method
def test_recomputed_activations_change_nothing(name: str) -> None:
    on_ranks(1, _checkpointed, name)
