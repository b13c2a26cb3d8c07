"""bf16 on a CPU: only where the processor has it and a measured step is clearly faster."""

from __future__ import annotations

from pathlib import Path

import pytest

from cl_runner.engine.precision import GAIN, decide, has_bf16


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("fpu avx avx2 avx512f", False),
        ("fpu avx512f avx512_bf16 avx512_fp16", True),
        ("avx512f amx_bf16 amx_tile amx_int8", True),
        ("amx_tile amx_int8 not_amx_bf16", False),  # tiles of integers alone
    ],
)
def test_what_the_processor_has_is_in_its_flags(tmp_path: Path, flags: str, has: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: avx512_bf16 of the name alone\nflags\t\t: {flags}\nbugs\t\t:\n")
    assert has_bf16(cpuinfo) is has
    assert not has_bf16(tmp_path / "none")


class Clock:
    """A processor that is so many times as fast in bf16, at a step of 6 seconds and at an answer of 2."""

    def __init__(self, step: float, answer: float) -> None:
        self.gains = step, answer
        self.asked: list[bool] = []

    def __call__(self, bf16: bool) -> tuple[float, float]:
        self.asked.append(bf16)
        slow = 100.0 if len(self.asked) <= 2 else 1.0 + len(self.asked)  # kernels are made, then other work comes
        step, answer = self.gains if bf16 else (1.0, 1.0)
        return 6 * slow / step, 2 * slow / answer


@pytest.mark.parametrize(
    ("step", "answer", "bf16"),
    [(0.3, 0.3, False), (1.0, 1.0, False), (GAIN - 0.01, GAIN - 0.01, False), (GAIN + 0.01, GAIN + 0.01, True),
     (1.3, 0.5, False), (1.8, 0.8, True), (1.1, 9.0, True)],
)  # fmt: skip
def test_bf16_only_where_step_and_answer_together_are_clearly_faster(step: float, answer: float, bf16: bool) -> None:
    def even(way: bool) -> tuple[float, float]:
        return (6 / step, 2 / answer) if way else (6.0, 2.0)

    found = decide(even)
    assert (found.bf16, found.kept) == (bf16, True)
    assert found.said.startswith(f"computes in {'bf16' if bf16 else 'fp32'}: ")
    assert f"a step is {step:.2f} and an answer {answer:.2f} times as fast" in found.said


def test_the_quickest_turn_counts_and_the_first_one_does_not() -> None:
    clock = Clock(2, 2)
    found = decide(clock)
    assert clock.asked == [False, True] * 3
    # Of the turns 4, 5 and 6, 7 the quicker ones.
    assert f"a step is {2 * 4 / 5:.2f} " in found.said, found.said
