"""DeepSpeed ZeRO 1 and 2, on one process or many, GPU or CPU. The only file that imports deepspeed.

Under ZeRO-2 each rank has its part of the gradients and of what the rules keep; under ZeRO-1 gradients are whole on
each until the step. What stands whole on every rank (ZeRO-0) is ``replicated.py``.

Measured facts this file rests on (deepspeed 0.19): a parameter that trains is fp32 and its own master as long as
DeepSpeed's ``bf16`` section stays off; gradient clipping left unset means 1.0; an in-place write to a parameter is
lost at the next step unless the fp32 fragment is written with it; an engine that is not destroyed is never freed, nor
is one whose hooks stay on the module.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.config.schema import TrainingConfig
from cl_runner.engine.optim import WHOLE, ParameterGroup, RuleOptimizer
from cl_runner.engine.process import Place
from cl_runner.errors import TrainingError, UserError
from cl_runner.imports import compiled_when_called, light_imports
from cl_runner.plain_files import LARGEST_JSON, content

# Keys of a DeepSpeed JSON that decide numbers we answer for; a dot leads into a section.
OWNED = {
    "train_batch_size": "training.global_batch",
    "train_micro_batch_size_per_gpu": "training.micro_batch",
    "gradient_accumulation_steps": "training.global_batch and training.micro_batch",
    "managed_gradient_accumulation": "training.global_batch and training.micro_batch",
    "gradient_clipping": "training.clip",
    "optimizer": "training.optimizer and training.lr",
    "scheduler": "training.schedule",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "data_types": "training.precision",
    "communication_data_type": "training.precision",
    "zero_optimization.offload_optimizer": "training.offload_optimizer",
    "zero_optimization.zenflow": "training.offload_optimizer",
    "zero_optimization.offload_param": "training.zero",
}

# What ``start`` sets, and what it was before: a child process must not take this one's port and rank for its own.
_EXPORTED = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("DS_ACCELERATOR", "DS_BUILD_OPS", "GLOO_SOCKET_IFNAME"),
)
_environment: dict[str, str | None] = {}


class Autocast(nn.Module):
    """The model under bf16 autocast where wanted, entered inside the wrapped module's forward.

    ``forward`` takes the computation itself, so that whatever a method does (a second forward for distillation, a
    penalty in fp32) runs inside one forward of the engine.
    """

    def __init__(self, model: nn.Module, device: torch.device, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self._device = device.type
        self._bf16 = bf16

    def context(self) -> Any:
        """The autocast context of every forward of this model, training or not."""
        if not self._bf16:
            return nullcontext()
        # Uncached: a cast made under no_grad (or before a write) would serve later forwards, without their gradient.
        return torch.autocast(self._device, torch.bfloat16, cache_enabled=False)

    def twin(self) -> Autocast:
        """Another wrapper of the same model, out of reach of what DeepSpeed hangs on this one."""
        return Autocast(self.model, torch.device(self._device), self._bf16)

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        with self.context():
            return compute()


def start(place: Place) -> None:
    """Bring up the one process group of this process; it lives through all stages. Safe to call again."""
    if torch.distributed.is_initialized():
        return
    _environment.update({name: os.environ.get(name) for name in _EXPORTED})
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if place.device == "cuda" else "cpu")
    os.environ.setdefault("DS_BUILD_OPS", "0")
    place.export()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with light_imports(), compiled_when_called():
        import deepspeed
        import deepspeed.ops
        import deepspeed.runtime.zero.muon.muon_optimizer

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # No op of DeepSpeed's own: it would run compilers to find out which there can be, and its shared-memory collective
    # compiles for most of a minute on a fresh machine, where gloo does the same work.
    deepspeed.ops.__compatible_ops__ = {}
    # DeepSpeed 0.19 calls a collective by a name that torch 2.13 deprecates, at every step.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    if place.device == "cuda":
        torch.cuda.set_device(place.torch_device)  # collectives of objects take the current device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed.init_distributed(dist_backend="nccl" if place.device == "cuda" else "gloo", verbose=False)


def stop() -> None:
    """Take the process group down (an open one makes later groups of this process hang), the environment with it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from deepspeed import comm

        comm.destroy_process_group()  # with the groups that DeepSpeed itself remembers
        comm.comm.cdb = None
    for name, value in _environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _environment.clear()


def broadcast_object(place: Place, value: Any) -> Any:
    """Rank 0's value on every rank. *Collective*; needs ``start`` where there are several."""
    if place.ranks == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(place: Place, value: Any) -> list[Any]:
    """Every rank's value, on every rank. *Collective*; needs ``start`` where there are several."""
    found = [value] * place.ranks
    if place.ranks > 1:
        torch.distributed.all_gather_object(found, value)
    return found


def adam_step(taken: int, made: Mapping[str, Any], device: torch.device) -> Tensor:
    """The count that torch's Adam keeps beside its moments, where that group of its (``made``) looks for it."""
    return torch.tensor(float(taken), device=device if made.get("fused") or made.get("capturable") else "cpu")


class Engine:
    """One stage's optimisation.

    Args:
        root: the model, wrapped for autocast; what trains in it is fp32.
        groups: which parameters train, and by which rule.
        training: the stage's settings.
        place: this process among the others.
        micro_batch, accumulation: the batch arithmetic of the plan (``train.BatchPlan``).
    """

    def __init__(
        self,
        root: Autocast,
        groups: Sequence[ParameterGroup],
        training: TrainingConfig,
        place: Place,
        *,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        import deepspeed

        self.place = place
        self.accumulation = accumulation
        self.skipped = 0
        self._linked = False
        self._clip = training.clip
        self.lr = training.lr  # of the step that is made, before each group's own scale
        self.groups = [group for group in groups if group.parameters]
        self.parameters: dict[str, nn.Parameter] = {}
        for group in self.groups:
            self.parameters.update(group.parameters)
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                raise TrainingError(f"{name} trains and is {parameter.dtype}; what trains must be fp32")
            parameter.grad = None  # what an earlier stage left, that did not train it, would be added to
        self.whole = [name for group in self.groups if group.rule in WHOLE for name in group.parameters]
        config = deepspeed_config(training, micro_batch=micro_batch, accumulation=accumulation, ranks=place.ranks)
        optimizer = self._make_optimizer()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._engine, self._optimizer, _, _ = deepspeed.initialize(
                    model=root,
                    model_parameters=list(self.parameters.values()),
                    optimizer=optimizer,
                    config=config,
                    dist_init_required=False,
                )
        except (AssertionError, ValueError) as error:
            if training.deepspeed is None:
                raise
            why = " ".join(str(error).split())[:300]
            raise UserError(f"training.deepspeed: {training.deepspeed}: DeepSpeed refuses it: {why}") from error

    def _make_optimizer(self) -> torch.optim.Optimizer:
        groups = [
            {
                "params": list(group.parameters.values()),
                "lr": self.lr * group.lr_scale,
                "weight_decay": group.weight_decay,
                **group.options,
            }
            for group in self.groups
        ]
        if all(group.rule == "adamw" for group in self.groups):
            return torch.optim.AdamW(groups, weight_decay=0.0, fused=self.place.device == "cuda")
        for made, group in zip(groups, self.groups, strict=True):
            made["rule"] = group.rule
        return RuleOptimizer(groups)

    # One step: forward and backward of each micro-batch, then clip, edit, whole steps, step.

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        """The loss that ``compute`` returns, computed inside the engine's forward (autocast on)."""
        loss: Tensor = self._engine(compute)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` (a scalar, already divided by what it is to be divided by)."""
        if not loss.requires_grad:
            # A loss that reaches no trained parameter still has to pass through, on every rank alike.
            loss = loss + sum((p.sum() * 0.0 for p in self.parameters.values()), torch.zeros((), device=loss.device))
        self._engine.backward(loss, scale_wrt_gas=False)

    def next_micro_batch(self) -> None:
        """Between two micro-batches of one step: DeepSpeed counts them by its ``step``."""
        self._engine.step()

    def give(self, gradients: Mapping[str, Tensor]) -> None:
        """All micro-batches of a step whose whole gradient is this, of every parameter; the same on every rank."""
        for slot in range(self.accumulation):
            last = slot == self.accumulation - 1
            self.forward(lambda: torch.zeros(()))  # which DeepSpeed counts
            terms = [(p * gradients[name]).sum() for name, p in self.parameters.items()] if last else []
            self.backward(sum(terms, torch.zeros((), device=self.place.torch_device)))
            if not last:
                self.next_micro_batch()

    def set_lr(self, lr: float) -> None:
        """The learning rate of the coming step, before each group's own scale."""
        self.lr = lr
        for made, group in zip(self._optimizer.param_groups, self.groups, strict=True):
            made["lr"] = lr * group.lr_scale

    def _fragments(self) -> Iterator[Tensor]:
        for parameter in self.parameters.values():
            zero: Any = parameter  # ZeRO hangs what it knows on the parameter itself
            if zero._hp_mapping is not None:
                yield zero._hp_mapping.get_lp_grad_fragment(zero._index_in_param_group)

    _counts = True  # whether what this rank has of the gradients is no other's too

    @property
    def offloads(self) -> bool:
        """Optimizer states in CPU memory: DeepSpeed looks at gradients as they come then, not as they are edited."""
        return bool(self._optimizer.cpu_offload)

    @torch.no_grad()
    def gradient_norm(self, also: Iterable[Tensor] = ()) -> float:
        """L2 norm of the whole mean gradient (no clipping), the same number on every rank.

        ``also``: scalars of this rank, on its device. Where one of them, on any rank, is not finite the norm is not
        either; finite ones change no bit. So the device is waited for once a step, whatever there is to be known.
        """
        square = torch.zeros((), dtype=torch.float64, device=self.place.torch_device)
        fragments = list(self._fragments()) if self._counts else []
        for norm in torch._foreach_norm(fragments) if fragments else ():  # a rank may own nothing but padding
            square += norm.double().to(square.device) ** 2
        for value in also:
            square += 0.0 * value.double().sum()
        return float(self.all_reduce(square).sqrt())

    @torch.no_grad()
    def clip(self, also: Iterable[Tensor] = ()) -> float:
        """Scale the whole gradient to norm ``training.clip`` at most; returns the norm before (see there)."""
        norm = self.gradient_norm(also)
        fragments = list(self._fragments())
        if fragments and 0 < self._clip < norm < math.inf:
            torch._foreach_mul_(fragments, self._clip / (norm + 1e-6))
        return norm

    def whole_gradients(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Name → whole fp32 mean gradient, of all parameters or of some.

        Between the last backward of a step and ``step``; a collective.
        """
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(self.parameters[name]) for name in names or self.parameters}

    def set_whole_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Replace the gradients of the names given (fp32, the same on every rank)."""
        from deepspeed.utils import safe_set_full_grad

        for name, gradient in gradients.items():
            safe_set_full_grad(self.parameters[name], gradient.to(torch.float32).contiguous())

    @torch.no_grad()
    def skip(self) -> None:
        """Leave this step out, on all ranks: parameters and what their rules keep stay as they are. It is counted."""
        for fragment in self._fragments():
            fragment.fill_(math.nan)  # which DeepSpeed sees, and then takes no step
        if self.offloads:
            norms = self._optimizer.norm_for_param_grads
            norms.update({key: norm * math.nan for key, norm in norms.items()})
        self.step()

    def step(self) -> bool:
        """One optimizer step from the gradients as they are; whether it was taken: not where one is not finite."""
        before = self._engine.skipped_steps
        self._engine.step()
        self.skipped += int(self._engine.skipped_steps - before)
        if not self._linked and self._engine.global_steps > self._engine.skipped_steps:
            self._link_moments()
        return bool(self._engine.skipped_steps == before)

    def _link_moments(self) -> None:
        """Let each parameter know its moments: DeepSpeed does so once, when the first group alone has any."""
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()
        self._linked = True

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Set parameters: the parameter and its fp32 fragment together. The same values on every rank."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, value in values.items():
            parameter = self.parameters[name]
            value = value.to(parameter.device, torch.float32).contiguous()
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)

    def moments(self, name: str) -> dict[str, Tensor] | None:
        """Adam's whole ``exp_avg`` and ``exp_avg_sq`` of a parameter; a collective.

        None before the first step, and for a parameter of another rule.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self._has_moments(name):
            return None
        parameter = self.parameters[name]
        return {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}

    def _has_moments(self, name: str) -> bool:
        # Asked of what every rank knows alike: DeepSpeed itself fails on the rank that owns a fragment alone.
        adamw = any(name in group.parameters and group.rule == "adamw" for group in self.groups)
        return adamw and self._engine.global_steps > self._engine.skipped_steps

    def _refuse_no_moments(self, name: str) -> None:
        if not self._has_moments(name):
            raise TrainingError(f"{name} has no moments before the first step, nor under another rule than adamw")

    def set_moments(self, name: str, moments: Mapping[str, Tensor]) -> None:
        """Replace Adam's moments of a parameter (after at least one step)."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self._refuse_no_moments(name)
        for key, value in moments.items():
            safe_set_full_optimizer_state(self.parameters[name], value.to(torch.float32).contiguous(), key)

    # What it holds between two steps.

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Parameters and what their rules keep of them, whole and on the CPU, and the counts of steps. *Collective*.

        ``parameter.<name>``, ``exp_avg.<name>``, …: the same on every rank; any number of ranks may go on with them.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        tensors = {f"parameter.{name}": p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
        for group, made in zip(self.groups, self._optimizer.optimizer.param_groups, strict=True):
            part = made["params"][0]  # flat: what this rank steps
            kept = self._optimizer.optimizer.state.get(part, {})
            for key in [key for key, value in kept.items() if torch.is_tensor(value) and value.shape == part.shape]:
                for name, parameter in group.parameters.items():
                    tensors[f"{key}.{name}"] = safe_get_full_optimizer_state(parameter, key).cpu()
        return tensors, {"steps": int(self._engine.global_steps), "skipped": self.skipped}

    def load_state(self, tensors: Mapping[str, Tensor], counts: Mapping[str, Any]) -> None:
        """Go on from what ``state`` gave; of an engine that has taken no step. The same on every rank."""
        from deepspeed.utils import safe_set_full_optimizer_state

        taken, kept = self._restore(tensors, counts)
        if not taken:
            return
        for group, made in zip(self.groups, self._optimizer.optimizer.param_groups, strict=True):
            part = made["params"][0]
            keys = [key for name, key in kept if name == next(iter(group.parameters))]
            if keys:  # as a first step would make them
                state = {key: torch.zeros_like(part) for key in keys}
                if group.rule == "adamw":
                    state["step"] = adam_step(taken, made, part.device)
                self._optimizer.optimizer.state[part] = state
        self._link_moments()
        for (name, key), value in kept.items():
            safe_set_full_optimizer_state(self.parameters[name], value.contiguous(), key)

    def _restore(
        self, tensors: Mapping[str, Tensor], counts: Mapping[str, Any]
    ) -> tuple[int, dict[tuple[str, str], Tensor]]:
        """Parameters and counts as ``state`` gave them; steps taken by then, and by name and key what rules keep."""
        steps, self.skipped = counts["steps"], counts["skipped"]
        self.write({name: tensors[f"parameter.{name}"] for name in self.parameters})
        self._engine.global_steps, self._engine.skipped_steps = steps, self.skipped
        self._engine.micro_steps = steps * self.accumulation
        kept: dict[tuple[str, str], Tensor] = {}
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            if kind != "parameter":
                kept[name, kind] = value
        return steps - self.skipped, kept

    def optimizer_bytes(self) -> int:
        """Of what this rank's optimizer holds by now: moments, and the masters of what trains."""
        kept = [value for state in self._optimizer.optimizer.state.values() for value in state.values()]
        kept += [p for group in self._optimizer.optimizer.param_groups for p in group["params"]]
        return sum(value.numel() * value.element_size() for value in kept if torch.is_tensor(value))

    # Ranks.

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; returns the tensor."""
        if self.place.ranks > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def destroy(self) -> None:
        """Free the engine. The module stays, its parameters keep their values."""
        with torch.no_grad():
            for parameter in self.parameters.values():
                # The data were views into ZeRO's flat buffers, which would stay alive with them.
                parameter.data = parameter.data.clone()
                for name in ("_hp_mapping", "_zero_optimizer", "_dp_group", "_index_in_param_group"):
                    if hasattr(parameter, name):
                        delattr(parameter, name)
                parameter.grad = None
        for hook in (self._engine.module_forward_pre_hook, self._engine.module_forward_post_hook):
            if hook is not None:  # DeepSpeed leaves both on the module, and the engine alive with them
                hook.remove()
        self._engine.destroy()
        del self._engine, self._optimizer
        gc.collect()
        if self.place.device == "cuda":
            torch.cuda.empty_cache()


def deepspeed_config(training: TrainingConfig, *, micro_batch: int, accumulation: int, ranks: int) -> dict[str, Any]:
    """The DeepSpeed config: the user's JSON merged over ours, except for the keys that we own.

    Raises:
        UserError: the file is missing or broken, or sets a key of ours.
    """
    ours: dict[str, Any] = {
        "train_batch_size": micro_batch * accumulation * ranks,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": training.zero, "overlap_comm": False, "reduce_bucket_size": 50_000_000},
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU at every forward
        "wall_clock_breakdown": False,
    }
    if training.offload_optimizer:
        ours["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        ours["zero_force_ds_cpu_optimizer"] = False
    return _merge(ours, read_deepspeed_json(training))


def read_deepspeed_json(training: TrainingConfig) -> dict[str, Any]:
    """The user's DeepSpeed JSON, checked for keys that we own; ``{}`` without one."""
    file = training.deepspeed
    if file is None:
        return {}
    try:
        given = json.loads(content(Path(file), LARGEST_JSON))
    except OSError as error:
        raise UserError(f"training.deepspeed: {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"training.deepspeed: {file}: not JSON: {error}") from None
    if not isinstance(given, dict):
        raise UserError(f"training.deepspeed: {file}: must be a JSON object")
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"training.deepspeed: {file}: zero_optimization must be a JSON object")
    if (stage := zero.get("stage", training.zero)) != training.zero:
        raise UserError(
            f"training.deepspeed: {file}: zero_optimization.stage is {stage}, and training.zero is {training.zero}; "
            "set training.zero, and remove it from the file"
        )
    for key, ours in OWNED.items():
        section, _, name = key.rpartition(".")
        if name in (given.get(section, {}) if section else given):
            raise UserError(f"training.deepspeed: {file}: '{key}' is decided by {ours}; remove it from the file")
    return given


def _merge(ours: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in given.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
