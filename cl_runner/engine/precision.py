"""Whether a CPU computes in bf16: it has to know how, and a measured step has to be clearly faster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FLAGS = frozenset({"avx512_bf16", "amx_bf16"})  # as Linux names them; without them torch imitates bf16, slowly
AUTO = "training.precision: auto"
GAIN = 1.2  # so many times as fast, or it is not worth numbers that are coarser
TURNS = 2

Measure = Callable[[bool], tuple[float, float]]  # whether in bf16 → seconds of a step, and of an answer


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


def decide(measure: Measure) -> Compute:
    """What this processor computes in: bf16 where step and answer together are clearly faster so.

    The quickest of a few turns, in both by turns: what else the machine does only ever slows.
    """
    turns = [(measure(False), measure(True)) for _ in range(TURNS + 1)][1:]  # the first one makes the kernels
    fp32, bf16 = ([min(times) for times in zip(*way, strict=True)] for way in zip(*turns, strict=True))
    step, answer = (slow / fast for slow, fast in zip(fp32, bf16, strict=True))
    bf16_chosen = sum(fp32) >= GAIN * sum(bf16)
    name = Compute(bf16_chosen).name
    said = f"computes in {name}: in bf16 a step is {step:.2f} and an answer {answer:.2f} times as fast here ({AUTO})"
    return Compute(bf16_chosen, kept=True, said=said)
