"""The health of a penalty: its gradient beside the task loss's, the update's norm, and the two warnings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cl_runner.config.schema import Section
from cl_runner.engine.process import Place
from cl_runner.methods.protocol import Method
from cl_runner.training.health import Health, PenaltyWatch
from tests.command_line import NANO, ORDER, STAGES, call
from tests.conftest import Finished
from tests.distributed import on_ranks
from tests.stages import open_stage, some_rows, tiny_config, tiny_room, train


class Pulled(Method):
    """A penalty on A alone, in a known proportion."""

    name = "pulled"

    def penalty(self, stage: Any) -> Tensor:
        return 0.5 * sum(p.square().sum() for n, p in stage.parameters().items() if n.endswith("lora_A"))


class Without(Method):
    name = "without"


def logged(place: Place, method: type[Method], **settings: Any) -> list[dict[str, Any]]:
    """Log rows of a stage of three steps."""
    config = tiny_config(training__micro_batch=1, **settings)
    stage = open_stage(tiny_room(method(Section()), config, place), config, randomise=False)
    return train(stage, some_rows(10)).rows


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_ratio_is_that_of_the_two_gradients(ranks: int) -> None:
    """B is zero at the first step: A's gradient is the penalty's alone, which is A, and B's is the task loss's."""
    rows = on_ranks(ranks, logged, Pulled)[0]
    plain = on_ranks(ranks, logged, Without)[0]
    penalised = (2 * rows[0]["penalty"]) ** 0.5  # ‖A‖, the norm of its own gradient
    assert rows[0]["penalty_gradient_ratio"] == pytest.approx(penalised / plain[0]["gradient_norm"], rel=1e-4)
    total = rows[0]["gradient_norm"]
    assert total == pytest.approx((penalised**2 + plain[0]["gradient_norm"] ** 2) ** 0.5, rel=1e-4)
    assert all(row["penalty_gradient_ratio"] is None for row in plain)


def test_looking_changes_nothing() -> None:
    """Steps are the same whether each is looked at, or the last alone."""
    often, seldom = (on_ranks(1, logged, Pulled, output__log_every=every)[0] for every in (1, 1000))
    assert len(often) == 3 and len(seldom) == 1
    assert {k: often[-1][k] for k in ("loss", "penalty", "gradient_norm")} == {
        k: seldom[-1][k] for k in ("loss", "penalty", "gradient_norm")
    }


def test_a_penalty_out_of_reach_has_no_ratio() -> None:
    watch = PenaltyWatch()
    weight = torch.nn.Parameter(torch.ones(2))
    watch.see(torch.zeros(()), {"w": weight})
    assert not watch.waits and watch.idle
    watch.see((weight * 3).sum(), {"w": weight})
    assert watch.waits and not watch.idle
    watch.compare({"w": torch.tensor([3.0, 3.0])}, torch.clone)  # all of it is the penalty's
    assert watch.ratio is None
    watch.see((weight * 3).sum(), {"w": weight})
    watch.compare({"w": torch.tensor([3.0, 7.0])}, torch.clone)
    assert watch.ratio == pytest.approx(18**0.5 / 4)


def health(**given: Any) -> Health:
    values = {"loss": 0.1, "penalty": 0.02, "ratio": 0.3, "idle": False, "update": 1.0, "earlier": 2.0, "first": False}
    values["expected"] = True
    return Health(**{**values, **given})


def test_the_line_names_every_figure() -> None:
    line = health().line()
    assert line is not None
    for part in ("penalty 0.02", "task loss 0.1", "0.3 ×", "‖ΔW‖ 1"):
        assert part in line
    assert health(penalty=None, ratio=None).line() == "no penalty yet, task loss 0.1, new update ‖ΔW‖ 1"
    assert health(penalty=None, expected=False).line() is None and health(penalty=None).warning() is None


def test_warnings() -> None:
    assert health().warning() is None
    assert "exactly 0" in str(health(penalty=0.0, idle=True).warning())
    assert health(penalty=0.0, idle=True, first=True).warning() is None  # nothing to be orthogonal to
    assert "met by learning nothing; lower" in str(health(update=0.03).warning())
    assert "met by learning nothing; lower" in str(health(update=0.03, ratio=None).warning())
    assert str(health(update=0.03, ratio=0.05).warning()).endswith("has learned next to nothing")  # it hardly pulls
    assert str(health(update=0.03, penalty=None).warning()).endswith("before: this stage has learned next to nothing")
    assert health(update=0.0, penalty=None).warning() and not health(update=None, penalty=None).warning()
    assert health(update=0.05).warning() is None
    assert health(update=0.03, earlier=None).warning() is None


def training(run: Path, index: int) -> dict[str, Any]:
    """What a stage's metrics say of its training."""
    text = (run / f"stages/{index + 1:02d}-{STAGES[index]}/metrics.json").read_text()
    found: dict[str, Any] = json.loads(text)["training"]
    return found


def test_a_run_says_it_of_every_stage_and_keeps_it(finished: Finished) -> None:
    """The norm is that of the pair as it stands on disk; stage 1 has no past and no penalty."""
    folder = finished.run / "stages/01-dbpedia/adapter"
    pair = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    square = 0.0
    for name, A in pair.items():
        if "lora_A" in name:
            update = pair[name.replace("lora_A", "lora_B")] @ A * config["lora_alpha"] / config["r"]
            square += float(update.double().square().sum())
    assert training(finished.run, 0)["update_norm"] == pytest.approx(square**0.5, rel=1e-5)
    [first] = [line for line in finished.result.err.splitlines() if "no penalty yet" in line]
    assert first.startswith("stage 1 of 3 dbpedia: no penalty yet, task loss")
    said = [line for line in finished.result.err.splitlines() if "gradient of the penalty" in line]
    assert [line.split(":")[0] for line in said] == ["stage 2 of 3 amazon", "stage 3 of 3 agnews"]
    ratio = training(finished.run, 1)["penalty_gradient_ratio"]
    assert ratio > 0 and f"gradient of the penalty {ratio:.2g} ×" in said[0]


def test_a_penalty_that_leaves_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("name: two\ntasks: [dbpedia, amazon]\n")
    sets = ("--set", "training.epochs=20", "--set", "stages.2.method.lambda1=1e9")
    result = call("train", "--order", "two.yaml", "--method", "nlora", *NANO, *sets, cwd=tmp_path)
    assert result.code == 0, result.err
    [told] = [line for line in result.err.splitlines() if "warning" in line]
    assert told.startswith("stage 2 of 2 amazon: warning: the new update is 0.")
    assert told.endswith("the penalty was met by learning nothing; lower its coefficient")


def test_a_penalty_of_zero_is_told(tmp_path: Path) -> None:
    """A weight that fp32 has no number for; the first stage has no past, and nothing to be told."""
    (tmp_path / "three.yaml").write_text(ORDER)
    result = call("train", "--order", "three.yaml", *NANO, "--set", "method.lambda1=1e-60", cwd=tmp_path)
    assert result.code == 0, result.err
    told = [line for line in result.err.splitlines() if "warning" in line]
    assert [line.partition(": warning: ")[0] for line in told] == ["stage 2 of 3 amazon", "stage 3 of 3 agnews"]
    assert all("the penalty was exactly 0" in line for line in told)
