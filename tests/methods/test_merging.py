"""Methods that make something of a pair once it is learned: restarted at every stage, on two ranks, in bf16, as plain
PEFT folders."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method, method_class
from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.training.checkpoint import restore_stage, save_stage
from cl_runner.training.compatibility import check_method
from cl_runner.training.stage import StageRun
from tests.adapters.test_peft_folder import plain
from tests.breadth import narrowed, wide
from tests.command_line import call
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.ranks import FEW, each_learned, two_do_what_one_does
from tests.methods.steps import THREE, label_logits, off, opposed, vector
from tests.methods.test_carried import same
from tests.stages import Kind, tiny_model

OWN: dict[str, dict[str, Any]] = {
    "slao": {},
    "slao fisher": {"fisher_beta": 0.5, "fisher_samples": 4},
    "merge": {}, "merge ties": {"how": "ties"}, "merge dare": {"how": "dare", "drop": 0.5},
    "merge magmax": {"how": "magmax"}, "slora": {},
}  # fmt: skip
RANKS = ["slao fisher", "merge ties", "slora"]


def opened(place: Place, name: str, **settings: Any) -> tuple[Any, Any]:
    own = {f"method__{key}": value for key, value in OWN[name].items()}
    return order_room(place, name.split()[0], **{**THREE, **own, **settings})


def learned(room: Any) -> dict[str, Tensor]:
    """All that the model that answers has over the base, by target: the sum, and the live pair."""
    live = room.adapters.live_update() if room.adapters.live else {}
    found = {}
    for target, past in room.adapters.past.items():
        parts = [part for part in (past.sum, live.get(target)) if part is not None]
        found[target] = sum(parts[1:], parts[0])
    return found


def _resumed(place: Place, folder: str, name: str, kind: Kind) -> None:
    """Each stage in a room of its own, from the files of the one before; every folder in plain PEFT; stage 2 again."""
    dropped: dict[str, Any] = {"dropout": 0.2, "adapter__dropout": 0.2, "training__epochs": 2}
    straight, config = opened(place, name, kind=kind, **dropped)
    rundir, after = RunDir(Path(folder)), []
    for index in range(3):
        learn(straight, config, index, opposed(index))
        room, _ = opened(place, name, kind=kind, **dropped)
        if index:
            restored = StageRun(room, config, index - 1)
            restore_stage(rundir, restored, index - 1)
            restored.close()
        stage = learn(room, config, index, opposed(index)).stage
        after.append(vector(learned(room)))
        assert torch.equal(after[-1], vector(learned(straight)))
        assert same(room.method.state(), straight.method.state())
        commit(rundir, index, stage.plan.name, lambda draft: save_stage(draft, stage))  # noqa: B023
        alone = plain(tiny_model(kind), rundir.stage_dir(index, stage.plan.name) / "adapter")
        example = opposed(index).examples[0]
        with torch.no_grad():
            assert (
                off(label_logits(alone, kind, example), label_logits(room.adapters.model.eval(), kind, example)) < 1e-5
            )
        for one in (room, straight):
            one.adapters.let_go(one.method.reads_past())
    assert all(off(one, other) > 1e-2 for one, other in pairwise(after))
    room, _ = opened(place, name, kind=kind)
    stage = StageRun(room, config, 1, evaluating=True)
    restore_stage(rundir, stage, 1)
    room.method.build(stage)
    stage.close()
    assert torch.equal(vector(learned(room)), after[1])


@pytest.mark.parametrize("name", narrowed(OWN, ["slao fisher", "merge ties", "merge magmax"]))
def test_restarted_at_every_stage_it_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    on_ranks(1, _resumed, str(tmp_path), name, "llama" if list(OWN).index(name) % 2 else "t5")


def _ranks(place: Place) -> dict[str, Tensor]:
    return each_learned(
        RANKS,
        lambda name, kind: opened(place, name, kind=kind, **FEW),
        lambda room, outcome: vector(learned(room)),
    )


def test_two_ranks_do_what_one_does() -> None:
    two_do_what_one_does(_ranks)


def _bf16(place: Place) -> None:
    for name in OWN:
        room, config = opened(place, name, bf16=True, training__epochs=3)
        for index in range(2):
            outcome = learn(room, config, index, opposed(index))
        assert outcome.losses[-1] < outcome.losses[0], name
        kept = [t for t in room.method.state().tensors.values() if t.is_floating_point()]
        assert all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in (*outcome.parameters.values(), *kept))


@wide
def test_in_bf16_what_trains_and_what_is_carried_is_fp32() -> None:
    on_ranks(1, _bf16)


@pytest.mark.parametrize("name", sorted({name.split()[0] for name in OWN}))
def test_what_would_answer_as_before_the_merge_is_refused(name: str) -> None:
    why = method_class(name).remade
    for more, said in (
        ({"options": {"slow_copy": {}}}, f"options.slow_copy: {name} {why}, and the copy would answer without that; "),
        ({"eval": {"probe_every": 3}}, f"eval.probe_every: {name} {why}; "),
    ):
        config = RunConfig.model_validate({"method": {"name": name}, **more})
        with pytest.raises(UserError) as refused:
            check_method(config, make_method(config).plan(["a", "b"]))
        assert str(refused.value) == f"{said}leave it out"
    assert "slow_copy" not in call("show", name, cwd=Path()).out
