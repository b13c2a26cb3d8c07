"""Methods at a size for tiny models, such that what each holds during a stage decides something. Imports no torch."""

from __future__ import annotations

from typing import Any

OWN: dict[str, dict[str, Any]] = {
    "replay": {"memory_per_task": 3, "replay_ratio": 0.5},
    "ewc": {"lambda1": 30.0, "fisher_samples": 4},
    "lwf": {"lambda1": 5.0},
    "agem": {"memory_per_task": 4, "memory_batch": 3},
    "gem": {"memory_per_task": 4, "memory_batch": 3},
    "ogd": {"vectors": 4},
    "l2p": {"pool": 4, "length": 2, "top": 2, "lr": 0.1},
    "progprompt": {"length": 3},
    "lfpt5": {"length": 4, "lambda_kl": 0.5},
    "clora": {"k": 8, "subspace": "data"},
    "grassmann": {"stiefel": True},
    "shared-basis": {"mixing": "similarity", "every": 1},
    "coso": {"rank": 4, "sketch": 6, "every": 3, "lr": 0.05},
    "osft": {"lr": 0.05},
    "hard-orth": {"reorthogonalise": {"every": 1}},
    "soft-orth": {"reorthogonalise": {"how": "soft", "every": 1}},
    "pego": {"group": 2},
    "ella": {"lambda1": 30.0},
    "pslora": {"lambda1": 40.0, "a": 8.0},
    "oliera": {"lr": 0.02},
    "jumplora": {"lambda1": 20.0, "start": 0.3},
    "ewc-lora": {"lambda1": 3.0, "fisher_samples": 4},
    "merge": {"how": "magmax"},
    "slao": {"fisher_beta": 0.5, "fisher_samples": 4},
    "doc": {"components": 3},
    "gorp": {"k": 4, "every": 3, "lr": 0.02},
    "sapt": {"kappa": 2.0, "pseudo": 3, "pseudo_tokens": 5},
    "sure": {"memory_size": 9, "memory_batch": 3},
    "rkif": {"inner_steps": 3, "outer_steps": 2, "memory_share": 0.5, "memory_batch": 2},
}
