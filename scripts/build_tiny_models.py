"""Build the embedded models tiny-t5 and tiny-llama from nothing: tokenizer, pretraining, files.

    python scripts/build_tiny_models.py [tiny-t5] [tiny-llama] [--steps N] [--out DIR]

Both learn the synthetic language (span corruption, or next-token prediction) from the benchmark's synthetic *train*
texts without their labels, and auxiliary instruction tasks that are no benchmark tasks: naming what a text is about
(27 themes) and naming its tone (five), first by one canonical word each, then by whichever of four names the options
hold. Reading the options is what lets a base keep an old task's labels apart from a new one's. No benchmark row is
ever shown with its label.
Seeded; that two builds are equal to the bit was not checked.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from cl_runner.tasks import benchmark
from cl_runner.tasks.synthetic import TASKS, grammar, rows

VOCABULARY = 2400
SENTINELS = [f"<extra_id_{i}>" for i in range(16)]
SEED = 7
SOURCES = ["almanac", "digest", "letters", "archive", "notebook", "bulletin"]
# Grammar → (kind, instruction): the benchmark's own instructions are among them, with labels that are not its own.
AUXILIARY = {
    "pretraining-topic": [("TC", None), ("Topic", "Name the subject of the text. Choose one from the option.\n")],
    "pretraining-tone": [("SC", None), ("Tone", "Name the tone of the text. Choose one from the option.\n")],
}


class Example(NamedTuple):
    """An input text and its target; without a target the input is language to learn from."""

    prompt: str
    target: str | None


def language(rng: random.Random) -> Iterator[Example]:
    """Prompts of the benchmark's tasks, tasks in turn at random, without their labels."""
    streams = {name: rows(grammar(name), "train", SEED) for name in TASKS}
    while True:
        name = rng.choice(TASKS)
        yield Example(str(benchmark.get(name).prompt(next(streams[name]).text)), None)


def auxiliary(rng: random.Random, plain: int) -> Iterator[Example]:
    """Naming topic or tone. Each label has several names, and the options say which of them is asked for.

    The first ``plain`` examples use each label's first name only: reading the options is learned once naming is.
    """
    done = 0
    streams = {name: rows(grammar(name), "train", SEED) for name in AUXILIARY}
    while True:
        name = "pretraining-tone" if rng.random() < 0.3 else "pretraining-topic"
        row = next(streams[name])
        kind, instruction = rng.choice(AUXILIARY[name])
        first = done < plain or rng.random() < 0.2
        done += 1
        own = grammar(name).own
        names = {label: own[label]["name"][0] if first else rng.choice(own[label]["name"]) for label in own}
        others = rng.sample(
            [other for label, other in names.items() if label != row.label], rng.randint(2, 4 if len(names) < 6 else 13)
        )
        options = [*others, names[row.label]]
        rng.shuffle(options)
        task = benchmark.build(
            {"name": rng.choice(SOURCES), "kind": kind, "labels": options}
            | ({"instruction": instruction} if instruction else {})
        )
        yield Example(str(task.prompt(row.text)), names[row.label])


def train_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any UTF-8 goes through unchanged, and a word has one form, alone or after a space."""
    special = ["<pad>", "</s>", "<unk>", *SENTINELS] if kind == "t5" else ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Prepend(" ")  # so that 'Sports' the answer is ' Sports' the option
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(SEED)
    sources = (language(rng), auxiliary(rng, 0))
    corpus = [text for source in sources for _ in range(6000) for text in next(source) if text]
    corpus += [label for name in TASKS for label in grammar(name).labels] * 50
    tokenizer.train_from_iterator(corpus, trainer)
    end, begin = tokenizer.token_to_id("</s>"), tokenizer.token_to_id("<s>")
    tokenizer.post_processor = (
        processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", end)])
        if kind == "t5"
        else processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)])
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        **({"bos_token": "<s>", "padding_side": "left"} if kind == "llama" else {"extra_special_tokens": SENTINELS}),
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # '</s>' in a text is text
        model_max_length=1024,
    )


def new_model(kind: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained model of under three million parameters."""
    size = math.ceil(len(tokenizer) / 8) * 8
    if kind == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=size, d_model=192, d_kv=32, d_ff=576, num_heads=6, num_layers=3, num_decoder_layers=2,
                dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
            )
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size, hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=6,
            num_key_value_heads=6, max_position_embeddings=1024, tie_word_embeddings=True,
            bos_token_id=1, eos_token_id=2, pad_token_id=3,
        )
    )  # fmt: skip


def corrupt(ids: list[int], first_sentinel: int, end: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """T5's objective: spans of about three tokens, 15 % in all, replaced by sentinels; the target names them."""
    source: list[int] = []
    target: list[int] = []
    position, sentinel = 0, 0
    while position < len(ids):
        if rng.random() < 0.06 and sentinel < len(SENTINELS):
            length = rng.randint(1, 5)
            source.append(first_sentinel + sentinel)
            target += [first_sentinel + sentinel, *ids[position : position + length]]
            position += length
            sentinel += 1
        source += ids[position : position + 1]
        position += 1
    return [*source, end], [*target, end]


def pad(lists: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, lists))
    return torch.tensor([item + [value] * (width - len(item)) for item in lists])


def t5_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rng: random.Random, examples: list[Example]):
    """Mean loss over the target tokens."""
    end, pairs = tokenizer.eos_token_id, []
    first = tokenizer.convert_tokens_to_ids(SENTINELS[0])
    for prompt, target in examples:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if target is None:
            pairs.append(corrupt(ids, first, end, rng))
        else:
            pairs.append(([*ids, end], [*tokenizer(target, add_special_tokens=False)["input_ids"], end]))
    source = pad([pair[0] for pair in pairs], tokenizer.pad_token_id)
    labels = pad([pair[1] for pair in pairs], -100)
    return model(input_ids=source, attention_mask=(source != tokenizer.pad_token_id).long(), labels=labels).loss


def llama_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rng: random.Random, examples: list[Example]):
    """Next-token loss, the mean over prompt tokens plus that over target tokens."""
    prompts = [tokenizer(example.prompt)["input_ids"] for example in examples]
    targets = [
        [*tokenizer(example.target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if example.target
        else []
        for example in examples
    ]
    ids = pad([a + b for a, b in zip(prompts, targets, strict=True)], tokenizer.pad_token_id)
    part = pad([[1] * len(a) + [2] * len(b) for a, b in zip(prompts, targets, strict=True)], 0)[:, 1:]
    logits = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits[:, :-1]
    loss = F.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none")
    share = 0.5 if any(targets) else 1.0
    total = share * (loss * (part == 1)).sum() / (part == 1).sum()
    return total + (loss * (part == 2)).sum() / (part == 2).sum() if any(targets) else total


def pretrain(kind: str, steps: int, batch: int, lr: float, log: Callable[[str], None]):
    """Tokenizer and model after ``steps`` steps, a third of them language, the rest auxiliary tasks."""
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(kind)
    model = new_model(kind, tokenizer)
    log(f"{kind}: vocabulary {len(tokenizer)}, {model.num_parameters() / 1e6:.2f} M parameters")
    rng = random.Random(SEED)
    texts, tasks = language(rng), auxiliary(rng, plain=steps * batch // 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    loss_of = t5_loss if kind == "t5" else llama_loss
    means = {"language": 0.0, "auxiliary": 0.0}
    start = time.time()
    for step in range(steps):
        name, source = ("language", texts) if step % 3 == 0 else ("auxiliary", tasks)
        examples = [next(source) for _ in range(batch)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, tokenizer, rng, examples)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        means[name] = 0.95 * means[name] + 0.05 * loss.item() if step > 2 else loss.item()
        if (step + 1) % 50 == 0:
            shown = ", ".join(f"{key} {value:.3f}" for key, value in means.items())
            log(f"{kind}: step {step + 1}/{steps}, {shown}, {time.time() - start:.0f} s")
    return tokenizer, model, time.time() - start


CARD = """---
license: apache-2.0
language: en
---
# {name}

A {family} of {parameters:.2f} M parameters for trying out continual learning without a download or a GPU. It knows only
the small synthetic English of `cl_runner/tasks/grammars`; it is of no use for anything else, and numbers from it say
nothing about real data.

- **Made by** `python scripts/build_tiny_models.py {name} --steps {steps} --batch {batch} --lr {lr}` (seed {seed})
  from random weights, in {seconds:.0f} s on {threads} CPU threads.
- **Learned from** the synthetic train texts of the benchmark's stand-ins without their labels ({objective}), and from
  two auxiliary tasks that are no benchmark tasks: naming the topic of a text (27 themes) and its tone (five). Each
  theme has four names and the options say which is asked for; some of them hold words of the benchmark's labels
  ("World Affairs"), as any language model knows them. No benchmark row was shown with its label.
- **Tokenizer**: byte-level BPE of {vocabulary} entries trained on the same language; any UTF-8 goes through unchanged.
- **Stored** in 16 bit, meant to be computed in fp32: `from_pretrained(folder, dtype=torch.float32)`.
"""


def build(name: str, steps: int, batch: int, lr: float, out: Path) -> None:
    """Pretrain one model and write its folder."""
    kind = name.removeprefix("tiny-")
    tokenizer, model, seconds = pretrain(kind, steps, batch, lr, lambda line: print(line, flush=True))
    folder = out / name
    model.eval().to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    t5 = kind == "t5"
    card = CARD.format(
        name=name, family="T5 encoder-decoder" if t5 else "LLaMA decoder", parameters=model.num_parameters() / 1e6,
        steps=steps, batch=batch, lr=lr, seed=SEED, seconds=seconds, threads=torch.get_num_threads(),
        objective="span corruption" if t5 else "next-token prediction", vocabulary=len(tokenizer),
    )  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the embedded models.")
    parser.add_argument(
        "names", nargs="*", default=["tiny-t5", "tiny-llama"], help="tiny-t5, tiny-llama; default: both"
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "cl_runner" / "models" / "embedded")
    options = parser.parse_args()
    for name in options.names:
        build(name, options.steps, options.batch, options.lr, options.out)


if __name__ == "__main__":
    main()
