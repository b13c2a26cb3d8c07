"""SeqFT: all weights trained on task after task."""

from __future__ import annotations

from cl_runner.config.schema import Section
from cl_runner.methods.shared.sequential import Sequential


class SeqFT(Sequential):
    """The lower bound as the papers have it. Optimizer and schedule are new at every stage."""

    class Config(Section):
        """There are no factors to set anything of."""

    name = "seqft"
    title = "SeqFT: all weights, trained on task after task"
    equation = "θ trains on at every task,  θ: all weights of the model"
    paper = "2310.14152 (baseline of O-LoRA)"
    carried = "the weights"
    growth = "constant"
    trains = "all weights of the model"
    factors = "none"
    frozen = "nothing"

    @property
    def full(self) -> bool:
        return True

    @property
    def form(self) -> str:
        return ""  # there is no other
