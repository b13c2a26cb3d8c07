"""What the prompt methods share: soft prompts before the input, and nothing else that trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cl_runner.config import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.base import Method, State

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters import Prompts
    from cl_runner.methods.base import Stage
    from cl_runner.optim import ParameterGroup


class Prompting(Method):
    """The base is frozen; ``held`` is what has trained, by name, as the last stage left it.

    A prompt wants a learning rate some hundred times a LoRA's, whence ``method.lr``: it stands for ``training.lr``,
    whose warm-up and schedule it follows.
    """

    prompts = True
    trains = "soft prompts (no LoRA: adapter.* is not used)"
    factors = "none; a prompt is PEFT's prompt_embeddings"
    frozen = "the base"
    past_as = "none"

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.held: dict[str, Tensor] = {}

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        if config.training.optimizer == "muon":
            raise UserError(
                f"training.optimizer: muon is for matrices between hidden states; {self.name} trains embeddings: "
                "set adamw"
            )

    def parameter_groups(self, stage: Stage) -> list[ParameterGroup]:
        scale = self.config.lr / stage.config.training.lr
        return [replace(group, lr_scale=scale) for group in super().parameter_groups(stage)]

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
