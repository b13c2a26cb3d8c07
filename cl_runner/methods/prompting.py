"""What the prompt methods share: soft prompts before the input, and nothing else that trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_runner.config import Section
from cl_runner.methods.base import Method, State

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters import Prompts
    from cl_runner.methods.base import Stage


class Prompting(Method):
    """The base is frozen; ``held`` is what has trained, by name, as the last stage left it."""

    prompts = True
    trains = "soft prompts"

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.held: dict[str, Tensor] = {}

    def begin_with(self, stage: Stage) -> dict[str, Tensor]:
        """Where the parameters of the first stage begin, by name."""
        raise NotImplementedError

    def build(self, stage: Stage) -> None:
        prompts_of(stage).put(self.held or self.begin_with(stage))

    def end_task(self, stage: Stage) -> None:
        self.held = {name: p.detach().clone() for name, p in stage.parameters().items()}

    def state(self) -> State:
        return State(dict(self.held), {"trained": list(self.held)})  # in their order

    def load_state(self, state: State) -> None:
        self.held = {name: state.tensors[name] for name in state.json["trained"]}


def prompts_of(stage: Stage) -> Prompts:
    """What stands in the place of adapters."""
    found: Prompts = stage.adapters  # type: ignore[assignment]
    return found
