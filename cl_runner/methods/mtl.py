"""MTL: one pair, or all weights, on the union of all tasks at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cl_runner.methods.protocol import LoraOrFull, Method, StagePlan


class MultiTask(Method):
    """The upper bound: no order, nothing to forget."""

    class Config(LoraOrFull):
        """Settings of MTL."""

    name = "mtl"
    title = "MTL: one LoRA on all tasks at once"
    equation = "W = W0 + s·B A;  A, B train on the union of D_1 … D_T"
    paper = "2310.14152 (upper bound of O-LoRA)"
    carried = "A, B (full: the weights)"
    growth = "constant"
    any_rank = True
    frozen = "the base"
    past_as = "none"

    def plan(self, order: Sequence[str]) -> list[StagePlan]:
        return [StagePlan("mtl", tuple(order))]

    def reads_past(self) -> Mapping[str, str]:
        return {}
