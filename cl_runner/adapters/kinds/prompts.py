"""Soft prompts: a few vectors before the input of a frozen model. The methods that want them choose them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_runner.adapters.kind import Kind, Opening

if TYPE_CHECKING:
    from cl_runner.adapters.base import Adapters


class SoftPrompts(Kind):
    """``h = f([P; x])``: the method makes P, and carries it."""

    name = "prompts"
    title = "vectors before the input of a frozen model"
    equation = "x becomes [P; x]"
    paper = "2104.08691"
    offers = frozenset({"prompts"})
    trains = ("prompt",)
    quantized = True

    def open(self, opening: Opening) -> Adapters:
        from cl_runner.adapters.soft_prompts import Prompts

        return Prompts(
            opening.model,
            name_or_path=opening.name_or_path,
            revision=opening.revision,
            encoder_decoder=opening.encoder_decoder,
        )
