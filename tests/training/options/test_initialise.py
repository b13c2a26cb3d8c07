"""adapter.init, rslora and LoRA+ in stages and runs: by hand, on two ranks, restarted, entered, refused."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from cl_runner.config.schema import ModelConfig, RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import METHODS, make_method
from cl_runner.models.base import load_base
from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.runs.updates import free_subspace
from cl_runner.training.checkpoint import restore_stage, save_stage
from cl_runner.training.compatibility import check_method
from cl_runner.training.options.initialise import Initialisation
from cl_runner.training.stage import StageRun
from tests.breadth import narrowed, wide
from tests.command_line import NANO, call
from tests.distributed import on_ranks
from tests.methods.moments import moments_by_hand
from tests.methods.orders import LR, ByHand, learn, order_room, rows_of
from tests.methods.small import OWN
from tests.methods.steps import off, opposed
from tests.nano import nano_t5
from tests.stages import Kind, naive_loss
from tests.training.test_step_state import SAME, entered

FROM_WEIGHT = [
    {"init": "olora"},
    {"init": "pissa"},
    {"init": "corda", "corda": "ipm"},
    {"init": "corda", "corda": "kpm"},
]
ALL = [{"init": "gaussian"}, {"init": "orthogonal"}, {"init": "eva"}, *FROM_WEIGHT]
# B that is not zero, the inputs, the weight and the inputs.
SORTS = [{"init": "orthogonal"}, {"init": "eva"}, {"init": "corda", "corda": "kpm"}]
every_init = pytest.mark.parametrize("init", narrowed(ALL, SORTS), ids=lambda init: "-".join(init.values()))
borrowing = pytest.mark.parametrize("init", FROM_WEIGHT, ids=lambda init: "-".join(init.values()))


def sets(init: dict[str, Any]) -> dict[str, Any]:
    return {f"adapter__{name}": value for name, value in init.items()}


def begun(place: Place, init: dict[str, Any], kind: Kind = "t5", **settings: Any) -> StageRun:
    """A first stage whose option has begun it."""
    room, config = order_room(place, "inclora", kind=kind, **sets(init), **settings)
    stage = StageRun(room, config, 0)
    room.method.build(stage)
    stage.own = rows_of(stage.plan)
    for option in stage.options:
        option.begin(stage, stage.own)
    return stage


# Against numpy.


def naive(init: dict[str, Any], W: Any, C: Any, r: int, s: float) -> Any:
    """What is taken of W (m, n), from the definition in fp64; of inputs with second moments C."""
    W = W.double().numpy()
    if init["init"] == "olora":
        Q, R = np.linalg.qr(W)
        return s * Q[:, :r] @ R[:r]
    turn = np.eye(W.shape[1])
    if init["init"] == "corda":
        turn = C / np.trace(C) * len(C) + 0.01 * np.eye(len(C))
    U, sigma, Vh = np.linalg.svd(W @ turn, full_matrices=False)
    chosen = slice(len(sigma) - r, None) if init.get("corda") == "kpm" else slice(r)
    return (U[:, chosen] * sigma[chosen]) @ Vh[chosen] @ np.linalg.inv(turn)


PATTERNS = {"rank_pattern": {r"v(_proj)?": 4}, "alpha_pattern": {r"v(_proj)?": 6.0}, "rslora": True}


def _taken(place: Place, kind: Kind, init: dict[str, Any]) -> dict[str, Tensor]:
    stage = begun(place, {**init, **PATTERNS}, kind)
    assert {stage.rank_of(t) for t in stage.named("A")} == {2, 4}
    assert {stage.scale_of(t) for t in stage.named("A")} == {4 / 2**0.5, 6 / 2}
    pair, moments = stage.adapters.pair(), {}
    if init["init"] == "corda":
        moments = {t: C.numpy() for t, C in moments_by_hand(stage.room, kind, rows_of(stage.plan).examples).items()}
    for target, past in stage.adapters.past.items():
        wanted = naive(init, past.base, moments.get(target), stage.rank_of(target), stage.scale_of(target))
        found = pair.lent(target)
        assert found is not None and np.linalg.norm(found.double().numpy() - wanted) < 1e-4 * np.linalg.norm(wanted)
        assert off(past.weight, past.base - found) < 1e-6
        assert float(pair.update(target).norm()) < 1e-6 * float(found.norm())
    stage.close()
    return pair.A | {f"{target} B": B for target, B in pair.B.items()}


@pytest.mark.parametrize("kind", ["t5", "llama"])
@borrowing
def test_what_is_taken_of_the_weight_on_one_rank_and_on_two(init: dict[str, Any], kind: Kind) -> None:
    (alone,) = on_ranks(1, _taken, kind, init)
    first, second = on_ranks(2, _taken, kind, init)
    assert all(torch.equal(first[name], second[name]) and off(first[name], alone[name]) < 1e-4 for name in alone)


def _of_inputs(place: Place, kind: Kind) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Five rows of three: on two ranks one is dealt a row that does not count."""
    stage = begun(place, {"init": "eva", "init_rows": 5}, kind, adapter__r=6, training__micro_batch=1)
    [option] = [option for option in stage.options if isinstance(option, Initialisation)]
    drawn = torch.randperm(6, generator=stage.rng("inputs"))[:5].sort().values.tolist()
    moments = moments_by_hand(stage.room, kind, rows_of(stage.plan).take(drawn).examples)
    pair = stage.adapters.pair()
    for target, moment in moments.items():
        energy, vectors = np.linalg.eigh(moment.numpy())
        spans = min(int((energy > 1e-10 * energy[-1]).sum()), 6)
        A = pair.A[target].double().numpy()
        np.testing.assert_allclose(np.abs(np.sum(A[:spans].T * vectors[:, ::-1][:, :spans], 0)), 1, atol=1e-5)
        np.testing.assert_allclose(A @ A.T, np.eye(6), atol=1e-6)
        assert option.spans.get(target, 6) == spans
        assert not pair.B[target].any() and not pair.A0
    assert option.about() == ({"init_spans": option.spans} if option.spans else {})
    assert bool(option.said()) == bool(option.spans)
    stage.close()
    return pair.A, option.spans


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_eva_begins_with_the_inputs_directions_on_one_rank_and_on_two(kind: Kind) -> None:
    ((alone, spans),) = on_ranks(1, _of_inputs, kind)
    (first, _), (second, others) = on_ranks(2, _of_inputs, kind)
    assert spans == others
    assert all(torch.equal(first[t], second[t]) and off(first[t], A) < 1e-4 for t, A in alone.items())


# Steps by hand.


def _by_hand(place: Place, init: dict[str, Any]) -> None:
    """Two stages: the second takes of W0 and what the first has learned."""
    room, config = order_room(place, "inclora", **sets(init), training__epochs=2)
    hand = ByHand(room)
    for index in range(2):
        whole = {t: hand.W0[t] + hand.past[t] for t in hand.targets}
        stage = StageRun(room, config, index)
        room.method.build(stage)
        Initialisation().begin(stage, rows_of(stage.plan))
        stage.close()
        hand.take(room.adapters.pair())
        taken = {t: torch.from_numpy(naive(init, W, None, 2, 2.0)).float() for t, W in whole.items()}
        assert all(off(update.detach(), taken[t]) < 1e-4 for t, update in hand.update().items())
        hand.past = {t: hand.past[t] - taken[t] for t in hand.targets}
        examples = rows_of(room.order[index]).examples[:4]
        plainly = {f"{t}.weight": W for t, W in whole.items()}
        before = copy.deepcopy(hand.model)
        before.load_state_dict(plainly, strict=False)
        wanted = float(naive_loss(before, "t5", examples))
        assert float(naive_loss(hand, "t5", examples).detach()) == pytest.approx(wanted, rel=1e-4)

        outcome = learn(room, config, index)
        hand.train(config, index, rows_of(room.order[index]))
        folded = room.adapters.folded[-1]
        assert folded.rank == 4
        for t in hand.targets:
            ours = [outcome.parameters[f"{t}.lora_{factor}"] for factor in "AB"]
            assert off(ours[0], hand.A[t].detach()) < 1e-3 and off(ours[1], hand.B[t].detach()) < 1e-3
            learned = hand.update()[t].detach().double() - taken[t].double()
            assert off(folded.update(t), learned) < 1e-3
        hand.fold()
        for t, past in room.adapters.past.items():
            assert off(past.whole, hand.W0[t] + hand.past[t]) < 1e-4 and not past.lends


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_two_stages_by_hand(init: str) -> None:
    on_ranks(1, _by_hand, {"init": init})


def _two_rates(place: Place, optimizer: str) -> None:
    room, config = order_room(
        place, "inclora", adapter__lr_ratio_B=4.0, training__epochs=2, training__optimizer=optimizer
    )
    hand = ByHand(room)
    hand.begin(room, config, 0)
    at = [{"params": list(hand.A.values()), "lr": LR}, {"params": list(hand.B.values()), "lr": 4 * LR}]
    made: Any = {"adamw": lambda: torch.optim.AdamW(at, weight_decay=0.0), "sgd": lambda: torch.optim.SGD(at)}
    learn(room, config, 0)
    hand.train(config, 0, rows_of(room.order[0]), optimizer=made[optimizer]())
    assert hand.off(room.adapters.folded[-1]) < 1e-3
    one_rate = ByHand(room)
    one_rate.begin(room, config, 0)
    one_rate.train(config, 0, rows_of(room.order[0]))
    assert one_rate.off(room.adapters.folded[-1]) > 0.1


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_lora_plus_trains_b_at_a_rate_of_its_own(optimizer: str) -> None:
    on_ranks(1, _two_rates, optimizer)


def _rslora(place: Place) -> None:
    room, config = order_room(place, "inclora", adapter__rslora=True, adapter__r=4)
    hand = ByHand(room)
    assert room.adapters.scale == 2.0  # 4 / √4
    hand.begin(room, config, 0)
    learn(room, config, 0)
    hand.train(config, 0, rows_of(room.order[0]))
    assert hand.off(room.adapters.folded[-1]) < 1e-3 and room.adapters.folded[-1].scale == 2.0


def test_rslora_by_hand() -> None:
    on_ranks(1, _rslora)


# Under every method.


def _first_losses(place: Place, name: str) -> set[str]:
    """What a method refuses; of the others the first loss is that of the weight, and a second stage goes through."""
    own = {f"method__{key}": value for key, value in OWN.get(name, {}).items()}
    refused, wanted = set(), None
    for init in ({"init": "default"}, *ALL):
        room, config = order_room(place, name, **own, **sets(init))
        try:
            check_method(config, room.order, [(32, 32)])
        except UserError as error:
            assert "adapter.init" in str(error)
            refused.add("-".join(init.values()))
            continue
        if wanted is not None and init["init"] == "gaussian":
            continue  # B is zero, as it always was
        if not (room.method.full or room.method.only_kind):
            first = next(row["loss"] for row in learn(room, config, 0, opposed(0)).rows if "loss" in row)
            wanted = first if wanted is None else wanted
            assert first == pytest.approx(wanted, rel=1e-4), init
            for index in range(1, len(room.order))[:1]:
                learn(room, config, index, opposed(index))
    return refused


EVERY, PARTS = ({"-".join(init.values()) for init in inits} for inits in (ALL, FROM_WEIGHT))
# Methods that train no pair of the kind's own, and those that take B A for the update.
NO_PAIR = "seqft l2p progprompt lfpt5 shared-basis colora coso osft sdlora jumplora oliera oa gorp gainlora sapt"
TAKE_B_A = "nlora sparse-orth pego ella pslora ewc-lora slao merge slora hard-orth soft-orth"
CANNOT = {
    **dict.fromkeys(NO_PAIR.split(), EVERY),
    "inflora": EVERY,
    "grassmann": PARTS | {"orthogonal"},  # with method.stiefel
    **dict.fromkeys(TAKE_B_A.split(), PARTS),
}


# All of it, no part of the weight, and none: as A is designed, the update is no pair, all weights train, or a prompt.
@pytest.mark.parametrize("name", narrowed(METHODS.ours, ["inclora", "nlora", "inflora", "coso", "seqft", "l2p"]))
def test_each_method_begins_as_the_weight_answers_or_refuses(name: str) -> None:
    assert on_ranks(1, _first_losses, name) == [CANNOT.get(name, set())]


def test_what_each_refuses_depends_on_its_settings() -> None:
    def says(name: str, **own: Any) -> str:
        values = {"method": {"name": name, **own}, "adapter": {"init": "pissa"}}
        config = RunConfig.model_validate(values)
        with pytest.raises(UserError) as refused:
            check_method(config, make_method(config).plan(["a", "b"]))
        return str(refused.value)

    assert "clora keeps a subspace out of A and B as they are, not of what they change" in says("clora")
    assert "beside a B that is not zero the model would answer otherwise" in says("grassmann", stiefel=True)
    for fine in ({"name": "grassmann"}, {"name": "hard-orth", "reorthogonalise": {"rescale": True}}):
        config = RunConfig.model_validate({"method": fine, "adapter": {"init": "pissa"}})
        check_method(config, make_method(config).plan(["a", "b"]))


# Restarted, entered in the middle, with a slow copy.


def _restarted(place: Place, folder: str, name: str, init: dict[str, Any], settings: dict[str, Any]) -> str:
    dropped = {"dropout": 0.2, "adapter__dropout": 0.2, "training__epochs": 2, **sets(init), **settings}
    straight, config = order_room(place, name, **dropped)
    rundir = RunDir(Path(folder))
    for index in range(3):
        learn(straight, config, index, opposed(index))
        room, _ = order_room(place, name, **dropped)
        if index:
            restored = StageRun(room, config, index - 1)
            restore_stage(rundir, restored, index - 1)
            restored.close()
        stage = learn(room, config, index, opposed(index)).stage
        ours, theirs = room.adapters, straight.adapters
        assert list(ours.kept) == list(theirs.kept) and ours.live == theirs.live
        for t, past in theirs.past.items():
            assert torch.equal(ours.past[t].weight, past.weight)
            assert past.sum is None or torch.equal(ours.past[t].sum, past.sum)
        assert all(torch.equal(ours.parameters()[n], p) for n, p in theirs.parameters().items())
        commit(rundir, index, stage.plan.name, lambda draft: save_stage(draft, stage))  # noqa: B023
    again, _ = order_room(place, name, **dropped)
    evaluated = StageRun(again, config, 2, evaluating=True)
    restore_stage(rundir, evaluated, 2)
    evaluated.close()
    assert all(torch.equal(again.adapters.past[t].weight, past.weight) for t, past in room.adapters.past.items())
    assert again.adapters.live == room.adapters.live
    return str(json.loads((rundir.stage_dir(2, "c") / "state.json").read_text())["own"])


@pytest.mark.parametrize("name", narrowed(["inclora", "seqlora", "olora", "pertask"], ["inclora"]))
@every_init
def test_restarted_at_every_stage_it_is_the_same_to_the_bit(init: dict[str, Any], name: str, tmp_path: Path) -> None:
    assert on_ranks(1, _restarted, str(tmp_path), name, init, {}) == ["adapter"]


@pytest.mark.parametrize("name", ["inclora", "seqlora"])
def test_and_where_factors_are_larger_than_their_matrix(name: str, tmp_path: Path) -> None:
    found = on_ranks(1, _restarted, str(tmp_path), name, {"init": "pissa"}, {"adapter__r": 9})
    assert found == ["state" if name == "inclora" else "adapter"]


@pytest.mark.parametrize(
    ("method", "at"), [("inclora", 3), pytest.param("olora", 2, marks=wide), pytest.param("ewc", 1, marks=wide)]
)  # the first stage, or the second
@every_init
def test_a_stage_is_entered_in_its_middle(init: dict[str, Any], method: str, at: int) -> None:
    found = entered(1, method, at, **sets(init))
    assert found.pop("held") and found == SAME


def test_with_a_rank_that_is_chosen() -> None:
    (found,) = on_ranks(1, _chosen)
    assert len({rank for rank, _ in found.values()}) == 1 and all(rank == r for rank, r in found.values())


def _chosen(place: Place) -> dict[str, tuple[int, int]]:
    found = {}
    for init in [{"init": "default"}, *[init for init in ALL if init["init"] != "orthogonal"]]:
        stage = begun(place, init, adapter__r="auto", adapter__max_r=8, adapter__energy=0.8)
        pair = stage.adapters.pair()
        found["-".join(init.values())] = pair.rank, len(next(iter(pair.A.values())))
        assert bool(pair.A0) == stage.config.adapter.borrows
        stage.close()
    return found


# What is refused, and said.

EVEN = "adapter.init=orthogonal: half of the rank is A's, half B's, and adapter.r is {}; set an even one"
REFUSED = [
    ("inclora", "init=corda", "adapter.init=corda: set adapter.corda to ipm (the largest components) or kpm"),
    ("inclora", "corda=ipm", "adapter.corda: adapter.init is default; leave it out, or set adapter.init=corda"),
    ("inclora", "init=orthogonal r=3", EVEN.format(3)),
    ("inclora", "init=orthogonal r=auto", EVEN.format("auto")),
    ("inclora", 'init=orthogonal r=4 rank_pattern={"q":3}', "adapter.rank_pattern is 3; set an even one"),
    (
        "inclora",
        "init=pissa r=200",
        "adapter.r: adapter.init=pissa takes 200 directions of each layer, and one has 192",
    ),
    ("inclora", "init=qr", "adapter.init must be one of default, gaussian, orthogonal, olora, pissa, eva, corda"),
    ("inclora", "lr_ratio_B=0", "adapter.lr_ratio_B must be more than 0"),
    ("seqft", "init=pissa", "adapter.init: seqft trains all weights; leave it out"),
    ("coso", "rslora=true", "adapter.rslora: coso trains no pair of the adapter kind's own; leave it out"),
    ("l2p", "lr_ratio_B=2", "adapter.lr_ratio_B: l2p trains no pair of the adapter kind's own; leave it out"),
    ("inflora", "init=eva", "adapter.init=eva: inflora makes A itself, and B begins at zero; leave it out"),
    ("nlora", "init=pissa", "and nlora penalises the size of B A as that of the update; leave it out"),
    ("hard-orth", "init=olora", "method.reorthogonalise: with adapter.init=olora the pair holds a part of the weight"),
    ("inclora", "kind=dora init=pissa", "adapter.init: dora has no use for it; leave it out"),
    ("inclora", "kind=vera rslora=true", "adapter.rslora: vera has no use for it; leave it out"),
]


@pytest.mark.parametrize(("method", "given", "says"), REFUSED, ids=[f"{m} {given}" for m, given, _ in REFUSED])
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    method: str, given: str, says: str, tmp_path: Path
) -> None:
    words = [word for setting in given.split() for word in ("--set", f"adapter.{setting}")]
    result = call("train", "--order", "order1", "--method", method, *NANO, *words, "--dry-run", cwd=tmp_path)
    assert result.code == 2 and says in result.line and not (tmp_path / "runs").exists()


def test_that_dropout_drops_of_the_weight_too_is_said() -> None:
    def notes(**adapter: Any) -> list[str]:
        config = RunConfig.model_validate({"adapter": adapter})
        return Initialisation().notes([(config, make_method(config), 3)])

    assert notes(init="pissa", dropout=0) == notes(init="eva") == []
    assert notes(init="pissa") == [
        "adapter.init=pissa: the pair holds a part of the weight, and while it trains adapter.dropout (0.1) drops of "
        "that too; set it to 0 to begin as the weight answers"
    ]


# Whole runs.

ORDER = "name: two\ntasks: [dbpedia, amazon]\n"


def run(cwd: Path, *given: str) -> Any:
    (cwd / "two.yaml").write_text(ORDER)
    words = [word for setting in given for word in ("--set", setting)]
    return call("train", "--order", "two.yaml", *NANO, *words, "--name", "it", cwd=cwd)


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    result = run(tmp_path, "method.name=inclora", "adapter.init=eva", "adapter.r=16", "adapter.init_rows=1")
    assert result.code == 2
    assert "tokens in 1 rows of dbpedia (adapter.init_rows 1), and its rank is 16; give it more rows" in result.err


@pytest.mark.parametrize(
    ("method", "init", "slow"),
    [
        ("olora", "pissa", False),
        pytest.param("seqlora", "corda", True, marks=wide),
        pytest.param("inclora", "orthogonal", False, marks=wide),
        pytest.param("pertask", "olora", True, marks=wide),
    ],
)
def test_a_run_answers_again_and_in_plain_peft(method: str, init: str, slow: bool, tmp_path: Path) -> None:
    given = [f"method.name={method}", f"adapter.init={init}", "adapter.r=4", "adapter.dropout=0"]
    given += ["adapter.corda=kpm"] * (init == "corda") + ["options.slow_copy={beta: 0.5}"] * slow
    result = run(tmp_path, *given)
    assert result.code == 0, result.err
    for stage in ("1", "2"):
        again = call("eval", "it", "--stage", stage, "--json", cwd=tmp_path)
        assert again.code == 0, again.err
        found = json.loads(again.out)
        assert not any(found["differing_rows"].values()) and found["scores"] == found["committed"]
    folder = tmp_path / "runs/it/stages/01-dbpedia"
    base = load_base(ModelConfig(name=nano_t5()), torch.device("cpu")).model
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers by a name that transformers 5.23 deprecates.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        merged = PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload().state_dict()
    moved = sum(float((merged[name] - value).double().square().sum()) for name, value in before.items()) ** 0.5
    learned = json.loads((folder / "metrics.json").read_text())["training"]["update_norm"]
    free = free_subspace(RunDir(tmp_path / "runs/it"), ["dbpedia", "amazon"])
    pairs = 1 if method in ("seqlora", "pertask") else 2
    read = pairs * 4 * (1 if init == "orthogonal" else 2)  # A and what it began as, of each pair in the sum
    assert free == pytest.approx(100 * (1 - read / 192), abs=0.6)
    assert moved > 0 and (slow or moved == pytest.approx(learned, rel=1e-3))  # what was learned, no part of the weight
