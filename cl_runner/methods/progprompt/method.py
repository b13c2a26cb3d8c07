"""Progressive Prompts: a new soft prompt for each task, before those of past tasks (arXiv 2301.12314)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.config.schema import Section
from cl_runner.methods.progprompt.prompts import fresh_mlp, reparameterised, stacked
from cl_runner.methods.protocol import State
from cl_runner.methods.shared.prompting import Prompting

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch


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
    settled = "learned"

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.learned: dict[str, Tensor] = {}  # task → prompt (L, d), in the order of the tasks

    def prefix_tokens(self, stages: int) -> int:
        return int(stages * self.config.length)

    def build(self, stage: Stage) -> None:
        self.learned = {task: prompt.to(stage.device) for task, prompt in self.learned.items()}
        stage.hold_prompts({} if stage.plan.name in self.learned else self.begin_with(stage))

    def begin_with(self, stage: Stage) -> dict[str, Tensor]:
        prompt = stage.vocabulary_rows(self.config.length, stage.rng("prompt"))
        mlp = fresh_mlp(prompt.shape[1], stage.rng("mlp")) if self.config.mlp else {}
        return {"prompt": prompt, **mlp}

    def condition(self, stage: Stage, batch: Batch, task: str | None) -> dict[str, Tensor] | None:
        newest = stage.plan.name
        own = stage.all_parameters()
        prompts = dict(self.learned)
        if own and newest not in prompts:
            prompts[newest] = reparameterised(own)
        if not prompts:
            return None  # the untouched base is asked
        stack = stacked(prompts, task)
        return {"prefix": stack.expand(batch.size, *stack.shape)}

    def end_task(self, stage: Stage) -> None:
        self.learned[stage.plan.name] = reparameterised(stage.parameters()).detach().clone()
        stage.answer_with(stacked(self.learned, stage.plan.name))

    def answering(self, task: str | None) -> str | None:
        return task

    def state(self) -> State:
        return State(dict(self.learned), {"tasks": list(self.learned)})

    def load_state(self, state: State) -> None:
        self.learned = {task: state.tensors[task] for task in state.json["tasks"]}
