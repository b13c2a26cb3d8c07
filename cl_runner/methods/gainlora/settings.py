"""What is set of GainLoRA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cl_runner.config.schema import Section


class Settings(Section):
    """Settings of GainLoRA."""

    branch: Literal["inflora", "olora"] = Field(
        "inflora",
        description="How a new pair learns: A designed off past inputs, only B trains (inflora), or both train with "
        "O-LoRA's penalty (olora).",
    )
    gate: Literal["cosine", "linear"] = Field(
        "cosine", description="What opens a gate: 4·cos(k, p2) (the official code), or k·p2 (linear, the paper)."
    )
    centred: bool = Field(
        False,
        description="Count p0 from the first task's mean prompt (ours), so that gates do not read what all prompts "
        "begin with.",
    )
    hidden: int = Field(100, ge=1, description="Width of p1 (published).")
    threshold: float = Field(
        0.995,
        gt=0,
        le=1,
        description="ε of what gates read, at the first task: share of the squares of its moment's singular "
        "values that later gates leave alone; grows linearly to 1, for a task after the last (published; the official "
        "code always counts 15 tasks).",
    )
    input_threshold: float = Field(
        0.995, gt=0, le=1, description="The same of what layers read, for A (published; branch: inflora)."
    )
    renormalise: bool = Field(
        False,
        description="After each step rows of a gate are as long as before its projection, as in the official code; "
        "past prompts are then no longer left alone.",
    )
    lambda1: float = Field(
        0.5, ge=0, description="Weight of Σ_{i<t} Σ |A_i A_tᵀ| over all layers (published; branch: olora)."
    )
    max_gb: float = Field(
        16.0, gt=0, description="Most that pairs, moments and bases of all tasks and layers may take, 10⁹ bytes."
    )
