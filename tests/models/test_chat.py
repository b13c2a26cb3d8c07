"""Prompts in a model's chat template: the ids that transformers gives, cut without losing what is around, and ends."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from cl_runner.config.schema import ModelConfig, RunConfig
from cl_runner.errors import UserError
from cl_runner.methods.protocol import StagePlan
from cl_runner.models.base import Layout, load_base
from cl_runner.models.batch import collate_prompts
from cl_runner.models.chat import ChatTemplate
from cl_runner.models.encoding import Encoder
from cl_runner.models.forward import greedy
from cl_runner.models.heads import common_head
from cl_runner.models.verify import answers
from cl_runner.tasks import benchmark
from cl_runner.tasks.task import Prompt
from cl_runner.training.data import Data
from cl_runner.training.prepare import Tokens
from tests.command_line import Result, call, results, tree
from tests.models.tiny_models import CHATML, TURNS, chat_tokenizer

# peft 0.21 asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# As LLaMA 2's: it says the tokenizer's first token itself, and leaves out white space at the ends.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
# As LLaMA 3.2's: today's date.
DATED = (
    "{{ bos_token }}Today: {{ strftime_now('%d %b %Y') }}, {{ strftime_now(\"%Y\") }}\n"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
)
PLAIN = "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n{% endfor %}{{ '### ' if add_generation_prompt }}"
TEMPLATES = {"chatml": CHATML, "inst": INST, "plain": PLAIN}
LONG = Prompt("Option: World, Sports\n", "naïve {café} in Zürich and 日本 " * 8, "\nAnswer:")
ROWS = [
    Prompt("Task:TC\n", "The quick brown fox, naïve café", "\nAnswer:"),
    Prompt("", "  white space {at} %s both ends \n", " \n"),
    Prompt(" \n", " ", "x"),
    Prompt("", "what the user asks", "what is answered"),
    Prompt("", "<|im_end|></s>{{ bos_token }}{% if x %}", ""),
]


def chat_encoder(template: str = CHATML, **options: Any) -> Encoder:
    tokenizer = chat_tokenizer(template)
    chat = ChatTemplate.of(tokenizer, False, "tiny")
    end = tokenizer.eos_token_id if chat.end_id is None else chat.end_id
    return Encoder(tokenizer, Layout(False, 0, end, (end,), None, 420), chat=chat, **options)


def asked(encoder: Encoder, prompt: Prompt) -> list[int]:
    """The ids that transformers gives."""
    chat = [{"role": "user", "content": str(prompt)}]
    ids: list[int] = encoder.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    return ids


ENCODERS = {name: chat_encoder(template) for name, template in TEMPLATES.items()}


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers(name: str) -> None:
    encoder = ENCODERS[name]
    for prompt, example in zip(ROWS, encoder.encode_many(ROWS, ["A fox"] * len(ROWS)), strict=True):
        assert example.source == asked(encoder, prompt) and not example.truncated
        assert example.target == [
            *encoder.tokenizer("A fox", add_special_tokens=False)["input_ids"],
            encoder.layout.eos_id,
        ]
    assert encoder.tokenizer("a")["input_ids"][0] == encoder.tokenizer.bos_token_id, "the tokenizer adds one by itself"
    assert encoder.encode(ROWS[0], "A").source.count(encoder.tokenizer.bos_token_id) == (name == "inst")


@given(parts=st.tuples(*[st.text(max_size=20)] * 3), limit=st.integers(50, 100), name=st.sampled_from(list(TEMPLATES)))
def test_any_text_in_any_room(parts: tuple[str, str, str], limit: int, name: str) -> None:
    encoder = ENCODERS[name]
    prompt = Prompt(*parts)
    encoder.max_source = limit
    whole = asked(encoder, prompt)
    try:
        example = encoder.encode(prompt, "A")
    except UserError as error:
        assert "raise data.max_source" in str(error) and len(whole) > limit
        return
    finally:
        encoder.max_source = 512
    assert example.truncated == (len(whole) > limit) and len(example.source) <= limit
    if not example.truncated:
        assert example.source == whole


@pytest.mark.parametrize("truncate", ["text", "tail"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_cut_is_never_the_template(name: str, truncate: str) -> None:
    encoder = chat_encoder(TEMPLATES[name], max_source=90, truncate=truncate)
    chat = encoder.chat
    assert chat is not None
    example = encoder.encode(LONG, "A")
    said = encoder.tokenizer.decode(example.source)
    assert example.truncated and 87 <= len(example.source) <= 90
    assert said.startswith(chat.before + LONG.head) and said.endswith(chat.after)
    content = said[len(chat.before) : len(said) - len(chat.after)]
    assert content.endswith("\nAnswer:") == (truncate == "text")
    assert str(LONG).startswith(content.removesuffix("\nAnswer:")) and len(content) > len(LONG.head) + 20
    room = len(asked(encoder, Prompt("", "", "")))
    tight = chat_encoder(TEMPLATES[name], max_source=room - 1, truncate=truncate)
    hint = "$" if truncate == "tail" else " or set data.truncate to tail$"
    with pytest.raises(UserError, match=rf"longer than data\.max_source {room - 1} .*; raise data\.max_source{hint}"):
        tight.encode(LONG, "A")


def test_a_tokenizer_without_offsets_cuts_the_text_too() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=list(TURNS))
    tokenizer.chat_template = CHATML
    assert not tokenizer.is_fast
    chat = ChatTemplate.of(tokenizer, False, "bytes")
    assert chat.end_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    encoder = Encoder(tokenizer, Layout(False, 0, 1, (1,), None, 512), max_source=120, chat=chat)
    example = encoder.encode(LONG, "A")
    assert example.truncated and 117 <= len(example.source) <= 120
    said = tokenizer.decode(example.source)
    assert said.startswith(chat.before + LONG.head) and said.endswith("\nAnswer:" + chat.after)


def test_the_end_of_a_turn() -> None:
    tokenizer = chat_tokenizer()
    ends = {name: chat_encoder(template).chat.end_id for name, template in TEMPLATES.items()}  # type: ignore[union-attr]
    assert ends == {
        "chatml": tokenizer.convert_tokens_to_ids("<|im_end|>"), "inst": tokenizer.eos_token_id, "plain": None
    }  # fmt: skip
    unanswered = chat_encoder("<|im_start|>{{ messages[0].content }}").chat
    assert unanswered is not None and unanswered.end_id is None
    one_of_several = chat_encoder({"tool_use": INST, "default": CHATML})  # type: ignore[arg-type]
    assert one_of_several.chat is not None and one_of_several.chat.text == CHATML


def test_every_day_is_the_same() -> None:
    encoder = chat_encoder(DATED)
    text = encoder.tokenizer.decode(encoder.encode(Prompt("", "hi", ""), "A").source)
    assert text == "<s>Today: 26 Jul 2024, 2024\nuser: hi<|im_end|>"


def test_prompts_of_a_task_begin_alike() -> None:
    encoder = chat_encoder()
    assert encoder.chat is not None
    sources = [encoder.encode(Prompt("Task:TC\nOption: A, B \n", text, "\nAnswer:"), "A").source for text in "xyz"]
    head = encoder.tokenizer(encoder.chat.before + "Task:TC\nOption: A, B \n", add_special_tokens=False)["input_ids"]
    assert common_head(sources) == head


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "the tokenizer of tiny has none; take an instruct model, or set it to false"),
        ("{{ raise_exception('no') }}", r"the template of tiny cannot be used \(no\)"),
        ("{% for %}", "the template of tiny cannot be used"),
        ({"rag": CHATML}, "the template of tiny cannot be used"),
        ("{{ messages | length }}", "the template of tiny does not write once what the user says"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "the template of tiny does not write once"),
    ],
)
def test_templates_that_cannot_be_used(template: Any, says: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.chat_template: {says}"):
        ChatTemplate.of(chat_tokenizer(template), False, "tiny")


def test_a_template_that_changes_the_input() -> None:
    encoder = chat_encoder("{{ messages[0].content | replace('fox', 'cat') }}")
    with pytest.raises(UserError, match=r"the template of tiny changes what an input says \('a fox'\)"):
        encoder.encode_many([Prompt("", "a dog", ""), Prompt("", "a fox", "")], ["A", "A"])
    picky = "{% if 'fox' in messages[0].content %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    with pytest.raises(UserError, match=r"the template of tiny cannot be used \(no\)"):
        chat_encoder(picky).encode(Prompt("", "a fox", ""), "A")


def test_generation_stops_at_the_end_of_a_turn(saved: Callable[[str], Path]) -> None:
    base = load_base(ModelConfig(name=str(saved("instruct"))), torch.device("cpu"), chat_template=True)
    end, eos = base.tokenizer.convert_tokens_to_ids("<|im_end|>"), base.tokenizer.eos_token_id
    assert (base.layout.eos_id, base.layout.end_ids) == (end, (end, eos))
    plain = load_base(ModelConfig(name=str(saved("instruct"))), torch.device("cpu"))
    assert plain.layout.end_ids == (eos,) and plain.chat is None
    encoder = Encoder(base.tokenizer, base.layout, 100, 20, chat=base.chat)
    examples = encoder.encode_many(ROWS, ["A"] * len(ROWS))
    prompts = collate_prompts(examples, base.layout)
    free = greedy(base.model, prompts, replace(base.layout, eos_id=419, end_ids=(419,)), 8)
    said, _ = Counter(token for answer in free for token in set(answer[1:])).most_common(1)[0]
    with torch.no_grad():  # what the model says is now the end of its turn
        base.model.lm_head.weight[[said, end]] = base.model.lm_head.weight[[end, said]]
    expected = greedy(base.model, prompts, base.layout, 8)
    cut = [answer[: answer.index(said)] if said in answer else answer for answer in free]
    assert expected == cut and cut != free
    right = [encoder.encode_labels([encoder.decode(answer)])[0] for answer in expected]
    for targets in ([[*answer, end] for answer in expected], right, [[end]] * len(ROWS)):
        assert answers(base.model, prompts, targets, base.layout, 8)[0] == expected
    found, verified = answers(base.model, prompts, [[*answer, end] for answer in expected], base.layout, 8)
    assert found == expected and verified == [len(answer) < 8 for answer in expected] and any(verified)


def test_rows_of_a_run(saved: Callable[[str], Path]) -> None:
    task = benchmark.get("agnews")
    config = RunConfig.model_validate({"data": {"source": "synthetic", "max_train": 3, "max_test": 2}})
    data = Data.load([task], config, [StagePlan("agnews", ("agnews",))])
    base = load_base(ModelConfig(name=str(saved("instruct"))), torch.device("cpu"), chat_template=True)
    tokens = Tokens.make(data, base, max_new_tokens=8)
    for rows, found in ((data.train, tokens.train["agnews"]), (data.test, tokens.test["agnews"].examples)):
        for row, example in zip(rows["agnews"].rows, found, strict=True):
            assert example.source == asked(ENCODERS["chatml"], task.prompt(row.text))
            assert example.target[-1] == base.tokenizer.convert_tokens_to_ids("<|im_end|>")


ORDER = "name: two\ntasks: [amazon, agnews]\n"
RUN = ("data.max_train=8", "data.max_test=4", "data.max_source=150", "training.lr=1e-2", "training.global_batch=4",
       "training.micro_batch=2", "adapter.r=4", "eval.max_new_tokens=6")  # fmt: skip


def train(cwd: Path, model: Path | str, *more: str, method: str = "seqlora") -> Result:
    (cwd / "two.yaml").write_text(ORDER)
    sets = [word for each in (*RUN, *more) for word in ("--set", each)]
    return call("train", "--order", "two.yaml", "--method", method, "--model", str(model), "--data", "synthetic",
                *sets, cwd=cwd)  # fmt: skip


def predictions(run: Path) -> list[dict[str, Any]]:
    files = sorted(run.glob("stages/*/predictions.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_run(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Trained and gone on with; verified answers are the generated ones; heads shared or not, the same answers."""
    model = shutil.copytree(saved("instruct"), tmp_path / "instruct")
    chat = "data.chat_template=true"
    done = train(tmp_path, model, chat, "output.name=it")
    assert done.code == 0, done.err
    run = tmp_path / "runs/it"
    before = results(run)
    found = predictions(run)
    assert len(found) == 12
    for name, setting in (("generated", "eval.mode=generate"), ("whole", "training.share_prefix=off")):
        assert train(tmp_path, model, chat, f"output.name={name}", setting).code == 0
        assert predictions(tmp_path / "runs" / name) == found
    assert train(tmp_path, model, "output.name=plain").code == 0
    assert predictions(tmp_path / "runs/plain") != found
    shutil.rmtree(run / "stages/02-agnews")
    assert train(tmp_path, model, chat, "output.name=it").code == 0 and results(run) == before
    again = call("eval", "it", "--stage", "1", "--json", cwd=tmp_path)
    assert again.code == 0 and not any(again.json["differing_rows"].values()), again.err
    shutil.rmtree(run / "stages/02-agnews")
    other = train(tmp_path, model, "output.name=it")
    assert other.code == 2 and "was made with other settings (data.chat_template)" in other.err
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("Be kind.", "Be quick."))
    other = train(tmp_path, model, chat, "output.name=it")
    assert other.code == 2 and "is not what the run" in other.err


def test_what_is_shown_and_counted_is_what_is_asked(saved: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(ORDER)
    given = ("--order", "two.yaml", "--model", str(saved("instruct")), "--data", "synthetic", "--json",
             "--set", "data.max_train=8", "--set", "data.max_test=4", "--set", "data.max_source=90")  # fmt: skip
    chat = ("--set", "data.chat_template=true")
    plain, framed = (call("data", "show", *given, *more, "--task", "agnews", cwd=tmp_path).json for more in ((), chat))
    encoder = chat_encoder()
    lengths = []
    for row, other in zip(plain["rows"], framed["rows"], strict=True):
        ids = asked(encoder, Prompt("", row["input"], ""))
        assert other["input"] == encoder.tokenizer.decode(ids) and other["target"] == row["target"]
        lengths.append(len(ids))
    report = call("data", "check", *given, *chat, cwd=tmp_path)
    assert report.code == 0, report.err
    test = report.json["tasks"][1]["splits"]["test"]
    assert test["length"]["p100"] == max(lengths)
    assert test["truncated"] == 100 * sum(length > 90 for length in lengths) / len(lengths)


@pytest.mark.parametrize(
    ("model", "more", "method", "says"),
    [
        ("tiny-llama", (), "seqlora", "data.chat_template: the tokenizer of .* has none; take an instruct model"),
        ("tiny-t5", (), "seqlora", "data.chat_template: .* is an encoder-decoder model"),
        ("tiny-llama", (), "lfpt5", "data.chat_template: lfpt5 writes text and label in one go"),
        (
            "tiny-llama",
            ("tasks.agnews.data.chat_template=false",),
            "seqlora",
            "the chat template is for the whole",
        ),
        ("tiny-llama", ("data.chat_template=maybe",), "seqlora", "data.chat_template must be true or false"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, model: str, more: tuple[str, ...], method: str, says: str) -> None:
    found = train(tmp_path, model, "data.chat_template=true", *more, method=method)
    assert found.code == 2
    assert list(tree(tmp_path)) == ["two.yaml"]
    lines = [line for line in found.err.splitlines() if "chat" in line]
    assert len(lines) == 1 and "Traceback" not in found.err
    assert re.search(says, lines[0]), found.err
