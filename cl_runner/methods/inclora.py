"""IncLoRA: a new pair for each task, past ones frozen and summed."""

from __future__ import annotations

from collections.abc import Mapping

from cl_runner.methods.protocol import Method, PairSettings


class IncLoRA(Method):
    """Nothing is added to the loss: the control for every penalty on new pairs."""

    class Config(PairSettings):
        """Settings of IncLoRA."""

    name = "inclora"
    title = "IncLoRA: a new LoRA for each task, past ones frozen and summed"
    equation = "W_t = W0 + Σ_{i<t} s·B_i A_i + s·B_t A_t;  A_t, B_t train"
    paper = "2310.14152 (baseline of O-LoRA)"
    carried = "past updates, folded into the weight"
    growth = "constant in a step; the saved factors grow by one pair a task"
    any_rank = True

    def reads_past(self) -> Mapping[str, str]:
        return {}
