"""Sets of layers by name: what ``qv``, ``attention``, ``mlp``, ``outputs`` and ``all-linear`` are in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from cl_runner.adapters.targets import default_targets, is_linear, is_target, weight_owners
from cl_runner.config.schema import TARGET_SETS
from cl_runner.errors import UserError


@dataclass(frozen=True)
class Family:
    """Endings of the layers' names in each set; those that a model has not are passed over."""

    qv: tuple[str, ...]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    outputs: tuple[str, ...]  # the last of each sublayer


T5 = Family(("q", "v"), ("q", "k", "v", "o"), ("wi", "wi_0", "wi_1", "wo"), ("o", "wo"))
LLAMA = Family(
    ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"),
    ("o_proj", "down_proj"),
)  # fmt: skip
PHI = Family(("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "dense"), ("fc1", "fc2"), ("dense", "fc2"))
PHI3 = Family(("qkv_proj",), ("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj"), ("o_proj", "down_proj"))
OPT = Family(("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "out_proj"), ("fc1", "fc2"), ("out_proj", "fc2"))
GPT2 = Family(
    ("attn.c_attn",), ("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj"), ("attn.c_proj", "mlp.c_proj")
)
NEOX = Family(
    ("query_key_value",),
    ("attention.query_key_value", "attention.dense"),
    ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ("attention.dense", "mlp.dense_4h_to_h"),
)
BLOOM = Family(
    ("query_key_value",),
    ("self_attention.query_key_value", "self_attention.dense"),
    ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ("self_attention.dense", "mlp.dense_4h_to_h"),
)

FAMILIES: dict[str, Family] = {  # by model_type
    **dict.fromkeys(("t5", "mt5", "umt5"), T5),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2"), LLAMA
    ),
    "phi": PHI,
    "phi3": PHI3,
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "bloom": BLOOM,
    **dict.fromkeys(("opt", "bart", "mbart"), OPT),
}

# Of other families a layer is told by the class of the nearest module around it that says what it is.
WORDS = {"attention": ("attention", "attn"), "mlp": ("mlp", "feedforward", "ffn")}
QUERY_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("q", "v"), ("c_attn",), ("query_key_value",), ("qkv_proj",))


def chosen_targets(
    model: nn.Module,
    asked: Sequence[str] | None,
    default: Callable[[nn.Module], list[str]] = default_targets,
) -> list[str]:
    """The endings of names that ``adapter.target_modules`` asks for, its sets as the endings of their layers.

    They name these layers here as in plain PEFT, and no others. Raises UserError for a set that the model has not.
    """
    if not asked:
        return default(model)
    found: dict[str, None] = {}
    for name in asked:
        found.update(dict.fromkeys(endings(layers_of(model, name), model) if name in TARGET_SETS else [name]))
    return list(found)


def layers_of(model: nn.Module, name: str) -> list[str]:
    """The linear layers of a set, in the model's order. Raises UserError where there are none."""
    linear = [layer for layer, module in model.named_modules() if is_linear(module)]
    family = getattr(getattr(model, "config", None), "model_type", "")
    if name == "all-linear":
        found = _of_blocks(model, linear)
    elif family in FAMILIES:
        found = [layer for layer in linear if is_target(layer, getattr(FAMILIES[family], name))]
    else:
        found = _by_class(model, linear, name)
    if not found:
        there = sorted({layer.rsplit(".", 1)[-1] for layer in linear})
        raise UserError(
            f"adapter.target_modules: cannot tell which layers of a {family or 'model'} are '{name}'; name them "
            f"(there are {', '.join(there)})"
        )
    return found


def _of_blocks(model: nn.Module, linear: Iterable[str]) -> list[str]:
    """All in the repeated blocks but the output head, and those whose weight is another module's too."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    owners = weight_owners(model)
    found = []
    for name in linear:
        module = model.get_submodule(name)
        if _in_block(name) and module is not head and owners[id(module.weight)] == {name}:
            found.append(name)
    return found


def _by_class(model: nn.Module, linear: Iterable[str], name: str) -> list[str]:
    """Of a family that is in no table; which layers are ``outputs`` no class says."""
    attention = [layer for layer in linear if _class_says(model, layer) == "attention"]
    if name == "outputs":
        return []
    if name != "qv":
        return attention if name == "attention" else [layer for layer in linear if _class_says(model, layer) == "mlp"]
    for names in QUERY_VALUE:
        if all(any(is_target(layer, [one]) for layer in attention) for one in names):
            return [layer for layer in attention if is_target(layer, names)]
    return []


def _class_says(model: nn.Module, layer: str) -> str:
    """``attention`` or ``mlp``, by the nearest module around a layer whose class name says so; else nothing.

    The model around its blocks says nothing of a layer.
    """
    above = layer.rpartition(".")[0]
    while _in_block(above):
        called = type(model.get_submodule(above)).__name__.lower()
        for name, words in WORDS.items():
            if any(word in called for word in words):
                return name
        above = above.rpartition(".")[0]
    return ""


def _in_block(name: str) -> bool:
    """Whether a module is one of a numbered list, or in one."""
    return any(part.isdigit() for part in name.split("."))


def endings(layers: Sequence[str], model: nn.Module) -> list[str]:
    """The shortest endings of names that are those of these layers and of no other module. Raises UserError."""
    mine = set(layers)
    by_last: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        by_last.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    found: list[str] = []
    for layer in layers:
        if is_target(layer, found):
            continue
        parts = layer.split(".")
        alike = by_last[parts[-1]]
        tails = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        ending = next((tail for tail in tails if {name for name in alike if is_target(name, [tail])} <= mine), None)
        if ending is None:
            raise UserError(f"adapter.target_modules: no name is that of {layer} alone; name the layers")
        found.append(ending)
    return found
