"""L2P: a pool of prompts, from which every input takes those whose keys are nearest (arXiv 2112.08654)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.shared.prompting import Prompting

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch


class L2P(Prompting):
    """The query is the mean of the frozen base's last hidden states over the source (the encoder's, where there is
    one), without prompts or labels; the published one is a vision transformer's class token.

    The nearest prompt stands first. Each input chooses for itself, in training too (the official code can have a batch
    choose as one: the answers then depend on the batch). Its loss masks the classes of other tasks and averages a
    head over the prompts; a language model that answers in words has neither. Prompts begin as embeddings of random
    tokens, keys uniform in [0, 0.01), as the official ones. The pull of a row counts by its label tokens.
    """

    class Config(Section):
        """Settings of L2P."""

        pool: int = Field(
            10, ge=1, description="M: prompts in the pool, keys from U(0, 0.01) (published for CIFAR-100)."
        )
        length: int = Field(5, ge=1, description="L: vectors of a prompt (the paper; its code: 10).")
        top: int = Field(5, ge=1, description="N: prompts that an input takes (the paper; its code: 4).")
        lr: float = Field(0.03, gt=0, description="Learning rate, in place of training.lr (published, with Adam).")
        lambda1: float = Field(0.5, ge=0, description="Weight λ of the keys' pull (the paper; its code: 1).")

    name = "l2p"
    title = "L2P: a pool of soft prompts, the nearest of which each input takes"
    equation = "[P_s1; …; P_sN; x],  s = the N keys of largest cos(q(x), K_s);  loss + λ Σ_s (1 − cos(q(x), K_s))"
    paper = "2112.08654 (Learning to Prompt)"
    carried = "pool and keys"
    growth = "constant"
    revision = 2  # 1: keys from U(-1, 1)

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        super().check(config, shapes)
        if self.config.top > self.config.pool:
            raise UserError(
                f"method.top: {self.config.top} prompts cannot be taken of a pool of {self.config.pool}; lower it, or "
                "raise method.pool"
            )

    def prefix_tokens(self, stages: int) -> int:
        return int(self.config.top * self.config.length)

    @property
    def no_folder(self) -> str:
        return "puts prompts of its own before every input"

    def begin_with(self, stage: Stage) -> dict[str, Tensor]:
        import torch

        M, L = self.config.pool, self.config.length
        pool = stage.vocabulary_rows(M * L, stage.rng("pool")).view(M, L, -1)
        return {"pool": pool, "keys": 0.01 * torch.rand(M, pool.shape[-1], generator=stage.rng("keys"))}

    def condition(self, stage: Stage, batch: Batch, task: str | None) -> dict[str, Tensor] | None:
        parameters = stage.all_parameters()
        if not parameters:
            return None  # the untouched base is asked
        from torch.nn.functional import cosine_similarity

        near = cosine_similarity(stage.features(batch)[:, None], parameters["keys"][None], dim=-1)  # (b, M)
        nearest, which = near.topk(self.config.top, dim=1)
        return {"prefix": parameters["pool"][which].flatten(1, 2), "distance": (1 - nearest).sum(1)}

    def loss(self, stage: Stage, batch: Batch) -> Tensor:
        from cl_runner.models.forward import token_loss

        pull = self.config.lambda1 * batch.condition["distance"][:, None]
        total: Tensor = ((token_loss(stage.forward(batch), batch.labels) + pull) * batch.token_weights).sum()
        return total
