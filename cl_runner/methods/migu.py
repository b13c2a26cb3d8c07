"""MIGU: only the output rows with large activations learn (arXiv 2406.17245)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.config import Section
from cl_runner.methods.base import LoraOrFull
from cl_runner.methods.seqlora import SeqLoRA

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.base import Stage
    from cl_runner.models.batch import Batch


class MIGU(SeqLoRA):
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

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.sizes: dict[str, Tensor] = {}  # parameter → Σ |output| over this rank's tokens of the step (rows)

    def loss(self, stage: Stage, batch: Batch) -> Tensor:
        if not stage.index:
            return super().loss(stage, batch)
        parameters = stage.parameters()
        batch = batch.read_to_the_end(head=head_learns(stage))
        real = (batch.token_weights != 0).any(1)  # a rank without rows computes on one that does not count

        def add(name: str, rows: Tensor, mask: Tensor | None) -> None:
            counts = real[:, None] if mask is None else mask & real[:, None]
            size = (rows.float().abs() * counts[..., None]).sum((0, 1))
            self.sizes[name] = self.sizes[name] + size if name in self.sizes else size

        def outputs(target: str, rows: Tensor, mask: Tensor | None) -> None:
            for name in (f"{target}.lora_B", f"{target}.weight"):
                if name in parameters:
                    add(name, rows, mask)

        def inputs(target: str, rows: Tensor, mask: Tensor | None) -> None:
            if (name := f"{target}.lora_A") in parameters:
                add(name, rows.float() @ parameters[name].detach().mT, mask)

        with stage.observe("outputs", outputs), stage.observe("inputs", inputs):
            return super().loss(stage, batch)

    def edit_gradients(self, stage: Stage, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if not self.sizes:
            return None
        import torch

        from cl_runner.adapters.lora import is_transposed

        names = sorted(self.sizes)
        whole = stage.sum(torch.cat([self.sizes[name] for name in names]))
        sizes = zip(names, torch.split(whole, [len(self.sizes[name]) for name in names]), strict=True)
        layers, edited = stage.adapters.layers, {}
        for name, size in sizes:
            mask = learning(size, self.config.quantile)
            # A whole weight of GPT-2's is (in, out): its rows stand upright.
            upright = name.endswith(".weight") and is_transposed(layers[name.removesuffix(".weight")])
            edited[name] = (mask if upright else mask[:, None]) * gradients[name]
        self.sizes = {}
        return edited


def head_learns(stage: Stage) -> bool:
    """Whether rows of the head are chosen: not where it is tied to the embedding, or has no pair."""
    from cl_runner.models.forward import unwrapped

    head = unwrapped(stage.adapters.model).get_output_embeddings()  # type: ignore[operator]
    targets = {target for target, layer in stage.adapters.layers.items() if layer is head}
    return any(name.rpartition(".")[0] in targets for name in stage.parameters())


def learning(sizes: Tensor, quantile: float) -> Tensor:
    """Which rows learn (rows): 1.0 at or over the quantile (with linear interpolation), else 0.0."""
    return (sizes >= sizes.quantile(quantile)).float()


METHOD = MIGU
