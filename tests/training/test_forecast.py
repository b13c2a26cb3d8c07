"""What is made of measurements: lines through steps, what grows between two stages, sums over a run."""

from __future__ import annotations

import pytest

from cl_runner.training.forecast import Line, Memory, Rehearsed, forecast, seconds_of_base
from cl_runner.training.rehearsed import spread


def test_a_line_tells_what_grows_with_tokens_from_what_does_not() -> None:
    line = Line.through([(100, 1.5), (200, 2.5), (300, 3.5), (400, 4.5)])
    assert (line.fixed, line.each) == (pytest.approx(0.5), pytest.approx(0.01))
    assert line.at([100, 1000]) == pytest.approx(12.0)


@pytest.mark.parametrize(
    "timed",
    [
        [(100, 1.0), (300, 3.0)],  # too few
        [(100, 1.0), (101, 1.2), (102, 0.9), (103, 0.96)],  # of a length
        [(100, 0.5), (200, 2.0), (300, 3.5), (400, 4.0)],  # would begin below 0
    ],
)
def test_elsewhere_a_token_takes_the_same_wherever_it_is(timed: list[tuple[float, float]]) -> None:
    line = Line.through(timed)
    assert line.fixed == 0.0
    assert line.at([work for work, _ in timed]) == pytest.approx(sum(seconds for _, seconds in timed))


def test_a_step_that_does_not_grow_is_the_mean() -> None:
    line = Line.through([(100, 2.0), (200, 1.9), (300, 1.8), (400, 1.9)])
    assert (line.fixed, line.each) == (pytest.approx(1.9), 0.0)


def stages() -> list[Rehearsed]:
    """Three: steps of 1 s in the first, 3 s in the last; the same answers take twice as long after the last."""
    first = Rehearsed("a", [10.0] * 5, [(10.0, 1.0)] * 2, 0.5, 0.25, {"a": [(100.0, 2.0)]})
    middle = Rehearsed("b", [10.0] * 5, [], 1.5, 0.25)
    last = Rehearsed("c", [20.0] * 2, [(10.0, 3.0)], 0.5, 0.25, {"a": [(100.0, 4.0)], "c": [(50.0, 4.0)]})
    return [first, middle, last]


ASKED = [{"a": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0, "c": 2.0}]
BATCHES = {"a": [100.0, 100.0], "b": [100.0], "c": [50.0]}


def test_stages_between_two_that_were_measured_lie_between_them() -> None:
    found = forecast(stages(), ASKED, BATCHES)
    assert [stage.train for stage in found] == [5 + 0.5, 10 + 1.5, 2 * 6 + 0.5]
    assert [stage.steps for stage in found] == [5, 5, 2]
    # b was not asked: its tokens are taken for the mean of those that were, (4 + 4) s / 150 after the last stage.
    b = 100 * 8 / 150 / 2
    assert found[0].evaluate == pytest.approx(4.0)
    assert found[1].evaluate == pytest.approx(1.5 * (4.0 + b))
    assert found[2].evaluate == pytest.approx(2 * (4.0 + b) + 2 * 4.0)
    assert [stage.total for stage in found] == [pytest.approx(s.train + s.evaluate + 0.25) for s in found]


def test_processes_share_steps_and_batches_but_not_what_a_method_does_at_its_ends() -> None:
    one, four = forecast(stages(), ASKED, BATCHES)[0], forecast(stages(), ASKED, BATCHES, 4)[0]
    assert (four.train, four.evaluate) == (5 / 4 + 0.5, one.evaluate / 4)


def test_the_base_answers_as_after_the_first_stage() -> None:
    assert seconds_of_base(stages(), BATCHES, ["a", "c"]) == pytest.approx(4.0 + 2.0)
    assert seconds_of_base([], BATCHES, ["a"]) == 0.0


def test_without_a_step_there_is_no_time() -> None:
    assert forecast([Rehearsed("a")], [{}], {})[0].total == 0.0


def test_what_is_left_of_the_peak_is_activations() -> None:
    assert Memory(100, 40, 30, 20, 1000).about()["rest"] == 10
    assert Memory(50, 40, 30, 20, 1000).rest == 0
    assert Memory(100, 40, 30, 21, 1000).of_each(2) == Memory(90, 40, 30, 11, 1000)
    assert Memory(100, 40, 30, 21, 1000).of_each(1).rest == Memory(90, 40, 30, 11, 1000).rest  # nobody else has it


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 16, 100])
def test_steps_are_taken_from_all_over_a_stage(count: int) -> None:
    found = spread(count)
    assert sorted(found) == list(range(count))
    if count > 16:
        assert found[:2] == [count // 2, count - 1]  # the longest among the first
        assert max(b - a for a, b in zip(sorted(found[:8]), sorted(found[:8])[1:], strict=False)) <= count // 4
