"""Examples of past tasks, written by the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cl_runner.methods.lfpt5.settings import Settings
    from cl_runner.methods.protocol import Stage
    from cl_runner.methods.shared.frame import Frame
    from cl_runner.models.batch import Example

MOST = 1000  # examples to draw of a task, however many labels it has


def write(stage: Stage, settings: Settings, frame: Frame) -> tuple[list[Example], dict[str, int]]:
    """Examples of a past task, as many of each label as are wanted and were drawn; how many were drawn, well-formed,
    used. *Collective*."""
    from cl_runner.models.batch import Example

    asked = [Example(frame.asking(), [])] * min(settings.pseudo * settings.draws * len(frame.labels), MOST)
    most = longest(stage, settings, frame)
    found = stage.sample(asked, most, settings.top_k, settings.repetition_penalty) if asked else []
    well_formed = [parsed for ids in found if len(ids) < most and (parsed := frame.parsed(ids))]
    used: dict[tuple[int, ...], list[Example]] = {tuple(label): [] for label in frame.labels}
    for text, label in well_formed:
        example = Example([*frame.before, *text, *frame.after], [*label, frame.end])
        of_label = used[tuple(label)]
        fits = len(example.source) <= stage.config.data.max_source
        if fits and len(of_label) < settings.pseudo and example not in of_label:
            of_label.append(example)
    kept = [example for of_label in used.values() for example in of_label]
    return kept, {"drawn": len(asked), "well_formed": len(well_formed), "used": len(kept)}


def longest(stage: Stage, settings: Settings, frame: Frame) -> int:
    """Tokens of an example that is written: together with what asks for it no more than a row may have."""
    data = stage.config.data
    return min(settings.pseudo_tokens, data.max_source + data.max_target - len(frame.asking()))
