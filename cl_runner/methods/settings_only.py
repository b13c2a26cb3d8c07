"""Names for a method with settings: no class file, only other defaults, and what ``cl-runner show`` says of them."""

from __future__ import annotations

from collections.abc import Mapping
from operator import getitem
from typing import Annotated, Any

from pydantic import Field, create_model

from cl_runner.config.schema import Section
from cl_runner.config.validation import parts_of
from cl_runner.methods.protocol import Method
from cl_runner.methods.seqlora import SeqLoRA


def named(
    method: type[Method], name: str, settings: Mapping[str, Any], says: Mapping[str, str], **facts: str
) -> type[Method]:
    """A method under another name, whose settings begin otherwise; all may still be set.

    Args:
        method: the method as it is.
        name: what ``--method`` calls it.
        settings: key → default; of a setting with parts, those that differ (such a setting can no longer be null).
        says: key → what ``show`` says of that setting.
        facts: ``title``, ``equation`` and other facts of a method.
    """
    label = "".join(word.title() for word in name.split("-"))
    config = with_defaults(method.Config, settings, says, label)
    config.__doc__ = f"Settings of {name}."
    return type(label, (method,), {"__doc__": f"{method.name} as {name}.", "name": name, "Config": config, **facts})


def with_defaults(
    section: type[Section], defaults: Mapping[str, Any], says: Mapping[str, str], label: str
) -> type[Section]:
    """A section whose settings have other defaults, and the same bounds; itself where they are its own already."""
    fields: dict[str, Any] = {}
    for key, value in defaults.items():
        field, parts = section.model_fields[key], parts_of(section, key)
        description = says.get(key, field.description)
        if parts is not None and issubclass(parts, Section):
            inner = with_defaults(parts, value, {}, f"{label}{parts.__name__}")
            fields[key] = (inner, Field(default_factory=inner, description=description))
        elif value != field.default:
            bounds = getitem(Annotated, (field.annotation, *field.metadata)) if field.metadata else field.annotation
            fields[key] = (bounds, Field(value, description=description))
    made: type[Section] = create_model(label, __base__=section, **fields) if fields else section
    return made


PUT_BACK = {"reorthogonalise": "{how, every, on, rescale, moments}: how, and every how many steps."}

HARD_ORTH = named(
    SeqLoRA,
    "hard-orth",
    {"reorthogonalise": {"how": "hard"}},
    PUT_BACK,
    title="hard-orth: one LoRA for all tasks, its A made orthonormal every few steps",
    equation="W_t = W0 + s·B A;  every k steps A = R Q, A ← Q (Q Qᵀ = I);  rescale: B ← B R, which keeps B A",
    paper="2310.14152 (baseline of O-LoRA), re-orthogonalised",
)

SOFT_ORTH = named(  # its rows do not become orthogonal
    SeqLoRA,
    "soft-orth",
    {"reorthogonalise": {"how": "soft"}},
    PUT_BACK,
    title="soft-orth: one LoRA for all tasks, the rows of its A given norm 1 every few steps",
    equation="W_t = W0 + s·B A;  every k steps A = D Â, A ← Â (rows of norm 1);  rescale: B ← B D, which keeps B A",
    paper="2310.14152 (baseline of O-LoRA), re-orthogonalised",
)
