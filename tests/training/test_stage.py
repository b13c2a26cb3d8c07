"""Every service of a stage, as small methods use it, against direct computations; with one rank and with two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from cl_runner.adapters.layers import Layers
from cl_runner.config.schema import AdapterConfig, Section
from cl_runner.engine.process import Place
from cl_runner.engine.zero import Autocast
from cl_runner.methods.protocol import Method, Source, StagePlan
from cl_runner.models.base import Base, Layout
from cl_runner.models.batch import IGNORE, Batch, Example, collate
from cl_runner.models.forward import token_loss
from cl_runner.training.stage import Room, StageRun
from tests.distributed import on_ranks
from tests.stages import (
    END,
    LAYOUTS,
    VOCABULARY,
    Kind,
    naive_loss,
    open_stage,
    some_rows,
    tiny_config,
    tiny_model,
    tiny_room,
)

both = pytest.mark.parametrize("ranks", [1, 2])
kinds = pytest.mark.parametrize("kind", ["t5", "llama"])
Values = dict[str, Tensor]
ROWS = 5  # in micro-batches of 2: with two ranks the last one has no rows


def plain_method() -> Method:
    return Method(Section())


def opened(kind: Kind = "t5", place: Place | None = None, method: Method | None = None, **settings: Any) -> StageRun:
    config = tiny_config(**settings)
    return open_stage(tiny_room(method or plain_method(), config, place or Place(), kind), config)


def close(ours: Values, theirs: Values, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    assert list(ours) == list(theirs)
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def all_equal(first: Any, second: Any) -> bool:
    """Equality to the bit, through lists and dicts."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(all_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(all_equal, first, second))
    return bool(first == second)


def naive_gradient(stage: StageRun, kind: Kind, examples: Sequence[Example]) -> Values:
    """Of transformers' own mean loss over the label tokens of all examples."""
    named = stage.adapters.parameters()
    found = torch.autograd.grad(naive_loss(stage.adapters.model, kind, examples), list(named.values()))
    return dict(zip(named, found, strict=True))


# --- forward


@kinds
def test_forward_is_the_models_own(kind: Kind) -> None:
    stage, source = opened(kind), some_rows(3)
    batch = collate(source.examples, LAYOUTS[kind])
    scores = stage.forward(batch)
    for row, example in enumerate(source.examples):
        # Each row alone, without padding.
        if kind == "t5":
            own = stage.adapters.model(
                input_ids=torch.tensor([example.source]), decoder_input_ids=torch.tensor([[0, *example.target[:-1]]])
            ).logits[0]
        else:
            ids = torch.tensor([example.source + example.target[:-1]])
            own = stage.adapters.model(input_ids=ids).logits[0, len(example.source) - 1 :]
        ours = scores[row][batch.labels[row] != IGNORE]
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)


@kinds
def test_forward_with_other_parameters(kind: Kind) -> None:
    stage = opened(kind)
    batch = collate(some_rows(3).examples, LAYOUTS[kind])
    live = stage.adapters.parameters()
    before = {name: p.detach().clone() for name, p in live.items()}
    generator = torch.Generator().manual_seed(9)
    others = {
        name: torch.randn(p.shape, generator=generator).requires_grad_()
        for name, p in live.items()
        if name.endswith("lora_A")
    }
    replaced = stage.forward(batch, others)
    found = torch.autograd.grad(replaced.square().sum(), list(others.values()), retain_graph=True)
    assert not torch.equal(replaced, stage.forward(batch))
    assert all_equal(before, {name: p.detach() for name, p in live.items()})

    # What is not replaced is the model's own, with its gradient.
    beside = torch.autograd.grad(replaced.square().sum(), [p for n, p in live.items() if n not in others])
    stage.write({name: value.detach() for name, value in others.items()})
    really = stage.forward(batch)
    torch.testing.assert_close(replaced, really)
    expected = torch.autograd.grad(really.square().sum(), list(live.values()))
    close(
        dict(zip([*others, *(n for n in live if n not in others)], [*found, *beside], strict=True)),
        {n: g for last in ("lora_A", "lora_B") for n, g in zip(live, expected, strict=True) if n.endswith(last)},
    )


def test_forward_computes_in_bf16_where_training_does() -> None:
    config = tiny_config()
    stage = open_stage(tiny_room(plain_method(), config, Place(), bf16=True), config)
    batch = collate(some_rows(3).examples, LAYOUTS["t5"])
    assert stage.forward(batch).dtype == torch.bfloat16
    with torch.no_grad():
        stage.forward(batch)
    gradient = next(stage.gradient(lambda b: token_loss(stage.forward(b), b.labels).sum(), iter([batch])))
    assert all(value.dtype == torch.float32 and value.abs().sum() > 0 for value in gradient.values())


# --- gradient and batches


class Conditioned(Method):
    """Gives every row its own first id, and notes when it was asked."""

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.asked: list[tuple[str | None, int, int]] = []

    def condition(self, stage: Any, batch: Batch, task: str | None) -> dict[str, Tensor]:
        self.asked.append((task, batch.size, batch.labels.shape[1]))
        return {"first": batch.input_ids[:, 0], "all": batch.input_ids}


def gradients(place: Place, kind: Kind, ready: bool) -> tuple[Any, ...]:
    """All gradients of a source; the model is left in training mode, with dropout to notice."""
    config = tiny_config(adapter__dropout=0.3)
    method = Conditioned(Section())
    stage = open_stage(tiny_room(method, config, place, kind, dropout=0.3), config)
    source = some_rows(ROWS)
    stage.own = None if ready else source
    model = stage.adapters.model.train()
    model.base_model.model.lm_head.eval()
    modes = [module.training for module in model.modules()]

    def loss(batch: Batch) -> Tensor:
        assert torch.equal(batch.condition["first"], batch.input_ids[:, 0])
        assert torch.equal(batch.condition["all"], batch.input_ids)
        return (token_loss(stage.forward(batch), batch.labels) * batch.token_weights).sum()

    given = source if ready else None
    (whole,) = list(stage.gradient(loss, stage.batches(given)))
    each = list(stage.gradient(loss, stage.batches(given), per_example=True))
    first = next(iter(stage.gradient(loss, stage.batches(given), per_example=True)))
    assert modes == [module.training for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    return whole, each, first, method.asked


@both
@kinds
def test_gradients_of_a_source(ranks: int, kind: Kind) -> None:
    stage, source = opened(kind), some_rows(ROWS)
    total = sum(len(example.target) for example in source.examples)
    results = on_ranks(ranks, gradients, kind, True)
    for whole, each, first, _ in results:
        close(whole, naive_gradient(stage, kind, source.examples))
        assert len(each) == ROWS
        for ours, example in zip(each, source.examples, strict=True):
            alone = naive_gradient(stage, kind, [example])
            close(ours, {name: g * len(example.target) / total for name, g in alone.items()})
        assert all_equal(first, each[0])
    assert all(all_equal(result[:3], results[0][:3]) for result in results)
    assert all_equal([r[:3] for r in on_ranks(ranks, gradients, kind, False)], [r[:3] for r in results])


@both
def test_a_condition_is_asked_for_every_batch(ranks: int) -> None:
    # Three times over the source; every rank has as many batches, the last of them a filler where rows have run out.
    for rank, result in enumerate(on_ranks(ranks, gradients, "t5", True)):
        sizes = {1: [2, 2, 1], 2: [[2, 1], [2, 1]][rank]}[ranks]
        asked = result[3]
        assert [size for _, size, _ in asked[: len(sizes)]] == sizes
        assert len(asked) == 2 * len(sizes) + 1
        assert {task for task, _, _ in asked} == {"one"}


def learned_condition(place: Place) -> list[Values]:
    """A condition with a graph of its own, which the rows of a batch share."""

    class Routed(Method):
        def condition(self, stage: Any, batch: Batch, task: str | None) -> dict[str, Tensor]:
            first = next(iter(stage.parameters().values()))
            return {"route": first.sum().square().expand(batch.size)}

    config = tiny_config()
    stage = open_stage(tiny_room(Routed(Section()), config, place), config)
    return list(
        stage.gradient(
            lambda b: (b.condition["route"] * b.token_weights.sum(1)).sum(), stage.batches(some_rows(3)), True
        )
    )


@both
def test_rows_that_share_the_graph_of_a_condition(ranks: int) -> None:
    stage, source = opened(), some_rows(3)
    name, first = next(iter(stage.parameters().items()))
    total = sum(len(example.target) for example in source.examples)
    for each in on_ranks(ranks, learned_condition):
        for ours, example in zip(each, source.examples, strict=True):
            expected = 2 * first.detach().sum() * len(example.target) / total
            torch.testing.assert_close(ours[name], expected.expand(first.shape))


def dealt(place: Place, weight: float) -> list[tuple[list[list[int]], list[float], float]]:
    stage = opened(place=place)
    source = some_rows(ROWS, weight=weight)
    source.examples = [*source.examples, Example([5, 6, END], [7, END], weight=0.0)]
    source.tasks = [*source.tasks, "one"]
    return [
        (
            [[i for i in row if i not in (0,)] for row in batch.input_ids.tolist()],
            batch.token_weights.max(1).values.tolist(),
            float(batch.token_weights.sum()),
        )
        for batch in stage.batches(source)
    ]


@both
def test_every_row_is_in_one_batch_of_one_rank(ranks: int) -> None:
    results = on_ranks(ranks, dealt, 3.0)
    assert len({len(batches) for batches in results}) == 1
    in_order = [batch for turn in zip(*results, strict=True) for batch in turn]
    rows = [row for sources, weights, _ in in_order for row, w in zip(sources, weights, strict=True) if w]
    assert rows == [example.source for example in some_rows(ROWS).examples]
    assert sum(total for _, _, total in in_order) == pytest.approx(3.0)  # the weight of a mean of ones


# --- observation


SEEN: dict[str, list[str]] = {"t5": ["q", "k", "v", "o", "wi", "wo"], "llama": ["q_proj", "v_proj", "o_proj"]}


def observed(place: Place, kind: Kind, what: Any, same_length: bool) -> tuple[list[Any], dict[str, Tensor], Batch]:
    """What an observer sees, and what torch's own hooks beneath the adapters saw."""
    stage = opened(kind, place, adapter__target_modules=SEEN[kind])
    examples = some_rows(4, seed=place.rank).examples
    if same_length:  # as many source as label positions, so that no shape tells one mask from the other
        examples = [Example([5, 6, 7, END], [8, END]), Example([5, END], [8, 9, 9, END])]
    batch = collate(examples, LAYOUTS[kind])
    seen: list[Any] = []
    truly: dict[str, Tensor] = {}

    def note(target: str, module: Any, given: Any, out: Tensor) -> None:
        x = given[0]
        pair = stage.adapters.pair()
        truly[target] = x if what == "inputs" else out + 2.0 * (x @ pair.A[target].T) @ pair.B[target].T

    hooks = [
        layer.get_base_layer().register_forward_hook(lambda *given, t=target: note(t, *given))
        for target, layer in stage.adapters.layers.items()
    ]
    stage.forward(batch)
    with stage.observe(what, lambda *given: seen.append(given)):
        stage.forward(batch)
        with torch.no_grad():
            stage.forward(batch)
    stage.forward(batch)
    for hook in hooks:
        hook.remove()
    stage.close()
    with stage.observe(what, lambda *given: seen.append(given)):
        stage.forward(batch)  # the hooks are gone
    return seen, truly, batch


@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize("what", ["inputs", "outputs"])
@kinds
def test_observers_see_every_target_once_a_forward(kind: Kind, what: str, same_length: bool) -> None:
    _check_observed(kind, observed(Place(), kind, what, same_length))


def test_observers_on_two_ranks_see_their_own() -> None:
    for result in on_ranks(2, observed, "t5", "inputs", False):
        _check_observed("t5", result)


def _check_observed(kind: Kind, result: tuple[list[Any], dict[str, Tensor], Batch]) -> None:
    seen, truly, batch = result
    assert sorted(target for target, _, _ in seen) == sorted([*truly, *truly])
    for target, rows, counts in seen:
        assert not rows.requires_grad
        torch.testing.assert_close(rows, truly[target], rtol=1e-4, atol=1e-5)
        # T5's decoder, but for the keys and values that its cross-attention makes of the encoder's output.
        crossing = "EncDecAttention" in target and target.endswith((".k", ".v"))
        of_labels = kind == "t5" and target.startswith("decoder.") and not crossing
        expected = batch.labels != IGNORE if of_labels else batch.attention_mask.bool()
        assert torch.equal(counts, expected.long()), target


def test_observers_of_a_generation_get_no_wrong_counts() -> None:
    stage = opened("t5")
    seen: list[Any] = []
    with stage.observe("inputs", lambda *given: seen.append(given)):
        stage.generate(some_rows(2).examples)
    encoder = [(rows, counts) for target, rows, counts in seen if target.startswith("encoder.")]
    assert encoder and all(counts.shape == rows.shape[:2] for rows, counts in encoder)
    decoder = [counts for target, rows, counts in seen if "decoder" in target and "SelfAttention" in target]
    assert len(decoder) > len(encoder) and not any(counts is not None for counts in decoder)


# --- generation


def answers(place: Place, kind: Kind, rows: int, task: str | None) -> tuple[list[str], list[Any]]:
    config = tiny_config(adapter__dropout=0.5)
    method = Conditioned(Section())
    stage = open_stage(tiny_room(method, config, place, kind, dropout=0.5), config)
    stage.adapters.model.train()
    before = torch.get_rng_state()
    said = stage.generate(some_rows(rows).examples, task)
    assert torch.equal(before, torch.get_rng_state())
    assert stage.adapters.model.training
    return said, method.asked


@both
@kinds
def test_answers_are_greedy_and_in_order(ranks: int, kind: Kind) -> None:
    model = opened(kind).adapters.model.eval()
    expected = []
    for example in some_rows(7).examples:  # token by token, without cache or padding
        ids: list[int] = []
        while len(ids) < 4 and END not in ids:
            if kind == "t5":
                scores = model(input_ids=torch.tensor([example.source]), decoder_input_ids=torch.tensor([[0, *ids]]))
            else:
                scores = model(input_ids=torch.tensor([example.source + ids]))
            ids.append(int(scores.logits[0, -1].argmax()))
        expected.append(" ".join(str(i) for i in ids if i != END))
    assert len(set(expected)) > 3
    results = on_ranks(ranks, answers, kind, 7, None)
    for said, asked in results:
        assert said == expected
        assert {task for task, _, _ in asked} == {None} and {width for _, _, width in asked} == {0}
    # The same batches on any number of ranks: 3, 3 and 1 rows.
    assert sorted(size for _, asked in results for _, size, _ in asked) == [3, 4]


@both
def test_answers_for_a_task_and_for_no_rows(ranks: int) -> None:
    for _, asked in on_ranks(ranks, answers, "t5", 4, "two"):
        assert {task for task, _, _ in asked} == {"two"}
    assert [said for said, _ in on_ranks(ranks, answers, "t5", 0, None)] == [[]] * ranks


@kinds
@pytest.mark.parametrize("mode", ["verify", "generate"])
def test_answers_of_rows_with_labels(kind: Kind, mode: str) -> None:
    """Both modes answer as generation does, whatever the labels; neither shows a label to the method."""
    config = tiny_config(eval__mode=mode)
    method = Conditioned(Section())
    stage = open_stage(tiny_room(method, config, Place(), kind), config)
    free = [[*map(int, answer.split())] for answer in stage.generate(some_rows(7).examples, "one")]
    base = stage.room.base
    base.layout = replace(base.layout, end_ids=(END, free[0][2], free[1][1]))  # ends that the model really says
    said = stage.generate(some_rows(7).examples, "one")
    golds = [[*map(int, answer.split()), END] for answer in said]
    assert any(len(gold) <= 4 for gold in golds), "none ends within the limit: nothing to verify"
    rows = [example._replace(target=gold) for example, gold in zip(some_rows(7).examples, golds, strict=True)]
    rows[2] = rows[2]._replace(target=[3, END])
    rows[4] = rows[4]._replace(target_cut=True)
    done: list[int] = []
    assert stage.answer(rows, "one", done.append) == said
    assert done[-1] == 7 and {width for _, _, width in method.asked} == {0}


# --- factors and weights


@kinds
def test_factors_in_groups_of_equal_shape(kind: Kind) -> None:
    stage = opened(kind)
    groups = stage.factors()
    assert len(groups) == (1 if kind == "t5" else 2)  # LLaMA's v is narrower than its q
    assert sorted(t for group in groups for t in group.targets) == sorted(stage.adapters.layers)
    live = stage.parameters()
    for group in groups:
        assert group.past is None
        for at, target in enumerate(group.targets):
            assert torch.equal(group.A[at], live[f"{target}.lora_A"])
            assert torch.equal(group.B[at], live[f"{target}.lora_B"])
        (gradient,) = torch.autograd.grad((group.A * 3.0).sum(), [live[f"{group.targets[0]}.lora_A"]])
        assert torch.equal(gradient, torch.full_like(gradient, 3.0))


@kinds
def test_past_factors_and_the_base_weight(kind: Kind) -> None:
    stage = opened(kind)
    untouched = {
        target: layer.get_base_layer().weight.detach().clone() for target, layer in stage.adapters.layers.items()
    }
    past = []
    for number in range(2):
        past.append(stage.adapters.pair())
        stage.adapters.fold_live()
        stage.adapters.begin(f"stage {number + 2}", torch.Generator().manual_seed(number))
    for group in stage.factors():
        assert group.past is not None
        rows_A, rows_B = group.past.rows("A"), group.past.rows("B")
        for at, target in enumerate(group.targets):
            assert torch.equal(rows_A[at], torch.cat([pair.A[target] for pair in past], dim=0))
            assert torch.equal(rows_B[at], torch.cat([pair.B[target].T for pair in past], dim=0))
        assert not rows_A.requires_grad and group.A.requires_grad
    for target, weight in untouched.items():
        assert torch.equal(stage.base_weight(target), weight)
        assert not torch.equal(stage.adapters.layers[target].get_base_layer().weight, weight)


def test_targets_that_share_an_input() -> None:
    def grouped(kind: Kind, *targets: str) -> set[tuple[str, ...]]:
        config = tiny_config(adapter__target_modules=[*targets])
        return set(open_stage(tiny_room(plain_method(), config, Place(), kind, blocks=2), config).input_groups())

    t5 = grouped("t5", "q", "k", "v", "o", "wi", "wo")
    expected = set()
    for half, blocks in (("encoder", 2), ("decoder", 2)):
        for block in range(blocks):
            at = f"{half}.block.{block}.layer"
            expected |= {tuple(f"{at}.0.SelfAttention.{x}" for x in "qkv"), (f"{at}.0.SelfAttention.o",)}
            dense = f"{at}.{1 if half == 'encoder' else 2}.DenseReluDense"
            expected |= {(f"{dense}.wi",), (f"{dense}.wo",)}
            if half == "decoder":
                expected |= {(f"{at}.1.EncDecAttention.q",), (f"{at}.1.EncDecAttention.o",)}
    # All cross-attention reads the one output of the encoder.
    expected.add(tuple(f"decoder.block.{b}.layer.1.EncDecAttention.{x}" for b in range(2) for x in "kv"))
    assert t5 == expected

    llama = grouped("llama", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for block in range(2):
        at = f"model.layers.{block}"
        assert {
            tuple(f"{at}.self_attn.{x}_proj" for x in "qkv"),
            (f"{at}.self_attn.o_proj",),
            (f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"),
            (f"{at}.mlp.down_proj",),
        } <= llama
    assert len(llama) == 8


def other_stage(model: Any, targets: list[str], encoder_decoder: bool) -> StageRun:
    model.requires_grad_(False)
    layout = Layout(encoder_decoder, 0, END, (END,), 2 if encoder_decoder else None, VOCABULARY)
    config = AdapterConfig(target_modules=targets, r=2)
    adapters = Layers(model, config, name_or_path="other", encoder_decoder=encoder_decoder)
    root = Autocast(adapters.model, torch.device("cpu"), False)
    base = Base(model, None, layout, "other", "random")  # type: ignore[arg-type]
    room = Room(base, None, adapters, plain_method(), Place(), root, (StagePlan("one", ("one",)),))  # type: ignore[arg-type]
    return StageRun(room, tiny_config(), 0)


def test_shared_inputs_and_masks_of_other_families() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    stage = other_stage(gpt2, ["c_attn", "c_proj", "c_fc"], False)
    assert all(len(group) == 1 for group in stage.input_groups()) and len(stage.input_groups()) == 4

    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, d_model=16, **sizes, **heads))
    stage = other_stage(bart, ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"], True)
    cross = [f"model.decoder.layers.{n}.encoder_attn.{x}_proj" for n in range(2) for x in "kv"]
    assert sorted(cross) in [sorted(group) for group in stage.input_groups()]
    assert [len(group) for group in stage.input_groups() if "out_proj" in group[0] or "fc1" in group[0]] == [1] * 8
    batch = collate([Example([5, 6, 7, END], [8, END]), Example([5, END], [8, 9, 9, END])], stage.room.base.layout)
    seen: dict[str, Any] = {}
    with stage.observe("inputs", lambda target, rows, counts: seen.update({target: counts})):
        stage.input_groups()  # no forward that an observer should see
        stage.looking.shared_inputs()
        assert not seen
        stage.forward(batch)
    for target, counts in seen.items():
        of_source = target in cross or ".encoder." in target
        assert torch.equal(counts, (batch.attention_mask.bool() if of_source else batch.labels != IGNORE).long()), (
            target
        )


# --- ranks


def reduced(place: Place) -> dict[str, Any]:
    stage = opened(place=place)
    own = torch.arange(6.0).view(2, 3) + 10 * place.rank
    kept = own.clone()
    found = {"sum": stage.sum(own.T), "mean": stage.mean(own), "broadcast": stage.broadcast(own.T)}
    found["counts"] = stage.sum(torch.tensor([1, place.rank]))
    assert torch.equal(own, kept)
    found["rng"] = torch.rand(3, generator=stage.rng("x"))
    found["gather"] = stage.gather({place.rank: f"from {place.rank}"})
    found["facts"] = (stage.rank, stage.ranks, str(stage.device))
    return found


@both
def test_over_the_ranks(ranks: int) -> None:
    results = on_ranks(ranks, reduced)
    own = torch.arange(6.0).view(2, 3)
    for rank, found in enumerate(results):
        assert torch.equal(found["sum"], (own * ranks + (10 if ranks == 2 else 0)).T)
        assert torch.equal(found["mean"], own + (5 if ranks == 2 else 0))
        assert torch.equal(found["broadcast"], own.T)
        assert found["counts"].tolist() == [ranks, ranks - 1]
        assert found["gather"] == {r: f"from {r}" for r in range(ranks)}
        assert found["facts"] == (rank, ranks, "cpu")
        assert torch.equal(found["rng"], results[0]["rng"])


def test_a_generator_comes_from_seed_stage_and_purpose_alone() -> None:
    config = tiny_config()
    room = tiny_room(plain_method(), config, Place(), order=("one", "two"))

    def draw(seed: int, index: int, purpose: str) -> list[float]:
        stage = StageRun(room, config.model_copy(update={"seed": seed}), index)
        before = torch.get_rng_state()
        drawn = torch.rand(2, generator=stage.rng(purpose)).tolist()
        assert torch.equal(before, torch.get_rng_state())
        stage.close()
        return drawn

    assert draw(1, 0, "x") == draw(1, 0, "x")
    different = [draw(1, 0, "x"), draw(2, 0, "x"), draw(1, 1, "x"), draw(1, 0, "y")]
    assert len({tuple(drawn) for drawn in different}) == 4


# --- without an engine


def test_writes_and_moments_without_an_engine() -> None:
    stage = opened()
    name, parameter = next(iter(stage.parameters().items()))
    stage.write({name: torch.full(parameter.shape, 2.5)})
    assert torch.equal(parameter, torch.full_like(parameter, 2.5))
    assert stage.moments(name) is None
    assert (stage.progress.step, stage.progress.steps, stage.progress.loss, stage.progress.share) == (0, 0, None, 1.0)


def test_parameters_are_those_that_train() -> None:
    stage = opened()
    assert sorted(stage.parameters()) == sorted(f"{t}.lora_{x}" for t in stage.adapters.layers for x in "AB")
    stage.adapters.train(False)
    assert stage.parameters() == {}


def test_a_stage_without_rows_says_so() -> None:
    with pytest.raises(AssertionError, match="no rows of its own"):
        list(opened().batches())
    assert list(opened().batches(Source([], []))) == []


def test_models_differ_enough_to_test_with() -> None:
    """The random models answer differently to different inputs; otherwise the tests above would see little."""
    for kind in ("t5", "llama"):
        stage = opened(kind)  # type: ignore[arg-type]
        first, second = (stage.forward(collate(some_rows(1, seed).examples, LAYOUTS[kind])) for seed in (0, 1))
        assert not torch.allclose(first[:, -1], second[:, -1], atol=1e-2)
        with torch.no_grad():
            without = tiny_model(kind)  # type: ignore[arg-type]
            assert without.training is False
