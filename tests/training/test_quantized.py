"""A base in 4 bits under whole stages: trained, gone on with, evaluated, said, and refused where it cannot be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cl_runner.adapters.quantized import Quantized
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import METHODS, make_method
from cl_runner.models.batch import collate, collate_prompts
from cl_runner.models.forward import greedy, logits
from cl_runner.models.heads import logits_behind_head
from cl_runner.models.verify import answers
from cl_runner.registry import KINDS
from cl_runner.training import compatibility
from cl_runner.training.compatibility import check_quantized
from cl_runner.training.stage import StageRun
from tests.adapters.families import adapters_of, off, random_pair
from tests.breadth import ONE_OF_EACH_SORT, narrowed
from tests.command_line import NANO, ORDER, call, results, tree
from tests.distributed import on_ranks
from tests.four_bits import need, twins
from tests.methods.orders import learn, order_room
from tests.stages import END, LAYOUTS, Kind, distance, some_rows, tiny_config
from tests.training.test_checkpoint import Make, Order, kinds, named, same

NF4 = ("--set", "model.quantize=nf4")
SETTINGS: dict[str, dict[str, Any]] = {
    "l2p": {"pool": 4, "length": 2, "top": 2},
    "progprompt": {"length": 3},
    "lfpt5": {"length": 6, "draws": 2, "pseudo_tokens": 8},
    "clora": {"k": 4, "subspace": "data"},
    "coso": {"rank": 2, "sketch": 4, "every": 1},
    "pego": {"group": 2},
    "doc": {"components": 3},
    "gorp": {"k": 2, "every": 1},
    "hard-orth": {"reorthogonalise": {"how": "hard", "every": 2}},
    "soft-orth": {"reorthogonalise": {"how": "soft", "every": 2}},
}


def possible() -> list[str]:
    """Methods that train something that may stand beside 4 bits."""
    made = {name: make_method(tiny_config(method__name=name)) for name in METHODS.ours}
    return [name for name, method in made.items() if KINDS.get(method.kind(tiny_config())).quantized]


def learned(place: Place, name: str, kind: Kind, in_4_bits: bool, dropout: float = 0.0, **more: Any) -> list[Any]:
    """What each of two stages leaves: parameters, and the answers to some rows."""
    own = {f"method__{key}": value for key, value in SETTINGS.get(name, {}).items()}
    model = twins(kind, dropout)[0 if in_4_bits else 1]
    room, config = order_room(place, name, ("a", "b"), kind, model=model, **own, **more)
    found = []
    for index in range(len(room.order)):
        parameters = dict(learn(room, config, index).parameters)
        stage = StageRun(room, config, index)
        some = some_rows(3, seed=9, task="a")
        with torch.no_grad(), stage.without_dropout():
            parameters["answer"] = stage.forward(stage.make_batch(some.examples, some.tasks, [1.0] * 3)).clone()
        stage.close()
        found.append(parameters)
    if in_4_bits and room.adapters.past:
        assert any(isinstance(past, Quantized) for past in room.adapters.past.values())
    return found


@pytest.mark.parametrize("name", narrowed(possible(), ONE_OF_EACH_SORT))
def test_every_method_learns_what_it_learns_on_the_same_weights(name: str) -> None:
    """Those that read W0 too: they read what the codes stand for."""
    need()
    found, wanted = (on_ranks(1, learned, name, "t5", on)[0] for on in (True, False))
    for ours, theirs in zip(found, wanted, strict=True):
        assert distance(ours, theirs) < 1e-3


def test_recomputed_activations_and_dropout_change_nothing() -> None:
    need()
    more = {"adapter__dropout": 0.2, "training__share_prefix": "off"}
    plain, wanted = (on_ranks(1, learned, "inclora", "llama", on, 0.1, **more)[0] for on in (True, False))
    again = on_ranks(1, learned, "inclora", "llama", True, 0.1, training__activation_checkpointing=True, **more)[0]
    for ours, sparing, theirs in zip(plain, again, wanted, strict=True):
        assert distance(ours, theirs) < 1e-3 and distance(sparing, ours) < 1e-4


@pytest.mark.parametrize("more", [{"adapter__dropout_past": True}, {"adapter__r": "auto", "adapter__max_r": 4}])
def test_options_of_adapters_mean_the_same(more: dict[str, Any]) -> None:
    need()
    asked = {"adapter__dropout": 0.2, **more}
    found, wanted = (on_ranks(1, learned, "inclora", "t5", on, 0.1, **asked)[0] for on in (True, False))
    for ours, theirs in zip(found, wanted, strict=True):
        assert distance(ours, theirs) < 1e-3


def _ranks(place: Place) -> list[Any]:
    return learned(place, "inclora", "t5", True)


def test_two_processes_learn_what_one_does() -> None:
    need()
    [one] = on_ranks(1, _ranks)
    for found in on_ranks(2, _ranks):
        for ours, alone in zip(found, one, strict=True):
            assert distance(ours, alone) < 1e-4


# Going on.

LONG: dict[str, Make] = {
    "olora": lambda: named("olora"),
    "dense, then pairs": lambda: kinds("factors", "dense", *["factors"] * 8),
    "kept": lambda: kinds("factors", "keep", *["factors"] * 8),
}


@pytest.mark.parametrize("name", LONG)
def test_stages_go_on_to_the_bit(name: str, tmp_path: Path) -> None:
    """Matrices of 64 × 64, pairs of rank 4: factors beside the codes of seven pairs, one sum of eight and more."""
    need()
    tasks = [f"task{i}" for i in range(10)]

    def order(folder: Path) -> Order:
        return Order(LONG[name], tasks, folder, r=4, model=twins()[0])

    straight = order(tmp_path / "straight")
    after, answered = [], []
    for index in range(10):
        straight.commit(straight.learn(index))
        after.append(straight.bits())
        answered.append(straight.logits())
    forms = [past.right is not None for past in straight.adapters.past.values()]
    assert not any(forms)
    worn = order(straight.rundir.path)
    for index in (9, 3, 8, 0, 7, 6):
        worn.restore(index)
        assert same(worn.bits(), after[index]) and torch.equal(worn.logits(), answered[index]), index
        in_factors = {past.right is not None for past in worn.adapters.past.values()}
        assert in_factors == {index < {"olora": 7, "dense, then pairs": 1, "kept": 8}[name]}, index
    for index in (1, 2, 7, 8):
        again = order(straight.rundir.path).restore(index - 1)
        again.learn(index)
        assert same(again.bits(), after[index]) and torch.equal(again.logits(), answered[index]), index


@pytest.fixture
def here(tmp_path: Path) -> Path:
    need()
    (tmp_path / "three.yaml").write_text(ORDER)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three stages; nobody changes it."""
    need()
    cwd = tmp_path_factory.mktemp("trained")
    (cwd / "three.yaml").write_text(ORDER)
    found = call("train", "--order", "three.yaml", *NANO, *NF4, "--name", "whole", cwd=cwd)
    assert found.code == 0, found.err
    said = r"the base is \d+ KB in 4 bits, and [\d.]+ [KM]B that stay as they are; what stages leave stands beside it, "
    assert len(re.findall(said + r"at most \d+ KB after the last\n", found.err)) == 1
    return cwd / "runs" / "whole"


def test_what_a_run_says_of_itself(trained: Path) -> None:
    about = json.loads((trained / "run.json").read_text())["identity"]["model"]
    assert about["quantize"] == "nf4"
    assert "bitsandbytes" in json.loads((trained / "environment.json").read_text())["packages"]


def test_a_run_that_is_cut_off_after_every_stage_ends_as_one_in_one_go(
    trained: Path, here: Path, cut: Callable[[], None]
) -> None:
    words = ("train", "--order", "three.yaml", *NANO, *NF4, "--name", "whole")
    cut()
    for _ in range(3):
        assert call(*words, cwd=here).code == 1
    assert call(*words, cwd=here).code == 0  # all is there: the results alone are written
    assert results(here / "runs/whole") == results(trained)


@pytest.mark.parametrize("stage", narrowed(["1", "3"], ["3"]))
def test_a_stage_is_scored_again_as_it_was(trained: Path, stage: str) -> None:
    again = call("eval", "whole", "--stage", stage, "--json", cwd=trained.parents[1]).json
    assert again["scores"] == again["committed"] and not any(again["differing_rows"].values())


def test_a_run_on_4_bits_goes_on_with_no_other_base(trained: Path) -> None:
    before = tree(trained)
    found = call("train", "--order", "three.yaml", *NANO, "--name", "whole", cwd=trained.parents[1])
    assert found.code == 2 and "was made with other settings (model.quantize)" in found.line
    assert tree(trained) == before


def test_a_run_in_bf16_trains_what_is_fp32(here: Path) -> None:
    words = ("train", "--order", "three.yaml", *NANO, *NF4, "--set", "training.precision=bf16", "--name", "bf16")
    assert call(*words, cwd=here).code == 0
    run = here / "runs/bf16"
    saved = load_file(run / "stages/03-agnews/adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    again = call("eval", "bf16", "--json", cwd=here).json
    assert again["scores"] == again["committed"] and not any(again["differing_rows"].values())


def test_a_slow_copy_answers_beside_what_goes_on(here: Path) -> None:
    """What answers is held while the sum beside the codes has grown already."""
    slow = ("--set", "options.slow_copy={beta: 0.5, answers: true, next: fast}")
    assert call("train", "--order", "three.yaml", *NANO, *NF4, *slow, "--name", "slow", cwd=here).code == 0
    assert (here / "runs/slow/stages/02-amazon/next").is_dir()
    for stage in ("2", "3"):
        again = call("eval", "slow", "--stage", stage, "--json", cwd=here).json
        assert again["scores"] == again["committed"] and not any(again["differing_rows"].values())


# Answers.


def adapted(kind: Kind) -> Any:
    """A model in 4 bits with two pairs behind it."""
    adapters = adapters_of(twins(kind)[0], kind)
    for i in range(2):
        adapters.fold(random_pair(adapters, f"s{i}", seed=i))
    return adapters.model


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_verified_answers_are_greedy_ones(kind: Kind) -> None:
    need()
    model, layout = adapted(kind), LAYOUTS[kind]
    rows = some_rows(8, seed=3).examples
    prompts = collate_prompts(rows, layout)
    said = greedy(model, prompts, layout, 6)
    right = [[*ids, END] if len(ids) < 6 else ids for ids in said]
    wrong = [[*ids[:-1], 7, END] for ids in right]
    for golds in (right, wrong, [row.target for row in rows]):
        ids, _ = answers(model, prompts, golds, layout, 6, lambda _: None, None)
        assert ids == said


def test_a_head_computed_once_changes_no_logits() -> None:
    need()
    model = adapted("llama")
    rows = [row._replace(source=[9, 11, 13, 15, *row.source]) for row in some_rows(5, seed=4).examples]
    batch = collate(rows, LAYOUTS["llama"])
    batch = replace(batch, lengths=tuple(len(row.source) + len(row.target) - 1 for row in rows))
    with torch.no_grad():
        assert off(logits_behind_head(model, batch, 4, lambda _: None), logits(model, batch)) < 1e-5


# What is refused, before anything is loaded.


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("seqft",), "model.quantize: seqft trains all weights, and what trains is fp32; leave model.quantize out"),
        (("ewc", "method.train=full"), "model.quantize: ewc trains all weights, and what trains is fp32; leave"),
        (
            ("inclora", "adapter.kind=dora"),
            "adapter.kind: dora stands beside no base in 4 bits (model.quantize); lora,",
        ),
        (
            ("olora", "model.dtype=bf16"),
            "model.dtype bf16: model.quantize=nf4 says what the base is kept in; set it to",
        ),
        (
            ("olora", "model.dtype=fp32"),
            "model.dtype fp32: model.quantize=nf4 says what the base is kept in; set it to",
        ),
        (("olora", "model.quantize=nf5"), "model.quantize must be one of nf4"),
        (("olora", "training.optimizer=paged_adamw"), "training.optimizer cannot be paged: bitsandbytes frees no"),
    ],
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    sets = [word for setting in words[1:] for word in ("--set", setting)]
    found = call("train", "--order", "order1", "--method", words[0], *NF4, *sets, "--dry-run", cwd=tmp_path)
    assert found.code == 2 and says in found.line and not list(tmp_path.iterdir())


def test_without_bitsandbytes_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "find_spec", lambda _: None)
    found = call("train", "--order", "order1", *NF4, "--dry-run", cwd=tmp_path)
    assert found.code == 2
    assert found.line.endswith('model.quantize=nf4 needs bitsandbytes: pip install "cl-runner[qlora]"')


def test_every_kind_that_is_refused_is_named_with_those_that_would_do() -> None:
    for name in KINDS.ours:
        config: Any = tiny_config(model__quantize="nf4", method__name="inclora", adapter__kind=name)
        method, kind = make_method(config), KINDS.get(name)
        if kind.quantized or name == "full":
            continue
        with pytest.raises(UserError, match=rf"^adapter\.kind: {name} stands beside no base in 4 bits") as error:
            check_quantized(config, method, kind(config.adapter))
        named = re.findall(r"[\w-]+", str(error.value).partition("; ")[2].removesuffix(" would"))
        assert named and all(KINDS.get(one).quantized for one in named)


def test_kinds_are_listed_with_whether_they_do(tmp_path: Path) -> None:
    rows = call("list", "adapters", "--json", cwd=tmp_path).json["adapters"]
    assert {row["adapter"]: row["4-bit base"] for row in rows} == {n: KINDS.get(n).quantized for n in KINDS.ours}
    lines = call("list", "adapters", cwd=tmp_path).out.splitlines()
    assert "4-bit base" in lines[0]
