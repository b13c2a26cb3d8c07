"""Whether the rows of a micro-batch share the beginning of their prompts, and their logits where they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_runner.methods.protocol import overrides
from cl_runner.models.batch import Batch, Example
from cl_runner.models.dropout import attention_dropout, drops
from cl_runner.models.forward import accepted, evaluating, logits
from cl_runner.models.heads import (
    NEEDED,
    Head,
    by_task,
    common_head,
    goes_on,
    head_of,
    logits_behind_head,
    logits_in_one_row,
    most_packed,
)
from cl_runner.models.token_cache import lengths

if TYPE_CHECKING:
    from cl_runner.training.stage import StageRun

WORTH = 0.1  # the share of a micro-batch's tokens that must be saved: a second call of the model costs something too


class Sharing:
    """The heads of a stage's tasks, and the forwards that compute each once (``training.share_prefix``)."""

    def __init__(self, stage: StageRun) -> None:
        self.stage = stage
        self._heads: dict[str, list[int]] = {}
        self._always: str | None = None  # ``_never``, once it was asked
        self._why_not = ""

    def learn(self, examples: Sequence[Example], tasks: Sequence[str]) -> None:
        """Find what all prompts of each task begin with, as they are read: these rows', and those learned before."""
        if self.stage.room.base.encoder_decoder:
            return
        for task, rows in by_task(tasks).items():
            self._heads[task] = common_head((examples[row].source for row in rows), self._heads.get(task))
        if any(self._heads.values()):
            self._will_share()  # tried here, where nobody looks at layers yet

    def with_heads(self, batch: Batch, examples: Sequence[Example], tasks: Sequence[str]) -> Batch:
        """The batch, that knows how much of each row is its task's head; of rows that do not begin so, nothing."""
        if not self._heads or len(tasks) != batch.size:
            return batch
        heads = [self._heads.get(task, []) for task in tasks]
        known = [
            len(h) if len(e.source) > len(h) and e.source[: len(h)] == h else 0
            for e, h in zip(examples, heads, strict=True)
        ]
        lengths = [max(len(e.source) + len(e.target) - 1, 0) for e in examples]
        return replace(batch, heads=tuple(known), lengths=tuple(lengths))

    def head_of(self, task: str) -> int:
        """How many tokens of a task's prompts a micro-batch computes once, as far as is known beforehand."""
        return len(self._heads.get(task, [])) if self._will_share() else 0

    def head_of_prompts(self, examples: Sequence[Example]) -> int:
        """How many tokens of these prompts an evaluation computes once, as far as is known beforehand."""
        return self.of_prompts(examples).tokens if self._will_share() else 0

    def _will_share(self) -> bool:
        stage = self.stage
        if stage.config.training.share_prefix == "off" or overrides(stage.room.method, "condition"):
            return False
        return not self._never()

    def logits(self, batch: Batch) -> Tensor:
        """As ``models.forward.logits``, of the batch that the stage has just been shown."""
        groups = self._groups(batch)
        if groups is None:
            return logits(self.stage.adapters.model, batch)
        if len(groups) == 1:
            return self._of_one_task(batch)
        found = torch.cat([self._of_one_task(batch.slice(rows)) for rows in groups])
        order = torch.tensor([row for rows in groups for row in rows], device=batch.labels.device)
        return found[order.argsort()]

    def _of_one_task(self, part: Batch) -> Tensor:
        """Behind the head where that saves enough, few tokens in one row; else row by row."""
        model, show = self.stage.adapters.model, self.stage.show_part
        h, tokens = min(part.heads), sum(part.lengths)
        saved = (part.size - 1) * h
        if saved >= WORTH * tokens:
            if self.stage.device.type == "cpu" and tokens - saved <= most_packed(model):
                return logits_in_one_row(model, part, h, show)
            return logits_behind_head(model, part, h, show)
        show(part)
        return logits(model, part)

    def of_prompts(self, examples: Sequence[Example]) -> PromptHead:
        """What these prompts begin with, to be read once for all their batches, by the model as it then is."""
        return PromptHead(self, examples)

    def may_share(self, batch: Batch) -> bool:
        """Whether a batch of prompts may go on from a head."""
        return self.stage.config.training.share_prefix != "off" and not self._reason(batch)

    def _groups(self, batch: Batch) -> list[list[int]] | None:
        """Rows that may share a head; None where the batch is read as it is."""
        if self.stage.config.training.share_prefix == "off" or not any(batch.heads):
            return None
        why_not = self._reason(batch)
        if self.stage.adapters.model.training:
            self._why_not = why_not
        return None if why_not else list(by_task(batch.tasks).values())

    def _reason(self, batch: Batch) -> str:
        stage = self.stage
        if batch.condition:
            return f"{stage.room.method.name} conditions each row"
        if stage.looking.observed and stage.head_targets():  # which is asked behind the beginning alone
            return f"{stage.room.method.name} looks at what the output layer reads"
        return self._never()

    def _never(self) -> str:
        """Why this stage's batches never share; empty: they may."""
        if self._always is None:
            self._always = self._static_reason()
        return self._always

    def _static_reason(self) -> str:
        stage = self.stage
        training = stage.config.training
        if training.activation_checkpointing:
            return "training.activation_checkpointing keeps no keys and values"
        if not accepted(stage.adapters.model) >= NEEDED:
            return "this model cannot go on from keys and values at given positions"
        if training.dropout_by == "micro" and (stage.config.adapter.dropout or drops(stage.room.base.model)):
            return "training.dropout_by: micro drops otherwise in each row's"
        if attention_dropout(stage.room.base.model):
            return "the attention drops otherwise in each row's"
        with stage.room.root.context():
            keeps = goes_on(stage.adapters.model)
        if not keeps:
            return "this model keeps no keys and values that rows could go on from"
        return ""

    def said(self) -> list[str]:
        """Once a run: why heads are not shared."""
        told = self.stage.room.told
        if not self._why_not or self._why_not in told:
            return []
        told.add(self._why_not)
        return [f"the beginning of a task's prompts is computed for every row: {self._why_not}"]


class PromptHead:
    """The head of all prompts of an evaluation: read at the first batch that may go on from it."""

    def __init__(self, sharing: Sharing, examples: Sequence[Example]) -> None:
        self._sharing = sharing
        stage = sharing.stage
        nothing = stage.room.base.encoder_decoder or not any(example.target for example in examples)  # to verify
        known = [] if nothing else common_head(example.source for example in examples)
        saved = (len(examples) - 1) * len(known)
        self._ids = known if saved >= WORTH * int(lengths(examples)[0].sum()) else []
        self._head: Head | None = None

    @property
    def tokens(self) -> int:
        """How long it is."""
        return len(self._ids)

    def read(self, prompts: Batch) -> Head | None:
        """For these prompts; None where they are read as they are."""
        if not self._ids or not self._sharing.may_share(prompts):
            return None
        if self._head is None:
            model = self._sharing.stage.adapters.model
            with evaluating(model):
                self._head = Head.read(model, head_of(torch.tensor([self._ids], device=prompts.input_ids.device)))
        return self._head
