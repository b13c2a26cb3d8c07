"""SeqLoRA: one pair trained on task after task."""

from __future__ import annotations

from cl_runner.methods.protocol import PairSettings
from cl_runner.methods.shared.sequential import Sequential


class SeqLoRA(Sequential):
    """The lower bound: every task overwrites the ones before. Optimizer and schedule are new at every stage."""

    class Config(PairSettings):
        """Settings of SeqLoRA."""

    name = "seqlora"
    title = "SeqLoRA: one LoRA for all tasks"
    equation = "W_t = W0 + s·B A;  A, B train on at every task"
    paper = "2310.14152 (baseline of O-LoRA)"
