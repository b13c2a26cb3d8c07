"""ZeRO-0: parameters, gradients and what the rules keep stand whole on every rank, and each takes the whole step.

DeepSpeed then has no optimizer of its own around torch's: gradients are the parameters' own, summed over the ranks once
a step, and it looks for nothing that is not finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.config.schema import TrainingConfig
from cl_runner.engine.zero import Engine, adam_step


def engine_for(training: TrainingConfig) -> type[Engine]:
    """The engine that ``training.zero`` asks for."""
    return Replicated if training.zero == 0 else Engine


class Replicated(Engine):
    """``Engine`` without partitions; the same promises."""

    _edited = False  # whether gradients are no longer those whose norm was looked at

    @property
    def _counts(self) -> bool:  # type: ignore[override]
        return self.place.rank == 0  # every rank has the same

    @property
    def offloads(self) -> bool:
        """It keeps all where the parameters are."""
        return False

    def backward(self, loss: Tensor) -> None:
        """As ``Engine``'s; DeepSpeed 0.19 divides by the accumulation where it is handed what its forward gave."""
        super().backward(loss.clone())

    def _fragments(self) -> Iterator[Tensor]:
        yield from (_gradient(parameter) for parameter in self.parameters.values())

    def whole_gradients(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Name → the fp32 mean gradient, a copy."""
        return {name: _gradient(self.parameters[name]).clone() for name in names or self.parameters}

    def set_whole_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Replace the gradients of the names given (fp32, the same on every rank)."""
        for name, gradient in gradients.items():
            _gradient(self.parameters[name]).copy_(gradient)
        self._edited = True

    def skip(self) -> None:
        """Leave this step out; it is counted."""
        for parameter in self.parameters.values():
            parameter.grad = None  # of which torch's rules take no step
        self._edited = False
        self._engine.step()
        self._engine.skipped_steps += 1
        self.skipped += 1

    def step(self) -> bool:
        """One optimizer step from the gradients as they are; whether it was taken: not where one is not finite."""
        edited, self._edited = self._edited, False
        if edited and not torch.stack([gradient.isfinite().all() for gradient in self._fragments()]).all():
            self.skip()
            return False
        for parameter in self.parameters.values():
            _gradient(parameter)  # one that no loss reaches decays too
        self._engine.step()
        return True

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Set parameters; the same values on every rank."""
        for name, value in values.items():
            self.parameters[name].copy_(value)

    def moments(self, name: str) -> dict[str, Tensor] | None:
        """Adam's ``exp_avg`` and ``exp_avg_sq``, copies; None as for ``Engine``."""
        if not self._has_moments(name):
            return None
        kept = self._optimizer.state[self.parameters[name]]
        return {key: kept[key].clone() for key in ("exp_avg", "exp_avg_sq")}

    def set_moments(self, name: str, moments: Mapping[str, Tensor]) -> None:
        """Replace Adam's moments of a parameter (after at least one step)."""
        self._refuse_no_moments(name)
        kept = self._optimizer.state[self.parameters[name]]
        for key, value in moments.items():
            kept[key].copy_(value)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As ``Engine``'s, from which it may go on."""
        tensors = {f"parameter.{name}": p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    tensors[f"{key}.{name}"] = value.to("cpu", copy=True)
        return tensors, {"steps": int(self._engine.global_steps), "skipped": self.skipped}

    def load_state(self, tensors: Mapping[str, Tensor], counts: Mapping[str, Any]) -> None:
        """Go on from what an engine's ``state`` gave; of one that has taken no step."""
        taken, kept = self._restore(tensors, counts)
        for (name, key), value in kept.items():
            parameter = self.parameters[name]
            self._optimizer.state[parameter][key] = value.to(parameter.device, copy=True)
        for group, made in zip(self.groups, self._optimizer.param_groups, strict=True):
            for parameter in group.parameters.values() if group.rule == "adamw" and taken else ():
                self._optimizer.state[parameter]["step"] = adam_step(taken, made, parameter.device)

    def optimizer_bytes(self) -> int:
        """Of what this rank's optimizer holds by now beside the parameters."""
        kept = [value for state in self._optimizer.state.values() for value in state.values()]
        return sum(value.numel() * value.element_size() for value in kept if torch.is_tensor(value))


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Zeros where no loss reaches the parameter."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
