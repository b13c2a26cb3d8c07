"""Adapters of every kind that is another tuner than LoRA's, around tiny models, with values that show."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from cl_runner.adapters.kind import Opening
from cl_runner.adapters.tuned import Tuned
from cl_runner.adapters.tuner import Tuner
from cl_runner.registry import KINDS

# Small enough for layers of 24 and 32, and none of it what the kind begins with by itself.
SETTINGS: dict[str, dict[str, Any]] = {
    "dora": {"r": 2, "alpha": 6.0},
    "vera": {"r": 6, "projection_seed": 3},
    "vblora": {"r": 2, "vectors": 7, "vector_length": 4, "topk": 3},
    "tied-lora": {"r": 2, "alpha": 6.0},
    "lora-xs": {"r": 3, "alpha": 6.0},
    "loha": {"r": 2, "alpha": 6.0},
    "lokr": {"r": 1, "alpha": 3.0},
    "ia3": {},
    "oft": {"block_size": 4},
    "boft": {"block_size": 4},
    "hra": {"r": 4},
    "randlora": {"r": 5, "alpha": 20.0, "projection_seed": 3},
    "fourierft": {"frequencies": 30, "scaling": 20.0},
}
# T5: square and oblong both ways, in encoder, decoder and across; LLaMA: the same; GPT-2: Conv1D with biases.
TARGETS = {
    "t5": ["q", "v", "wi", "wo"],
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
}
MOVES = ("vblora", "lora-xs")  # begin a little beside the base, as published
READS_WEIGHT = ("dora", "loha", "lokr", "hra")  # compute in fp32
FACTORS = ("dora", "vera", "vblora", "tied-lora", "lora-xs")  # give factors
PAIRS = ("vera", "vblora", "tied-lora", "lora-xs")  # fold as a pair of factors
CASES = [(kind, family) for kind in SETTINGS for family in TARGETS if family != "gpt2" or KINDS.get(kind).takes_conv1d]  # type: ignore[attr-defined]


def tuner(kind: str, family: str = "t5", **settings: Any) -> Tuner:
    """The kind with small settings, and those given."""
    cls = KINDS.get(kind)
    dropout = {} if "dropout" in cls.Config.unused else {"dropout": 0.0}
    values = {"target_modules": TARGETS[family], **dropout, **SETTINGS[kind], **settings}
    made = cls(cls.Config.model_validate({"kind": kind, **values}))
    assert isinstance(made, Tuner)
    return made


def opened(kind: str, base: Any, family: str = "t5", *, compute: torch.dtype | None = None, **settings: Any) -> Tuned:
    """Adapters around a copy of ``base``, in evaluation mode, with no stage begun."""
    opening = Opening(copy.deepcopy(base), "some/base", None, family == "t5", compute)
    adapters = tuner(kind, family, **settings).open(opening)
    assert isinstance(adapters, Tuned)
    adapters.model.eval()
    return adapters


def begun(adapters: Tuned, stage: str = "one", seed: int = 0) -> Tuned:
    """A stage has begun, as drawn."""
    adapters.begin(stage, torch.Generator().manual_seed(seed))
    return adapters


def moved(adapters: Tuned, seed: int = 0, size: float = 0.3) -> Tuned:
    """Every parameter is off its start, as if it had trained."""
    dice = torch.Generator().manual_seed(100 + seed)
    for parameter in adapters.parameters().values():
        parameter.data.add_(size * torch.randn(parameter.shape, generator=dice))
    return adapters


def values(adapters: Tuned, target: str) -> dict[str, Tensor]:
    """PEFT's name of a parameter or a shared one → its value in fp64, as this target has it."""
    found = {}
    for name, value in adapters.values().tensors.items():
        if name.startswith(f"{target}."):
            found[name.removeprefix(f"{target}.")] = value.double()
        elif name in adapters.kind.shared:
            found[name] = value.double()
    return found


def folded(adapters: Tuned, stage: str, seed: int) -> dict[str, Tensor]:
    """Train a stage in a word, and fold it; the update that it was."""
    update = moved(begun(adapters, stage, seed), seed).live_update()
    adapters.fold_live()
    return update
