"""Whether a CPU computes in bf16: it has to know how, and a measured step has to be clearly faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional

FLAGS = frozenset({"avx512_bf16", "amx_bf16"})  # as Linux names them; without them torch imitates bf16, slowly
AUTO = "training.precision: auto"
GAIN = 1.2  # so many times as fast, or it is not worth numbers that are coarser
# Weights of a layer worth measuring; smaller ones wait for Python, and embedded models keep their numbers on every CPU.
LARGE = 384 * 384
SHAPES, TOKENS, TURNS = 3, 512, 5  # of what is measured: enough for a ratio, and a fraction of a second

Shape = tuple[int, int]


@dataclass(frozen=True)
class Compute:
    """What the forwards of a run compute in."""

    bf16: bool
    kept: bool = False  # to be written down, for the run to go on so: where a processor's speed decided it
    said: str = ""  # a line for the screen

    @property
    def name(self) -> str:
        return "bf16" if self.bf16 else "fp32"


def has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bf16 matrices itself."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    return any(FLAGS & set(line.partition(":")[2].split()) for line in lines if line.startswith("flags"))


def seconds(shape: Shape, tokens: int) -> tuple[float, float]:
    """Of a layer (m, n) on so many rows, forward and backward, as it is frozen in a step: in fp32, and in bf16.

    The quickest of a few turns: what else the machine does only ever slows.
    """
    m, n = shape
    weight, given = torch.randn(m, n), torch.randn(tokens, n, requires_grad=True)

    def product(bf16: bool) -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            out = functional.linear(given, weight)
        torch.autograd.grad(out, given, torch.ones_like(out))
        return time.perf_counter() - started

    with torch.enable_grad():
        turns = [(product(False), product(True)) for _ in range(TURNS + 1)][1:]  # the first one makes the kernels
    fp32, bf16 = zip(*turns, strict=True)
    return min(fp32), min(bf16)


def decide(
    shapes: Sequence[Shape],
    tokens: int,
    capable: Callable[[], bool] = has_bf16,
    measure: Callable[[Shape, int], tuple[float, float]] = seconds,
) -> Compute:
    """What this processor computes in. torch's own random numbers are left as they are.

    Args:
        shapes: (m, n), out by in, of the layers that a step goes through; the largest few are measured.
        tokens: of a micro-batch.
        capable, measure: for tests.
    """
    large = sorted({(m, n) for m, n in shapes if m * n >= LARGE}, key=lambda shape: -shape[0] * shape[1])[:SHAPES]
    if not large or not capable():
        return Compute(False)
    with torch.random.fork_rng(devices=[]):
        found = [measure(shape, max(1, min(tokens, TOKENS))) for shape in large]
    fp32, bf16 = (sum(times) for times in zip(*found, strict=True))
    gain = fp32 / bf16
    chosen = Compute(gain >= GAIN, kept=True)
    times = f"{gain:.2f} times as fast in bf16 as in fp32"
    return replace(chosen, said=f"computes in {chosen.name}: this model's layers are {times} here ({AUTO})")
