"""Loading a base in 4 bits: what is, what stays, what is computed with, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cl_runner.adapters.quantized import dequantized, is_quantized
from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError
from cl_runner.models import quantized
from cl_runner.models.base import Base, load_base
from tests.command_line import NANO, ORDER, call
from tests.four_bits import need, weight_of
from tests.models.tiny_models import byte_tokenizer
from tests.nano import nano_t5

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _needs() -> None:
    need()


def load(name: str, **settings: Any) -> Base:
    return load_base(ModelConfig(name=name, quantize="nf4", **settings), CPU)


def layers_of(base: Base) -> dict[str, Any]:
    return {name: layer for name, layer in base.model.named_modules() if is_quantized(layer)}


def test_linear_layers_are_in_4_bits_and_the_rest_is_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    base = load(nano_t5())
    assert capfd.readouterr() == ("", "")
    whole = load_file(Path(nano_t5()) / "model.safetensors")
    layers = layers_of(base)
    linear = {key.removesuffix(".weight") for key in whole if key.rsplit(".", 2)[-2] in ("q", "k", "v", "o", "wi")}
    assert set(layers) == linear and len(linear) == 14
    for name, layer in layers.items():
        weight = whole[f"{name}.weight"]
        assert torch.equal(dequantized(layer), weight_of(layer))
        assert 0.05 < float((weight_of(layer) - weight).norm() / weight.norm()) < 0.12  # NF4's, of normal numbers
    for name, parameter in base.model.named_parameters():
        if name.removesuffix(".weight") not in linear:
            assert parameter.dtype == torch.float32 and torch.equal(parameter, whole[name])
    assert not any(parameter.requires_grad for parameter in base.model.parameters()) and not base.model.training


def test_what_it_takes_is_counted() -> None:
    """Half a byte a weight, a byte for 64 of them, and four bytes for 256 of those."""
    base = load(nano_t5())
    assert base.sizes is not None
    whole = load_file(Path(nano_t5()) / "model.safetensors")
    counts = [whole[f"{name}.weight"].numel() for name in layers_of(base)]
    blocks = [-(-count // 64) for count in counts]
    assert base.sizes.quantized == sum(counts) // 2 + sum(blocks) + sum(4 * -(-n // 256) for n in blocks)
    assert base.sizes.rest == 4 * (sum(weight.numel() for weight in whole.values()) - sum(counts))
    assert load_base(ModelConfig(name=nano_t5()), CPU).sizes is None


def test_forwards_without_gradient_leave_the_weights_as_they_are() -> None:
    """On some CPUs bitsandbytes would pack them for bf16 products, which have no gradient."""
    base = load(nano_t5())
    ids = torch.arange(5, 12)[None]

    def answer() -> Tensor:
        found: Tensor = base.model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits
        return found

    codes = {name: layer.weight.data.clone() for name, layer in layers_of(base).items()}
    with torch.no_grad():
        before = answer()
    assert all(torch.equal(layer.weight.data, codes[name]) for name, layer in layers_of(base).items())
    embeddings = base.model.get_input_embeddings()
    embeddings.weight.requires_grad_(True)
    after = answer()
    assert torch.equal(after.detach(), before)
    after.sum().backward()
    assert float(embeddings.weight.grad.norm()) > 0


@pytest.mark.parametrize("width", [16, 48, 63, 64, 96, 128, 192, 250])
def test_widths_that_are_read_wrongly_are_known(width: int) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    wanted = weight_of(SimpleNamespace(weight=SimpleNamespace(data=codes, quant_state=state)))  # type: ignore[arg-type]
    right = torch.allclose(dequantize_4bit(codes, state), wanted, atol=1e-6)
    assert quantized.reads_right(width, CPU) == right and (right or width % 64 != 0)


def trained(cwd: Path) -> str:
    """The one line of a run that does not begin."""
    (cwd / "three.yaml").write_text(ORDER)
    found = call("train", "--order", "three.yaml", *NANO, "--set", "model.quantize=nf4", cwd=cwd)
    assert found.code == 2 and not (cwd / "runs").exists()
    return found.err.splitlines()[-1]


def test_a_width_that_is_read_wrongly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = quantized.reads_right
    monkeypatch.setattr(quantized, "reads_right", lambda width, device: width != 192 and right(width, device))
    says = (
        "bitsandbytes reads layers of 192 columns wrongly on this CPU, which wants multiples of 64; leave model.quant"
    )
    assert says in trained(tmp_path)


def test_a_device_that_cannot_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes.functional

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fails)
    monkeypatch.setattr("cl_runner.models.base._load_network", lambda *_: pytest.fail("the model was loaded"))
    says = "model.quantize: bitsandbytes cannot work on this CPU (no kernel image is available); leave it out"
    assert says in trained(tmp_path)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(UserError, match="model x: has no linear layer that could be in 4 bits"):
        quantized.settle(nn.Sequential(nn.Embedding(3, 4)), "x")


def test_a_gguf_file_may_be_the_base(tmp_path: Path) -> None:
    """Dequantised once as any, and then kept in 4 bits of another kind."""
    pytest.importorskip("gguf", reason='GGUF files are written and read with gguf: pip install "cl-runner[gguf]"')
    from tests.models.tiny_gguf import write

    config = LlamaConfig(
        vocab_size=420, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=0, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    file = write(tmp_path / "tiny.gguf", model, byte_tokenizer(bos=True))
    layers = layers_of(load(str(file)))
    assert len(layers) == 7
    for name, layer in layers.items():
        weight = model.get_submodule(name).weight.detach()
        assert 0.05 < float((weight_of(layer) - weight).norm() / weight.norm()) < 0.12
