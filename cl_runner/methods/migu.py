"""MIGU: only the output rows with large activations learn (arXiv 2406.17245)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.config.schema import Section
from cl_runner.methods.protocol import LoraOrFull
from cl_runner.methods.shared.sequential import Sequential

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters.kind import Need
    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch


class MIGU(Sequential):
    """Rows of B are chosen by the whole layer's output W x + s·B A x, rows of A by A's own output A x.

    That is the rule the official code means for LoRA (it is not wired up there). In full, rows of every linear layer's
    weight are chosen by its output; biases, norms and embeddings (a head tied to one too) all learn. Every token counts
    that the official code hands the model: the label's last one too, from which nothing is predicted. Padding does not
    (there it does), nor dropout in A x. Only gradients are masked: Adam's moments and weight decay still move a row, as
    in the official code.
    """

    class Config(LoraOrFull):
        """Settings of MIGU."""

        quantile: float = Field(
            0.7, ge=0, lt=1, description="q: rows at or over this quantile of a layer's activations learn (published)."
        )

    name = "migu"
    title = "MIGU: one LoRA (or all weights), of which only rows with large outputs learn"
    equation = (
        "from task 2 on, before the clip:  g_j ← 1[n_j ≥ q-quantile(n)] · g_j,  "
        "n_j = mean |output j| over the step's tokens"
    )
    paper = "2406.17245 (Unlocking Continual Learning Abilities in Language Models)"
    carried = "A, B (full: the weights)"
    growth = "constant"
    edits_before_clip = True  # as in the official code: a step is as long as the clip lets it be
    revision = 2  # 1: clipped before the mask, a label's last token not counted on decoder-only models

    @property
    def needs(self) -> tuple[Need, ...]:
        return super().needs if self.full else (("pair",), ("product",))  # whose rows have to do with a layer's output

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.sizes: dict[str, Tensor] = {}  # parameter → Σ |output| over this rank's tokens of the step (rows)

    def loss(self, stage: Stage, batch: Batch) -> Tensor:
        if not stage.index:
            return super().loss(stage, batch)
        parameters, A = stage.parameters(), stage.named("A")
        rows_of = {**stage.named("weight"), **stage.named("B")}  # what a layer's output has to do with
        heads = [rows_of[target] in parameters for target in stage.head_targets() if target in rows_of]
        batch = batch.read_to_the_end(head=any(heads))  # no rows are chosen of a head that is tied or has no pair

        def add(name: str, rows: Tensor, counts: Tensor | None) -> None:
            assert counts is not None, "no rows of this batch"
            size = (rows.float().abs() * counts[..., None]).sum((0, 1))
            self.sizes[name] = self.sizes[name] + size if name in self.sizes else size

        def outputs(target: str, rows: Tensor, counts: Tensor | None) -> None:
            if rows_of.get(target) in parameters:
                add(rows_of[target], rows, counts)

        def inputs(target: str, rows: Tensor, counts: Tensor | None) -> None:
            if A.get(target) in parameters:
                add(A[target], rows.float() @ parameters[A[target]].detach().mT, counts)

        with stage.observe("outputs", outputs), stage.observe("inputs", inputs):
            return super().loss(stage, batch)

    def take_back(self, stage: Stage) -> None:
        self.sizes = {}

    def edit_gradients(self, stage: Stage, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if not self.sizes:
            return None
        import torch

        names, upright = sorted(self.sizes), {n for t, n in stage.named("weight").items() if stage.transposed(t)}
        whole = stage.sum(torch.cat([self.sizes[name] for name in names]))
        sizes = zip(names, torch.split(whole, [len(self.sizes[name]) for name in names]), strict=True)
        self.sizes, found = {}, {name: learning(size, self.config.quantile) for name, size in sizes}
        return {name: (mask if name in upright else mask[:, None]) * gradients[name] for name, mask in found.items()}


def learning(sizes: Tensor, quantile: float) -> Tensor:
    """Which rows learn (rows): 1.0 at or over the quantile (with linear interpolation), else 0.0."""
    return (sizes >= sizes.quantile(quantile)).float()
