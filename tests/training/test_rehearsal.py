"""The work of a step is what its forwards compute; rows passed over in part are owed; answers are taken for right."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from cl_runner.engine.process import Place
from cl_runner.methods.protocol import Method
from cl_runner.models.token_cache import lengths
from cl_runner.training.rehearsal import of_processes
from cl_runner.training.rehearsed import ROWS, RehearsedStage, work_of_step
from cl_runner.training.sampling import BatchPlan
from tests.distributed import on_ranks
from tests.methods.orders import order_room
from tests.stages import open_stage, some_rows, tiny_config, tiny_room
from tests.training.test_sharing import rows as with_heads


class Plain(Method):
    pass


def computed(place: Place, kind: Any, how: str) -> tuple[float, float]:
    """The tokens that a step's forwards read, as counted in the first layers, and as foreseen."""
    config = {"training__global_batch": 9, "training__micro_batch": 4, "training__share_prefix": how}
    room, settings = order_room(place, "seqlora", ("a", "b"), kind, **config)
    stage = RehearsedStage(room, settings, 0)
    room.method.build(stage)
    own = with_heads("a") if kind == "llama" else some_rows(9, task="a")
    stage.sharing.learn(own.examples, own.tasks)
    read: defaultdict[str, int] = defaultdict(int)
    layers = [name for name in stage.adapters.layers if ("0." in name and name.endswith(("q", "q_proj")))]
    firsts = {
        part: next(name for name in layers if part in name and "EncDec" not in name)
        for part in (("encoder", "decoder") if kind == "t5" else ("layers.0",))
    }
    for part, name in firsts.items():

        def count(_: Any, inputs: Any, __: Any, part: str = part) -> None:
            read[part] += inputs[0].shape[0] * inputs[0].shape[1]

        stage.adapters.layers[name].register_forward_hook(count)
    plan = BatchPlan.make(9, settings.training, 1)
    step = next(plan.step_rows(1, 0, lengths(own.examples)[0].tolist()))
    for at in range(0, 9, 4):
        part = own.take(step[at : at + 4])
        with torch.no_grad():
            stage.forward(stage.make_batch(part.examples, part.tasks, [1.0] * len(part.examples)))
    inputs, labels = (one.tolist() for one in lengths(own.examples))
    found = work_of_step(stage, plan, step, inputs, labels, own.tasks)
    stage.close()
    return float(sum(read.values())), found


@pytest.mark.parametrize(("kind", "how"), [("t5", "auto"), ("llama", "off"), ("llama", "auto")])
def test_the_work_of_a_step_is_the_tokens_that_are_read(kind: str, how: str) -> None:
    [(read, foreseen)] = on_ranks(1, computed, kind, how)
    assert foreseen == pytest.approx(read, rel=0.02)


def passed_over(place: Place, count: int) -> tuple[int, float, list[str], float]:
    config = tiny_config(training__micro_batch=2, eval__batch_tokens=8)
    room = tiny_room(Plain(Plain.Config()), config, place)
    stage = RehearsedStage(room, config, 0)
    room.method.build(stage)
    batches = len(list(stage.batches(some_rows(count))))
    owed = stage.owed
    answers = stage.generate(some_rows(count).examples)
    stage.close()
    return batches, owed, answers, stage.owed - owed


def test_of_many_rows_a_few_are_passed_over_and_the_rest_is_owed() -> None:
    batches, owed, answers, owed_answers = on_ranks(1, passed_over, 40)[0]
    assert batches == 1 + ROWS and owed > 0
    assert len(answers) == 40 and owed_answers > 0
    batches, owed, answers, owed_answers = on_ranks(1, passed_over, 4)[0]
    assert (batches, owed, len(answers), owed_answers) == (2, 0.0, 4, 0.0)


def decoded(place: Place) -> list[int]:
    """How many rows are decoded of six, gold labels being what nobody would say."""
    config = tiny_config(eval__batch_tokens=1000, eval__max_new_tokens=8)
    found = []
    for made in (RehearsedStage, None):
        stage = open_stage(tiny_room(Plain(Plain.Config()), config, place), config)
        if made:
            stage.close()
            stage = made(stage.room, config, 0)
        said = stage.answer(examples := some_rows(6).examples)
        gold = [stage.room.encoder.decode(example.target[:-1]) for example in examples]
        found.append(sum(one != other for one, other in zip(said, gold, strict=True)))
        stage.close()
    return found


def test_half_of_the_answers_are_taken_for_right() -> None:
    assert on_ranks(1, decoded)[0] == [3, 6]


def test_one_process_does_the_share_of_several() -> None:
    config = tiny_config(training__global_batch=10)
    assert of_processes(config, 4).training.global_batch == 3
    assert of_processes(config, 1) is config
