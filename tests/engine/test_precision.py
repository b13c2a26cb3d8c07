"""bf16 on a CPU: only where the processor has it and a measured step is clearly faster."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cl_runner.engine.precision import GAIN, TOKENS, Shape, decide, has_bf16, seconds


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
    """A processor that is ``gain`` times as fast in bf16."""

    def __init__(self, gain: float) -> None:
        self.gain = gain
        self.asked: list[tuple[Shape, int]] = []

    def __call__(self, shape: Shape, tokens: int) -> tuple[float, float]:
        self.asked.append((shape, tokens))
        torch.rand(3)
        return shape[0] * shape[1] * self.gain, float(shape[0] * shape[1])


SHAPES = [(800, 800), (400, 800), (800, 800), (380, 800), (1600, 800), (8, 8)]


@pytest.mark.parametrize(("gain", "bf16"), [(0.3, False), (1.0, False), (GAIN - 0.01, False), (GAIN + 0.01, True)])
def test_bf16_only_where_it_is_clearly_faster(gain: float, bf16: bool) -> None:
    clock, before = Clock(gain), torch.get_rng_state()
    found = decide(SHAPES, 40, lambda: True, clock)
    assert (found.bf16, found.kept) == (bf16, True)
    assert found.said.startswith(f"computes in {'bf16' if bf16 else 'fp32'}: ") and f"{gain:.2f} times" in found.said
    assert clock.asked == [((1600, 800), 40), ((800, 800), 40), ((400, 800), 40)], "the largest, each once"
    assert torch.equal(before, torch.get_rng_state())


def test_few_tokens_are_measured_and_no_more() -> None:
    clock = Clock(2)
    assert decide(SHAPES, 10**6, lambda: True, clock).bf16 and decide(SHAPES, 0, lambda: True, clock).bf16
    assert [tokens for _, tokens in clock.asked] == 3 * [TOKENS] + 3 * [1]


def test_a_processor_without_bf16_is_not_measured_nor_a_small_model_and_nothing_is_said() -> None:
    clock = Clock(9)
    small = [(192, 192), (576, 192), (512, 192)]  # the embedded models
    for shapes, has in ((SHAPES, False), ([], True), (small, True)):
        found = decide(shapes, 40, lambda has=has: has, clock)  # type: ignore[misc]
        assert (found.bf16, found.kept, found.said) == (False, False, "")
    assert clock.asked == []


def test_the_clock_measures_both_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of the product that a step has, in each; also where gradients are off."""
    products = []
    linear = torch.nn.functional.linear

    def watched(given: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = linear(given, weight)
        products.append((tuple(weight.shape), tuple(out.shape), out.dtype, out.requires_grad))
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    with torch.no_grad():
        fp32, bf16 = seconds((6, 4), 5)
    assert fp32 > 0 and bf16 > 0
    assert set(products) == {((6, 4), (5, 6), dtype, True) for dtype in (torch.float32, torch.bfloat16)}
    assert len(products) % 2 == 0 and [p[2] for p in products[:2]] == [torch.float32, torch.bfloat16]
