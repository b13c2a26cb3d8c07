"""What the prompt methods share: soft prompts before the input, and nothing else that trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cl_runner.adapters.kind import Need
from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.protocol import Method, State
from cl_runner.methods.shared.rates import at_rate
from cl_runner.methods.shared.tensors import copies

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.engine.optim import ParameterGroup
    from cl_runner.methods.protocol import Stage


class Prompting(Method):
    """The base is frozen; ``held`` is what has trained, by name, as the last stage left it.

    A prompt wants a learning rate some hundred times a LoRA's, whence ``method.lr``: it stands for ``training.lr``,
    whose warm-up and schedule it follows.
    """

    only_kind = "prompts"
    trains = "soft prompts (no LoRA: adapter.* is not used)"
    factors = "none; a prompt is PEFT's prompt_embeddings"
    frozen = "the base"
    past_as = "none"

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("prompts",),)

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
        return at_rate(stage, self.config.lr)

    def begin_with(self, stage: Stage) -> dict[str, Tensor]:
        """Where the parameters of the first stage begin, by name."""
        raise NotImplementedError

    def build(self, stage: Stage) -> None:
        stage.hold_prompts(self.held or self.begin_with(stage))

    def end_task(self, stage: Stage) -> None:
        self.held = copies(stage)

    def state(self) -> State:
        return State(dict(self.held), {"trained": list(self.held)})  # in their order

    def load_state(self, state: State) -> None:
        self.held = {name: state.tensors[name] for name in state.json["trained"]}
