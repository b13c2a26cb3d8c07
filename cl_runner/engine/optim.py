"""Which parameters train, and by which rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.config.schema import TrainingConfig

# Rules that take a parameter's whole gradient: ZeRO's flat partitions know no rows and columns.
WHOLE = ("whole", "muon")


@dataclass
class ParameterGroup:
    """Parameters that share a learning rate and a rule.

    ``rule`` is ``adamw``, ``sgd``, ``muon``, or ``whole``: the method itself makes the update from the whole gradient.
    ``lr_scale`` multiplies the stage's learning rate.
    """

    parameters: dict[str, nn.Parameter]
    rule: str = "adamw"
    lr_scale: float = 1.0
    weight_decay: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


class RuleOptimizer(torch.optim.Optimizer):
    """Each parameter group by its own rule; those that take whole gradients are left to the training loop.

    The rules are torch's own optimizers. They share this one's state, so that ZeRO finds the moments here.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "rule": "adamw"})
        self._rules: dict[str, torch.optim.Optimizer] = {}
        for group in self.param_groups:
            rule = group["rule"]
            if rule not in WHOLE and rule not in self._rules:
                make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[rule]
                self._rules[rule] = make([torch.nn.Parameter(torch.zeros(1))], lr=1e-3, weight_decay=0.0)
            if rule not in WHOLE:
                for key, value in self._rules[rule].defaults.items():
                    group.setdefault(key, value)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every group by torch's own rule. ZeRO calls it with one group at a time."""
        for group in self.param_groups:
            if group["rule"] in WHOLE:
                continue
            rule = self._rules[group["rule"]]
            rule.param_groups, rule.state = [group], self.state
            rule.step()


def ordinary_groups(
    parameters: Mapping[str, nn.Parameter], training: TrainingConfig, model: nn.Module
) -> list[ParameterGroup]:
    """All parameters by the rule that ``training.optimizer`` says.

    Weight decay is decoupled in each: w ← (1 − lr·decay)·w beside the update (for plain SGD the coupled form is that).
    """
    decay = training.weight_decay
    if training.optimizer != "muon":
        return [ParameterGroup(dict(parameters), training.optimizer, weight_decay=decay)]
    # Embeddings and the head are tables with a row a token, no maps of hidden states: AdamW, as Muon's author has it.
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tables = [head, *(module for module in model.modules() if isinstance(module, nn.Embedding))]
    by_row = {id(table.weight) for table in tables if table is not None}
    # A vector is no map either, whichever way it lies (IA3's scales are (m, 1) and (1, n)).
    matrices = {name: p for name, p in parameters.items() if p.dim() == 2 and 1 not in p.shape and id(p) not in by_row}
    others = {name: p for name, p in parameters.items() if name not in matrices}
    return [
        ParameterGroup(matrices, "muon", weight_decay=decay),
        ParameterGroup(others, weight_decay=decay),
    ]


def by_learning_rate(groups: Sequence[ParameterGroup], ratios: Mapping[str, float]) -> list[ParameterGroup]:
    """The same groups, split where parameters have a learning rate of their own: name → its ratio to the others'."""
    found = []
    for group in groups:
        apart: dict[float, dict[str, nn.Parameter]] = {}
        for name, parameter in group.parameters.items():
            apart.setdefault(ratios.get(name, 1.0), {})[name] = parameter
        found += [replace(group, parameters=own, lr_scale=group.lr_scale * ratio) for ratio, own in apart.items()]
    return found


class Muon:
    """Muon (Keller Jordan, 2024, kellerjordan.github.io/posts/muon): momentum, made orthogonal.

    w ← (1 − lr·decay)·w − lr·√max(1, rows/columns)·O, O the orthogonalised Nesterov momentum of whole gradients. The
    momentum of every matrix is kept on every rank, new at every stage like any optimizer's.
    """

    MOMENTUM = 0.95

    def __init__(self) -> None:
        self.momentum: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        """The momentum of each matrix, between two steps."""
        return dict(self.momentum)

    def load_state(self, momentum: Mapping[str, Tensor]) -> None:
        """Go on with it; where the gradients are."""
        self.momentum = dict(momentum)

    @torch.no_grad()
    def update(self, name: str, weight: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> Tensor:
        """What to add to a matrix (rows, columns) after its whole fp32 gradient."""
        momentum = self.momentum.setdefault(name, torch.zeros_like(gradient))
        momentum.mul_(self.MOMENTUM).add_(gradient)
        direction = orthogonalised(gradient + self.MOMENTUM * momentum)
        rows, columns = gradient.shape
        scale: float = max(1.0, rows / columns) ** 0.5
        return -lr * (scale * direction + weight_decay * weight)


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U Vᵀ of a matrix U S Vᵀ: five Newton-Schulz steps with Muon's quintic, in the matrix's precision.

    X ← aX + (bXXᵀ + c(XXᵀ)²)X. Singular values end between 0.68 and 1.14, not at 1 (those under 1/1000 of the norm may
    end lower); a zero matrix stays zero.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT  # the smaller Gram matrix
    x: Tensor = wide / (torch.linalg.matrix_norm(wide) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrix else x.mT
