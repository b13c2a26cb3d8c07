"""SAPT: attention against a loop over rows, the KL at what was stored, pseudo inputs, and whole steps by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.engine.process import Place
from cl_runner.methods import make_method
from cl_runner.methods.protocol import Source
from cl_runner.methods.sapt.attention import moved, scores
from cl_runner.methods.sapt.writing import longest, to_write, write
from cl_runner.methods.shared.frame import Frame
from cl_runner.models.batch import Example
from cl_runner.training.sampling import BatchPlan, StepWeights
from cl_runner.training.stage import StageRun
from tests.breadth import wide
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import LR, THREE, Values, off, opposed, values
from tests.stages import END, VOCABULARY, Kind, naive_loss, tiny_config, tiny_model

NET = ("W1", "W2", "gain", "bias")


def log_attention(net: Any, keys: Any, e: Tensor) -> Tensor:
    """log a (T) of one prompt, from its definition."""
    u = net["W2"] @ (net["W1"] @ e)
    u = u / (1 + torch.exp(-u))
    q = (u - u.mean()) / ((u - u.mean()).square().mean() + 1e-5).sqrt() * net["gain"] + net["bias"]
    each = torch.stack([(key * q).sum() / math.sqrt(len(e)) for key in keys])
    return each - torch.logsumexp(each, 0)


def test_attention_and_its_gradients_are_those_of_a_loop() -> None:
    dice = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice, dtype=torch.float64).requires_grad_()

    net = {"W1": some(5, 6), "W2": some(6, 5), "gain": some(6), "bias": some(6)}
    keys, pooled, g = some(3, 6), some(4, 6).detach(), some(4, 3).detach()
    found = scores(net, keys, pooled)
    wanted = torch.stack([log_attention(net, keys, e) for e in pooled])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(4, dtype=torch.float64))
    trains = [*net.values(), keys]
    ours, theirs = (torch.autograd.grad((a * g).sum(), trains) for a in (found, wanted))
    for mine, naive in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, naive)


def test_the_divergence_is_its_definition_and_zero_where_nothing_moved() -> None:
    dice = torch.Generator().manual_seed(0)
    now = torch.randn(4, 3, generator=dice, dtype=torch.float64).log_softmax(1).requires_grad_()
    before = [0.25, 0.75]
    wanted = sum(p * (math.log(p) - now[row, i]) for row in range(4) for i, p in enumerate(before)) / 4
    torch.testing.assert_close(moved(before, now), wanted)
    stored = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64)
    assert float(moved(before, stored.log().clamp(min=-1e9))) == pytest.approx(0, abs=1e-12)
    [gradient] = torch.autograd.grad(moved([0.2, 0.3, 0.5], now.log_softmax(1)), now)
    assert float(gradient.sum(1).abs().max()) < 1e-12


# Pseudo inputs.


def _writes(place: Place) -> None:
    room, config = order_room(place, "sapt", method__pseudo=12, method__pseudo_tokens=5, data__max_source=12)
    stage = StageRun(room, config, 0)
    room.method.build(stage)
    own = Source([Example([7, 9, *text, 11, END], [8, END]) for text in ([20, 21, 22, 23, 24, 25], [30])], ["a"] * 2)
    frame = Frame.of(own.examples)
    assert (frame.before, frame.after, longest(stage, room.method.config, frame)) == ([7, 9], [11, END], 5)
    written = to_write(stage, room.method.config, frame, own)
    assert [(e.source, e.target) for e in written] == [([7, 9, END], [20, 21, 22, 23, END]), ([7, 9, END], [30, END])]
    found, counts = write(stage, room.method.config, frame)
    assert counts == {"drawn": 12, "used": len(found)} and 1 < len(found) <= 12
    assert len({tuple(example.source) for example in found}) == len(found)
    for example in found:
        assert example.source[:2] == [7, 9] and example.source[-2:] == [11, END] and 5 <= len(example.source) <= 8
    again, _ = write(stage, room.method.config, frame)
    assert again == found
    stage.close()


def test_what_is_to_be_written_and_what_was() -> None:
    on_ranks(1, _writes)


def _mixed(place: Place) -> None:
    """Both losses are means over their own tokens, whatever a step divides by."""
    room, config = order_room(place, "sapt", method__lambda_lm=0.5)
    stage = StageRun(room, config, 0)
    room.method.build(stage)
    own = opposed(0)
    answers, writing = room.method.training_data(stage, own)
    a, w = (sum(len(e.target) for e in source.examples) for source in (answers, writing))
    assert answers.examples == own.examples and len(writing.examples) == 6
    assert answers.weight * a / (a + w) == pytest.approx(1) and writing.weight * w / (a + w) == pytest.approx(0.5)
    stage.close()
    room, config = order_room(place, "sapt", method__pseudo=0)
    stage = StageRun(room, config, 0)
    assert room.method.training_data(stage, own) == [own]
    stage.close()


def test_the_mix() -> None:
    on_ranks(1, _mixed)


def _dealt(place: Place) -> list[float]:
    """What the answers count for in each full step, texts being far longer than answers."""
    batch = {"training__global_batch": 32, "training__length_window": 8}
    room, config = order_room(place, "sapt", **batch, method__pseudo_tokens=64)
    stage = StageRun(room, config, 0)
    room.method.build(stage)
    dice = random.Random(0)
    sources = [[dice.randrange(30, VOCABULARY) for _ in range(dice.randint(20, 50))] + [END] for _ in range(320)]
    own = Source([Example(source, [10, END]) for source in sources], ["a"] * 320)
    sources_of = room.method.training_data(stage, own)
    stage.close()
    examples = [e for source in sources_of for e in source.examples]
    tasks = [task for source in sources_of for task in source.tasks]
    shares = [source.weight for source in sources_of for _ in source.examples]
    plan = BatchPlan.make(len(examples), config.training, 1)
    weights = StepWeights(plan, "global", [len(e.target) for e in examples], shares)
    lengths = [len(e.source) + len(e.target) for e in examples]
    found = []
    for rows in plan.step_rows(1, 0, lengths, len(set(tasks)) > 1):
        answers = [row for row in rows if row < len(own.examples)]
        found.append(sum(2 * weight for weight in weights.of(rows, answers)))  # of two tokens each
    return found


def test_every_step_has_rows_to_answer_and_rows_to_write() -> None:
    """However long texts are: the mean over answers is in each step what it is to be, but for the lot."""
    [found] = on_ranks(1, _dealt)
    assert len(found) == 20 and min(found) > 0.4 and max(found) < 1.9
    assert sum(found) / len(found) == pytest.approx(1, abs=0.1)


# Whole steps.


def by_hand(kind: Kind, method: Any, start: Values, index: int, targets: list[str], rate: float) -> Values:
    """A stage's parameters after four steps: each row by a model whose weights are written out, torch's AdamW."""
    model, config = tiny_model(kind), method.config
    W0 = {t: model.get_submodule(t).weight.detach().clone() for t in targets}
    table = model.get_input_embeddings().weight.detach()
    now = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    router = [*NET, "key"]
    groups = [
        {"params": [p for n, p in now.items() if n not in router]},
        {"params": [now[n] for n in router], "lr": LR * rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=0.0)

    def attention(source: list[int]) -> Tensor:
        keys = [*(method.router["keys"] if index else []), now["key"]]
        return log_attention(now, keys, torch.stack([table[i] for i in source]).amax(0))

    def loss_of(examples: list[Example]) -> Tensor:
        total = torch.zeros(())
        for example in examples:
            a, weights = attention(example.source).exp(), {}
            for t, W in W0.items():
                delta = a[-1] * 2.0 * now[f"{t}.B"] @ now[f"{t}.A"]
                for i in range(index):
                    A, B = method.pairs[t]
                    delta = delta + a[i] * B[:, 2 * i : 2 * i + 2] @ A[2 * i : 2 * i + 2]
                weights[f"{t}.weight"] = W + delta

            def answer(weights: Any = weights, **inputs: Any) -> Any:
                return torch.func.functional_call(model, weights, (), inputs)

            total = total + naive_loss(answer, kind, [example]) * len(example.target)
        return total / sum(len(example.target) for example in examples)

    own = opposed(index).examples
    frame = Frame.of(own)
    writing = [Example(frame.asking(), [*frame.text(e.source)[:5], END]) for e in own]
    for _ in range(4):
        total = loss_of(own) + config.lambda_lm * loss_of(writing)
        for task, pseudo in method.written.tasks.items():
            p = method.shares[task]
            for example in pseudo:
                a = attention(example.source)
                kl = sum(p[i] * (math.log(p[i]) - a[i]) for i in range(len(p)))
                total = total + config.kappa * kl / len(pseudo)
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: value.detach() for name, value in now.items()}


OWN: dict[str, Any] = {
    "method__kappa": 3.0, "method__pseudo": 3, "method__pseudo_tokens": 6, "method__router_lr": 0.1,
    "training__global_batch": 12,
}  # fmt: skip


def _steps(place: Place, kind: Kind) -> list[float]:
    room, config = order_room(place, "sapt", kind=kind, **{**THREE, **OWN})
    found = []
    for index in range(3 if kind == "t5" else 2):
        held, method = make_method(config), room.method
        state = method.state()
        held.load_state(type(state)({name: value.clone() for name, value in state.tensors.items()}, state.json))
        begin, starts = method.begin_task, []

        def spy(stage: Any, begin: Any = begin, starts: Any = starts) -> None:
            begin(stage)
            starts.append(values(room))

        method.begin_task = spy  # type: ignore[method-assign]
        outcome = learn(room, config, index, opposed(index))
        del method.begin_task
        if place.rank:
            continue
        wanted = by_hand(kind, held, starts[0], index, list(room.adapters.past), 0.1)
        ours = {name: value.detach() for name, value in outcome.parameters.items()}
        moving = [name for name in wanted if off(wanted[name], starts[0][name]) > 1e-6]
        assert any(name in moving for name in NET) == (index > 0)
        found.append(max(off(ours[name], wanted[name]) for name in moving))
    return found


@pytest.mark.parametrize(("kind", "ranks"), [pytest.param("t5", 1, marks=wide), ("llama", 2)])
def test_steps_against_a_loop(kind: Kind, ranks: int) -> None:
    found = on_ranks(ranks, _steps, kind)[0]
    assert len(found) > 1 and max(found) < 5e-3, found


def test_bounds_of_settings() -> None:
    wrong = {
        "kappa": -1,
        "hidden": 0,
        "pseudo": -1,
        "lambda_lm": 0,
        "router_lr": 0,
        "repetition_penalty": 0.5,
        "top_k": 0,
    }
    for key, value in wrong.items():
        with pytest.raises(ValueError, match=key):
            make_method(tiny_config(method__name="sapt", **{f"method__{key}": value}))
