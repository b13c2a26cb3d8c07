"""EWC-LoRA: a new update for each task, held small where its weight mattered to past ones (arXiv 2602.17559)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cl_runner.adapters.kind import Need
from cl_runner.config.schema import RunConfig, Section
from cl_runner.methods.protocol import Method, PairSettings, State
from cl_runner.methods.shared.fisher import negative_log_likelihood
from cl_runner.methods.shared.limits import refuse_borrowing, refuse_by_task, refuse_too_large, size
from cl_runner.methods.shared.rows import drawn
from cl_runner.methods.shared.tensors import added

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Source, Stage


class EWCLoRA(Method):
    """F, the diagonal Fisher information, is that of the whole matrix ΔW of each layer, not of its factors.

    It is taken at the end of a task, by the gradient of the loss with respect to ΔW. The official code's sum of past
    updates is (Σ B)(Σ A), which has cross terms that nobody learned; here it is Σ B A.
    """

    class Config(PairSettings):
        """Settings of EWC-LoRA."""

        lambda1: float | None = Field(
            None,
            ge=0,
            description="Weight λ, on the sum over entries and layers; null: the form's own. example: 1e3 (ours, "
            "not published). batch: 1e7 (the official code's, for images).",
        )
        gamma: float = Field(1.0, ge=0, le=1, description="γ: what is left of F at each further task (published).")
        fisher: Literal["example", "batch"] = Field(
            "example",
            description="Whose gradients are squared: each example's (the definition), or the mean loss's of each "
            "training.global_batch examples (the official code's).",
        )
        fisher_samples: int | None = Field(
            500, ge=1, description="Examples that F is estimated from, by lot; null: all (ours)."
        )
        max_gb: float = Field(16.0, gt=0, description="Most that F, and what it is made of, may take, 10⁹ bytes.")

        @property
        def weight(self) -> float:
            """λ: as set, or the form's own."""
            return self.lambda1 if self.lambda1 is not None else 1e7 if self.fisher == "batch" else 1e3

    name = "ewc-lora"
    title = "EWC-LoRA: new pairs, held small where the weight mattered to past tasks"
    equation = "loss + λ/2 Σ F ∘ (B_t A_t)²,  F ← γ F + E[(∂ loss / ∂ΔW)²] at the end of each task"
    paper = "2602.17559 (EWC-LoRA)"
    carried = "past updates, folded into the weight; F"
    growth = "constant: one fp32 matrix a layer"
    since_second = ("lambda1",)
    by_shape = True
    any_rank = True

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("A",), ("B",), ("product",))

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.fisher: dict[str, Tensor] = {}  # target → F (m, n) fp32

    @property
    def form(self) -> str:
        return "reference" if self.config.fisher == "batch" else "paper"

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        refuse_borrowing(config, "ewc-lora penalises B A as the update")
        refuse_by_task(config, "fisher")  # F is a sum over tasks
        if shapes is not None:
            of = f"adapter.target_modules: F and gradients of {len(shapes)} layers"
            refuse_too_large(of, 3 * self.state_bytes(shapes, 0, 0) / 1e9, self.config.max_gb, "name fewer layers")

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        return f"carries {size(self.state_bytes(shapes, 0, 0))}: F of {len(shapes)} layers"

    def reads_past(self) -> Mapping[str, str]:
        return {}

    def begin_task(self, stage: Stage) -> None:
        self.fisher = {target: F.to(stage.device) for target, F in self.fisher.items()}

    def penalty(self, stage: Stage) -> Tensor | None:
        if not self.fisher or not self.config.weight:
            return None
        from cl_runner.maths.product import weighted_squares

        terms = [
            weighted_squares(group.B, group.A, [self.fisher[target] for target in group.targets])
            for group in stage.factors()
        ]
        total: Tensor = self.config.weight / 2 * added(terms)
        return total

    def end_task(self, stage: Stage) -> None:
        rows = drawn(stage.own_rows(), self.config.fisher_samples, stage.rng("fisher"))
        new = self._of_examples(stage, rows) if self.config.fisher == "example" else self._of_batches(stage, rows)
        self.fisher = {t: self.config.gamma * self.fisher[t] + F if self.fisher else F for t, F in new.items()}

    def _of_examples(self, stage: Stage, source: Source) -> dict[str, Tensor]:
        """Target → the mean over examples of the squared gradient by ΔW, (m, n) fp32. *Collective*."""
        import torch

        total = {target: torch.zeros(shape, device=stage.device) for target, shape in stage.targets().items()}
        count = torch.zeros((), device=stage.device)
        loss = partial(negative_log_likelihood, stage)
        for gradients in stage.update_gradients(loss, stage.batches(source), per_example=True):
            for target, gradient in gradients.items():
                total[target] += gradient.square()
            count += 1
        examples = stage.sum(count).clamp(min=1)
        return {target: stage.sum(squares) / examples for target, squares in total.items()}

    def _of_batches(self, stage: Stage, source: Source) -> dict[str, Tensor]:
        """The same of the mean loss of each global batch of examples. *Collective*."""
        import torch

        total = {target: torch.zeros(shape, device=stage.device) for target, shape in stage.targets().items()}
        together, rows = stage.config.training.global_batch, len(source.examples)
        chunks = [range(first, min(first + together, rows)) for first in range(0, rows, together)]
        for chunk in chunks:
            batches = stage.batches(source.take(chunk).by_length())
            [gradients] = stage.update_gradients(partial(self.loss, stage), batches)
            for target, gradient in gradients.items():
                total[target] += gradient.square()
        return {target: squares / len(chunks) for target, squares in total.items()}

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return 4 * sum(m * n for m, n in shapes)

    def state(self) -> State:
        return State(dict(self.fisher))

    def load_state(self, state: State) -> None:
        self.fisher = dict(state.tensors)
