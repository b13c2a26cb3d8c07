"""Progressive Prompts: a new soft prompt for each task, before those of past tasks (arXiv 2301.12314)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.config import Section
from cl_runner.methods.base import State
from cl_runner.methods.prompting import Prompting, prompts_of

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.base import Stage
    from cl_runner.models.batch import Batch

MLP = {"mlp_in": 800, "mlp_middle": 400}  # widths, as published


class ProgressivePrompts(Prompting):
    """The newest prompt stands first, as in the official code; past ones are constants.

    A task not learned yet is answered with all prompts there are. The prompts come on top of ``data.max_source`` (the
    official code cuts both together); the last step's is kept (the official code keeps the best on validation rows).
    Published with ``training.weight_decay`` 1e-5.
    """

    class Config(Section):
        """Settings of Progressive Prompts."""

        length: int = Field(10, ge=1, description="Vectors of each task's prompt (published).")
        lr: float = Field(0.3, gt=0, description="Learning rate, in place of training.lr (published, with AdamW).")
        mlp: bool = Field(
            False,
            description="Train the prompt through a residual MLP (d → 800 → 400 → d), folded into it after the stage; "
            "off, as the official code's default.",
        )

    name = "progprompt"
    title = "Progressive Prompts: a new soft prompt a task, before those of past tasks"
    equation = "[P_t; P_{t−1}; …; P_1; x], P_t trains;  mlp: P_t + MLP(P_t);  task k is answered with P_1 … P_k"
    paper = "2301.12314 (Progressive Prompts)"
    carried = "all prompts"
    growth = "one prompt a task"
    task_id = "yes"
    frozen = "the base and the prompts of past tasks"

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.learned: dict[str, Tensor] = {}  # task → prompt (L, d), in the order of the tasks

    def prefix_tokens(self, stages: int) -> int:
        return int(stages * self.config.length)

    def build(self, stage: Stage) -> None:
        self.learned = {task: prompt.to(stage.device) for task, prompt in self.learned.items()}
        prompts_of(stage).put({} if stage.plan.name in self.learned else self.begin_with(stage))

    def begin_with(self, stage: Stage) -> dict[str, Tensor]:
        values = {"prompt": prompts_of(stage).of_vocabulary(self.config.length, stage.rng("prompt"))}
        if self.config.mlp:
            import torch

            d = values["prompt"].shape[1]
            dice = stage.rng("mlp")
            widths = [d, *MLP.values(), d]
            for (n, m), name in zip(pairwise(widths), [*MLP, "mlp_out"], strict=True):
                # Uniform within 1/√n, as torch's own linear layers.
                values[name] = (torch.rand(m, n, generator=dice) * 2 - 1) * n**-0.5
                values[f"{name}_bias"] = (torch.rand(m, generator=dice) * 2 - 1) * n**-0.5
        return values

    def condition(self, stage: Stage, batch: Batch, task: str | None) -> dict[str, Tensor] | None:
        newest = stage.plan.name
        own = stage.adapters.parameters()
        prompts = dict(self.learned)
        if own and newest not in prompts:
            prompts[newest] = reparameterised(own)
        if not prompts:
            return None  # the untouched base is asked
        stack = stacked(prompts, task)
        return {"prefix": stack.expand(batch.size, *stack.shape)}

    def end_task(self, stage: Stage) -> None:
        self.learned[stage.plan.name] = reparameterised(stage.parameters()).detach().clone()
        prompts_of(stage).single = stacked(self.learned, stage.plan.name)

    def answering(self, task: str | None) -> str | None:
        return task

    def state(self) -> State:
        return State(dict(self.learned), {"tasks": list(self.learned)})

    def load_state(self, state: State) -> None:
        self.learned = {task: state.tensors[task] for task in state.json["tasks"]}


def stacked(prompts: Mapping[str, Tensor], task: str | None) -> Tensor:
    """What stands before the input of a task: its prompt and those of the tasks before, newest first, (p, d)."""
    import torch

    names = list(prompts)
    before = names[: names.index(task) + 1] if task is not None and task in prompts else names
    return torch.cat([prompts[name] for name in reversed(before)])


def reparameterised(own: Mapping[str, Tensor]) -> Tensor:
    """The prompt (L, d), and what an MLP adds to it, if there is one."""
    prompt = own["prompt"]
    if "mlp_in" not in own:
        return prompt
    from torch.nn.functional import linear

    hidden = linear(prompt, own["mlp_in"], own["mlp_in_bias"]).relu()
    hidden = linear(hidden, own["mlp_middle"], own["mlp_middle_bias"]).tanh()
    return prompt + linear(hidden, own["mlp_out"], own["mlp_out_bias"])


METHOD = ProgressivePrompts
