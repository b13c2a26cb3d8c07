"""Which layers of a model are adapted: their names, their shapes, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from cl_runner.config.schema import TARGET_SETS
from cl_runner.errors import UserError, did_you_mean
from cl_runner.imports import light_imports


def target_shapes(model: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Name → (m, n), out by in, of every layer that ``targets`` name, of a model that may be on the meta device.

    Raises:
        UserError: as ``check_targets``.
    """
    check_targets(model, targets)
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if is_target(name, targets)}
    return {name: shape_of(layer) for name, layer in layers.items()}


def shape_of(layer: Any) -> tuple[int, int]:
    """(m, n), out by in, of a linear layer, whatever its weight is kept in."""
    if is_transposed(layer):
        n, m = layer.weight.shape
        return m, n
    return layer.out_features, layer.in_features


def refuse_conv1d(model: nn.Module, targets: Iterable[str], kind: str) -> None:
    """Of a kind that cannot stand in for GPT-2's Conv1D. Raises UserError."""
    for name, module in model.named_modules():
        if is_target(name, targets) and is_transposed(module):
            raise UserError(f"adapter.kind: {kind} cannot adapt a Conv1D, which this model's {name} is; lora can")


def default_targets(model: nn.Module) -> list[str]:
    """What PEFT adapts of the model's family: query and value, or the one layer that holds both; of Phi the MLP too."""
    with light_imports():
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    family = getattr(getattr(model, "config", None), "model_type", "")
    if isinstance(known.get(family), list):  # a regular expression names no layers
        return list(known[family])
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    fused = (["c_attn"], ["query_key_value"], ["qkv_proj"])  # the last is Phi-3's, of which PEFT knows nothing
    for layers in (["q_proj", "v_proj"], ["query", "value"], ["q", "v"], *fused):
        if set(layers) <= names:
            return layers
    raise UserError(f"adapter.target_modules: cannot tell query and value of a {family or 'model'}; name the layers")


def check_targets(model: nn.Module, targets: Iterable[str]) -> None:
    """Every target names at least one linear layer.

    Raises:
        UserError: it names none, something else, or one whose weight is another layer's too.
    """
    modules = dict(model.named_modules())
    endings = {name.rsplit(".", 1)[-1] for name, m in modules.items() if is_linear(m)}
    owners = weight_owners(model)
    for target in targets:
        found = {name: module for name, module in modules.items() if is_target(name, [target])}
        if not found:
            there = f" (there are {', '.join(sorted(endings))}, and the sets {', '.join(TARGET_SETS)})"
            hint = did_you_mean(target, [*endings, *TARGET_SETS]) or there
            raise UserError(f"adapter.target_modules: the model has no layer '{target}'{hint}")
        if not all(is_linear(module) for module in found.values()):
            raise UserError(f"adapter.target_modules: '{target}' is no linear layer")
        for name, module in found.items():
            for other in sorted(owners.get(id(module.weight), set()) - {name}):
                raise UserError(
                    f"adapter.target_modules: '{target}' shares its weight with {other}, which a folded update would "
                    "change too; leave it out"
                )


def weight_owners(model: nn.Module) -> dict[int, set[str]]:
    """The id of each parameter → the modules that hold it: of tied ones several."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    return owners


def is_target(name: str, targets: Iterable[str]) -> bool:
    """Whether a module's name is one of the targets, or ends in one."""
    return any(name == target or name.endswith("." + target) for target in targets)


def is_linear(module: nn.Module) -> bool:
    """Whether a layer is a matrix product."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """GPT-2's Conv1D: a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"
