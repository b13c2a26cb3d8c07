"""One way of order.py: a naive O-LoRA in the manner of the published code, written for this comparison only.

What it shares with that code: a new process for every task, which reads model, tokenizer and the adapters of the task
before from disk; past pairs side by side in a second LoRA of growing rank, frozen, in every forward, with a dropout of
their own; a penalty that walks all parameter names for each past matrix; batches in random order, padded to their
longest row (`--pad max`: to the longest input allowed); plain `generate` of at most 50 tokens in batches of 128.

What it leaves out in its favour: DeepSpeed with its optimizer on the CPU, the trainer's logging, a copy of the data in
a cache on disk, and a score computed twice.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common import parser, run_process
from benchmarks.job import Job, add_arguments, exact_match, training_row
from cl_runner.adapters.targets import default_targets
from cl_runner.models.base import Base
from cl_runner.models.batch import IGNORE, Example

EVAL_BATCH = 128
MAX_NEW_TOKENS = 50


class TwoLoras(nn.Module):
    """A frozen linear layer, all past pairs as one frozen LoRA, and a new pair that trains."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float, past: tuple[Tensor, Tensor] | None):
        super().__init__()
        self.linear, self.scale, self.dropout = linear, scale, nn.Dropout(dropout)
        n, m = linear.in_features, linear.out_features
        past_A, past_B = past or (torch.zeros(0, n), torch.zeros(m, 0))
        self.past_A, self.past_B = nn.Parameter(past_A, requires_grad=False), nn.Parameter(past_B, requires_grad=False)
        self.new_A, self.new_B = nn.Parameter(torch.empty(rank, n)), nn.Parameter(torch.zeros(m, rank))
        nn.init.kaiming_uniform_(self.new_A, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x)
        if self.past_A.shape[0]:
            result = (
                result + functional.linear(functional.linear(self.dropout(x), self.past_A), self.past_B) * self.scale
            )
        return result + functional.linear(functional.linear(self.dropout(x), self.new_A), self.new_B) * self.scale


def with_loras(model: nn.Module, job: Job, saved: Path | None) -> None:
    """Put the layers in place of every query and value layer; the pairs of the tasks before come from ``saved``."""
    past: dict[str, Tensor] = torch.load(saved) if saved else {}
    adapter, adapted = job.config.adapter, default_targets(model)
    targets = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in adapted
    ]
    for name, module in targets:
        parent, _, child = name.rpartition(".")
        old = (past[f"{name}.A"], past[f"{name}.B"]) if past else None
        layer = TwoLoras(module, adapter.largest, adapter.alpha / adapter.largest, adapter.dropout, old)
        setattr(model.get_submodule(parent), child, layer)


def save_loras(model: nn.Module, to: Path) -> None:
    """The new pair goes beside the past ones, and all of them to disk."""
    pairs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, TwoLoras):
            pairs[f"{name}.A"] = torch.cat([module.past_A.data, module.new_A.data], dim=0)
            pairs[f"{name}.B"] = torch.cat([module.past_B.data, module.new_B.data], dim=1)
    torch.save(pairs, to)


def orthogonality(model: nn.Module) -> Tensor:
    """Σ |A_past A_newᵀ|, found by name: for each past matrix all names again."""
    total = torch.zeros(())
    for name, past in model.named_parameters():
        if name.endswith("past_A") and past.shape[0]:
            for other, new in model.named_parameters():
                if other.endswith("new_A") and other.removesuffix("new_A") == name.removesuffix("past_A"):
                    total = total + (past @ new.T).abs().sum()
                    break
    return total


def padded(rows: list[list[int]], value: int, base: Base, width: int | None = None) -> Tensor:
    """Padded ids: at the right, of decoder-only models at the left, as the published code has it."""
    width = width or max(map(len, rows))
    gaps = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([row + gap if base.encoder_decoder else gap + row for row, gap in zip(rows, gaps, strict=True)])


def inputs(rows: list[list[int]], base: Base, width: int | None) -> dict[str, Tensor]:
    """Ids and mask of what is read."""
    ids = padded(rows, base.pad_id, base, width)
    return {"input_ids": ids, "attention_mask": padded([[1] * len(row) for row in rows], 0, base, width)}


def train(base: Base, job: Job, examples: list[Example], width: int | None) -> None:
    """AdamW over random batches, clipped at the same norm as ours."""
    model: Any = base.model
    settings = job.config.training
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    dice = random.Random(job.seed)
    model.train()
    for _ in range(job.epochs):
        dice.shuffle(examples)
        for start in range(0, len(examples), settings.global_batch):
            batch = [training_row(base, example) for example in examples[start : start + settings.global_batch]]
            labels = padded([labels for _, labels in batch], IGNORE, base, None if base.encoder_decoder else width)
            loss = model(**inputs([read for read, _ in batch], base, width), labels=labels).loss
            loss = loss + job.penalty * orthogonality(model)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, settings.clip)
            optimizer.step()


@torch.no_grad()
def answers(base: Base, examples: list[Example], width: int | None) -> list[list[int]]:
    """Greedy answers, batch after batch as the rows come."""
    model: Any = base.model
    model.eval()
    found: list[list[int]] = []
    for start in range(0, len(examples), EVAL_BATCH):
        prompts = inputs([example.source for example in examples[start : start + EVAL_BATCH]], base, width)
        out = model.generate(**prompts, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        found += out[:, 1 if base.encoder_decoder else prompts["input_ids"].shape[1] :].tolist()
    return found


def one_task(job: Job, index: int, folder: Path, pad: str) -> None:
    """A process of its own: read everything, learn one task, answer all seen ones, write the pairs."""
    torch.manual_seed(job.seed + index)
    base = job.base()
    with_loras(base.model, job, folder / f"{index - 1}.pt" if index else None)
    data = job.config.data
    width = data.max_source if pad == "max" else None
    # A decoder-only model reads the target too.
    trained_width = width and width + (0 if base.encoder_decoder else data.max_target)
    began = time.perf_counter()
    train(base, job, job.examples(base, job.tasks[index], "train"), trained_width)
    trained = time.perf_counter()
    scores = {}
    for task in job.tasks[: index + 1]:
        examples = job.examples(base, task, "test")
        scores[task] = exact_match(base, answers(base, examples, width), examples)
    about = {"scores": scores, "train": trained - began, "evaluate": time.perf_counter() - trained}
    save_loras(base.model, folder / f"{index}.pt")
    (folder / f"{index}.json").write_text(json.dumps(about))


def main() -> None:
    made = parser(__doc__)
    add_arguments(made)
    made.add_argument("--out", type=Path, required=True, help="folder for adapters and result.json")
    made.add_argument(
        "--pad", choices=("longest", "max"), default="longest", help="inputs' width (default %(default)s)"
    )
    made.add_argument("--task", type=int, help="learn this one task only (from 0); the others stand in --out")
    given = made.parse_args()
    job = Job.given(given)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.task is not None:
        one_task(job, given.task, given.out, given.pad)
        return
    stages = []
    for index in range(len(job.tasks)):
        again = ["-m", "benchmarks.reference_style", *job.as_arguments(), "--out", str(given.out), "--pad", given.pad]
        run_process([*again, "--task", str(index)], given.out / f"{index}.log")
        stages.append(json.loads((given.out / f"{index}.json").read_text()))
    total = {key: sum(stage[key] for stage in stages) for key in ("train", "evaluate")}
    (given.out / "result.json").write_text(json.dumps({"scores": stages[-1]["scores"], **total}))


if __name__ == "__main__":
    main()
