"""A stage of every kind on disk: plain PEFT on the original base answers as it did; all comes back to the bit."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from cl_runner.adapters.base import Held
from cl_runner.adapters.pairs import Pair
from cl_runner.adapters.saved import Saved
from cl_runner.adapters.tuned import Tuned, Values
from tests.adapters.families import base_model, logits, off, with_updates
from tests.adapters.test_peft_folder import plain, same_pair
from tests.adapters.tuners import CASES, PAIRS, SETTINGS, begun, folded, moved, opened
from tests.breadth import paired

State = Literal["alone", "folded", "folded twice", "beside a sum"]
STATES: tuple[State, ...] = ("alone", "folded", "folded twice", "beside a sum")
NATIVE = {"tied-lora": "LORA", "lora-xs": "LORA", "dora": "LORA", "vera": "VERA", "vblora": "VBLORA", "ia3": "IA3"}
OURS = ("tied-lora", "lora-xs")  # PEFT has no such kind


def alone(base: Any, folder: Path) -> PeftModel:
    """A folder of the kind's own, in PEFT alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # The frozen matrices come from their seed.
        warnings.filterwarnings("ignore", message="Specified to not (save|load)", category=UserWarning)
        return PeftModel.from_pretrained(base, folder).eval()


def at(state: State, kind: str, base: Any, family: str = "t5") -> tuple[Tuned, str]:
    """Adapters in that state, and the stage that is to be committed."""
    adapters = opened(kind, base, family)
    if state in ("folded twice", "beside a sum"):
        folded(adapters, "one", seed=1)
    moved(begun(adapters, "two", seed=2), seed=2)
    if state in ("alone", "beside a sum"):
        adapters.keep_live()
    else:
        adapters.fold_live()
    return adapters, "two"


def read(again: Tuned, folder: Path, saved: Saved, beside: dict[str, Tensor], of: Tuned, stage: str) -> Held:
    """A stage that ``of`` committed, in adapters that are as new; the pairs of earlier ones are those of ``of``."""
    earlier = {pair.stage: pair for pair in of.folded}
    live = stage if stage in of.kept else None
    held = again.load(folder, stage, Saved.from_json(saved.to_json()), beside, live, earlier.__getitem__, {})
    again.restore(held.folded, held.kept, held.live, sums=held.sums, dense=held.dense)
    return held


# Every kind alone on T5, and on the others in one of the other states.
QUICK = [
    *((kind, "t5", "alone") for kind in SETTINGS),
    *((*case, STATES[1 + i % 3]) for i, case in enumerate(case for case in CASES if case[1] != "t5")),
]


@pytest.mark.parametrize(
    ("kind", "family", "state"), paired([(*case, state) for case in CASES for state in STATES], QUICK)
)
def test_a_stage_answers_in_plain_peft_and_comes_back_to_the_bit(
    kind: str, family: str, state: State, tmp_path: Path
) -> None:
    base = base_model(family, layers=1)
    adapters, stage = at(state, kind, base, family)
    wanted = logits(adapters.model)
    saved, beside = adapters.save(tmp_path / "a", stage, adapters.held())
    own_format = state == "alone" and kind not in OURS
    about = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert about["peft_type"] == (NATIVE.get(kind, kind.upper()) if own_format else "LORA")
    assert about.get("use_dora", False) == (own_format and kind == "dora")
    assert about["base_model_name_or_path"] == "some/base" and about["inference_mode"] is True
    fresh = copy.deepcopy(base)
    loaded = alone(fresh, tmp_path / "a") if own_format else plain(fresh, tmp_path / "a")
    assert off(logits(loaded), wanted) < 1e-5
    assert off(logits(base), wanted) > 0.02

    again = opened(kind, base, family)
    held = read(again, tmp_path / "a", saved, beside, adapters, stage)
    assert torch.equal(logits(again.model), wanted)
    assert held.dense == tuple(adapters.dense) and held.live == adapters.live
    assert len(held.folded) == len(adapters.folded)
    assert all(same_pair(a, b) for a, b in zip(held.folded, adapters.folded, strict=True))
    for target, past in adapters.past.items():
        total = again.past[target].sum
        assert past.sum is total is None or (past.sum is not None and torch.equal(past.sum, total))
    if adapters.live is not None:
        kept, ours = again.values(), adapters.values()
        assert kept.stage == ours.stage and kept.tensors.keys() == ours.tensors.keys()
        assert all(torch.equal(tensor, kept.tensors[name]) for name, tensor in ours.tensors.items())
        assert again.kept.keys() == adapters.kept.keys() == {stage}
    # And what comes next is the same.
    for one in (adapters, again):
        if one.live is not None:
            one.rename("three")
        else:
            begun(one, "three", seed=3)
        moved(one, seed=3)
    assert torch.equal(logits(again.model), logits(adapters.model))
    assert again.update_norm() == adapters.update_norm()


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_stage_that_answers_otherwise_than_it_goes_on(kind: str, tmp_path: Path) -> None:
    """A slow copy is written after the fast one was folded: its update is beside the sum of before, not of now."""
    base = base_model("t5", layers=1)
    adapters = opened(kind, base)
    folded(adapters, "one", seed=1)
    moved(begun(adapters, "two", seed=2), seed=2)
    fast = {name: parameter.detach().clone() for name, parameter in adapters.parameters().items()}
    moved(adapters, seed=3, size=0.1)
    wanted = logits(adapters.model)
    adapters.keep_live()
    answers = adapters.held(copied=True)
    adapters.kept.pop("two")
    adapters.put(fast)
    adapters.fold_live()
    saved, beside = adapters.save(tmp_path / "a", "two", answers)
    assert off(logits(plain(copy.deepcopy(base), tmp_path / "a")), wanted) < 1e-5
    assert adapters.live is None and [*adapters.dense, *(pair.stage for pair in adapters.folded)][-1] == "two"
    again = opened(kind, base)
    held = again.load(tmp_path / "a", "two", saved, beside, "two", lambda _: answers.folded[0], {})
    again.restore(held.folded, held.kept, held.live, sums=held.sums, dense=held.dense)
    assert torch.equal(logits(again.model), wanted)


def test_a_folder_of_vblora_is_small_and_the_logits_are_carried(tmp_path: Path) -> None:
    """On disk k − 1 weights and k numbers of vectors a piece; to train on takes all logits, and these stand beside."""
    base = base_model("t5", layers=1)
    adapters, stage = at("alone", "vblora", base)
    saved, beside = adapters.save(tmp_path / "a", stage, adapters.held())
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert saved.own == "state" and set(beside) == {f"set.{name}" for name in adapters.values().tensors}
    numbers = [tensor for name, tensor in stored.items() if name.endswith("_topk_indices")]
    assert {tensor.dtype for tensor in numbers} == {torch.uint8} and {t.shape[-1] for t in numbers} == {3}
    weights = [tensor for name, tensor in stored.items() if name.endswith("_topk_weights")]
    assert {tensor.shape[-1] for tensor in weights} == {2} and len(stored) == 2 * 2 * len(adapters.layers) + 1
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert size == 4 * adapters.kind.stored_count(adapters.targets())


@pytest.mark.parametrize("kind", [kind for kind in SETTINGS if kind != "vblora"])
def test_a_set_by_itself_is_as_small_as_it_is_counted(kind: str, tmp_path: Path) -> None:
    base = base_model("t5", layers=1)
    adapters, stage = at("alone", kind, base)
    saved, beside = adapters.save(tmp_path / "a", stage, adapters.held())
    if kind in OURS:
        assert saved.own == "state"
        size = sum(tensor.numel() for name, tensor in beside.items() if "basis" not in name)
    else:
        assert saved.own == "adapter" and beside == {}
        size = sum(tensor.numel() for tensor in load_file(tmp_path / "a" / "adapter_model.safetensors").values())
    assert size == adapters.kind.stored_count(adapters.targets())


@pytest.mark.parametrize("kind", SETTINGS)
def test_what_is_said_of_a_folders_size_is_about_right(kind: str, tmp_path: Path) -> None:
    base = base_model("t5", layers=1)
    for state, pairs in (("alone", 1), ("folded twice", 2)):
        adapters, stage = at(state, kind, base)  # type: ignore[arg-type]
        _, beside = adapters.save(tmp_path / state, stage, adapters.held())
        size = (tmp_path / state / "adapter_model.safetensors").stat().st_size
        size += sum(tensor.numel() * tensor.element_size() for tensor in beside.values())
        said = adapters.folder_bytes(pairs, 8, dense=state != "alone" and kind not in PAIRS)
        # A first pair may be folded, and lie there as one.
        assert size < said + 8000 and (said < 2 * size or (state, kind) == ("alone", "vera")), (state, said, size)


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_own_set_of_an_earlier_stage_is_read_from_its_folder(kind: str, tmp_path: Path) -> None:
    base = base_model("t5", layers=1)
    adapters, stage = at("alone", kind, base)
    saved, beside = adapters.save(tmp_path / "a", stage, adapters.held())
    own = opened(kind, base).own(tmp_path / "a", stage, saved, beside)
    assert isinstance(own, Values) and own.stage == stage
    again = opened(kind, base)
    again.show(own)
    assert torch.equal(logits(again.model), logits(adapters.model))

    adapters, stage = at("folded", kind, base)
    saved, beside = adapters.save(tmp_path / "b", stage, adapters.held())
    if adapters.folded:
        own = opened(kind, base).own(tmp_path / "b", stage, saved, beside)
        assert isinstance(own, Pair) and same_pair(own, adapters.folded[0])


@pytest.mark.parametrize("kind", SETTINGS)
def test_two_sets_answer_in_turn(kind: str) -> None:
    """As where each task has its own: what one holds is not in the other's way."""
    base = base_model("t5", layers=1)
    adapters = opened(kind, base)
    wanted = {}
    for stage in ("one", "two"):
        moved(begun(adapters, stage, seed=len(wanted)), seed=len(wanted))
        adapters.keep_live()
        wanted[stage] = logits(adapters.model)
        assert off(wanted[stage], logits(with_updates(base, [adapters.live_update()]))) < 1e-5
    for stage in ("one", "two", "one"):
        adapters.show(adapters.kept[stage])
        assert torch.equal(logits(adapters.model), wanted[stage])
    assert off(wanted["one"], wanted["two"]) > 0.02
