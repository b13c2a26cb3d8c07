"""Every family of base models, through the whole of a run: rows as they are read, answers, adapters, heads, an order.

What is compared with is plain transformers and plain PEFT: one row at a time, no padding, no cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from cl_runner.adapters.kind import Opening
from cl_runner.adapters.targets import default_targets
from cl_runner.adapters.terms import Term
from cl_runner.config.schema import ModelConfig, RunConfig
from cl_runner.engine.process import Place
from cl_runner.engine.zero import Autocast
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.protocol import Source
from cl_runner.models.base import Base, load_base
from cl_runner.models.batch import IGNORE, Batch, Example, collate, collate_prompts
from cl_runner.models.encoding import Encoder
from cl_runner.models.forward import logits, token_loss
from cl_runner.models.model_folder import ModelFolder
from cl_runner.models.verify import answers
from cl_runner.registry import KINDS
from cl_runner.tasks.task import Prompt
from cl_runner.training.stage import Room, StageRun
from tests import breadth
from tests.breadth import narrowed
from tests.distributed import on_ranks
from tests.families import FAMILIES, NO_CACHE, NO_POSITIONS, WINDOW
from tests.methods.orders import learn
from tests.stages import Outcome, distance, tiny_config

# peft 0.21 asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
every_family = pytest.mark.parametrize("name", narrowed(FAMILIES, breadth.FAMILIES))

CPU, LIMIT = torch.device("cpu"), 6
HEAD = "say if the word is red or blue :"
ROWS = [(" a very dark rose", "red"), (" sky", "blue red yes"), (" the old new bright sun and moon", "no blue")]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``folder("OPT")``: a family's model on disk, written once."""
    root = tmp_path_factory.mktemp("families")

    def of(name: str) -> Path:
        path = root / str(list(FAMILIES).index(name))
        if not path.exists():
            FAMILIES[name].save(path)
        return path

    return of


@pytest.fixture
def base(name: str, folder: Callable[[str], Path]) -> Base:
    """The family's model as a run loads it."""
    return load_base(ModelConfig(name=str(folder(name))), CPU)


@pytest.fixture
def plain(name: str, folder: Callable[[str], Path]) -> Any:
    """The family's model as transformers loads it."""
    auto = AutoModelForSeq2SeqLM if FAMILIES[name].encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(folder(name)).eval()


def encoder_of(base: Base) -> Encoder:
    return Encoder(base.tokenizer, base.layout, 40, 12)


def examples_of(base: Base) -> list[Example]:
    """Rows of unequal lengths that begin alike, labels of unequal lengths."""
    prompts = [Prompt(HEAD, text, " answer") for text, _ in ROWS]
    return encoder_of(base).encode_many(prompts, [label for _, label in ROWS])


def scores_of(model: Any, source: Sequence[int], target: Sequence[int]) -> Tensor:
    """(len(target), V) of one row by itself: no padding, no mask, no position ids, no cache."""
    ids = torch.tensor([[*source]])
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            start = torch.tensor([[model.config.decoder_start_token_id, *target[:-1]]])
            return model(input_ids=ids, decoder_input_ids=start, use_cache=False).logits[0]
        both = torch.tensor([[*source, *target[:-1]]])
        return model(input_ids=both, use_cache=False).logits[0, len(source) - 1 :]


def answer_of(model: Any, source: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Arg-max token by token, the whole row anew each time."""
    answer: list[int] = []
    while len(answer) < LIMIT:
        token = int(scores_of(model, source, [*answer, 0])[-1].argmax())
        if token in ends:
            break
        answer.append(token)
    return answer


# Rows.


@every_family
def test_a_padded_batch_is_its_rows(name: str, base: Base, plain: Any) -> None:
    examples = examples_of(base)
    batch = collate(examples, base.layout)
    ours = (token_loss(logits(base.model, batch), batch.labels) * batch.token_weights).sum() / batch.label_tokens
    losses, tokens = [], [len(example.target) for example in examples]
    for source, target, *_ in examples:  # as transformers reckons them, shifting labels itself
        if base.encoder_decoder:
            losses.append(plain(input_ids=torch.tensor([source]), labels=torch.tensor([target])).loss.item())
        else:
            both, labels = [*source, *target], [-100] * len(source) + target
            losses.append(plain(input_ids=torch.tensor([both]), labels=torch.tensor([labels])).loss.item())
    mean = sum(loss * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens)
    assert ours.item() == pytest.approx(mean, rel=1e-5)
    assert len({len(example.source) for example in examples}) == 3  # padding there was


@every_family
def test_special_tokens_and_positions_are_the_familys(name: str, base: Base) -> None:
    family, layout = FAMILIES[name], base.layout
    number = base.tokenizer.convert_tokens_to_ids
    for example in examples_of(base):
        before = [number(family.special.before)] if family.special.before else []
        behind = [number(family.special.behind)] if family.special.behind else []
        words = len(example.source) - len(before) - len(behind)
        assert example.source == before + example.source[len(before) :][:words] + behind
        assert not set(example.source[len(before) :][:words]) & set(base.tokenizer.all_special_ids)
        assert example.target[-1] == layout.eos_id == number(family.special.end)
    assert layout.end_ids == (layout.eos_id, *family.ends)
    assert layout.pad_id == number(family.special.pad or family.special.end)
    assert layout.max_positions == family.positions
    prompts = collate_prompts(examples_of(base), layout)
    gaps = prompts.attention_mask.argmin(1) if base.encoder_decoder else prompts.attention_mask.argmax(1)
    assert len(set(gaps.tolist())) == 3
    if not base.encoder_decoder:  # the first token of each row is at position 0, wherever it stands
        assert prompts.position_ids is not None
        assert [int(prompts.position_ids[row, gap]) for row, gap in enumerate(gaps)] == [0, 0, 0]


@every_family
def test_soft_prompts_stand_right_before_each_row(name: str, base: Base, plain: Any) -> None:
    examples = examples_of(base)
    embed = plain.get_input_embeddings()
    prefix = 0.5 * torch.randn(3, 4, base.model.get_input_embeddings().weight.shape[1])
    batch = replace(collate(examples, base.layout), condition={"prefix": prefix})
    found = logits(base.model, batch)
    for row, (source, target, *_) in enumerate(examples):
        ids = source if base.encoder_decoder else [*source, *target[:-1]]
        both = torch.cat([prefix[row], embed(torch.tensor(ids))])[None]
        start = {"decoder_input_ids": torch.tensor([[base.layout.decoder_start_id or 0, *target[:-1]]])}
        scores = plain(inputs_embeds=both, **(start if base.encoder_decoder else {})).logits[0, -len(target) :]
        torch.testing.assert_close(found[row][batch.labels[row] != -100], scores, rtol=0, atol=1e-4)


def test_an_attention_that_would_leave_soft_capping_out_is_refused(folder: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"cannot be loaded with model\.attention 'sdpa'"):
        load_base(ModelConfig(name=str(folder("Gemma 2")), attention="sdpa"), CPU)


# Answers.


def golds(said: list[int], end: int) -> list[list[int]]:
    """What is said, and that changed by one token, cut and extended."""
    at, token = len(said) // 2, 5 if end != 5 else 6
    return [
        [*said, end],
        [*said[:at], token, *said[at + 1 :], end],
        [*said[:-1], end],
        [*said, token, end],
        [],  # a label that was cut
    ]


@pytest.mark.parametrize("name", narrowed(FAMILIES, ["T5", "Gemma 3", "GPT-2", "OPT"]))
def test_verified_answers_are_generated_ones(name: str, base: Base, plain: Any) -> None:
    sources = [example.source for example in examples_of(base)]
    free = [answer_of(plain, source, ()) for source in sources]
    # An end token that the model itself says, of most rows behind something else.
    end = max(range(32), key=lambda token: sum(token in row and row.index(token) > 0 for row in free))
    layout = base.layout = replace(base.layout, eos_id=end, end_ids=(end,))
    said = [row[: row.index(end)] if end in row else row for row in free]
    assert min(map(len, sources)) > WINDOW  # a window that slides has slid on
    assert any(0 < len(row) < LIMIT for row in said), "no answer that can be verified: no test"
    rows = [(source, row, gold) for source, row in zip(sources, said, strict=True) for gold in golds(row, end)]
    examples = [Example(source, gold) for source, _, gold in rows]
    found, verified = answers(
        base.model, collate_prompts(examples, layout), [gold for *_, gold in rows], layout, LIMIT
    )  # fmt: skip
    assert found == [row for _, row, _ in rows]
    assert verified == [gold == [*row, end] and len(gold) <= LIMIT for _, row, gold in rows]
    texts = [encoder_of(base).decode(row) for _, row, _ in rows]
    for how in ({}, {"training__share_prefix": "off"}, {"eval__mode": "generate"}):
        config = tiny_config(eval__max_new_tokens=LIMIT, **how)
        stage = StageRun(room_of(replace(base, model=copy.deepcopy(base.model)), config), config, 0)
        assert stage.answer(examples) == texts
        stage.close()


# Adapters.


def room_of(base: Base, config: RunConfig, method: str = "seqlora") -> Room:
    """A room with the family's own targets; its order is two tasks."""
    config = RunConfig.model_validate({**config.model_dump(), "method": {"name": method}})
    made = make_method(config)
    opening = Opening(
        base.model, base.name_or_path, None, base.encoder_decoder, folder=ModelFolder(base.model, base.tokenizer)
    )
    adapters = KINDS.get(made.kind(config))(config.adapter).open(opening)
    root = Autocast(adapters.model, CPU, False)
    return Room(base, encoder_of(base), adapters, made, Place(), root, tuple(made.plan(("a", "b"))))


def on_two_tasks(place: Place, base: Base, config: RunConfig) -> tuple[Room, list[Outcome]]:
    """A new pair for each of two tasks, the first one folded; what was learned of each."""
    room = room_of(replace(base, model=copy.deepcopy(base.model)), config, "inclora")
    rows = examples_of(base)
    return room, [learn(room, config, at, Source(rows[at:], [task] * (3 - at))) for at, task in enumerate("ab")]


def naive_sum(plain: Any, room: Room) -> Any:
    """The plain model with every pair's ``s·B A`` written into its weights."""
    changed = copy.deepcopy(plain)
    for pair in room.adapters.folded:
        for target, A in pair.A.items():
            weight = changed.get_submodule(target).weight
            update = pair.scale * pair.B[target].double() @ A.double()
            weight.data += (update.T if type(changed.get_submodule(target)).__name__ == "Conv1D" else update).float()
    return changed


@every_family
def test_folded_is_summed_and_plain_peft_answers_the_same(name: str, base: Base, plain: Any, tmp_path: Path) -> None:
    family = FAMILIES[name]
    assert default_targets(base.model) == list(family.targets)
    config = tiny_config(training__lr=0.05, training__epochs=2, eval__max_new_tokens=LIMIT)
    [(room, _)] = on_ranks(1, on_two_tasks, base, config)
    adapters = room.adapters
    assert {target.rsplit(".", 1)[-1] for target in adapters.layers} == set(family.targets)
    assert [pair.stage for pair in adapters.folded] == ["a", "b"]
    summed = naive_sum(plain, room)
    adapters.save(tmp_path / "adapter", "b", adapters.held())
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter").eval()
    for source, target, *_ in examples_of(base):
        ours, theirs = scores_of(room.adapters.model, source, target), scores_of(summed, source, target)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scores_of(loaded, source, target), theirs, rtol=1e-4, atol=1e-4)
        assert float((theirs - scores_of(plain, source, target)).abs().max()) > 0.05
    stage = StageRun(room, config, 1)
    said = [encoder_of(base).decode(answer_of(loaded, e.source, base.layout.end_ids)) for e in examples_of(base)]
    assert stage.answer(examples_of(base)) == said
    stage.close()


@every_family
def test_the_whole_model_is_a_plain_folder(name: str, base: Base, plain: Any, tmp_path: Path) -> None:
    """All weights changed, heads of their own and tied ones: transformers alone answers the same, and so do we."""
    room = room_of(base, tiny_config(), "seqft")
    for number, parameter in enumerate(room.adapters.parameters().values()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    room.adapters.begin("a")
    room.adapters.save(tmp_path / "model", "a", room.adapters.held())
    loaded = type(plain).from_pretrained(tmp_path / "model").eval()
    again = load_base(ModelConfig(name=str(tmp_path / "model")), CPU)
    for source, target, *_ in examples_of(base):
        ours = scores_of(room.adapters.model, source, target)
        assert torch.equal(scores_of(loaded, source, target), ours)
        assert torch.equal(scores_of(again.model, source, target), ours)
        assert float((ours - scores_of(plain, source, target)).abs().max()) > 0.01


def with_heads(base: Base, how: str) -> tuple[list[Outcome], int]:
    """What is learned of two tasks, dropout on, and how many forwards went on from a head."""
    shared = 0

    def counting(_: Any, __: Any, named: dict[str, Any]) -> None:
        nonlocal shared
        mask = named.get("attention_mask")
        shared += named.get("past_key_values") is not None or (mask is not None and mask.dim() == 4)

    hook = base.model.register_forward_pre_hook(counting, with_kwargs=True)
    config = tiny_config(adapter__dropout=0.2, training__share_prefix=how, training__micro_batch=4)
    [(_, outcomes)] = on_ranks(1, on_two_tasks, base, config)
    hook.remove()
    return outcomes, shared


def assert_same(ours: Sequence[Outcome], others: Sequence[Outcome]) -> None:
    for found, wanted in zip(ours, others, strict=True):
        assert found.losses == pytest.approx(wanted.losses, rel=1e-5)
        assert found.norms == pytest.approx(wanted.norms, rel=1e-4)
        assert distance(found.parameters, wanted.parameters) < 1e-3


@every_family
def test_heads_are_shared_or_it_is_said_once(name: str, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginning that all prompts have is read once, or why not is said; what is learned is the same."""
    family = FAMILIES[name]
    whole, none = with_heads(base, "off")
    assert none == 0
    if family.encoder_decoder or family.whole:
        ours, shared = with_heads(base, "auto")
        line = f"the beginning of a task's prompts is computed for every row: {family.whole}"
        assert shared == 0 and [each.trained.said for each in ours] == [[line] if family.whole else [], []]
        assert_same(ours, whole)
        return
    for packed in (0.0, 1000.0):  # behind their head; end to end, in one row
        monkeypatch.setattr("cl_runner.models.heads.PACKED", packed)
        ours, shared = with_heads(base, "auto")
        assert shared == 2 and [each.trained.said for each in ours] == [[], []]
        assert_same(ours, whole)


@pytest.mark.parametrize(
    ("name", "setting", "shares"),
    [
        ("GPT-2", "resid_pdrop", True),
        ("GPT-2", "attn_pdrop", False),
        ("GPT-NeoX", "hidden_dropout", True),
        ("Phi", "resid_pdrop", True),
        ("OPT", "dropout", True),
        ("OPT", "attention_dropout", False),
    ],
)
def test_heads_of_a_base_that_drops(
    name: str, setting: str, shares: bool, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    base.model = FAMILIES[name].model(**{setting: 0.2})
    whole, _ = with_heads(base, "off")
    for packed in (0.0, 1000.0):
        monkeypatch.setattr("cl_runner.models.heads.PACKED", packed)
        ours, shared = with_heads(base, "auto")
        assert shared == (2 if shares else 0)
        assert bool(ours[0].trained.said) is not shares
        assert_same(ours, whole)


# Tokens end to end, as OPT's MLP reads them.


@pytest.mark.parametrize("name", ["OPT"])
def test_layers_that_read_all_tokens_end_to_end_are_seen_row_by_row(name: str, base: Base, plain: Any) -> None:
    """What a layer reads, of real tokens alone, is what it reads of each row by itself."""
    config = tiny_config(adapter__target_modules=["fc1"])
    room = room_of(base, config)
    stage = StageRun(room, config, 0)
    seen: list[Tensor] = []

    def see(target: str, rows: Tensor, counts: Tensor | None) -> None:
        assert counts is not None
        seen.extend(row[of > 0] for row, of in zip(rows, counts, strict=True))

    with stage.observe("inputs", see):
        stage.forward(stage.make_batch(examples_of(base), ["a"] * 3, [1.0] * 3))
    stage.close()
    alone: list[Tensor] = []
    [layer] = [module for target, module in plain.named_modules() if target.endswith("fc1")]
    layer.register_forward_pre_hook(lambda _, given: alone.append(given[0].flatten(0, -2)))
    for source, target, *_ in examples_of(base):
        scores_of(plain, source, target)
    for found, wanted in zip(seen, alone, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


class Weighed(Term):
    """The input times the row's own weight."""

    def forward(self, x: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        return functional.pad(x, (0, 16)) * condition["weight"][:, None, None]


@pytest.mark.parametrize("name", ["OPT"])
def test_terms_in_such_layers_are_told_rows_apart(name: str, base: Base) -> None:
    adapters = room_of(base, tiny_config(adapter__target_modules=["fc1"])).adapters
    adapters.begin_terms("a", {target: Weighed() for target in adapters.layers})
    weights = torch.tensor([0.0, 1.0, 3.0])

    def scores(batch: Batch, rows: list[int]) -> Tensor:
        adapters.condition = {"weight": weights[rows]}
        return logits(adapters.model, batch.slice(rows))

    short = [Example(example.source[-1:], example.target[-1:]) for example in examples_of(base)]
    for batch in (collate(examples_of(base), base.layout), collate(short, base.layout)):  # of one token a row, too
        with torch.no_grad():
            together, alone = scores(batch, [0, 1, 2]), torch.cat([scores(batch, [row]) for row in range(3)])
            with adapters.without_terms():
                bare = scores(batch, [0, 1, 2])
        real = batch.labels != IGNORE
        torch.testing.assert_close(together[real], alone[real], rtol=0, atol=1e-4)
        torch.testing.assert_close(together[0][real[0]], bare[0][real[0]], rtol=0, atol=1e-4)
        assert float((together - bare)[2][real[2]].abs().max()) > 0.1


# An order.

COLOURS = {"sky": "dark blue", "sea": "dark blue", "rose": "bright red", "fire": "bright red"}
SWAPPED = {word: "bright red" if colour == "dark blue" else "dark blue" for word, colour in COLOURS.items()}


def on_an_order(place: Place, base: Base) -> list[list[float]]:
    """Exact match on each of two tasks after each, the same inputs with labels swapped, under ``seqlora``."""
    config = tiny_config(
        adapter__r=8, adapter__alpha=16.0, training__lr=0.02, training__epochs=40, training__micro_batch=4,
        output__log_every=40,
    )  # fmt: skip
    room, matrix = room_of(base, config), []
    prompts = [Prompt("say : ", word, "") for word in COLOURS]
    tasks = [room.encoder.encode_many(prompts, list(task.values())) for task in (COLOURS, SWAPPED)]
    for at, rows in enumerate(tasks):
        learn(room, config, at, Source(rows, ["ab"[at]] * len(rows)))
        stage = StageRun(room, config, at)
        scores = []
        for task, examples in zip((COLOURS, SWAPPED), tasks, strict=True):
            said = stage.answer(examples)
            right = [answer == gold for answer, gold in zip(said, task.values(), strict=True)]
            scores.append(100 * sum(right) / len(right))
        matrix.append(scores)
        stage.close()
    return matrix


@pytest.mark.parametrize("name", narrowed(FAMILIES, ["T5", "LLaMA 3", "GPT-2"]))
def test_an_order_is_learned_and_its_first_task_forgotten(name: str, base: Base) -> None:
    [matrix] = on_ranks(1, on_an_order, base)
    assert matrix == [[100.0, 0.0], [0.0, 100.0]]


# The page.

PAGE = (Path(__file__).parents[1] / "docs/models.md").read_text()
TABLE = {
    cells[0].removeprefix("| "): cells[1:]
    for line in PAGE.splitlines()
    if len(cells := line.removesuffix(" |").split(" | ")) == 5 and cells[1].startswith("`")
}


def test_the_page_has_these_families_and_no_others() -> None:
    assert list(TABLE) == list(FAMILIES)


@every_family
def test_the_page_says_what_the_family_is(name: str) -> None:
    family, (kind, _, targets, heads) = FAMILIES[name], TABLE[name]
    assert kind == f"`{family.kind}`"
    assert targets == ", ".join(f"`{target}`" for target in family.targets)
    said = {NO_CACHE: "no: windows slide", NO_POSITIONS: "no: takes no positions", "": "yes"}
    assert heads == ("–" if family.encoder_decoder else said[family.whole])
