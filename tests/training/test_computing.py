"""What a run computes in is decided once, said, recorded, and the same ever after and on every rank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from cl_runner.config.schema import ModelConfig
from cl_runner.engine.precision import Compute
from cl_runner.engine.process import Place
from cl_runner.models.base import Layout, load_base
from cl_runner.models.batch import Example, collate
from cl_runner.models.forward import logits
from cl_runner.training import computing as module
from tests.command_line import NANO, ORDER, Result, call, tree
from tests.distributed import on_ranks

BF16 = Compute(True, kept=True, said="computes in bf16: measured")


def never(*_: Any) -> Compute:
    raise AssertionError("nothing is to be measured")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, where even the smallest model is worth measuring."""
    monkeypatch.setattr(module, "worth_measuring", lambda _: True)
    (tmp_path / "three.yaml").write_text(ORDER)
    (tmp_path / "longer.yaml").write_text("name: longer\ntasks: [dbpedia, amazon, agnews, yahoo]\n")
    return tmp_path


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """``decided(what)``: what the processor and the clock say; or something that is called in their place."""

    def to(what: Any) -> None:
        monkeypatch.setattr(module, "decide", what if callable(what) else lambda *_: what)

    return to


def train(here: Path, *more: str) -> Result:
    found = call("train", "--order", "three.yaml", *NANO, *more, cwd=here)
    assert found.code == 0, found.err
    return found


def identity(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())["identity"]
    return found


def stages(run: Path) -> dict[str, str]:
    """What the stages wrote, but for times, and sums over them."""
    return {
        name: file for name, file in tree(run / "stages").items() if Path(name).name not in ("metrics.json", "DONE")
    }


def test_bf16_is_said_recorded_and_kept_on_resume_extension_and_eval(here: Path, decided: Any) -> None:
    decided(BF16)
    assert BF16.said in train(here, "--name", "one").err
    run = here / "runs/one"
    assert identity(run)["computes"] == "bf16" and BF16.said in (run / "run.log").read_text()
    train(here, "--name", "same", "--set", "training.precision=bf16")
    assert "computes" not in identity(here / "runs/same"), "the settings say it"
    assert stages(run) == stages(here / "runs/same")
    decided(Compute(False))
    train(here, "--name", "plain")
    assert "computes" not in identity(here / "runs/plain")
    assert stages(run) != stages(here / "runs/plain"), "bf16 gives other numbers"

    decided(never)
    before = stages(run)
    shutil.rmtree(next((run / "stages").glob("*agnews")))
    assert "computes in bf16, as the run began" in train(here, "--name", "one").err
    assert stages(run) == before
    for name in ("one", "plain"):
        found = call("eval", name, "--json", cwd=here)
        assert found.code == 0 and not any(found.json["differing_rows"].values()), found.err
    extended = call("train", "--extend", "one", "--order", "longer.yaml", "--name", "longer", cwd=here)
    assert extended.code == 0 and "computes in bf16, as the run began" in extended.err, extended.err
    assert identity(here / "runs/longer")["computes"] == "bf16"


def test_a_run_of_before_has_fp32_whatever_the_processor_can(here: Path, decided: Any) -> None:
    decided(Compute(False))
    train(here, "--name", "old")
    run = here / "runs/old"
    before = stages(run)
    assert "computes" not in identity(run)
    shutil.rmtree(next((run / "stages").glob("*agnews")))
    decided(never)
    assert "computes in" not in train(here, "--name", "old").err
    assert stages(run) == before


def test_a_run_begun_meanwhile_by_another_process_is_not_gone_on_with_otherwise(here: Path, decided: Any) -> None:
    decided(Compute(False))
    train(here, "--name", "one")
    run, aside = here / "runs/one", here / "aside"
    shutil.rmtree(next((run / "stages").glob("*agnews")))
    run.rename(aside)

    def meanwhile(*_: Any) -> Compute:
        aside.rename(run)
        return BF16

    decided(meanwhile)
    found = call("train", "--order", "three.yaml", *NANO, "--name", "one", cwd=here)
    assert found.code == 2 and "computes in fp32; the same command again goes on with it" in found.err


class Network(nn.Module):
    def __init__(self, width: int = 384) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 4), nn.Linear(width, 384), nn.Linear(400, 999)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


NETWORK = Network()


def asked(
    place: Place,
    precision: str = "auto",
    computes: Any = None,
    only: Any = None,
    model: nn.Module = NETWORK,
    sizes: Any = None,
) -> Compute:
    """``computing`` of a plan with micro-batches of 8, on a network with one layer that is large enough."""
    plan: Any = SimpleNamespace(
        config=SimpleNamespace(training=SimpleNamespace(precision=precision)),
        batches=lambda _: [SimpleNamespace(micro_batch=8)],
        computes=computes,
        only=only,
    )
    layout = Layout(False, 0, 1, (1,), None, 9)
    base: Any = SimpleNamespace(model=model, layout=layout, sizes=sizes)
    return module.computing(plan, place, base, [Example([1] * n, [2] * 3) for n in (4, 10, 7)])


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_bf16", lambda: True)


def test_settings_gpus_records_and_evaluation_ask_no_clock(decided: Any, able: None) -> None:
    decided(never)
    assert not asked(Place(), "fp32").bf16 and asked(Place(), "bf16").bf16 and asked(Place(device="cuda")).bf16
    assert not asked(Place(device="cuda"), "fp32").bf16
    assert asked(Place(), computes="bf16").bf16 and asked(Place(), computes="bf16", only=["a"]).bf16
    assert not asked(Place(), computes="fp32").bf16 and not asked(Place(), only=["a"]).bf16


def test_nor_small_layers_four_bits_and_processors_without_bf16(
    decided: Any, able: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided(BF16)
    assert asked(Place()) == BF16
    assert asked(Place(), sizes=(1, 2)) == asked(Place(), model=Network(383)) == Compute(False)
    monkeypatch.setattr(module, "has_bf16", lambda: False)
    assert asked(Place()) == Compute(False)


def test_random_numbers_are_left_as_they_are(decided: Any, able: None) -> None:
    decided(lambda *_: (torch.rand(3), BF16)[1])
    before = torch.get_rng_state()
    assert asked(Place()).bf16 and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("micro", "most", "lengths"),
    [(2, 256, [9, 7]), (8, 256, [9, 7, 11, 3, 200]), (8, 20, [9, 7]), (8, 5, [9])],
)
def test_usual_rows_are_measured(micro: int, most: int, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a micro-batch has, or as make so many tokens; the nearest to the median, 9."""
    monkeypatch.setattr(module, "TOKENS", most)
    rows = [Example([5] * (n - 2), [6, 1]) for n in (200, 9, 7, 3, 11)]
    base: Any = SimpleNamespace(layout=Layout(False, 0, 1, (1,), None, 9))
    batch = module.usual_rows(rows, base, micro)
    assert batch.attention_mask.sum(1).tolist() == [n - 1 for n in lengths], "a decoder-only model reads no end token"


@pytest.mark.parametrize("model", ["tiny-t5", "tiny-llama"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_and_an_answer_are_what_is_timed(model: str, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward and a backward through every block, then a forward that keeps nothing; nothing of it stays."""
    base = load_base(ModelConfig(name=model), torch.device("cpu"))
    seen: list[tuple[bool, torch.dtype]] = []
    backward: list[Any] = []
    layers = [module for name, module in base.model.named_modules() if name.endswith((".q", "q_proj"))]

    def look(_: Any, inputs: Any, out: torch.Tensor) -> None:
        seen.append((out.requires_grad, out.dtype))
        if out.requires_grad:
            out.register_hook(backward.append)

    hooks = [layer.register_forward_hook(look) for layer in layers]
    before = {name: len(part._forward_hooks) for name, part in base.model.named_modules()}
    batch = collate([Example([5, 6, 7], [8, base.eos_id]), Example([5, 6], [9, base.eos_id])], base.layout)
    with torch.no_grad():
        step, answer = module.seconds(base, batch, bf16)
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert step > 0 and answer > 0
    assert seen == len(layers) * [(True, dtype)] + len(layers) * [(False, dtype)]
    assert len(backward) == len(layers)
    assert {name: len(part._forward_hooks) for name, part in base.model.named_modules()} == before
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base.model.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in base.model.parameters())
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("model", ["tiny-t5", "tiny-llama"])
def test_weights_rounded_once_give_the_same_bits_at_half_the_memory(model: str) -> None:
    """But of layers that are to keep theirs, and of a head that is the embedding, too."""
    base = load_base(ModelConfig(name=model), torch.device("cpu"))
    batch = collate([Example([5, 6, 7], [8, base.eos_id]), Example([5, 6], [9, base.eos_id])], base.layout)
    names = {name for name, part in base.model.named_modules() if isinstance(part, nn.Linear)}
    keeps = {name for name in names if name.endswith((".q", "q_proj"))}

    def answer() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return logits(base.model, batch)

    before = answer()
    rounded = module.rounded(base.model, but=keeps)
    now = {name for name in names if base.model.get_submodule(name).weight.dtype == torch.bfloat16}
    tied = base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    assert now == names - keeps - ({"lm_head"} if tied else set()) and len(rounded) == len(now)
    assert base.model.get_input_embeddings().weight.dtype == torch.float32
    assert torch.equal(answer(), before)


def on_rank(place: Place) -> tuple[Compute, int]:
    """Rank 1's clock says otherwise than rank 0's."""
    calls = []

    def clock(*given: Any) -> tuple[float, float]:
        calls.append(given)
        bf16 = given[-1]
        return (1.0, 1.0) if bf16 == (place.rank == 0) else (2.0, 2.0)

    with patch.multiple(module, seconds=clock, has_bf16=lambda: True):
        return asked(place), len(calls)


def test_rank_0_decides_for_all() -> None:
    (first, measured), (second, never_measured) = on_ranks(2, on_rank)
    assert first == second and first.bf16 and first.kept
    assert (measured, never_measured) == (6, 0)
    assert not torch.distributed.is_initialized()
