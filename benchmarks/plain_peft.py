"""One way of order.py: PEFT and the transformers Trainer as a good user writes it, in one process.

A fresh PEFT LoRA for every task, O-LoRA's penalty in `compute_loss` as one product a layer, merged into the base when
the task is done; random batches padded to their longest row; `generate` in batches of 64 on the merged model.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import parser
from benchmarks.job import Job, add_arguments, exact_match, training_row
from cl_runner.adapters.targets import default_targets
from cl_runner.models.base import Base
from cl_runner.models.batch import Example

EVAL_BATCH = 64
MAX_NEW_TOKENS = 50


def rows_of(base: Base, examples: list[Example]) -> list[dict[str, list[int]]]:
    """What the Trainer takes for a data set."""
    rows = [training_row(base, example) for example in examples]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels} for ids, labels in rows]


def learn(job: Job, model: Any, base: Base, examples: list[Example], past: dict[str, Tensor], out: Path) -> None:
    """One task: a plain Trainer, with the penalty where there are past pairs."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    class WithPenalty(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
            if past:
                terms = [(past[name] @ A.T).abs().sum() for name, A in new_factors(model).items()]
                loss = loss + job.penalty * torch.stack(terms).sum()
            return (loss, outputs) if return_outputs else loss

    settings = job.config.training
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=settings.global_batch,
        num_train_epochs=job.epochs,
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=settings.clip,
        seed=job.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    base.tokenizer.padding_side = "right"
    collator = DataCollatorForSeq2Seq(base.tokenizer, model=model)
    WithPenalty(model, arguments, train_dataset=rows_of(base, examples), data_collator=collator).train()


def new_factors(model: Any) -> dict[str, Tensor]:
    """A of every layer, by the layer's name."""
    return {name.split(".lora_A")[0]: p for name, p in model.named_parameters() if ".lora_A." in name}


@torch.no_grad()
def answers(model: Any, base: Base, examples: list[Example]) -> list[list[int]]:
    """Greedy answers, batch after batch."""
    model.eval()
    base.tokenizer.padding_side = "right" if base.encoder_decoder else "left"
    found: list[list[int]] = []
    for start in range(0, len(examples), EVAL_BATCH):
        prompts = [{"input_ids": e.source} for e in examples[start : start + EVAL_BATCH]]
        batch = base.tokenizer.pad(prompts, return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        found += out[:, 1 if base.encoder_decoder else batch["input_ids"].shape[1] :].tolist()
    return found


def main() -> None:
    made = parser(__doc__)
    add_arguments(made)
    made.add_argument("--out", type=Path, required=True, help="folder for result.json")
    given = made.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    job = Job.given(given)

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(job.seed)
    base = job.base()
    model: Any = base.model
    train = {task: job.examples(base, task, "train") for task in job.tasks}
    test = {task: job.examples(base, task, "test") for task in job.tasks}
    adapter = job.config.adapter
    lora = LoraConfig(
        r=adapter.largest,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=default_targets(model),
        task_type="SEQ_2_SEQ_LM" if base.encoder_decoder else "CAUSAL_LM",
    )
    past: dict[str, Tensor] = {}
    scores: dict[str, float] = {}
    seconds = {"train": 0.0, "evaluate": 0.0}
    for index, task in enumerate(job.tasks):
        began = time.perf_counter()
        wrapped: Any = get_peft_model(model, lora)
        learn(job, wrapped, base, train[task], past, given.out)
        for name, A in new_factors(wrapped).items():
            past[name] = torch.cat([past[name], A.detach()]) if name in past else A.detach().clone()
        model = wrapped.merge_and_unload()
        trained = time.perf_counter()
        for seen in job.tasks[: index + 1]:
            scores[seen] = exact_match(base, answers(model, base, test[seen]), test[seen])
        seconds["train"] += trained - began
        seconds["evaluate"] += time.perf_counter() - trained
    (given.out / "result.json").write_text(json.dumps({"scores": scores, **seconds}))


if __name__ == "__main__":
    main()
