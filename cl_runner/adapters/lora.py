"""The LoRA adapters of a run: the live pair of every target layer (PEFT's own), past ones folded or kept.

Arithmetic that has to be the same to the bit wherever it happens stands here once: an update is ``(s·B) A`` in fp32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.adapters.folding import Accumulator
from cl_runner.config import AdapterConfig
from cl_runner.errors import UserError, did_you_mean

NAME = "default"


@dataclass(frozen=True)
class Pair:
    """One stage's factors: for every target layer ``A`` (r, n) and ``B`` (m, r), fp32; the update is ``s·B A``."""

    stage: str
    rank: int
    scale: float
    A: dict[str, Tensor]
    B: dict[str, Tensor]

    def update(self, target: str) -> Tensor:
        """ΔW of a target, (m, n) fp32."""
        return (self.scale * self.B[target]) @ self.A[target]


@dataclass(frozen=True)
class FactorGroup:
    """Target layers of equal shape, stacked, so that a penalty is a few batched products.

    ``A`` (L, r, n) and ``B`` (L, m, r) are the live pair, part of the graph; ``past_A`` (L, R, n) and ``past_B``
    (L, m, R) the pairs of past stages one under (beside) the other, constants, None at the first stage. The scale s
    is in none of them.
    """

    targets: tuple[str, ...]
    A: Tensor
    B: Tensor
    past_A: Tensor | None
    past_B: Tensor | None


class Adapters:
    """The adapters of one model.

    Args:
        model: the frozen base; it is wrapped, reach the whole through ``model`` afterwards.
        config: rank, alpha, dropout, targets.
        name_or_path: what a saved adapter names as its base.
        encoder_decoder: for PEFT's task type.

    Raises:
        UserError: a target that the model does not have, or that is no linear layer.
    """

    def __init__(self, model: nn.Module, config: AdapterConfig, *, name_or_path: str, encoder_decoder: bool) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        self.name_or_path = name_or_path
        self.task_type = "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"
        targets = config.target_modules or default_targets(model)
        check_targets(model, targets)
        self.target_modules = list(targets)
        self.rank = config.r
        self.scale = config.alpha / config.r
        transposed = any(type(m).__name__ == "Conv1D" for n, m in model.named_modules() if n.endswith(tuple(targets)))
        peft_config = LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(targets),
            task_type=self.task_type,
            fan_in_fan_out=transposed,
            bias="none",
        )
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers by a name that transformers 5.23 deprecates.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            self.model: Any = get_peft_model(model, peft_config)
        prefix = "base_model.model."
        self.layers: dict[str, Any] = {
            name.removeprefix(prefix): module
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
        }
        self.past: dict[str, Accumulator] = {
            name: Accumulator(layer.get_base_layer(), transposed) for name, layer in self.layers.items()
        }
        self.folded: list[Pair] = []  # in stage order
        self.kept: dict[str, Pair] = {}  # by stage: pairs that stay outside the weight
        self.live: str | None = None  # the stage whose pair the layers hold
        self._stacks: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    # The live pair.

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → parameter of the live pair, ``<target>.lora_A`` and ``<target>.lora_B``, fp32."""
        found: dict[str, nn.Parameter] = {}
        for target, layer in self.layers.items():
            found[f"{target}.lora_A"] = layer.lora_A[NAME].weight
            found[f"{target}.lora_B"] = layer.lora_B[NAME].weight
        return found

    def begin(self, stage: str, generator: torch.Generator | None = None) -> None:
        """A new pair for ``stage``: A Kaiming-uniform as PEFT's, from ``generator`` (CPU), B zero."""
        for layer in self.layers.values():
            A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            fresh = torch.empty(A.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(fresh, a=5**0.5, generator=generator)
            A.data = fresh.to(A.device)
            B.data = torch.zeros(B.shape, dtype=torch.float32, device=B.device)
        self.live = stage
        self.train(True)

    def rename(self, stage: str) -> None:
        """Go on training the live pair, as the pair of ``stage``."""
        self.kept.pop(self.live or "", None)
        self.live = stage
        self.train(True)

    def train(self, on: bool) -> None:
        """Whether the live pair's parameters ask for gradients."""
        for parameter in self.parameters().values():
            parameter.requires_grad_(on)

    def pair(self, stage: str | None = None) -> Pair:
        """A copy of the live pair."""
        stage = stage or self.live
        assert stage is not None, "no stage has begun"
        return Pair(
            stage,
            self.rank,
            self.scale,
            {target: layer.lora_A[NAME].weight.detach().float().clone() for target, layer in self.layers.items()},
            {target: layer.lora_B[NAME].weight.detach().float().clone() for target, layer in self.layers.items()},
        )

    @torch.no_grad()
    def show(self, pair: Pair | None) -> None:
        """Put a pair into the layers to answer with; None answers without any."""
        for target, layer in self.layers.items():
            A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            if pair is None:
                B.data.zero_()
            else:
                A.data.copy_(pair.A[target])
                B.data.copy_(pair.B[target])
        self.live = pair.stage if pair else None

    # Past pairs.

    @torch.no_grad()
    def fold(self, pair: Pair) -> None:
        """Add a pair to the sum of past updates of every target, in the order of the calls."""
        for target, accumulator in self.past.items():
            accumulator.add(pair.update(target).to(accumulator.weight.device))
        self.folded.append(pair)
        self._stacks.clear()

    def fold_live(self) -> None:
        """Fold the live pair; what answers from now on is the weight alone."""
        pair = self.pair()
        self.show(None)
        self.fold(pair)

    def keep_live(self) -> None:
        """Keep the live pair as a parameter set of its own, named by its stage."""
        pair = self.pair()
        self.kept[pair.stage] = pair

    def restore(self, folded: Sequence[Pair], kept: Mapping[str, Pair], live: str | None) -> None:
        """Put the adapters into the state that a stage committed."""
        for accumulator in self.past.values():
            accumulator.set(None)
        self.folded, self.kept = [], dict(kept)
        self._stacks.clear()
        for pair in folded:
            self.fold(pair)
        self.show(self.kept[live] if live else None)

    # Factors for methods.

    def groups(self) -> list[FactorGroup]:
        """The live pair, and the folded ones, in groups of equal shape."""
        by_shape: dict[tuple[torch.Size, torch.Size], list[str]] = {}
        for target, layer in self.layers.items():
            shape = (layer.lora_A[NAME].weight.shape, layer.lora_B[NAME].weight.shape)
            by_shape.setdefault(shape, []).append(target)
        return [self._group(tuple(targets)) for targets in by_shape.values()]

    def _group(self, targets: tuple[str, ...]) -> FactorGroup:
        A = torch.stack([self.layers[target].lora_A[NAME].weight for target in targets])
        B = torch.stack([self.layers[target].lora_B[NAME].weight for target in targets])
        if not self.folded:
            return FactorGroup(targets, A, B, None, None)
        if targets not in self._stacks:
            # Constants of the stage: stacked once, not at every step.
            past_A = torch.stack([torch.cat([pair.A[t] for pair in self.folded], dim=0) for t in targets])
            past_B = torch.stack([torch.cat([pair.B[t] for pair in self.folded], dim=1) for t in targets])
            self._stacks[targets] = (past_A.to(A.device), past_B.to(B.device))
        return FactorGroup(targets, A, B, *self._stacks[targets])


def default_targets(model: nn.Module) -> list[str]:
    """Query and value of the model's attention, as PEFT knows them; GPT-2's ``c_attn`` holds both."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    family = getattr(getattr(model, "config", None), "model_type", "")
    if family in known:
        return list(known[family])
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for pair in (["q_proj", "v_proj"], ["query", "value"], ["q", "v"], ["c_attn"], ["query_key_value"]):
        if set(pair) <= names:
            return pair
    raise UserError(f"adapter.target_modules: cannot tell query and value of a {family or 'model'}; name the layers")


def check_targets(model: nn.Module, targets: Iterable[str]) -> None:
    """Every target names at least one linear layer.

    Raises:
        UserError: it names none, or something else.
    """
    modules = dict(model.named_modules())
    endings = {name.rsplit(".", 1)[-1] for name, m in modules.items() if _linear(m)}
    for target in targets:
        found = [m for name, m in modules.items() if name == target or name.endswith("." + target)]
        if not found:
            hint = did_you_mean(target, endings) or f" (there are {', '.join(sorted(endings))})"
            raise UserError(f"adapter.target_modules: the model has no layer '{target}'{hint}")
        if not all(_linear(module) for module in found):
            raise UserError(f"adapter.target_modules: '{target}' is no linear layer")


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
