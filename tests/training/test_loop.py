"""A stage's training against a naive loop: the whole global batch at once, transformers' loss, torch's optimizer."""

from __future__ import annotations

import gc
import math
import random
import threading
import weakref
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from cl_runner.config.schema import RunConfig, Section, TrainingConfig
from cl_runner.engine.optim import ParameterGroup
from cl_runner.engine.process import Place
from cl_runner.errors import TrainingError
from cl_runner.methods.protocol import Method, Source
from cl_runner.models.batch import Batch
from cl_runner.models.forward import token_loss
from cl_runner.models.token_cache import Encoded, Joined
from cl_runner.terminal.stopping import Stopped
from cl_runner.training.loop import train_stage
from cl_runner.training.sampling import BatchPlan, StepWeights, derived_seed
from cl_runner.training.schedule import learning_rate
from cl_runner.training.stage import StageRun
from tests.breadth import wide
from tests.distributed import on_ranks
from tests.stages import (
    Kind,
    Outcome,
    distance,
    naive_loss,
    open_stage,
    some_rows,
    tiny_config,
    tiny_room,
    train,
    widths,
)

both = pytest.mark.parametrize("ranks", [1, 2])
Values = dict[str, Tensor]
ROWS = 10  # steps of 4, 4 and 2: the last one leaves the second of two ranks without rows


# --- the batch arithmetic


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("rows", "global_batch", "micro"), [(10, 4, 2), (7, 8, 8), (64, 64, 8), (5, 1, 4), (9, 6, 4), (50, 4, 2)]
)
@pytest.mark.parametrize(("window", "mixed"), [(1, False), (3, False), (8, False), (8, True)])
def test_every_row_is_trained_once_an_epoch(
    rows: int, global_batch: int, micro: int, ranks: int, window: int, mixed: bool
) -> None:
    training = TrainingConfig(global_batch=global_batch, micro_batch=micro, epochs=3, length_window=window)
    plan = BatchPlan.make(rows, training, ranks)
    steps = list(plan.step_rows(1, 2, varied(rows), mixed))
    assert len(steps) == plan.steps == 3 * math.ceil(rows / global_batch)
    for epoch in range(3):
        mine = steps[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        assert sorted(row for step in mine for row in step) == list(range(rows))
        assert [len(step) for step in mine[:-1]] == [global_batch] * (plan.steps_per_epoch - 1)
    for step in steps:
        dealt: dict[int, list[int]] = {}
        for rank in range(ranks):
            mine_now = list(plan.micro_batches(step, rank))
            assert len(mine_now) == plan.accumulation  # the same on every rank, whatever the rows
            dealt.update(mine_now)
        assert [row for number in sorted(dealt) for row in dealt[number]] == step
        assert max(map(len, dealt.values())) <= min(micro, plan.micro_batch)
        assert sorted(dealt) == list(range(ranks * plan.accumulation))


def varied(rows: int) -> list[int]:
    """Lengths as of short labels and long reviews; many equal ones."""
    dice = random.Random(rows)
    return [int(4 * 1.6 ** dice.gauss(3, 1.5)) for _ in range(rows)]


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_order_of_rows_comes_from_seed_stage_epoch_and_lengths(window: int, mixed: bool) -> None:
    def order(seed: int, index: int, ranks: int = 1, scale: int = 1) -> list[list[int]]:
        training = TrainingConfig(global_batch=4, micro_batch=2, epochs=2, length_window=window)
        lengths = [scale * length for length in varied(40)]
        return list(BatchPlan.make(40, training, ranks).step_rows(seed, index, lengths, mixed))

    assert order(1, 0) == order(1, 0, 2)
    assert order(1, 0) != order(2, 0) and order(1, 0) != order(1, 1)
    assert order(1, 0)[:10] != order(1, 0)[10:]
    assert (order(1, 0) == order(1, 0, scale=-1)) == (window == 1)


def permutation(rows: int, seed: int, index: int, epoch: int) -> list[int]:
    """An epoch's plain shuffle."""
    generator = torch.Generator().manual_seed(derived_seed(seed, index, "rows", epoch))
    return torch.randperm(rows, generator=generator).tolist()


def test_a_window_of_one_is_the_plain_shuffle() -> None:
    plan = BatchPlan.make(23, TrainingConfig(global_batch=4, epochs=2, length_window=1), 1)
    for mixed in (False, True):
        steps = list(plan.step_rows(5, 1, varied(23), mixed))
        for epoch in range(2):
            rows = permutation(23, 5, 1, epoch)
            assert steps[6 * epoch : 6 * epoch + 6] == [rows[i : i + 4] for i in range(0, 23, 4)]


def test_rows_of_several_tasks_are_drawn_plainly_and_sorted_within_a_step() -> None:
    lengths = varied(23)
    plan = BatchPlan.make(23, TrainingConfig(global_batch=4), 1)
    rows = permutation(23, 5, 1, 0)
    plain = [sorted(rows[i : i + 4], key=lambda row: lengths[row]) for i in range(0, 23, 4)]
    assert list(plan.step_rows(5, 1, lengths, mixed=True)) == plain


def test_a_step_is_a_piece_of_its_windows_sorted_rows() -> None:
    """Three windows of three steps, the last of one; then the short step, of rows as the shuffle left them over."""
    lengths = varied(30)
    assert len(set(lengths)) < 25  # there are ties
    plan = BatchPlan.make(30, TrainingConfig(global_batch=4, length_window=3), 1)
    steps = list(plan.step_rows(5, 1, lengths))
    rows = permutation(30, 5, 1, 0)
    expected = []
    for start, end in ((0, 12), (12, 24), (24, 28)):
        by_length = sorted(range(start, end), key=lambda at: (lengths[rows[at]], at))
        expected += [[rows[at] for at in by_length[i : i + 4]] for i in range(0, end - start, 4)]
    assert sorted(steps[:-1]) == sorted(expected)
    assert steps[:-1] != expected  # nor do steps of a window come shortest first
    assert steps[-1] == sorted(rows[28:], key=lambda row: lengths[row])


def padding(steps: list[list[int]], lengths: list[int], micro: int) -> int:
    parts = [step[i : i + micro] for step in steps for i in range(0, len(step), micro)]
    return sum(max(lengths[row] for row in part) - lengths[row] for part in parts for row in part)


def test_windows_pad_less() -> None:
    lengths = varied(2000)

    def padded(window: int, mixed: bool = False) -> float:
        plan = BatchPlan.make(2000, TrainingConfig(global_batch=64, length_window=window), 1)
        return padding(list(plan.step_rows(1, 0, lengths, mixed)), lengths, plan.micro_batch) / sum(lengths)

    assert padded(8) < 0.1 < 0.2 < padded(8, mixed=True) < 0.5 < 0.8 < padded(1), (
        padded(8),
        padded(8, True),
        padded(1),
    )


# --- the learning rate


def rates(steps: int, **training: Any) -> list[float]:
    settings = TrainingConfig.model_validate({"lr": 2.0, **training})
    return [learning_rate(settings, step, steps) for step in range(steps)]


def test_schedules() -> None:
    assert rates(4) == [2.0] * 4
    assert rates(4, schedule="linear") == pytest.approx([2.0, 1.5, 1.0, 0.5])
    cosine = [1 + math.cos(math.pi * step / 4) for step in range(4)]
    assert rates(4, schedule="cosine") == pytest.approx(cosine)


def test_warm_up() -> None:
    assert rates(6, warmup=2) == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert rates(6, warmup=2, schedule="linear") == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 0.5])
    assert rates(10, warmup=0.3) == rates(10, warmup=3)
    assert rates(10, warmup=0.25) == rates(10, warmup=3)  # a share is whole steps, and never leads above the rate
    assert rates(100, warmup=0.07) == rates(100, warmup=7)
    assert rates(10, warmup=0.01) == rates(10, warmup=1) == [2.0] * 10
    assert rates(3, warmup=6) == pytest.approx([1 / 3, 2 / 3, 1.0])
    for warmup in (0.0, 0.1, 0.55, 1, 2.5, 7, 20):
        for schedule in ("constant", "linear", "cosine"):
            assert all(0 < rate <= 2.0 for rate in rates(7, warmup=warmup, schedule=schedule))


# --- the weights of the loss


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("mean", ["global", "micro"])
def test_weights_make_the_mean(mean: str, ranks: int) -> None:
    dice = random.Random(ranks)
    tokens = [dice.randint(1, 9) for _ in range(11)]
    losses = [[dice.random() for _ in range(count)] for count in tokens]
    plan = BatchPlan.make(11, TrainingConfig(global_batch=8, micro_batch=2), ranks)
    weights = StepWeights(plan, mean, tokens, [1.0] * 11)
    for step in plan.step_rows(0, 0, tokens):  # of 8 and of 3 rows
        ours = 0.0
        for rank in range(ranks):
            for _, rows in plan.micro_batches(step, rank):
                given = weights.of(step, rows)
                ours += sum(w * sum(losses[row]) for w, row in zip(given, rows, strict=True)) / ranks
        if mean == "global":
            flat = [loss for row in step for loss in losses[row]]
            expected = sum(flat) / len(flat)
        else:
            micro = [step[i : i + 2] for i in range(0, len(step), 2)]
            means = [sum(sum(losses[r]) for r in rows) / sum(tokens[r] for r in rows) for rows in micro]
            expected = sum(means) / len(means)
        assert ours == pytest.approx(expected)


# --- training as a whole


def plain_method() -> Method:
    return Method(Section())


class Penalised(Method):
    """A penalty on A, as large as the loss; in fp32 whatever the precision."""

    def penalty(self, stage: Any) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        total: Tensor = 0.5 * sum(group.A.abs().sum() for group in stage.factors())  # type: ignore[assignment]
        assert total.dtype == torch.float32
        return total


class ByTheLoss(Method):
    """A penalty in proportion to the loss of the step."""

    def penalty(self, stage: Any) -> Tensor:
        total: Tensor = sum(group.A.square().sum() for group in stage.factors())  # type: ignore[assignment]
        return stage.progress.loss * total


class Replay(Method):
    """Two sources: the own rows, and older ones at a quarter of the weight."""

    def training_data(self, stage: Any, own: Source) -> list[Source]:
        return [own, old_rows()]


def old_rows() -> Source:
    return some_rows(6, seed=5, task="old", weight=0.25)


METHODS: dict[str, type[Method]] = {
    "plain": Method,
    "penalised": Penalised,
    "by the loss": ByTheLoss,
    "replay": Replay,
}


def trained(place: Place, config: RunConfig, method: str = "plain", kind: Kind = "t5") -> Outcome:
    stage = open_stage(tiny_room(METHODS[method](Section()), config, place, kind), config)
    outcome = train(stage, some_rows(ROWS))
    outcome.stage = None  # type: ignore[assignment] (it does not travel between processes)
    return outcome


def naive(
    config: RunConfig, method: str = "plain", kind: Kind = "t5", without: int | None = None
) -> tuple[Values, list[float], list[float]]:
    """Parameters, losses and gradient norms of the same training, done the plain way; without a step (from 0)."""
    stage = open_stage(tiny_room(plain_method(), config, Place(), kind), config)
    training, model, named = config.training, stage.adapters.model, stage.adapters.parameters()
    examples = list(some_rows(ROWS).examples)
    shares = [1.0] * ROWS
    if method == "replay":
        examples += old_rows().examples
        shares += [0.25] * 6
    optimizer = torch.optim.AdamW(named.values(), weight_decay=training.weight_decay)
    plan = BatchPlan.make(len(examples), training, 1)
    losses, norms = [], []
    for number, rows in enumerate(plan.step_rows(config.seed, 0, widths(examples), method == "replay")):
        if training.loss_mean == "micro":
            parts = [rows[i : i + training.micro_batch] for i in range(0, len(rows), training.micro_batch)]
            loss = sum(naive_loss(model, kind, [examples[r] for r in part]) for part in parts) / len(parts)
        else:
            total = sum(len(examples[row].target) for row in rows)
            loss = sum(
                shares[row] * len(examples[row].target) / total * naive_loss(model, kind, [examples[row]])
                for row in rows
            )
        assert isinstance(loss, Tensor)
        losses.append(float(loss.detach()))
        A = [p for name, p in named.items() if name.endswith("lora_A")]
        if method == "penalised":
            loss = loss + 0.5 * sum(p.abs().sum() for p in A)
        if method == "by the loss":
            loss = loss + loss.detach() * sum(p.square().sum() for p in A)
        for parameter, gradient in zip(named.values(), torch.autograd.grad(loss, list(named.values())), strict=True):
            parameter.grad = gradient
        norms.append(float(nn.utils.clip_grad_norm_(named.values(), training.clip or math.inf)))
        optimizer.param_groups[0]["lr"] = learning_rate(training, number, plan.steps)
        if number != without:
            optimizer.step()
    stage.close()
    assert not training.clip or max(norms) > 1.2 * training.clip  # else nothing is clipped
    return {name: p.detach() for name, p in named.items()}, losses, norms


FULL = {"epochs": 2, "weight_decay": 0.1, "warmup": 0.4, "schedule": "linear", "clip": 0.1}


def settings(**training: Any) -> RunConfig:
    return tiny_config(**{f"training__{key}": value for key, value in training.items()})


def same_training(ours: Outcome, theirs: tuple[Values, list[float], list[float]], within: float = 1e-3) -> None:
    values, losses, norms = theirs
    assert ours.losses == pytest.approx(losses, rel=1e-4)
    assert ours.norms == pytest.approx(norms, rel=1e-3)
    assert distance(ours.parameters, values) < within


@both
@pytest.mark.parametrize(
    ("method", "training"),
    [
        ("plain", FULL),
        ("plain", {"loss_mean": "micro", "epochs": 2}),
        pytest.param("penalised", {"micro_batch": 2}, marks=wide),
        ("penalised", {"micro_batch": 1, "global_batch": 6}),  # accumulation 6 on one rank, 3 on two
        pytest.param("penalised", {"micro_batch": 4}, marks=wide),
        ("by the loss", {"micro_batch": 1}),
        ("replay", {"epochs": 2}),
    ],
)
def test_training_is_that_of_the_plain_loop(ranks: int, method: str, training: dict[str, Any]) -> None:
    config = settings(**training)
    expected = naive(config, method)
    for ours in on_ranks(ranks, trained, config, method):
        same_training(ours, expected)
        assert ours.trained.steps == len(expected[1]) and ours.trained.skipped == 0
        assert (ours.trained.penalty is not None) == (method in ("penalised", "by the loss"))


class Kept(Penalised):
    """Keeps the gradients of each step."""

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.given: list[Values] = []

    def edit_gradients(self, stage: Any, gradients: Values) -> None:
        self.given.append({name: gradient.clone() for name, gradient in gradients.items()})


def first_gradients(place: Place, config: RunConfig) -> tuple[Values, float | None, int]:
    method = Kept(Section())
    outcome = train(open_stage(tiny_room(method, config, place), config), some_rows(config.training.global_batch))
    return method.given[0], outcome.rows[0]["penalty"], outcome.trained.plan.accumulation


def added_at_every_micro_batch(config: RunConfig, ranks: int) -> tuple[Values, Values]:
    """The loss divided by the accumulation, then the penalty, a backward; the mean over ranks. And of losses alone."""
    stage = open_stage(tiny_room(plain_method(), config, Place()), config)
    examples, micro = some_rows(config.training.global_batch).examples, config.training.micro_batch
    plan = BatchPlan.make(len(examples), config.training, ranks)
    (rows,) = plan.step_rows(config.seed, 0, widths(examples))
    named = stage.adapters.parameters()
    both = []
    for weight in (0.5, 0.0):
        for parameter in named.values():
            parameter.grad = None
        for number in range(0, len(rows), micro):
            loss = naive_loss(stage.adapters.model, "t5", [examples[row] for row in rows[number : number + micro]])
            penalty = sum(p.abs().sum() for name, p in named.items() if name.endswith("lora_A"))
            (loss / plan.accumulation + weight * penalty).backward()
        both.append({name: parameter.grad / ranks for name, parameter in named.items()})
    stage.close()
    return both[0], both[1]


@both
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_penalty_at_every_micro_batch_counts_as_often(ranks: int, accumulation: int) -> None:
    shape = {"micro_batch": 2, "global_batch": 2 * ranks * accumulation, "loss_mean": "micro", "length_window": 1}
    wanted, losses = added_at_every_micro_batch(settings(**shape), ranks)
    given = on_ranks(ranks, first_gradients, settings(**shape, penalty_at="micro"))
    once = on_ranks(ranks, first_gradients, settings(**shape))
    for (found, penalty, took), (other, single, _) in zip(given, once, strict=True):
        assert took == accumulation
        assert distance(found, wanted) < 1e-4
        assert penalty == pytest.approx(accumulation * single)  # what is logged is what was added
        for name, loss in losses.items():
            assert torch.allclose(found[name] - loss, accumulation * (other[name] - loss), atol=1e-5)


@both
def test_training_a_decoder_only_model(ranks: int) -> None:
    config = settings(**FULL)
    expected = naive(config, kind="llama")
    for ours in on_ranks(ranks, trained, config, "plain", "llama"):
        same_training(ours, expected)


@both
def test_training_with_the_optimizer_states_in_cpu_memory(ranks: int) -> None:
    config = settings(**FULL, offload_optimizer=True)
    for ours in on_ranks(ranks, trained, config):
        same_training(ours, naive(config))


def two_stages(place: Place, config: RunConfig) -> tuple[Values, Values, list[Any]]:
    """The second stage trains the pair of the first on; both end in a short step with accumulation left over."""
    room = tiny_room(plain_method(), config, place, order=("one", "two"))
    first = train(open_stage(room, config), some_rows(ROWS))
    stage = StageRun(room, config, 1)
    room.adapters.rename("two")
    second = train(stage, some_rows(ROWS, seed=3))
    return first.parameters, second.parameters, second.losses


@both
def test_nothing_of_a_stage_leaks_into_the_next(ranks: int) -> None:
    config = settings(micro_batch=1)
    for first, second, losses in on_ranks(ranks, two_stages, config):
        # The second stage alone, in a fresh room, from where the first one ended.
        room = tiny_room(plain_method(), config, Place(), order=("one", "two"))
        stage = open_stage(room, config, 1)
        stage.write(first)
        (again,) = on_ranks(1, partial(_train_here, stage=stage))
        assert losses == pytest.approx(again.losses, rel=1e-5)
        assert distance(second, again.parameters) < 1e-3


def _train_here(place: Place, stage: StageRun) -> Outcome:
    return train(stage, some_rows(ROWS, seed=3))


def test_no_epochs_train_nothing() -> None:
    config = settings(epochs=0)
    start = open_stage(tiny_room(plain_method(), config, Place()), config).adapters.parameters()
    (ours,) = on_ranks(1, trained, config)
    assert ours.trained.steps == 0 and ours.trained.loss is None and ours.rows == []
    assert all(torch.equal(ours.parameters[name], start[name]) for name in start)


# --- micro-batches from the background


class Drawing(Method):
    """A condition that draws random numbers: it belongs between the micro-batch's seed and its forward."""

    threads: ClassVar[list[threading.Thread]] = []

    def condition(self, stage: Any, batch: Batch, task: str | None) -> dict[str, Tensor]:
        self.threads.append(threading.current_thread())
        return {"noise": torch.rand(batch.size)}

    def loss(self, stage: Any, batch: Batch) -> Tensor:
        return super().loss(
            stage, replace(batch, token_weights=batch.token_weights * batch.condition["noise"][:, None])
        )


def drawn(place: Place, config: RunConfig) -> Outcome:
    stage = open_stage(tiny_room(Drawing(Section()), config, place, dropout=0.2), config)
    return train(stage, some_rows(ROWS))


def test_prefetched_training_is_that_without_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(epochs=3, micro_batch=1)
    (ours,) = on_ranks(1, drawn, config)
    assert Drawing.threads and set(Drawing.threads) == {threading.main_thread()}
    made_in = []

    def plain(make: Any, items: Any, *_: Any) -> Any:
        for item in items:
            made_in.append(threading.current_thread())
            yield make(item)

    monkeypatch.setattr("cl_runner.training.loop.prefetched", plain)
    (theirs,) = on_ranks(1, drawn, config)
    assert set(made_in) == {threading.main_thread()}  # the second training was another one
    assert ours.losses == theirs.losses and ours.norms == theirs.norms
    assert all(torch.equal(ours.parameters[name], value) for name, value in theirs.parameters.items())


class Broken(Exception):
    pass


class Stops(Method):
    def after_step(self, stage: Any) -> None:
        if stage.progress.step == 2:
            raise Stopped("SIGINT")


class Refusing(StageRun):
    """Cannot pad its fourth micro-batch."""

    padded_so_far = 0

    def padded(self, examples: Any, weights: Any, tasks: Any = ()) -> Batch:
        self.padded_so_far += 1
        if self.padded_so_far == 4:
            raise Broken
        return super().padded(examples, weights, tasks)


@pytest.mark.parametrize(("method", "kind", "error"), [(Stops, StageRun, Stopped), (Method, Refusing, Broken)])
def test_what_ends_a_training_ends_its_thread(method: type[Method], kind: type[StageRun], error: type) -> None:
    config = settings(epochs=50)

    def begin(place: Place) -> list[int]:
        stage = kind(tiny_room(method(Section()), config, place), config, 0)
        stage.room.method.build(stage)
        with pytest.raises(error):
            train(stage, some_rows(ROWS))
        stage.close()
        return [stage.step, *(1 for thread in threading.enumerate() if thread.name.startswith("prefetch"))]

    assert on_ranks(1, begin) == [[2 if method is Stops else 1]]  # two micro-batches a step


@both
def test_rows_in_columns_train_as_rows_do(ranks: int) -> None:
    config = settings(epochs=2)
    for ours, theirs in zip(on_ranks(ranks, in_columns, config), on_ranks(ranks, trained, config), strict=True):
        assert ours.losses == theirs.losses
        assert all(torch.equal(ours.parameters[name], value) for name, value in theirs.parameters.items())


def in_columns(place: Place, config: RunConfig) -> Outcome:
    stage = open_stage(tiny_room(plain_method(), config, place), config)
    own = some_rows(ROWS)
    columns = replace(own, examples=Joined([Encoded.of(own.examples[:3]), Encoded.of(own.examples[3:])]))
    for ours, theirs in zip(stage.batches(columns), stage.batches(own), strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.token_weights, theirs.token_weights)
    outcome = train(stage, columns)
    outcome.stage = None  # type: ignore[assignment]
    return outcome


# --- the hooks, in their order


class Recorder(Method):
    """Notes every hook with the steps done."""

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.events: list[Any] = []

    def note(self, what: str, stage: Any, *more: Any) -> None:
        self.events.append((what, stage.progress.step, *more))

    def parameter_groups(self, stage: Any) -> list[ParameterGroup]:
        self.note("parameter_groups", stage)
        named = stage.parameters()
        whole = {name: named.pop(name) for name in list(named)[:1]}
        return [ParameterGroup(named), ParameterGroup(whole, rule="whole")]

    def begin_task(self, stage: Any) -> None:
        assert not stage.adapters.model.training
        assert sum(batch.size for batch in stage.batches()) == 4  # the data are at hand
        self.events.clear()
        self.note("begin_task", stage)

    def training_data(self, stage: Any, own: Source) -> list[Source]:
        self.note("training_data", stage)
        return [own]

    def condition(self, stage: Any, batch: Batch, task: str | None) -> dict[str, Tensor]:
        self.note("condition", stage, task)
        return {}

    def loss(self, stage: Any, batch: Batch) -> Tensor:
        assert stage.adapters.model.training
        self.note("loss", stage)
        return super().loss(stage, batch)

    def penalty(self, stage: Any) -> Tensor | None:
        self.note("penalty", stage)
        return None

    def edit_gradients(self, stage: Any, gradients: Values) -> None:
        assert list(gradients) == list(stage.parameters())[1:] + list(stage.parameters())[:1]
        self.note("edit_gradients", stage)

    def whole_step(self, stage: Any, name: str, gradient: Tensor, lr: float) -> Tensor:
        self.note("whole_step", stage, name)
        return torch.zeros_like(gradient)

    def after_step(self, stage: Any) -> None:
        self.note("after_step", stage)

    def end_task(self, stage: Any) -> None:
        assert not stage.adapters.model.training
        assert stage.engine is not None
        self.note("end_task", stage)


def test_hooks_run_in_their_order() -> None:
    config = settings(global_batch=2, micro_batch=1)
    method = Recorder(Section())
    stage = open_stage(tiny_room(method, config, Place()), config)
    first = next(iter(stage.parameters()))
    through: list[Any] = []
    stage.room.root.register_forward_pre_hook(lambda *given: through.append(given))
    on_ranks(1, lambda place: train(stage, some_rows(4)))
    assert len(through) == 4  # each micro-batch goes through the engine once; the model in it is called raw
    micro = [("condition", "one"), ("loss",)]
    expected: list[Any] = [("begin_task", 0), ("training_data", 0), ("parameter_groups", 0)]
    for step in range(2):
        expected += [(name, step, *more) for name, *more in [*micro, *micro]]
        expected += [("penalty", step), ("edit_gradients", step), ("whole_step", step, first), ("after_step", step + 1)]
    assert method.events == [*expected, ("end_task", 2)]


class Reshaping(Method):
    """Decides in ``begin_task``, from the data, that A is another matrix and does not train; writes it again later."""

    def end_task(self, stage: Any) -> None:
        self.drawn.append(float(torch.rand(())))
        names = [name for name in stage.adapters.parameters() if name.endswith("lora_A")]
        assert stage.moments(names[0]) is None
        stage.write({name: stage.adapters.parameters()[name] + 0.25 for name in names})

    def begin_task(self, stage: Any) -> None:
        self.drawn = [float(torch.rand(()))]
        with torch.no_grad():
            self.logits = stage.forward(next(stage.batches()))
        for name, parameter in stage.parameters().items():
            if name.endswith("lora_A"):
                parameter.data = torch.full_like(parameter, 0.5)
                parameter.requires_grad_(False)


def reshaped(place: Place) -> tuple[Values, list[float]]:
    config, method = settings(), Reshaping(Section())
    torch.manual_seed(place.rank)
    stage = open_stage(tiny_room(method, config, place), config)
    return train(stage, some_rows(ROWS)).parameters, method.drawn


@both
def test_begin_task_may_still_decide_what_trains(ranks: int) -> None:
    config = settings()
    start = open_stage(tiny_room(plain_method(), config, Place()), config).adapters.parameters()
    results = on_ranks(ranks, reshaped)
    for values, drawn in results:
        assert drawn == results[0][1] and len(set(drawn)) == 2  # both hooks draw alike on all ranks
        for name, value in values.items():
            if name.endswith("lora_A"):
                assert torch.equal(value, torch.full_like(value, 0.75))
            else:
                assert not torch.equal(value, start[name])


def test_begin_task_sees_the_same_model_in_a_fresh_process_as_after_a_stage() -> None:
    """New LoRA layers are in training mode: with dropout, unless they are put out of it."""
    config = tiny_config(adapter__dropout=0.5)
    method = Reshaping(Section())
    stage = open_stage(tiny_room(method, config, Place(), dropout=0.5), config)
    on_ranks(1, lambda place: train(stage, some_rows(ROWS)))
    clean = open_stage(tiny_room(plain_method(), config, Place()), config)
    clean.adapters.model.eval()
    torch.testing.assert_close(method.logits, clean.forward(next(clean.batches(some_rows(ROWS)))).detach())


# --- what a method may do to a step


class Whole(Method):
    """A by plain gradient descent of its own, B by sgd; gradients doubled first, those of A's first row gone."""

    def parameter_groups(self, stage: Any) -> list[ParameterGroup]:
        named = stage.parameters()
        A = {name: p for name, p in named.items() if name.endswith("lora_A")}
        B = {name: p for name, p in named.items() if name.endswith("lora_B")}
        return [ParameterGroup(A, rule="whole", lr_scale=3.0), ParameterGroup(B, rule="sgd", lr_scale=0.5)]

    def edit_gradients(self, stage: Any, gradients: Values) -> Values:
        return {name: edited(name, gradient) for name, gradient in gradients.items()}

    def whole_step(self, stage: Any, name: str, gradient: Tensor, lr: float) -> Tensor:
        assert stage.parameters()[name].shape == gradient.shape
        return -lr * gradient


class WholeFirst(Whole):
    edits_before_clip = True


def edited(name: str, gradient: Tensor) -> Tensor:
    doubled = 2.0 * gradient
    if name.endswith("lora_A"):
        doubled[0] = 0.0
    return doubled


def by_whole(place: Place, config: RunConfig, first: bool) -> tuple[Values, list[float]]:
    stage = open_stage(tiny_room((WholeFirst if first else Whole)(Section()), config, place), config)
    outcome = train(stage, some_rows(ROWS))
    return outcome.parameters, outcome.norms


@both
@pytest.mark.parametrize("first", [False, True], ids=["clipped first", "edited first"])
def test_whole_steps_and_edits(ranks: int, first: bool) -> None:
    config = settings(lr=1.0, clip=0.05, epochs=2, schedule="linear", micro_batch=1)
    stage = open_stage(tiny_room(plain_method(), config, Place()), config)
    named = stage.adapters.parameters()
    plan = BatchPlan.make(ROWS, config.training, 1)
    examples = some_rows(ROWS).examples
    norms = []
    for number, rows in enumerate(plan.step_rows(config.seed, 0, widths(examples))):
        loss = naive_loss(stage.adapters.model, "t5", [examples[row] for row in rows])
        for (name, p), gradient in zip(named.items(), torch.autograd.grad(loss, list(named.values())), strict=True):
            p.grad = edited(name, gradient) if first else gradient
        norms.append(float(nn.utils.clip_grad_norm_(named.values(), 0.05)))
        assert norms[-1] > 0.06
        lr = learning_rate(config.training, number, plan.steps)
        for name, p in named.items():
            assert p.grad is not None
            step = p.grad if first else edited(name, p.grad)  # after the clip, and not clipped again
            p.data -= lr * (3.0 if name.endswith("lora_A") else 0.5) * step
    expected = {name: p.detach() for name, p in named.items()}
    for values, logged in on_ranks(ranks, by_whole, config, first):
        assert distance(values, expected) < 1e-4 and logged == pytest.approx(norms, rel=1e-3)


class Writing(Method):
    """Halves B after every step, through the only write that lasts; reads and resets Adam's moments."""

    def after_step(self, stage: Any) -> None:
        named = stage.parameters()
        stage.write({name: 0.5 * p.detach() for name, p in named.items() if name.endswith("lora_B")})
        for name in named:
            moments = stage.moments(name)
            assert moments is not None and moments["exp_avg"].shape == named[name].shape
            stage.set_moments(name, {"exp_avg": torch.zeros_like(moments["exp_avg"])})

    def end_task(self, stage: Any) -> None:
        stage.write({name: p.detach() + 1.0 for name, p in stage.parameters().items() if name.endswith("lora_A")})


def by_writing(place: Place, config: RunConfig) -> Values:
    stage = open_stage(tiny_room(Writing(Section()), config, place), config)
    return train(stage, some_rows(ROWS)).parameters


@both
def test_writes_and_moments_during_training(ranks: int) -> None:
    config = settings(epochs=2)
    stage = open_stage(tiny_room(plain_method(), config, Place()), config)
    named = stage.adapters.parameters()
    optimizer = torch.optim.AdamW(named.values(), lr=config.training.lr, weight_decay=0.0)
    examples = some_rows(ROWS).examples
    for rows in BatchPlan.make(ROWS, config.training, 1).step_rows(config.seed, 0, widths(examples)):
        optimizer.zero_grad()
        naive_loss(stage.adapters.model, "t5", [examples[row] for row in rows]).backward()
        optimizer.step()
        for name, parameter in named.items():
            optimizer.state[parameter]["exp_avg"].zero_()
            if name.endswith("lora_B"):
                parameter.data *= 0.5
    expected = {name: p.detach() + (1.0 if name.endswith("lora_A") else 0.0) for name, p in named.items()}
    for values in on_ranks(ranks, by_writing, config):
        assert distance(values, expected) < 1e-3


class LooksAside(Method):
    """Everything that reaches for the model between backward and step; changes nothing unless told to."""

    aside = True

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.found: list[Any] = []

    def edit_gradients(self, stage: Any, gradients: Values) -> None:
        if not self.aside:
            return
        assert stage.adapters.model.training

        def loss(batch: Batch) -> Tensor:
            return (token_loss(stage.forward(batch), batch.labels) * batch.token_weights).sum()

        (whole,) = stage.gradient(loss, stage.batches(old_rows()))
        each = list(stage.gradient(loss, stage.batches(old_rows()), per_example=True))
        name = next(iter(whole))
        torch.testing.assert_close(sum(one[name] for one in each), whole[name], rtol=1e-4, atol=1e-6)
        torch.rand(3)
        with torch.no_grad():
            stage.forward(next(stage.batches()), {name: torch.zeros_like(whole[name])})
        self.found.append((whole[name], stage.generate(old_rows().examples)))


class LooksNowhere(LooksAside):
    aside = False


def looked_aside(place: Place, aside: bool) -> tuple[Values, list[float], list[Any]]:
    config = tiny_config(adapter__dropout=0.2)
    method = (LooksAside if aside else LooksNowhere)(Section())
    stage = open_stage(tiny_room(method, config, place, dropout=0.2), config)
    outcome = train(stage, some_rows(ROWS))
    return outcome.parameters, outcome.losses, method.found


@both
def test_services_between_backward_and_step_leave_it_alone(ranks: int) -> None:
    ours, plain = on_ranks(ranks, looked_aside, True), on_ranks(ranks, looked_aside, False)
    for (values, losses, found), (same, same_losses, _) in zip(ours, plain, strict=True):
        assert losses == same_losses
        assert all(torch.equal(values[name], same[name]) for name in same)
        assert len(found) == 3
        for (gradient, said), (first, first_said) in zip(found, ours[0][2], strict=True):
            assert torch.equal(gradient, first) and said == first_said


# --- randomness (rule 8), and one process as two


class Noisy(Method):
    """Draws from the global generator: in ``condition``, where it may, and after steps, where it does no harm."""

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.drawn: list[float] = []
        self.norms: list[Values] = []

    def condition(self, stage: Any, batch: Batch, task: str | None) -> dict[str, Tensor]:
        return {"gate": torch.rand(batch.size)}

    def loss(self, stage: Any, batch: Batch) -> Tensor:
        self.drawn.append(float(batch.condition["gate"].sum()))
        losses = token_loss(stage.forward(batch), batch.labels) * batch.token_weights
        return (losses * (1.0 + batch.condition["gate"])[:, None]).sum()

    def edit_gradients(self, stage: Any, gradients: Values) -> None:
        self.norms.append(gradients)

    def after_step(self, stage: Any) -> None:
        torch.rand(stage.rank + self.config.draws)


class Draws(Section):
    draws: int = 1


def noisy(place: Place, config: RunConfig, draws: int = 1) -> tuple[Outcome, list[Values], list[float]]:
    method = Noisy(Draws(draws=draws))
    stage = open_stage(tiny_room(method, config, place, dropout=0.2), config)
    torch.manual_seed(place.rank + draws)
    outcome = train(stage, some_rows(ROWS))
    outcome.stage = None  # type: ignore[assignment]
    return outcome, method.norms, method.drawn


def test_two_ranks_train_as_one_with_dropout() -> None:
    config = tiny_config(adapter__dropout=0.2, training__epochs=3)
    ((one, gradients, _),) = on_ranks(1, noisy, config)
    for two, same, _ in on_ranks(2, noisy, config):
        assert two.trained.plan.accumulation == 1 and one.trained.plan.accumulation == 2
        assert two.losses == pytest.approx(one.losses, rel=1e-5)
        assert two.norms == pytest.approx(one.norms, rel=1e-4)
        assert distance(same[0], gradients[0]) < 1e-5
        assert distance(two.parameters, one.parameters) < 0.01


def test_randomness_is_that_of_the_micro_batch_alone() -> None:
    config = tiny_config(adapter__dropout=0.2, training__epochs=2)
    ((first, _, drawn),) = on_ranks(1, noisy, config)
    ((again, _, _),) = on_ranks(1, noisy, config, 7)  # whatever else was drawn
    assert again.losses == first.losses
    assert all(torch.equal(again.parameters[name], first.parameters[name]) for name in first.parameters)
    assert len(set(drawn)) == len(drawn)  # no two micro-batches alike
    other = config.model_copy(update={"seed": 43})
    assert on_ranks(1, noisy, other)[0][0].losses != pytest.approx(first.losses, rel=1e-3)


def test_dropout_is_on_while_training_and_off_afterwards() -> None:
    config = tiny_config(adapter__dropout=0.4)
    ((with_dropout, _, _),) = on_ranks(1, noisy, config)
    ((without, _, _),) = on_ranks(1, noisy, tiny_config())
    assert with_dropout.losses[0] != pytest.approx(without.losses[0], rel=1e-3)


# --- observation (rule 9)


class Observing(Method):
    """Counts what an observer sees of each micro-batch, its rows recomputed in the backward or not."""

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.counts: list[int] = []
        self.recomputed = 0

    def loss(self, stage: Any, batch: Batch) -> Tensor:
        seen: list[str] = []
        self.open = stage.observe("inputs", lambda target, rows, counts: seen.append(target))
        self.open.__enter__()  # until after the backward
        self.seen = seen
        return super().loss(stage, batch)

    def edit_gradients(self, stage: Any, gradients: Values) -> None:
        self.open.__exit__(None, None, None)
        self.counts.append(len(self.seen))
        assert sorted(self.seen) == sorted(stage.adapters.layers)


def observing(place: Place, how: str) -> tuple[list[int], int, Outcome]:
    training = {"training__global_batch": 2, "training__activation_checkpointing": how == "checkpointed"}
    config = tiny_config(**training, adapter__dropout=0.3)
    method = Observing(Section())
    stage = open_stage(tiny_room(method, config, place, dropout=0.3), config)
    forwards: list[str] = []
    for target, layer in stage.adapters.layers.items():
        layer.register_forward_hook(lambda *_, t=target: forwards.append(t))
    outcome = train(stage, some_rows(6))
    outcome.stage = None  # type: ignore[assignment]
    return method.counts, len(forwards) // len(stage.adapters.layers), outcome


@both
@pytest.mark.parametrize("how", ["plain", "checkpointed"])
def test_observers_see_a_micro_batch_once(ranks: int, how: str) -> None:
    plain = on_ranks(ranks, observing, "plain")
    for (counts, forwards, ours), (_, _, expected) in zip(on_ranks(ranks, observing, how), plain, strict=True):
        assert len(set(counts)) == 1 and len(counts) == 3
        assert forwards == (3 if how == "plain" else 6)  # the rest are second looks
        assert ours.losses == expected.losses  # the second look has the first one's dropout
        assert all(torch.equal(ours.parameters[name], value) for name, value in expected.parameters.items())


# --- precision in a stage (rule 1)


class Precise(Method):
    def loss(self, stage: Any, batch: Batch) -> Tensor:
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        self.scores = stage.forward(batch)
        return (token_loss(self.scores, batch.labels) * batch.token_weights).sum()

    def penalty(self, stage: Any) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        return 0.0 * next(iter(stage.parameters().values())).sum()

    def edit_gradients(self, stage: Any, gradients: Values) -> None:
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())

    def after_step(self, stage: Any) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        for parameter in stage.parameters().values():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, safe_get_full_fp32_param(parameter))
        assert self.scores.dtype == torch.bfloat16


def precise(place: Place) -> Outcome:
    config = settings(epochs=2)
    room = tiny_room(Precise(Section()), config, place, bf16=True, base_dtype=torch.bfloat16)
    outcome = train(open_stage(room, config), some_rows(ROWS))
    assert {p.dtype for p in outcome.stage.adapters.model.parameters() if p.dim() > 1} == {
        torch.bfloat16,
        torch.float32,
    }
    outcome.stage = None  # type: ignore[assignment]
    return outcome


@both
def test_a_bf16_base_trains_fp32_adapters(ranks: int) -> None:
    _, losses, _ = naive(settings(epochs=2))
    for ours in on_ranks(ranks, precise):
        assert ours.losses == pytest.approx(losses, rel=0.1)
        assert ours.losses != pytest.approx(losses, rel=1e-5)


# --- what goes wrong


class Explodes(Method):
    """A loss that is not finite in the second step, on the last rank alone."""

    def loss(self, stage: Any, batch: Batch) -> Tensor:
        bad = stage.progress.step == 1 and stage.rank == stage.ranks - 1
        return super().loss(stage, batch) * (math.nan if bad else 1.0)


class BadEdit(Method):
    def edit_gradients(self, stage: Any, gradients: Values) -> Values | None:
        name = next(iter(gradients))
        return {name: gradients[name] * math.nan} if stage.progress.step == 1 else None


def exploded(place: Place) -> tuple[str, Values, Values, bool]:
    config = settings()
    room = tiny_room(Explodes(Section()), config, place)
    stage = open_stage(room, config)
    with pytest.raises(TrainingError) as error:
        train(stage, some_rows(ROWS))
    assert stage.engine is None
    after = {name: p.detach().clone() for name, p in room.adapters.parameters().items()}
    # The group is whole: another stage can train, and the parameters are those of the last good step.
    room.method = plain_method()
    again = train(open_stage(room, config, randomise=False), some_rows(4))
    return str(error.value), after, again.parameters, bool(room.root._forward_hooks)


@both
def test_a_gradient_that_is_not_finite_ends_the_training(ranks: int) -> None:
    for message, after, again, hooks in on_ranks(ranks, exploded):
        assert message.startswith("step 2: the loss is not finite; rows: one train/")
        assert all(value.isfinite().all() for value in [*after.values(), *again.values()])
        assert not hooks


def badly_edited(place: Place) -> Outcome:
    config = settings(non_finite="skip")
    outcome = train(open_stage(tiny_room(BadEdit(Section()), config, place), config), some_rows(ROWS))
    outcome.stage = None  # type: ignore[assignment]
    return outcome


@both
def test_skipped_steps_are_counted(ranks: int) -> None:
    for ours in on_ranks(ranks, badly_edited):
        assert ours.trained.skipped == 1 and ours.trained.steps == 3
        assert all(value.isfinite().all() for value in ours.parameters.values())


# --- memory and the log


def freed(place: Place) -> list[int]:
    config = settings()
    room = tiny_room(plain_method(), config, place, order=("a", "b", "c"))
    alive = []
    for index in range(3):
        stage = open_stage(room, config, index)
        seen: list[Any] = []

        def look(*_: Any, stage: StageRun = stage, seen: list[Any] = seen) -> None:
            assert stage.engine is not None
            seen[:] = [weakref.ref(stage.engine._engine), weakref.ref(stage.engine._optimizer)]

        train_stage(stage, some_rows(ROWS), log=lambda _: None, tick=look)
        stage.close()
        del stage, look
        gc.collect()
        alive.append(sum(ref() is not None for ref in seen))
    alive.append(len(room.root._forward_hooks) + len(room.root._forward_pre_hooks))
    return alive


@both
def test_a_stage_leaves_no_engine_behind(ranks: int) -> None:
    assert on_ranks(ranks, freed) == [[0, 0, 0, 0]] * ranks


def logged(place: Place) -> list[Any]:
    config = tiny_config(output__log_every=2, training__epochs=1)
    stage = open_stage(tiny_room(Penalised(Section()), config, place), config)
    rows: list[dict[str, Any]] = []
    ticks: list[tuple[int, bool]] = []
    trained_stage = train_stage(
        stage, some_rows(ROWS), log=rows.append, tick=lambda step, loss, pace: ticks.append((step, loss is not None))
    )
    stage.close()
    return [rows, ticks, trained_stage]


@both
def test_the_log(ranks: int) -> None:
    config = settings()
    _, losses, _ = naive(config, "penalised")
    for rows, ticks, done in on_ranks(ranks, logged):
        assert [row["step"] for row in rows] == [2, 3]  # every second step, and the last
        assert [row["loss"] for row in rows] == pytest.approx(losses[1:], rel=1e-4)  # the whole batch's, on every rank
        assert all(row["steps"] == 3 and row["stage"] == "one" and row["lr"] == 0.01 for row in rows)
        assert all(row["memory_mb"] > 0 and row["examples_per_second"] > 0 for row in rows)
        assert ticks == [(0, False), (1, False), (2, True), (3, True)]
        assert (done.steps, done.examples, done.skipped) == (3, ROWS, 0)
        assert done.loss == rows[-1]["loss"] and done.penalty == rows[-1]["penalty"] > 0
