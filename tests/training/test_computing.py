"""What a run computes in is decided once, said, recorded, and the same ever after and on every rank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cl_runner.engine.precision import Compute, decide
from cl_runner.engine.process import Place
from cl_runner.models.batch import Example
from cl_runner.training import computing as module
from tests.command_line import NANO, ORDER, Result, call, tree
from tests.distributed import on_ranks

BF16 = Compute(True, kept=True, said="computes in bf16: measured")


def never(*_: Any) -> Compute:
    raise AssertionError("nothing is to be measured")


@pytest.fixture
def here(tmp_path: Path) -> Path:
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
    train(here, "--name", "old")
    run = here / "runs/old"
    before = stages(run)
    assert "computes" not in identity(run)
    shutil.rmtree(next((run / "stages").glob("*agnews")))
    decided(never)
    assert "computes in" not in train(here, "--name", "old").err
    assert stages(run) == before


def test_a_run_begun_meanwhile_by_another_process_is_not_gone_on_with_otherwise(here: Path, decided: Any) -> None:
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
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(4, 99)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


ROWS = [Example([1] * n, [2] * 3) for n in (4, 10, 7)]


def asked(
    place: Place,
    precision: str = "auto",
    shapes: Any = ((500, 600),),
    computes: Any = None,
    only: Any = None,
    **more: Any,
) -> Compute:
    """``computing`` of a plan with micro-batches of 8, on a network of three layers and rows of 7 + 3 tokens."""
    plan: Any = SimpleNamespace(
        config=SimpleNamespace(training=SimpleNamespace(precision=precision)),
        kind=SimpleNamespace(shapes=lambda _: list(shapes)),
        batches=lambda _: [SimpleNamespace(micro_batch=8)],
        computes=computes,
        only=only,
    )
    base: Any = SimpleNamespace(model=Network(), encoder_decoder=more.get("encoder_decoder", True))
    return module.computing(plan, place, base, ROWS)


def test_the_layers_and_tokens_of_a_micro_batch_are_measured(decided: Any) -> None:
    seen: list[Any] = []
    decided(lambda *given: seen.append(given) or BF16)
    assert asked(Place()) == BF16
    asked(Place(), encoder_decoder=False)
    asked(Place(), shapes=())
    assert seen == [([(500, 600)], 56), ([(500, 600)], 80), ([(4, 6), (6, 4)], 56)]


def test_settings_gpus_records_and_evaluation_ask_no_clock(decided: Any) -> None:
    decided(never)
    assert not asked(Place(), "fp32").bf16 and asked(Place(), "bf16").bf16 and asked(Place(device="cuda")).bf16
    assert not asked(Place(device="cuda"), "fp32").bf16
    assert asked(Place(), computes="bf16").bf16 and asked(Place(), computes="bf16", only=["a"]).bf16
    assert not asked(Place(), computes="fp32").bf16 and not asked(Place(), only=["a"]).bf16


def on_rank(place: Place) -> tuple[Compute, int]:
    """Rank 1's clock says otherwise than rank 0's."""
    calls = []

    def clock(shape: Any, tokens: int) -> tuple[float, float]:
        calls.append(shape)
        return (2.0, 1.0) if place.rank == 0 else (1.0, 2.0)

    before, module.decide = module.decide, lambda *given: decide(*given, lambda: True, clock)  # type: ignore[assignment]
    try:
        return asked(place), len(calls)
    finally:
        module.decide = before


def test_rank_0_decides_for_all() -> None:
    (first, measured), (second, never_measured) = on_ranks(2, on_rank)
    assert first == second and first.bf16 and first.kept
    assert (measured, never_measured) == (1, 0)
    assert not torch.distributed.is_initialized()
