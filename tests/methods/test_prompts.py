"""L2P, Progressive Prompts and LFPT5: each step by hand, what is carried, and what plain PEFT makes of the folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from cl_runner.config.schema import DataConfig, RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.protocol import Source
from cl_runner.methods.shared.frame import Frame
from cl_runner.models.batch import Example, collate_prompts
from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.training.checkpoint import restore_stage, save_stage
from cl_runner.training.prepare import _check_prefix
from cl_runner.training.stage import Room, StageRun
from tests.breadth import in_turn, narrowed
from tests.distributed import on_ranks
from tests.methods.orders import learn, order_room
from tests.methods.steps import LR, STEPS, THREE, labels, off, opposed, values, vector
from tests.methods.test_carried import same
from tests.stages import END, LAYOUTS, Kind, tiny_model

OWN: dict[str, dict[str, Any]] = {
    "l2p": {"method__pool": 6, "method__length": 2, "method__top": 3, "method__lambda1": 0.7},
    "progprompt": {"method__length": 3},
    "progprompt mlp": {"method__length": 3, "method__mlp": True},
    "lfpt5": {"method__length": 4, "method__pseudo_tokens": 12, "method__lambda_kl": 0.3, "method__pseudo": 1},
}
both_kinds = pytest.mark.parametrize("kind", ["t5", "llama"])


def opened(place: Place, name: str, **settings: Any) -> tuple[Room, RunConfig]:
    return order_room(
        place, name.split()[0], **{**THREE, **OWN[name], "method__lr": LR, "training__lr": 1e-3, **settings}
    )


# By hand: one row at a time, its prompt and its embeddings one behind the other, nothing of ours but the model.


def row_scores(model: Any, kind: Kind, prefix: Tensor, example: Example) -> Tensor:
    """(t, V) of one example."""
    embed = model.get_input_embeddings()
    if kind == "t5":
        both = torch.cat([prefix, embed(torch.tensor(example.source))])[None]
        return model(inputs_embeds=both, decoder_input_ids=torch.tensor([[0, *example.target[:-1]]])).logits[0]
    both = torch.cat([prefix, embed(torch.tensor([*example.source, *example.target[:-1]]))])[None]
    return model(inputs_embeds=both).logits[0, len(prefix) + len(example.source) - 1 :]


def row_loss(model: Any, kind: Kind, prefix: Tensor, example: Example) -> Tensor:
    """Sum over the label tokens."""
    scores = row_scores(model, kind, prefix, example)
    return nn.functional.cross_entropy(scores, torch.tensor(example.target), reduction="sum")


def trained(start: dict[str, Tensor], whole_loss: Callable[[dict[str, Tensor]], Tensor]) -> dict[str, Tensor]:
    parameters = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=LR, weight_decay=0.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        whole_loss(parameters).backward()  # type: ignore[arg-type]
        optimizer.step()
    return {name: p.detach() for name, p in parameters.items()}


def tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.target) for example in examples)


def begun(room: Room, config: RunConfig, index: int) -> dict[str, Tensor]:
    """The parameters that a stage begins with."""
    room.method.build(StageRun(room, config, index))
    return values(room)


# L2P.


def chosen(model: Any, kind: Kind, keys: Tensor, example: Example, top: int) -> tuple[list[int], Tensor]:
    """The numbers of the nearest keys, nearest first, and the sum of their distances."""
    trunk = model.get_encoder() if kind == "t5" else model.model
    with torch.no_grad():
        hidden = trunk(torch.tensor([example.source]))[0][0]
    query = sum(hidden) / len(hidden)
    cosines = [(query @ key) / (query @ query).sqrt() / (key @ key).sqrt() for key in keys]
    order = sorted(range(len(keys)), key=lambda i: -float(cosines[i].detach()))[:top]
    return order, torch.stack([1 - cosines[i] for i in order]).sum()


def _l2p_gradient(room: Room, config: RunConfig, index: int, kind: Kind) -> None:
    """The loss and both gradients of one batch, and that labels have no say in the choice."""
    method: Any = room.method
    stage, own = StageRun(room, config, index), opposed(index)
    batch = stage.make_batch(own.examples, own.tasks, [0.5] * len(own.examples))
    prompts = collate_prompts(own.examples, room.base.layout)
    torch.testing.assert_close(method.condition(stage, prompts, None)["prefix"], batch.condition["prefix"])
    parameters = room.adapters.parameters()
    ours = method.loss(stage, batch)
    naive = torch.zeros(())
    for example in own.examples:
        order, distance = chosen(tiny_model(kind), kind, parameters["keys"], example, 3)
        prefix = torch.cat([parameters["pool"][i] for i in order])
        loss = row_loss(tiny_model(kind), kind, prefix, example)
        naive = naive + 0.5 * (loss + 0.7 * distance * len(example.target))
    torch.testing.assert_close(ours, naive, rtol=1e-5, atol=0)
    for name in ("pool", "keys"):
        found, wanted = (torch.autograd.grad(one, parameters[name], retain_graph=True)[0] for one in (ours, naive))
        assert off(found, wanted) < 1e-4
    stage.close()


def _l2p(place: Place, kind: Kind) -> None:
    room, config = opened(place, "l2p", kind=kind)
    model = tiny_model(kind)
    end: dict[str, Tensor] = {}
    for index in range(2):
        own = opposed(index)
        start = begun(room, config, index)
        if index:
            assert torch.equal(vector(start), vector(end))
        _l2p_gradient(room, config, index, kind)
        picks = set()

        def whole(parameters: dict[str, Tensor], own: Source = own, picks: set[Any] = picks) -> Tensor:
            total = torch.zeros(())
            for example in own.examples:
                order, distance = chosen(model, kind, parameters["keys"], example, 3)
                picks.add(tuple(order))
                prefix = torch.cat([parameters["pool"][i] for i in order])
                total = total + row_loss(model, kind, prefix, example) + 0.7 * distance * len(example.target)
            return total / tokens(own.examples)

        wanted = trained(start, whole)
        end = learn(room, config, index, own).parameters
        assert len(picks) > 1  # rows choose for themselves
        for name in ("pool", "keys"):
            assert off(end[name], wanted[name]) < 2e-3
            assert off(end[name], start[name]) > 2e-2


@both_kinds
def test_l2p_takes_the_nearest_keys_and_trains_as_a_naive_loop(kind: Kind) -> None:
    on_ranks(1, _l2p, kind)


def _keys(place: Place) -> list[Tensor]:
    room, config = opened(place, "l2p", method__pool=20)
    return [begun(room, config.model_copy(update={"seed": seed}), 0)["keys"] for seed in range(50)]


def test_l2p_keys_begin_near_one_another() -> None:
    """Uniform in [0, 0.01), as flax's initialiser has it: two keys' mean cosine is E[x]² / E[x²] = 3/4."""
    (found,) = on_ranks(1, _keys)
    keys = torch.stack(found)
    assert 0 <= float(keys.min()) < 1e-5 and 0.01 - 1e-5 < float(keys.max()) < 0.01
    torch.testing.assert_close(float(keys.mean()), 0.005, rtol=0.01, atol=0)
    torch.testing.assert_close(float(keys.std()), 0.01 / 12**0.5, rtol=0.01, atol=0)
    cosines = [float(a @ b / (a.norm() * b.norm())) for pool in keys for i, a in enumerate(pool) for b in pool[:i]]
    assert sum(cosines) / len(cosines) == pytest.approx(0.75, abs=0.01)


# Progressive Prompts.


def by_torch(own: dict[str, Tensor]) -> Tensor:
    """The prompt through torch's own layers."""
    if "mlp_in" not in own:
        return own["prompt"]
    given = {f"{i}.{k}": own[n + s] for i, n in ((0, "mlp_in"), (2, "mlp_middle"), (4, "mlp_out"))
             for k, s in (("weight", ""), ("bias", "_bias"))}  # fmt: skip
    d = own["prompt"].shape[1]
    layers = nn.Sequential(nn.Linear(d, 800), nn.ReLU(), nn.Linear(800, 400), nn.Tanh(), nn.Linear(400, d))
    return own["prompt"] + torch.func.functional_call(layers, given, (own["prompt"],))


def _progressive(place: Place, kind: Kind, name: str) -> None:
    room, config = opened(place, name, kind=kind)
    method: Any = room.method
    model = tiny_model(kind)
    past: list[Tensor] = []  # newest first
    for index in range(3):
        own = opposed(index)
        start = begun(room, config, index)
        table = model.get_input_embeddings().weight
        assert all(any(torch.equal(row, word) for word in table) for row in start["prompt"])

        def whole(parameters: dict[str, Tensor], own: Source = own, past: Sequence[Tensor] = tuple(past)) -> Tensor:
            prefix = torch.cat([by_torch(parameters), *past])
            return torch.stack([row_loss(model, kind, prefix, e) for e in own.examples]).sum() / tokens(own.examples)

        wanted = by_torch(trained(start, whole))
        stage = learn(room, config, index, own).stage
        before = list(method.learned.values())[:-1]
        assert all(map(torch.equal, before, reversed(past)))  # earlier prompts do not move
        newest = method.learned["abc"[index]]
        assert off(newest, wanted) < 2e-3
        assert off(newest, by_torch(start)) > 2e-2
        past.insert(0, newest)
        batch = collate_prompts(own.examples, room.base.layout)
        for number, task in enumerate("abc"[: index + 1]):
            prefix = method.condition(stage, batch, task)["prefix"]
            assert torch.equal(prefix, torch.cat(past[index - number :]).expand(6, -1, -1))
        later = method.condition(stage, batch, "not learned yet")["prefix"]
        assert torch.equal(later, torch.cat(past).expand(6, -1, -1))


@pytest.mark.parametrize(("name", "kind"), in_turn(["progprompt", "progprompt mlp"], ["t5", "llama"]))
def test_progressive_prompts_stand_before_past_ones_that_do_not_move(kind: Kind, name: str) -> None:
    on_ranks(1, _progressive, kind, name)


# LFPT5.

BEFORE, AFTER = [20, 21], [22, 23, END]
ROWS = [
    Example([*BEFORE, 30, 31, *AFTER], [10, END]),
    Example([*BEFORE, 32, *AFTER], [11, 12, END]),
    Example([*BEFORE, 33, 34, 35, *AFTER], [12, END]),
]


def test_a_frame_is_what_inputs_share_and_reads_what_it_has_written() -> None:
    frame = Frame.of(ROWS)
    assert frame == Frame(BEFORE, AFTER, [[10], [11, 12], [12]], END)
    for row in ROWS:
        written = frame.to_write(row, 50)
        assert written.source == [20, 21, END]
        assert written.target == [*row.source[2:-3], 22, 23, *row.target]
        text, label = frame.parsed(written.target[:-1]) or ([], [])
        assert [*frame.before, *text, *frame.after] == row.source and [*label, END] == row.target
    assert frame.to_write(ROWS[2], 6).target == [33, 34, 22, 23, 12, END]  # the text alone is cut
    wrong = ([30, 22, 23, 13], [30, 10], [22, 23, 10], [10], [], [30, 22, 23], [30, 22, 23, 10, 9],
             [30, 22, 23, 10, 22, 23, 10])  # fmt: skip
    assert not any(frame.parsed(ids) for ids in wrong)
    bare = Frame.of([row._replace(source=row.source[2:-3]) for row in ROWS])
    assert bare.asking() == [END] and bare.parsed([5, 11, 12]) == ([5], [11, 12])  # the longest label


def writes_well(room: Room) -> Callable[..., list[list[int]]]:
    """A model that writes one good example of each label of the oldest task, and much that is none."""

    def sample(stage: StageRun, examples: Sequence[Example], *_: Any) -> list[list[int]]:
        method: Any = room.method
        frame = next(frame for frame in method.frames.values() if frame.asking() == examples[0].source)
        good = [[40 + i, 41, *frame.between, *label] for i, label in enumerate(frame.labels)]
        return [*good, *([[3, 4]] * (len(examples) - len(good)))]

    return sample


def kl(before: Tensor, now: Tensor) -> Tensor:
    """Sum over positions and vocabulary."""
    p, q = before.softmax(-1), now.softmax(-1)
    return (p * (p / q).log()).sum()


def lfpt5_loss(
    model: Any,
    kind: Kind,
    prompt: Tensor,
    old: Tensor,
    answers: Sequence[Example],
    texts: Sequence[Example],
    past: Sequence[Example],
) -> Tensor:
    """As the official code adds up its three: λ 0.3, λ_lm 0.25, the KL of the answers ``past`` alone; means of tokens.

    The factor 1 − λ is there whether or not there is something past.
    """
    task = torch.stack([row_loss(model, kind, prompt, e) for e in answers]).sum() / tokens(answers)
    language = torch.stack([row_loss(model, kind, prompt, e) for e in texts]).sum() / tokens(texts)
    moved = [kl(row_scores(model, kind, old, e).detach(), row_scores(model, kind, prompt, e)) for e in past]
    return 0.7 * (task + 0.25 * language) + 0.3 * sum(moved, torch.zeros(())) / tokens(answers)


def _lfpt5_loss(place: Place, kind: Kind, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    room, config = opened(place, "lfpt5", kind=kind)
    method: Any = room.method
    monkeypatch.setattr(StageRun, "sample", writes_well(room) if case == "written" else lambda *_: [[3, 4]])
    index = 0 if case == "first" else 1
    if index:
        learn(room, config, 0, opposed(0))
    stage, own = StageRun(room, config, index), opposed(index)
    method.build(stage)
    method.begin_task(stage)
    answering, writing = method.training_data(stage, own)
    past = method.written.source().examples
    assert len(past) == (3 if case == "written" else 0) and answering.examples == [*own.examples, *past]
    prompt = room.adapters.parameters()["prompt"]
    old = prompt.detach().clone()
    prompt.data += 3 * torch.randn(prompt.shape, generator=stage.rng("moved"))  # as after some steps
    rows = [(e, t, source.weight) for source in (answering, writing)
            for e, t in zip(source.examples, source.tasks, strict=True)]  # fmt: skip
    examples, tasks, weights = (list(column) for column in zip(*rows, strict=True))
    batch = stage.make_batch(examples, tasks, [weight / tokens(examples) for weight in weights])
    ours = method.loss(stage, batch)
    naive = lfpt5_loss(tiny_model(kind), kind, prompt, old, answering.examples, writing.examples, past)
    torch.testing.assert_close(ours, naive, rtol=1e-5, atol=0)
    found, wanted = (torch.autograd.grad(loss, prompt)[0] for loss in (ours, naive))
    assert off(found, wanted) < 1e-4
    if past:  # the KL of those that are to be written is no part of it, and would have shown
        extra = [kl(row_scores(tiny_model(kind), kind, old, e).detach(), row_scores(tiny_model(kind), kind, prompt, e))
                 for e in writing.examples[len(own.examples) :]]  # fmt: skip
        (pulled,) = torch.autograd.grad(0.3 * 0.25 * torch.stack(extra).sum() / tokens(writing.examples), prompt)
        assert pulled.norm() > 1e-3 * wanted.norm()
    stage.close()


@pytest.mark.parametrize("case", ["first", "nothing written", "written"])
@both_kinds
def test_lfpt5_holds_the_answers_alone_and_weighs_the_rest_by_what_is_left(
    kind: Kind, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_ranks(1, _lfpt5_loss, kind, case, monkeypatch)


def _lfpt5(place: Place, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    room, config = opened(place, "lfpt5", kind=kind, training__global_batch=30, training__micro_batch=10)
    method: Any = room.method
    monkeypatch.setattr(StageRun, "sample", writes_well(room))
    model = tiny_model(kind)
    for index in range(2):
        own = opposed(index)
        start = begun(room, config, index)
        frame = Frame.of(own.examples)
        past = [] if not index else [
            Example([*method.frames["a"].before, 40 + i, 41, *method.frames["a"].after], label)
            for i, label in enumerate(labels(0))
        ]  # fmt: skip
        writing = [frame.to_write(e, 12) for e in own.examples]
        rewriting = [method.frames["a"].to_write(e, 12) for e in past]
        answers, texts = [*own.examples, *past], [*writing, *rewriting]

        def whole(
            parameters: dict[str, Tensor],
            answers: Sequence[Example] = answers,
            texts: Sequence[Example] = texts,
            past: Sequence[Example] = tuple(past),
            old: Tensor = start["prompt"],
        ) -> Tensor:
            return lfpt5_loss(model, kind, parameters["prompt"], old, answers, texts, past)

        wanted = trained(start, whole)
        end = learn(room, config, index, own).parameters
        assert off(end["prompt"], wanted["prompt"]) < 2e-3
        assert off(end["prompt"], start["prompt"]) > 2e-2
    assert method.written.tasks == {"a": past}  # of the good ones, one a label
    assert method.state().json["pseudo"] == {"a": {"drawn": 24, "well_formed": 3, "used": 3}}


@both_kinds
def test_lfpt5_trains_as_a_naive_loop_on_what_it_has_written(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    on_ranks(1, _lfpt5, kind, monkeypatch)


def _draws(place: Place) -> list[list[list[int]]]:
    room, config = opened(place, "lfpt5", eval__batch_tokens=8)
    learn(room, config, 0, opposed(0))
    stage = StageRun(room, config, 1)
    asked = [Example([30 + i % 3, END], []) for i in range(9)]
    state = torch.get_rng_state()
    found = [stage.sample(asked, 5, k, 1.0) for k in (64, 64, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    stage.close()
    return found


def test_what_is_drawn_is_the_same_again_and_on_two_ranks() -> None:
    (alone,) = on_ranks(1, _draws)
    assert alone[0] == alone[1] and len(alone[0]) == 9 and all(len(ids) <= 5 for ids in alone[0])
    assert len({tuple(ids) for ids in alone[0]}) > 3  # drawn
    assert len({tuple(ids) for ids in alone[2]}) <= 3  # of one token there is no choice
    assert on_ranks(2, _draws) == [alone, alone]


# All of them.


def answered(room: Room, stage: StageRun) -> list[list[str]]:
    method: Any = room.method
    with torch.no_grad():
        return [stage.generate(opposed(0).examples, task if method.knows_task else None) for task in "abc"]


def _resumed(place: Place, folder: str, name: str) -> None:
    straight, config = opened(place, name, dropout=0.2)
    rundir = RunDir(Path(folder))
    said = []
    for index in range(3):
        learn(straight, config, index, opposed(index))
        room, _ = opened(place, name, dropout=0.2)
        if index:
            restored = StageRun(room, config, index - 1)
            restore_stage(rundir, restored, index - 1)
            restored.close()
        stage = learn(room, config, index, opposed(index)).stage
        assert torch.equal(vector(values(room)), vector(values(straight)))
        assert same(room.method.state(), straight.method.state())
        said.append(answered(room, stage))
        commit(rundir, index, stage.plan.name, lambda draft: save_stage(draft, stage))  # noqa: B023
    assert len({str(one) for one in said}) > 1
    plain, _ = order_room(place, "seqlora", **THREE)
    bare = StageRun(plain, config, 0)
    untouched = [bare.generate(opposed(0).examples)] * 3
    bare.close()
    for index in range(3):  # as eval does
        room, _ = opened(place, name)
        stage = StageRun(room, config, index, evaluating=True)
        assert answered(room, stage) == untouched  # what a0 is scored with
        restore_stage(rundir, stage, index)
        room.method.build(stage)
        assert answered(room, stage) == said[index]
        stage.close()


@pytest.mark.parametrize("name", narrowed(OWN, ["l2p", "progprompt"]))
def test_restarted_at_every_stage_it_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    on_ranks(1, _resumed, str(tmp_path), name)


def _folders(place: Place, folder: str, kind: Kind, name: str) -> None:
    room, config = opened(place, name, kind=kind)
    rundir = RunDir(Path(folder))
    for index in range(3):
        stage = learn(room, config, index, opposed(index)).stage
        commit(rundir, index, stage.plan.name, lambda draft: save_stage(draft, stage))  # noqa: B023
    last = rundir.stage_dir(2, "c")
    if name == "l2p":
        assert not (last / "adapter").exists()  # every input has a prompt of its own
        return
    if name == "progprompt":
        where = json.loads((last / "answers.json").read_text())
        assert where == {"a": "../01-a/adapter", "b": "../02-b/adapter", "c": "adapter"}
    else:
        where = dict.fromkeys("abc", "adapter")
    examples = opposed(0).examples
    for number, (task, path) in enumerate(where.items()):
        model = PeftModel.from_pretrained(tiny_model(kind), str(last / path))
        count = 3 * (number + 1) if name == "progprompt" else 4
        assert model.peft_config["default"].num_virtual_tokens == count
        said = stage.generate(examples, task if name == "progprompt" else None)
        for example, answer in zip(examples, said, strict=True):
            ids = torch.tensor([example.source])
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids),
                generation_config=room.base.model.generation_config, max_new_tokens=4,
            )[0].tolist()  # fmt: skip
            out = out[1 if kind == "t5" else len(example.source) :]
            out = out[: out.index(END)] if END in out else out
            assert " ".join(map(str, out)) == answer


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize(("name", "kind"), in_turn(["l2p", "progprompt", "lfpt5"], ["t5", "llama"]))
def test_plain_peft_answers_from_the_folders(kind: Kind, name: str, tmp_path: Path) -> None:
    on_ranks(1, _folders, str(tmp_path), kind, name)


def _ranks(place: Place) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Five rows in micro-batches of one: of two ranks with three each, one takes a row that does not count."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for number, name in enumerate(OWN):
            kind: Kind = "t5" if number % 2 else "llama"
            room, config = opened(place, name, kind=kind, training__micro_batch=1, training__epochs=2)
            patch.setattr(StageRun, "sample", writes_well(room))
            for index in range(3):
                learn(room, config, index, opposed(index, rows=5))
            found[name] = (values(room), room.method.state().tensors)
    return found


def test_two_ranks_do_what_one_does() -> None:
    (alone,) = on_ranks(1, _ranks)
    first, second = on_ranks(2, _ranks)
    for name, (parameters, carried) in alone.items():
        for part in (0, 1):
            assert torch.equal(vector(first[name][part]), vector(second[name][part])), name
        assert off(vector(first[name][0]), vector(parameters)) < 2e-3, name
        assert off(vector(first[name][1]), vector(carried)) < 2e-3, name


def _bf16(place: Place) -> None:
    for number, name in enumerate(OWN):
        # All rows in every step, those to be written too: losses of steps compare.
        room, config = opened(place, name, kind="t5" if number % 2 else "llama", bf16=True, training__global_batch=12)
        for index in range(2):
            outcome = learn(room, config, index, opposed(index))
        half = len(outcome.losses) // 2
        assert sum(outcome.losses[half:]) < sum(outcome.losses[:half]), name
        assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in outcome.parameters.values())


def test_in_bf16_what_trains_is_fp32() -> None:
    on_ranks(1, _bf16)


def _recomputed(place: Place) -> None:
    for number, name in enumerate(OWN):
        kind: Kind = "t5" if number % 2 else "llama"
        ends = []
        for again in (False, True):
            room, config = opened(place, name, kind=kind, dropout=0.2, training__activation_checkpointing=again)
            ends.append(vector(learn(room, config, 0, opposed(0)).parameters))
        assert torch.equal(*ends), name


def test_activations_computed_again_change_nothing() -> None:
    on_ranks(1, _recomputed)


def test_prompts_that_do_not_fit_the_positions_are_refused() -> None:
    data = DataConfig(max_source=60, max_target=10)
    for limit, encoder_decoder, fits in ((125, False, False), (126, False, True), (76, True, True), (75, True, False)):
        layout = replace(LAYOUTS["llama"], encoder_decoder=encoder_decoder, max_positions=limit)
        method = make_method(RunConfig.model_validate({"method": {"name": "progprompt", "length": 4}}))
        plan: Any = SimpleNamespace(
            config=RunConfig(), method=method, stages=range(4), data=SimpleNamespace(settings={"a": data})
        )
        base: Any = SimpleNamespace(layout=layout, encoder_decoder=encoder_decoder)
        if fits:
            _check_prefix(plan, base)
            continue
        with pytest.raises(UserError) as refused:
            _check_prefix(plan, base)
        assert str(refused.value) == (
            "progprompt puts up to 16 vectors before the input: with data.max_source 60 that exceeds the model's "
            f"{limit} positions; lower data.max_source or method.length"
        )


def test_bad_settings_are_refused_before_anything_is_loaded() -> None:
    config = RunConfig.model_validate({"method": {"name": "l2p", "top": 7, "pool": 6}})
    with pytest.raises(UserError) as refused:
        make_method(config).check(config)
    said = "method.top: 7 prompts cannot be taken of a pool of 6; lower it, or raise method.pool"
    assert str(refused.value) == said
    for name in ("l2p", "progprompt", "lfpt5"):
        config = RunConfig.model_validate({"method": {"name": name}, "training": {"optimizer": "muon"}})
        with pytest.raises(UserError, match=f"muon is for matrices between hidden states; {name} trains embeddings"):
            make_method(config).check(config)
    for name, own in (("l2p", {"length": 0}), ("l2p", {"pool": 0}), ("l2p", {"lambda1": -1}), ("l2p", {"top": 0}),
                      ("progprompt", {"length": 0}), ("lfpt5", {"length": 0}), ("lfpt5", {"lambda_lm": 0}),
                      ("lfpt5", {"lambda_kl": 1}), ("lfpt5", {"top_k": 0}), ("lfpt5", {"draws": 0})):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(own))):
            make_method(RunConfig.model_validate({"method": {"name": name, **own}}))
