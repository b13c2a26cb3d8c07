"""Pseudo inputs of a task, written by the model itself: what it learns to write, and what it wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_runner.methods.protocol import Source

if TYPE_CHECKING:
    from cl_runner.methods.protocol import Stage
    from cl_runner.methods.sapt.settings import Settings
    from cl_runner.methods.shared.frame import Frame
    from cl_runner.models.batch import Example


def longest(stage: Stage, settings: Settings, frame: Frame) -> int:
    """Tokens of an input's text that is written, its end among them: a whole row must have room for the input."""
    frame_tokens = len(frame.before) + len(frame.after)
    return max(min(settings.pseudo_tokens, stage.config.data.max_source - frame_tokens), 2)


def to_write(stage: Stage, settings: Settings, frame: Frame, own: Source) -> list[Example]:
    """Of each row a second one: asked with what all inputs begin with, its text is to be written."""
    most = longest(stage, settings, frame) - 1
    asking = frame.asking()
    texts = [frame.text(example.source)[:most] for example in own.examples]
    return [e._replace(source=asking, target=[*text, frame.end]) for e, text in zip(own.examples, texts, strict=True)]


def write(stage: Stage, settings: Settings, frame: Frame) -> tuple[list[Example], dict[str, int]]:
    """Pseudo inputs, each one once; how many were drawn, and are used. *Collective*."""
    from cl_runner.models.batch import Example

    asked = [Example(frame.asking(), [])] * settings.pseudo
    most = longest(stage, settings, frame)
    texts = stage.sample(asked, most, settings.top_k, settings.repetition_penalty)
    once = dict.fromkeys(tuple(text[: most - 1]) for text in texts if text)
    found = [Example([*frame.before, *text, *frame.after], []) for text in once]
    return found, {"drawn": len(asked), "used": len(found)}
