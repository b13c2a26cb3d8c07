"""What only a GPU can show: bf16 compute over a bf16 base, and a whole order through DeepSpeed with NCCL.

Skipped where there is no GPU. On a box with one: ``python -m pytest tests/test_gpu.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SMALL = [
    "--set", "data.max_train=64", "--set", "data.max_test=32", "--set", "training.epochs=2",
]  # fmt: skip


def cl_runner(cwd: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "cl_runner", *arguments], cwd=cwd, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of order 1 in bf16."""
    cwd = tmp_path_factory.mktemp("gpu")
    made = json.loads(cl_runner(cwd, "train", "--order", "order1", "--method", "olora", *SMALL, "--json"))
    return cwd / made["run"]


def test_order_trains_in_bf16(run: Path) -> None:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in log} == {"dbpedia", "amazon", "yahoo", "agnews"}
    assert all(row["memory_mb"] > 0 for row in log)
    assert "NVIDIA" in json.loads((run / "environment.json").read_text())["device"]


def test_adapters_are_saved_in_fp32(run: Path) -> None:
    from safetensors.torch import load_file

    saved = load_file(run / "stages" / "04-agnews" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_eval_gives_the_committed_numbers(run: Path) -> None:
    for stage in ("1", "4"):
        found = json.loads(cl_runner(run.parents[1], "eval", str(run), "--stage", stage, "--json"))
        assert found["scores"] == found["committed"]
        assert not any(found["differing_rows"].values())


def test_folded_update_is_applied_within_one_percent_on_a_bf16_base() -> None:
    from cl_runner.adapters.folding import Accumulator

    torch.manual_seed(0)
    layer = torch.nn.Linear(512, 512, bias=False, device="cuda", dtype=torch.bfloat16)
    update = torch.randn(512, 512, device="cuda") * layer.weight.float().std() * 1e-4
    past = Accumulator(layer, transposed=False)
    past.add(update)
    assert torch.linalg.vector_norm(past.applied() - update) < 0.01 * torch.linalg.vector_norm(update)


@pytest.mark.parametrize("method", ["l2p", "progprompt", "lfpt5"])
def test_prompts_train_before_a_bf16_base_and_answer_the_same_again(tmp_path: Path, method: str) -> None:
    short = ["--set", "method.length=8", *(["--set", "method.draws=1"] if method == "lfpt5" else [])]
    made = json.loads(cl_runner(tmp_path, "train", "--order", "order1", "--method", method, *SMALL, *short, "--json"))
    for stage in ("2", "4"):
        found = json.loads(cl_runner(tmp_path, "eval", made["run"], "--stage", stage, "--json"))
        assert found["scores"] == found["committed"]
        assert not any(found["differing_rows"].values())


IN_4_BITS = ["--set", "model.quantize=nf4"]
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason='needs bitsandbytes: pip install "cl-runner[qlora]"'
)


@needs_bitsandbytes
@pytest.mark.parametrize("method", ["olora", "osft", "l2p"])
def test_a_base_in_4_bits_trains_and_answers_the_same_again(tmp_path: Path, method: str) -> None:
    """Pairs beside the codes, sums beside them, prompts before them."""
    words = ["train", "--order", "order1", "--method", method, *SMALL, *IN_4_BITS, "--json"]
    made = json.loads(cl_runner(tmp_path, *words))
    for stage in ("2", "4"):
        found = json.loads(cl_runner(tmp_path, "eval", made["run"], "--stage", stage, "--json"))
        assert found["scores"] == found["committed"]
        assert not any(found["differing_rows"].values())


@needs_bitsandbytes
@pytest.mark.parametrize("width", [48, 64, 100, 4096])
def test_w0_in_4_bits_is_what_the_codes_stand_for(width: int) -> None:
    from cl_runner.adapters.quantized import dequantized
    from tests.four_bits import weight_of

    layer = _in_4_bits(64, width)
    assert torch.allclose(dequantized(layer).float(), weight_of(layer), rtol=0.01, atol=1e-4)


@needs_bitsandbytes
@pytest.mark.parametrize("form", ["factors", "sum"])
def test_past_updates_beside_4_bits_reach_bf16_outputs_and_gradients(form: str) -> None:
    from cl_runner.adapters.quantized import past_updates

    layer = _in_4_bits(512, 256)
    past = past_updates(layer, None)
    base = past.base.float()
    dice = torch.Generator().manual_seed(1)
    A, B = torch.randn(8, 256, generator=dice), torch.randn(512, 8, generator=dice)
    scale = 1e-3 * float(base.norm() / (B @ A).norm())
    past.add_pair((A, B, scale))
    if form == "sum":
        past.add_none()
    update = (scale * B @ A).cuda()
    assert torch.linalg.vector_norm(past.applied() - update) < 0.01 * torch.linalg.vector_norm(update)
    x = torch.randn(40_000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    wanted = x.detach().float() @ update.T
    arrived = ((y.detach().float() - x.detach().float() @ base.T) * wanted).sum() / wanted.square().sum()
    assert float(arrived) == pytest.approx(1.0, abs=0.03)
    given = torch.randn_like(y)
    [gradient] = torch.autograd.grad(y, x, given)
    exact = given.float() @ (base + update)
    assert torch.linalg.vector_norm(gradient.float() - exact) < 0.01 * torch.linalg.vector_norm(exact)


def _in_4_bits(m: int, n: int) -> Any:
    """A layer on the GPU, quantised from bf16 and computed with in it."""
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(n, m, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True)
    layer.source_cls = torch.nn.Linear
    return layer.to(torch.bfloat16).cuda().requires_grad_(False)


def test_metrics_of_updates_are_those_of_a_cpu() -> None:
    from cl_runner.metrics.updates.layer import layer_metrics
    from cl_runner.metrics.updates.update import Update

    dice = torch.Generator().manual_seed(0)
    pairs = [Update(torch.randn(300, r, generator=dice), torch.randn(r, 200, generator=dice)) for r in (3, 4, 5)]
    for updates in (pairs, [Update(each.whole()) for each in pairs]):
        here, there = layer_metrics(updates), layer_metrics([each.to(torch.device("cuda")) for each in updates])
        for of in ("by_stage", "between"):
            for name, values in getattr(here, of).items():
                torch.testing.assert_close(getattr(there, of)[name], values, rtol=1e-4, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(there.density, here.density, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(there.acr, here.acr, rtol=1e-4, atol=1e-4)


def test_a_step_that_does_not_fit_is_done_again_in_halves(tmp_path: Path) -> None:
    """Memory is held back so that all rows of a step do not fit at once, and half of them or fewer do."""
    program = """
import sys
import torch
from cl_runner.cli import main

if room := float(sys.argv.pop(1)):
    torch.cuda.set_per_process_memory_fraction(room * 2**20 / torch.cuda.get_device_properties(0).total_memory)
main()
"""
    sizes = ["--set", "training.global_batch=64", "--set", "data.max_train=128", "--set", "data.max_test=4"]
    order = ["--order", "order1", "--method", "seqlora", *sizes, "--set", "training.epochs=1", "--json"]

    def train(name: str, micro: int, room: float = 0, *more: str) -> tuple[int, str, dict[str, Any]]:
        arguments = ["train", *order, "--name", name, "--set", f"training.micro_batch={micro}", *more]
        done = subprocess.run(
            [sys.executable, "-c", program, str(room), *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        file = tmp_path / "runs" / name / "stages" / "01-dbpedia" / "metrics.json"
        return done.returncode, done.stderr, json.loads(file.read_text())["training"] if file.exists() else {}

    def peak(name: str) -> float:
        lines = (tmp_path / "runs" / name / "log.jsonl").read_text().splitlines()
        return max(json.loads(line).get("memory_mb", 0.0) for line in lines)

    for micro in (64, 8):
        assert train(f"of-{micro}", micro)[0] == 0
    between = (peak("of-64") + peak("of-8")) / 2
    code, said, _ = train("refused", 64, between)
    assert code == 2 and "out of memory in step" in said and "training.auto_batch=true" in said
    code, said, training = train("halved", 64, between, "--set", "training.auto_batch=true")
    assert code == 0 and training["micro_batch"] < 64 and training["micro_batches"], said
