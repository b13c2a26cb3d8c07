"""A model card, ``README.md``: what the hub reads at its top, and what the run's own files say of it below.

Nothing is in it that the run does not know; what it does not know stands under a heading of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import yaml

from cl_runner import __version__
from cl_runner.report import tables
from cl_runner.report.tables import RunSummary

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = "."  # in the place of a repository's name, of a folder that is loaded where it lies


@dataclass(frozen=True)
class Card:
    """What a card is made of.

    run: as of the stage. what: ``adapter``, ``prompts`` or ``model``. base: its name or folder, to be loaded beside an
    adapter. hub_base: its name on the hub, where it has one. title, equation, paper: of the method. stages: each with
    its tasks. data: of each task where its rows are from, train and test rows. datasets: their names on the hub.
    prompt: how a row is asked, of a text in it. chat: that goes into the model's chat template. settings: of the run,
    by section. versions: of what it ran with. seq2seq: the base reads its input in an encoder. dtype: of a merged
    model. task: the one that it answers, where that is one alone. started: the adapter that the run began with. repo:
    where it will be.
    """

    run: RunSummary
    what: str
    base: str
    hub_base: str | None
    license: str | None
    title: str
    equation: str
    paper: str
    stages: Sequence[tuple[str, Sequence[str]]]
    data: Sequence[Sequence[str]]
    datasets: Sequence[str]
    prompt: str
    chat: bool
    new_tokens: int
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    seq2seq: bool
    dtype: str = ""
    task: str | None = None
    started: str = ""
    repo: str = HERE


def front_matter(card: Card) -> dict[str, Any]:
    """What the hub reads: https://huggingface.co/docs/hub/model-cards. What is not known is not there."""
    merged = card.what == "model"
    kind = [] if merged else ["soft-prompts"] if card.what == "prompts" else ["lora"]
    tags = [
        "continual-learning",
        card.run.method,
        *kind,
        "cl-runner",
        *(["synthetic-data"] if card.run.synthetic else []),
    ]
    found = {
        "license": card.license,
        "library_name": "transformers" if merged else "peft",
        "base_model": card.hub_base,
        "base_model_relation": ("finetune" if merged else "adapter") if card.hub_base else None,
        "pipeline_tag": None if card.seq2seq else "text-generation",
        "datasets": list(card.datasets),
        "tags": tags,
    }
    return {key: value for key, value in found.items() if value}


def card_text(card: Card) -> str:
    """The whole file."""
    top = yaml.safe_dump(front_matter(card), sort_keys=False, allow_unicode=True)
    return (
        _environment()
        .get_template("model_card.md.j2")
        .render(
            card=card,
            top=top,
            run=card.run,
            version=__version__,
            matrix=tables.markdown(card.run),
            rows=tables.markdown_table(
                ["task", "train rows", "test rows", "from"], [_row(row) for row in card.data], left=1
            ),
            settings=yaml.safe_dump(dict(card.settings), sort_keys=False, allow_unicode=True).rstrip(),
            code=_code(card),
        )
    )


def _row(row: Sequence[str]) -> list[str]:
    return [row[0], *row[2:], row[1]]


def _code(card: Card) -> str:
    """How it is loaded and asked, which runs as it stands."""
    auto = "AutoModelForSeq2SeqLM" if card.seq2seq else "AutoModelForCausalLM"
    folder = f"folder = {card.repo!r}" + ("  # where this file lies" if card.repo == HERE else "")
    if card.what == "model":
        loaded = [
            f"from transformers import {auto}, AutoTokenizer",
            "",
            folder,
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            f"model = {auto}.from_pretrained(folder).eval()",
        ]
    else:
        ours = PurePath(card.base).name if "/cl_runner/models/embedded/" in card.base else ""
        loaded = [
            *(["from pathlib import Path", "", "import cl_runner"] if ours else []),
            "from peft import PeftModel",
            f"from transformers import {auto}, AutoTokenizer",
            "",
            folder,
            f'base = Path(cl_runner.__file__).parent / "models/embedded/{ours}"' if ours else f"base = {card.base!r}",
            "tokenizer = AutoTokenizer.from_pretrained(base)",
            f'model = {auto}.from_pretrained(base, dtype="float32")',
            "model = PeftModel.from_pretrained(model, folder).eval()",
        ]
    return "\n".join([*loaded, "", *_asked(card)])


def _asked(card: Card) -> list[str]:
    """A prompt, and the answer."""
    lines = [f"prompt = {card.prompt!r}"]
    if card.chat:
        lines += [
            'turns = [{"role": "user", "content": prompt}]',
            "prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)",
            'inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)',
        ]
    else:
        lines += ['inputs = tokenizer(prompt, return_tensors="pt")']
    lines += [f"answer = model.generate(**inputs, do_sample=False, max_new_tokens={card.new_tokens})[0]"]
    if not card.seq2seq:
        lines += ['answer = answer[inputs["input_ids"].shape[1] :]']
    return [*lines, "print(tokenizer.decode(answer, skip_special_tokens=True))"]


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("cl_runner.report.card"),
        autoescape=False,  # Markdown, none of which runs
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
