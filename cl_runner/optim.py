"""Which parameters train, and by which rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class ParameterGroup:
    """Parameters that share a learning rate and a rule.

    ``rule`` is ``adamw``, ``sgd``, or ``whole``: the method itself computes the update from the whole gradient.
    ``lr_scale`` multiplies the stage's learning rate.
    """

    parameters: dict[str, nn.Parameter]
    rule: str = "adamw"
    lr_scale: float = 1.0
    weight_decay: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


class RuleOptimizer(torch.optim.Optimizer):
    """Each parameter group by its own rule; ``whole`` groups are left to the method.

    The rules are torch's own optimizers. They share this one's state, so that ZeRO finds the moments here.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "rule": "adamw"})
        self._rules: dict[str, torch.optim.Optimizer] = {}
        for group in self.param_groups:
            rule = group["rule"]
            if rule != "whole" and rule not in self._rules:
                make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[rule]
                self._rules[rule] = make([torch.nn.Parameter(torch.zeros(1))], lr=1e-3, weight_decay=0.0)
            if rule != "whole":
                for key, value in self._rules[rule].defaults.items():
                    group.setdefault(key, value)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every group that is not ``whole``. ZeRO calls it with one group at a time."""
        for group in self.param_groups:
            if group["rule"] == "whole":
                continue
            rule = self._rules[group["rule"]]
            rule.param_groups, rule.state = [group], self.state
            rule.step()
