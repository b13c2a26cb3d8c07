"""A base model, loaded: frozen, in a known precision, every weight accounted for, nothing of its own in generation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cl_runner.adapters.targets import is_transposed
from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError
from cl_runner.models import attention, quantized
from cl_runner.models.chat import ChatTemplate
from cl_runner.models.locate import Located, check, config_of, locate
from cl_runner.models.tokenizer import first_line, load_tokenizer, quiet

# Buffers of old versions of transformers, found in many checkpoints and used by none today.
_OLD_BUFFERS = (
    "inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    "position_ids",
)


@dataclass(frozen=True)
class Layout:
    """How token ids become a batch for this model."""

    encoder_decoder: bool
    pad_id: int
    eos_id: int
    end_ids: tuple[int, ...]  # every id that ends an answer, eos_id first
    decoder_start_id: int | None  # encoder-decoder only
    vocab_size: int  # rows of the embedding
    max_positions: int | None = None  # where positions end, or from where on a row is read as the longest beside it


@dataclass
class Base:
    """A frozen base model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    name_or_path: str
    note: str
    chat: ChatTemplate | None = None  # where prompts go into it
    sizes: quantized.Sizes | None = None  # of a base in 4 bits

    @property
    def encoder_decoder(self) -> bool:
        return self.layout.encoder_decoder

    @property
    def pad_id(self) -> int:
        return self.layout.pad_id

    @property
    def eos_id(self) -> int:
        return self.layout.eos_id


def compute_dtype(model: ModelConfig, device: torch.device) -> torch.dtype:
    """The frozen base's precision: as set, or for ``auto`` bf16 on a GPU and fp32 on the CPU."""
    if model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if model.dtype == "bf16" else torch.float32


def load_base(
    model: ModelConfig, device: torch.device, base_dir: Path | None = None, chat_template: bool = False
) -> Base:
    """Load the base model: all parameters frozen, eval mode, on ``device``.

    Every weight must come from the checkpoint: a head that is missing there would be random and nothing would say
    so. With ``chat_template``, which there has to be, answers end with the model's own end of turn. Raises UserError
    for everything that the model's files can get wrong.
    """
    located = locate(model, base_dir)
    facts = check(located)
    folder = _folder(located)
    where = located.name_or_path
    if model.quantize:
        quantized.check_device(device)
    attention.keep_fp32_on_cpu()
    tokenizer = load_tokenizer(folder, where, facts.encoder_decoder, model.trust_remote_code)
    chat = ChatTemplate.of(tokenizer, facts.encoder_decoder, where) if chat_template else None
    network = _load_network(folder, where, facts.encoder_decoder, model, device)
    network.requires_grad_(False)
    network.eval()
    network.to(device)
    network.name_or_path = where  # PEFT copies it into adapter_config.json
    network.config._name_or_path = where
    layout = _layout(network, tokenizer, facts.encoder_decoder, where, chat.end_id if chat else None)
    # Also as the model's own, because generate() fills what a given config leaves open from the model's.
    network.generation_config = neutral_generation(layout)
    sizes = quantized.sizes(network) if model.quantize else None
    return Base(network, tokenizer, layout, where, located.note, chat, sizes)


def before_quantising(model: ModelConfig, device: torch.device, targets: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Linear layers of a base that is kept in 4 bits, each with the weight (m, n), fp32, that was quantised.

    The whole base is loaded for it, on the CPU, and let go of at the end. Raises UserError.

    Args:
        device: where the base in 4 bits is, which decides the precision that it was quantised from.
    """
    located = locate(model)
    as_it_was = model.model_copy(update={"quantize": None, "dtype": "bf16" if device.type == "cuda" else "fp32"})
    encoder_decoder = check(located).encoder_decoder
    network = _load_network(_folder(located), located.name_or_path, encoder_decoder, as_it_was, torch.device("cpu"))
    for target in targets:
        layer: Any = network.get_submodule(target)
        weight = layer.weight.detach().float()
        yield target, weight.T if is_transposed(layer) else weight


def outline(model: ModelConfig) -> PreTrainedModel | None:
    """The base model by its config alone, on torch's meta device: layers with shapes, no weights.

    None where the model brings its own code. Raises UserError.
    """
    located = locate(model)
    found = config_of(located)
    if "auto_map" in found:
        return None
    config = CONFIG_MAPPING[str(found["model_type"])].from_dict(found)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with quiet(), torch.device("meta"):
        network: PreTrainedModel = auto.from_config(config)
    return network


def tokenizer_of(
    model: ModelConfig, chat_template: bool = False
) -> tuple[PreTrainedTokenizerBase, ChatTemplate | None]:
    """The tokenizer of a base model, without its weights, and the chat template if asked for. Raises UserError."""
    located = locate(model)
    facts = check(located)
    where = located.name_or_path
    tokenizer = load_tokenizer(_folder(located), where, facts.encoder_decoder, model.trust_remote_code)
    return tokenizer, ChatTemplate.of(tokenizer, facts.encoder_decoder, where) if chat_template else None


def neutral_generation(layout: Layout, max_new_tokens: int | None = None) -> GenerationConfig:
    """Greedy arg-max and nothing else: no penalty, forced token, beam or length of the model's own config."""
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(layout.end_ids),
        pad_token_id=layout.pad_id,
        decoder_start_token_id=layout.decoder_start_id,
    )


def _folder(located: Located) -> Path:
    if located.path is not None:
        return located.path
    from cl_runner.models import hub_files

    return hub_files.fetch(located)


def _load_network(
    folder: Path, where: str, encoder_decoder: bool, model: ModelConfig, device: torch.device
) -> PreTrainedModel:
    auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": compute_dtype(model, device), "trust_remote_code": model.trust_remote_code}
    options["use_safetensors"] = True  # what the check of the folder found, and nothing else that may lie there
    if model.attention is not None:
        if "/" in model.attention and not model.trust_remote_code:
            raise UserError(
                f"model.attention {model.attention} is code of a hub repository; model.trust_remote_code runs that, if "
                "you trust it"
            )
        options["attn_implementation"] = model.attention
    if device.type == "cuda":
        options["device_map"] = {"": device}  # straight to the GPU: no copy of a large model in host memory per rank
    if model.quantize:
        options.update(quantized.options(device))
    try:
        with quiet():
            network, info = auto.from_pretrained(str(folder), output_loading_info=True, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # attention not available, shapes that do not fit, a broken pickle, …
        hint = f" with model.attention '{model.attention}'" if model.attention is not None else ""
        raise UserError(f"model {where}: cannot be loaded{hint} ({first_line(error)})") from error
    assert isinstance(network, PreTrainedModel)
    _account_for_weights(info, where, type(network).__name__)
    if model.quantize:
        quantized.settle(network, where)
    _keep_own_head(network)
    return network


def _account_for_weights(info: dict[str, Any], where: str, architecture: str) -> None:
    """Refuse a checkpoint that does not fill the model exactly."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"model {where}: its weights lack {_some(missing)}, which {architecture} needs; it was saved for something "
            "else, or not whole"
        )
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.endswith(_OLD_BUFFERS))
    if unexpected:
        raise UserError(
            f"model {where}: its weights hold {_some(unexpected)}, which {architecture} has no place for; config.json "
            "does not describe these weights"
        )


def _keep_own_head(network: PreTrainedModel) -> None:
    """Make a later ``tie_weights()`` harmless where the checkpoint has a head of its own (T5 v1.1, Flan).

    transformers 5 declares all T5 heads tied; loading leaves a different head alone, but any later tie would replace
    it by the embedding without a word. So a pair that is not one tensor now is taken off the model's list.
    """
    declared = network._tied_weights_keys
    if not isinstance(declared, dict):
        return
    parameters = dict(network.named_parameters(remove_duplicate=False))

    def tied(target: str, source: str) -> bool:
        # Patterns and module names are no parameters: left as they are.
        return target not in parameters or source not in parameters or parameters[target] is parameters[source]

    network._tied_weights_keys = {target: source for target, source in declared.items() if tied(target, source)}


def _layout(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder_decoder: bool,
    where: str,
    end_of_turn: int | None = None,
) -> Layout:
    config = network.config
    own = network.generation_config  # as the checkpoint has it: only its end and start ids are taken
    vocab_size = int(network.get_input_embeddings().weight.shape[0])
    ends = [
        i
        for ids in (
            end_of_turn,
            tokenizer.eos_token_id,
            getattr(config, "eos_token_id", None),
            getattr(own, "eos_token_id", None),
        )
        for i in (ids if isinstance(ids, list) else [ids])
        if isinstance(i, int) and 0 <= i < vocab_size
    ]
    if not ends:
        raise UserError(f"model {where}: neither tokenizer nor config.json has an end token (eos_token)")
    pads = (tokenizer.pad_token_id, getattr(config, "pad_token_id", None))
    # Padding is masked by length, never by id, so any id will do: the end token where there is none of its own.
    pad_id = next((i for i in pads if isinstance(i, int) and 0 <= i < vocab_size), ends[0])
    start_id = None
    if encoder_decoder:
        starts = (
            getattr(config, "decoder_start_token_id", None),
            getattr(own, "decoder_start_token_id", None),
            getattr(config, "bos_token_id", None),
        )
        start_id = next((i for i in starts if isinstance(i, int)), None)
        if start_id is None:
            raise UserError(f"model {where}: config.json has no decoder_start_token_id")
    return Layout(
        encoder_decoder, pad_id, ends[0], tuple(dict.fromkeys(ends)), start_id, vocab_size, _most_positions(network)
    )


def _most_positions(network: PreTrainedModel) -> int | None:
    """Longest input of a model whose positions are a learned table (GPT-2, OPT, BART); None for most others.

    Also of one whose rotary frequencies beyond it are those of the longest row of a batch (Phi-3 of 128k, and all with
    dynamic ones): a row would be read by what stands beside it, and its cache by what it will grow to.
    """
    config: Any = network.config
    names = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
    has_table = any(
        isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in names
        for name, module in network.named_modules()
    )
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope["original_max_position_embeddings"])
    return int(limit) if limit and (has_table or rope.get("rope_type") == "dynamic") else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
