"""InfLoRA: A against eigenvectors of inputs seen one example at a time, B by plain steps, and what past inputs get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_runner.adapters.pairs import Pair
from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import make_method
from cl_runner.methods.protocol import State
from cl_runner.methods.shared.gpm import Memory, designed_rows, updated
from cl_runner.methods.shared.moments import input_moments
from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.training.checkpoint import restore_stage, save_stage
from cl_runner.training.stage import StageRun
from tests.adapters.families import adapters_of, base_model
from tests.breadth import paired
from tests.distributed import on_ranks
from tests.methods.moments import moments_by_hand
from tests.methods.orders import learn, order_room
from tests.methods.steps import LR, STEPS, THREE, off, put, values
from tests.stages import Kind, naive_loss, some_rows

R = 3


def sources(index: int) -> Any:
    """Inputs that differ from stage to stage."""
    return some_rows(6, seed=20 + index, task="abc"[index])


def used(memory: Memory) -> Tensor:
    """The projector onto what past tasks use, fp64."""
    basis = memory.basis.double()
    onto = basis @ basis.T
    return torch.eye(len(onto), dtype=onto.dtype) - onto if memory.free else onto


def amplify(room: Any, by: float) -> None:
    """Of what the first block of a Llama reads, one channel ``by`` times as large; the model answers as before."""
    block = room.base.model.model.layers[0]
    block.input_layernorm.weight.data[5] *= by
    for layer in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
        layer.weight.data[:, 5] /= by


def _stages(place: Place, kind: Kind, threshold: float, by: float) -> None:
    room, config = order_room(place, "inflora", kind=kind, adapter__r=R, **THREE, method__threshold=threshold)
    hand, _ = order_room(place, "inclora", kind=kind, adapter__r=R)
    if by != 1:
        amplify(room, by), amplify(hand, by)
    past: dict[str, Memory] = {}
    close = 1e-3 if by == 1 else 1e-2  # beside one direction of 10,000, fp32 inputs have the others to a thousandth
    for index in range(3):
        examples = sources(index).examples
        before = moments_by_hand(room, kind, examples)
        weights = {target: p.weight.detach().clone() for target, p in room.adapters.past.items()}
        learn(room, config, index, sources(index))
        pair = room.adapters.folded[-1]
        for target, moment in before.items():
            allowed = torch.eye(len(moment), dtype=moment.dtype) - (used(past[target]) if past else 0)
            leading = torch.linalg.eigh(allowed @ moment @ moment @ allowed)[1][:, -R:]
            A = pair.A[target].double()
            assert off(3 * A.T @ A, leading @ leading.T) < close, target  # designed, and not trained since
            torch.testing.assert_close(3 * A @ A.T, torch.eye(R).double(), atol=1e-5, rtol=0)
            assert float(pair.B[target].norm()) > 0.1 and float(pair.B[target].norm(dim=0).min()) > 0.01  # each column
            if past:
                assert off(A @ allowed, A) < 1e-5  # in the designed space
                change = (room.adapters.past[target].weight - weights[target]).double()
                assert float((change @ used(past[target])).norm() / change.norm()) < 1e-5  # past inputs: as before
        # Targets that share an input share A.
        same = [[t for t in before if torch.equal(before[t], before[s])] for s in before]
        assert all(torch.equal(pair.A[t], pair.A[group[0]]) for group in same for t in group)
        assert max(map(len, same)) >= 2 and len({tuple(group) for group in same}) >= 2

        # B: plain steps of AdamW, A as it is.
        put(hand, {name: getattr(pair, name[-1])[name[:-7]] * (name[-1] == "A") for name in values(hand)})
        hand.adapters._live("hand")
        B = {name: p for name, p in hand.adapters.parameters().items() if name.endswith("B")}
        optimizer = torch.optim.AdamW(list(B.values()), lr=LR, weight_decay=0.0)
        for _ in range(STEPS):
            optimizer.zero_grad()
            naive_loss(hand.adapters.model, kind, examples).backward()
            optimizer.step()
        assert max(off(pair.B[name[:-7]], value.detach()) for name, value in B.items()) < 1e-3
        hand.adapters.fold(pair)

        # What is kept of the stage.
        after = moments_by_hand(room, kind, examples)
        share = threshold + (1 - threshold) * index / 3
        past = {target: updated(past.get(target), moment, share) for target, moment in after.items()}
        assert sorted(room.method.memories) == sorted({group[0] for group in same})
        for name, memory in room.method.memories.items():
            assert memory.free == past[name].free and memory.basis.shape == past[name].basis.shape
            assert off(used(memory), used(past[name])) < 1e-3


@pytest.mark.parametrize(
    ("kind", "threshold", "by"),
    paired(
        [("t5", 0.95, 1), ("llama", 0.95, 1), ("llama", 0.7, 1), ("llama", 0.95, 1e4)],
        [("t5", 0.95, 1), ("llama", 0.95, 1e4)],
    ),
)
def test_designed_trained_and_remembered(kind: Kind, threshold: float, by: float) -> None:
    """Also where one direction of an input is 10,000 times the others, that is 10⁸ in the moment."""
    on_ranks(1, _stages, kind, threshold, by)


def _moments(place: Place, bf16: bool, kind: Kind = "t5", by: float = 1) -> dict[tuple[str, ...], Tensor]:
    room, config = order_room(place, "inflora", kind=kind, bf16=bf16, training__micro_batch=1)
    if by != 1:
        amplify(room, by)
    stage = StageRun(room, config, 0)
    room.method.build(stage)
    stage.own = some_rows(5, task="a")
    room.adapters.model.eval()
    found = input_moments(stage)
    stage.close()
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_moments_leave_padding_and_idle_ranks_out(ranks: int) -> None:
    """Five rows one at a time on two ranks: the last one's second rank has none."""
    room, _ = order_room(Place(), "inclora")
    wanted = moments_by_hand(room, "t5", some_rows(5, task="a").examples)
    for found in on_ranks(ranks, _moments, False):
        assert sorted(t for group in found for t in group) == sorted(wanted)
        assert all(off(moment, wanted[target]) < 1e-5 for group, moment in found.items() for target in group)


@pytest.mark.parametrize("ranks", [1, 2])
def test_moments_resolve_what_a_loud_direction_drowns_in_fp32(ranks: int) -> None:
    """Beside a channel 10⁵ times the others, each of these has its energy still, summed over ranks too."""
    room, _ = order_room(Place(), "inclora", kind="llama")
    amplify(room, 1e5)
    first = "model.layers.0.self_attn.q_proj"
    wanted = torch.linalg.eigvalsh(moments_by_hand(room, "llama", some_rows(5, task="a").examples)[first])
    for found in on_ranks(ranks, _moments, False, "llama", 1e5):
        [moment] = [moment for group, moment in found.items() if first in group]
        assert moment.dtype == torch.float64
        energies = torch.linalg.eigvalsh(moment)
        assert float(energies[-1] / energies[-2]) > 1e8
        torch.testing.assert_close(energies[-10:], wanted[-10:], rtol=1e-4, atol=0)


def test_moments_are_fp64_sums_where_the_forward_is_bf16() -> None:
    """What the first layers see is not rounded yet: their moments are to the bit those of a forward in fp32."""
    plain, rounded = on_ranks(1, _moments, False)[0], on_ranks(1, _moments, True)[0]
    differ = [off(moment, plain[group]) for group, moment in rounded.items()]
    assert all(moment.dtype == torch.float64 for moment in rounded.values())
    assert 0 in differ and 1e-4 < max(differ) < 0.05


def _as_runs_once_wrote_it(place: Place) -> None:
    """A memory read from disk in fp32 serves as it is: A lies off it, and the next memory has its span."""
    room, config = order_room(place, "inflora", adapter__r=R, **THREE)
    learn(room, config, 0, sources(0))
    state = room.method.state()
    assert all(basis.dtype == torch.float64 for basis in state.tensors.values())
    room.method.load_state(State({name: basis.float() for name, basis in state.tensors.items()}, state.json))
    learn(room, config, 1, sources(1))
    for name, memory in room.method.memories.items():
        before = state.tensors[f"memory.{name}"]
        assert name not in state.json["free"] and memory.basis.dtype == torch.float64
        assert float((room.adapters.folded[-1].A[name].double() @ before).abs().max()) < 1e-6
        torch.testing.assert_close(used(memory) @ before, before, atol=1e-6, rtol=0)


def test_memories_of_older_runs_are_read() -> None:
    on_ranks(1, _as_runs_once_wrote_it)


def test_a_threshold_that_shrinks_is_refused() -> None:
    config = RunConfig.model_validate({"method": {"name": "inflora", "last_threshold": 0.9}})
    with pytest.raises(UserError, match=r"^method.last_threshold: 0.9 is below method.threshold 0.95; what is kept"):
        make_method(config).check(config)


def _no_room(place: Place, folder: str) -> None:
    """Past tasks use every direction of one input: the layers that read it stand still, the others go on."""
    room, config = order_room(place, "inflora", adapter__r=R, **THREE)
    learn(room, config, 0, sources(0))
    full = next(iter(room.method.memories))
    n = len(room.method.memories[full].basis)
    room.method.memories[full] = Memory(torch.zeros(n, 0), free=True)
    groups = {name: group for group in StageRun(room, config, 1).input_groups() for name in group}
    stage = learn(room, config, 1, sources(1)).stage
    pair = room.adapters.folded[-1]
    for target in room.adapters.layers:
        still = target in groups[full]
        assert not pair.A[target].any() if still else float(pair.A[target].norm()) == pytest.approx(1, abs=1e-5)
        assert not pair.update(target).any() if still else float(pair.update(target).norm()) > 0.1
    assert room.method.memories[full].free and room.method.memories[full].basis.shape == (n, 0)
    if place.ranks == 1:  # nothing is something to be stored, too
        commit(RunDir(Path(folder)), 1, stage.plan.name, lambda draft: save_stage(draft, stage))
        again, _ = order_room(place, "inflora", adapter__r=R, **THREE)
        restore_stage(RunDir(Path(folder)), StageRun(again, config, 1), 1)
        assert again.method.memories[full].basis.shape == (n, 0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_where_no_direction_is_left_a_layer_stands_still(ranks: int, tmp_path: Path) -> None:
    on_ranks(ranks, _no_room, str(tmp_path))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("precision", "least", "most"), [(torch.float32, 0.0, 1e-5), (torch.bfloat16, 1e-4, 1e-2)])
def test_past_inputs_are_left_alone_to_the_rounding_of_the_forward(
    precision: torch.dtype, least: float, most: float, folded: bool
) -> None:
    """What an update off past inputs makes of one, over what it makes of another input of that length."""
    n, used, dice = 512, 24, torch.Generator().manual_seed(0)
    past, new = (torch.randn(count, n, generator=dice) for count in (used, 64))
    A = designed_rows(new.T @ new, Memory(torch.linalg.qr(past.T).Q), 8)
    half = precision == torch.bfloat16
    model = base_model("llama", layers=1, hidden_size=n).to(precision)
    adapters = adapters_of(model, "llama", r=8, targets=["q_proj"], compute=precision)
    [(target, layer)] = adapters.layers.items()
    layer.get_base_layer().weight.data.zero_()  # what comes out is the update's alone
    adapters.show(Pair("a", 8, 1.0, {target: A}, {target: torch.randn(n, 8, generator=dice)}))
    if folded:
        adapters.fold_live()

    def effect(x: Tensor) -> float:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            return float(layer(x.to(precision)).float().norm())

    other = torch.randn(used, n, generator=dice)
    share = effect(past) / effect(past.norm() / other.norm() * other)
    assert least <= share < most
