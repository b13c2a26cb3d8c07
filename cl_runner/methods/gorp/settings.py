"""What is set of GORP, and which layers it trains in full."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import Field

from cl_runner.config.schema import Section
from cl_runner.errors import UserError

# What trains in full unless it is set: the first of these that there is among the target layers.
DEFAULTS = {
    "cross-attention": ("EncDecAttention", "encoder_attn", "cross_attn", "crossattention"),
    "gates": ("gate_proj", "wi_0"),
    "values": ("v", "v_proj", "value"),
}


class Settings(Section):
    """Settings of GORP."""

    full: list[str] | None = Field(
        None,
        description="Target layers that train in full: names of layers or of modules around them; null: "
        "cross-attention, else gates (both published), else values (ours).",
    )
    k: int = Field(8, ge=1, description="Side of the frame that full-rank changes move in (published).")
    every: int = Field(10, ge=1, description="Steps between two looks at the gradient, for the frame (published).")
    frame: Literal["full", "k"] = Field(
        "full",
        description="Where S of a full-rank change lies: on its m outputs (ours), or in the frame (paper).",
    )
    threshold: float = Field(
        0.95, gt=0, le=1, description="ε at the first task: share of the moment's energy that goes into S (ours)."
    )
    last_threshold: float = Field(1.0, gt=0, le=1, description="ε grows linearly to this, after the last task (ours).")
    lr: float = Field(1e-5, gt=0, description="Learning rate of full-rank changes; LoRA has training.lr (published).")
    scale: float = Field(1.0, gt=0, description="α, by which steps of full-rank changes are multiplied (ours).")
    max_gb: float = Field(
        64.0, gt=0, description="Most that full-rank changes and what their steps need may take, 10⁹ bytes."
    )


def in_full(targets: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """The targets that train in full, by these names, or as they are by default. Raises UserError where none is."""
    if names is None:
        for group in DEFAULTS.values():
            if found := _named(targets, group):
                return found
        raise UserError(
            f"method.full: no target layer is of {', '.join(DEFAULTS)}, which gorp would train in full; name some of "
            f"{_some(targets)}, or set [] for none"
        )
    for name in names:
        if not _named(targets, [name]):
            raise UserError(f"method.full: '{name}' is no target layer, nor around one; there are {_some(targets)}")
    return _named(targets, names)


def _named(targets: Sequence[str], names: Iterable[str]) -> list[str]:
    return [target for target in targets if any(f".{name}." in f".{target}." for name in names)]


def _some(targets: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(target.rpartition(".")[2] for target in targets))
