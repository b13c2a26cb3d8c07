"""The LoRA adapters of a run: the live pair of every target layer (PEFT's own), past ones folded or kept.

Arithmetic that has to be the same to the bit wherever it happens stands here once: an update is ``(s·B) A`` in fp32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.adapters.folding import Accumulator
from cl_runner.adapters.past_dropout import PastDropout
from cl_runner.adapters.terms import Term, Terms
from cl_runner.config import AdapterConfig
from cl_runner.errors import UserError, did_you_mean
from cl_runner.maths.directions import norm

NAME = "default"


@dataclass(frozen=True)
class Pair:
    """One stage's factors: for every target layer ``A`` (r, n) and ``B`` (m, r), fp32 on the CPU.

    The update is ``s·B A``. Of a pair that was let go of, both are empty.
    """

    stage: str
    rank: int
    scale: float
    A: dict[str, Tensor]
    B: dict[str, Tensor]

    @property
    def held(self) -> bool:
        """Whether the factors are in memory."""
        return bool(self.A)

    def let_go(self) -> Pair:
        """The same pair by name, rank and scale alone."""
        return replace(self, A={}, B={})

    def update(self, target: str, device: torch.device | str = "cpu") -> Tensor:
        """ΔW of a target, (m, n) fp32, computed on ``device``."""
        return (self.scale * self.B[target].to(device)) @ self.A[target].to(device)


@dataclass(frozen=True, eq=False)
class PastFactors:
    """The folded pairs of L target layers of equal shape: constants of a stage, made once, when first asked for.

    ``rank`` is R, the sum of the ranks. The scale s is in none of them. ``grams`` are sums over pairs that were let go
    of, all of them before those that are held.
    """

    targets: tuple[str, ...]
    pairs: tuple[Pair, ...]
    device: torch.device
    grams: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return sum(pair.rank for pair in self.pairs)

    def rows(self, factor: str) -> Tensor:
        """What the pairs span in the input (A) or the output (B): every A_i (L, R, n), or B_iᵀ (L, R, m), stacked."""
        return self._rows_A if factor == "A" else self._rows_B

    def gram(self, factor: str) -> Tensor:
        """``Σ A_iᵀ A_i / r_i`` (L, n, n), or ``Σ B_i B_iᵀ / r_i`` (L, m, m): the same size at every stage."""
        return self._gram_A if factor == "A" else self._gram_B

    @cached_property
    def row_weights(self) -> Tensor:
        """``1 / r_i`` of each of the R rows: every pair counts alike, whatever its rank."""
        ranks = torch.tensor([pair.rank for pair in self.pairs], device=self.device)
        return (1 / ranks).repeat_interleave(ranks)

    @cached_property
    def _rows_A(self) -> Tensor:
        return self._stacked("A")

    @cached_property
    def _rows_B(self) -> Tensor:
        return self._stacked("B")

    @cached_property
    def _gram_A(self) -> Tensor:
        return self._sum("A")

    @cached_property
    def _gram_B(self) -> Tensor:
        return self._sum("B")

    def _stacked(self, factor: str) -> Tensor:
        if not all(pair.held for pair in self.pairs):
            raise RuntimeError(f"past {factor} were let go of: the method's reads_past() does not say it reads them")
        return torch.cat([self._rows_of(pair, factor) for pair in self.pairs], dim=1)

    def _sum(self, factor: str) -> Tensor:
        held = [pair for pair in self.pairs if pair.held]
        if len(held) < len(self.pairs) and factor not in self.grams:
            raise RuntimeError(f"past {factor} were let go of: the method's reads_past() does not say it reads them")
        total = self.grams[factor].clone() if factor in self.grams else None
        for pair in held:
            rows = self._rows_of(pair, factor)
            mean = rows.mT @ rows / pair.rank
            total = mean if total is None else total.add_(mean)
        assert total is not None, "there are no past pairs"
        return total

    def _rows_of(self, pair: Pair, factor: str) -> Tensor:
        stacked = torch.stack([(pair.A if factor == "A" else pair.B)[target] for target in self.targets])
        return (stacked if factor == "A" else stacked.mT).to(self.device)


@dataclass(frozen=True, eq=False)
class FactorGroup:
    """Target layers of equal shape, stacked, so that a penalty is a few batched products.

    ``A`` (L, r, n) and ``B`` (L, m, r) are the live pair, part of the graph; ``past`` the pairs of past stages, None
    at the first one. The scale s is in none of them.
    """

    targets: tuple[str, ...]
    A: Tensor
    B: Tensor
    past: PastFactors | None


class Adapters:
    """The adapters of one model.

    Args:
        model: the frozen base; it is wrapped, reach the whole through ``model`` afterwards.
        config: rank, alpha, dropout, targets.
        name_or_path, revision: what a saved adapter names as its base.
        encoder_decoder: for PEFT's task type.
        compute: precision of the forward, where autocast makes it another than the base's.

    Raises:
        UserError: a target that the model does not have, that is no linear layer, or that shares its weight.
    """

    past_dropout: PastDropout | None = None  # where past pairs read the dropped-out input too
    terms: Terms | None = None  # what stands in the layers in the place of the pair
    condition: Mapping[str, Tensor] = MappingProxyType({})  # a method's own rows of the batch that is being computed
    _hooks: Sequence[Any] = ()  # of the terms
    _silent = False  # whether they add nothing

    def __init__(
        self,
        model: nn.Module,
        config: AdapterConfig,
        *,
        name_or_path: str,
        encoder_decoder: bool,
        revision: str | None = None,
        compute: torch.dtype | None = None,
    ) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        self.name_or_path, self.revision = name_or_path, revision
        self.task_type = "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"
        targets = config.target_modules or default_targets(model)
        check_targets(model, targets)
        self.target_modules = list(targets)
        self.rank, self._alpha = config.largest, config.alpha  # of the live pair; a stage may begin with another rank
        peft_config = LoraConfig(
            r=config.largest,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(targets),
            task_type=self.task_type,
            fan_in_fan_out=any(is_transposed(m) for name, m in model.named_modules() if _is_target(name, targets)),
            bias="none",
        )
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers by a name that transformers 5.23 deprecates.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            # Conv1D and Linear side by side: PEFT sets it right layer by layer.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
            self.model: Any = get_peft_model(model, peft_config)
        prefix = "base_model.model."
        self.layers: dict[str, Any] = {
            name.removeprefix(prefix): module
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
        }
        if compute is not None and compute != torch.float32:
            # PEFT casts every input up to the factors' fp32 and autocast casts it down again: two passes for nothing.
            for layer in self.layers.values():
                layer.cast_input_dtype_enabled = False
        if config.dropout_past and config.dropout:
            self.past_dropout = PastDropout(self.layers, NAME, compute or torch.float32)
        bases = {name: layer.get_base_layer() for name, layer in self.layers.items()}
        self.past: dict[str, Accumulator] = {
            name: Accumulator(layer, is_transposed(layer), compute) for name, layer in bases.items()
        }
        self.folded: list[Pair] = []  # in stage order
        self.dense: list[str] = []  # stages that folded an update without factors
        self.kept: dict[str, Pair] = {}  # by stage: pairs that stay outside the weight
        self.live: str | None = None  # the stage whose pair the layers hold
        self.start: Pair | None = None  # as its stage began, where a pair trains on
        self._past_factors: dict[tuple[str, ...], PastFactors] = {}
        self._grams: dict[tuple[str, ...], dict[str, Tensor]] = {}  # of the pairs that were let go of
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    @property
    def scale(self) -> float:
        """s of the live pair, alpha / r."""
        return self._alpha / self.rank

    def shapes(self) -> list[tuple[int, int]]:
        """(m, n), out by in, of every target layer."""
        return [(past.base.shape[0], past.base.shape[1]) for past in self.past.values()]

    # The live pair.

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → parameter of the live pair, ``<target>.lora_A`` and ``<target>.lora_B``, fp32; or of the terms."""
        return self.terms.parameters() if self.terms else self._of_pair()

    def _of_pair(self) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for target, layer in self.layers.items():
            found[f"{target}.lora_A"] = layer.lora_A[NAME].weight
            found[f"{target}.lora_B"] = layer.lora_B[NAME].weight
        return found

    def begin(self, stage: str, generator: torch.Generator | None = None, rank: int | None = None) -> None:
        """A new pair for ``stage``: A Kaiming-uniform as PEFT's, from ``generator`` (CPU), B zero.

        ``rank``: another than the last pair's.
        """
        self.start = None
        self._resize(rank or self.rank)
        for layer in self.layers.values():
            A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            fresh = torch.empty(A.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(fresh, a=5**0.5, generator=generator)
            A.data = fresh.to(A.device)
            B.data = torch.zeros(B.shape, dtype=torch.float32, device=B.device)
        self._live(stage)
        self.train(True)

    def _resize(self, rank: int) -> None:
        """Give the live pair another rank, its values are undefined then."""
        if rank == self.rank:
            return
        self.rank = rank
        for layer in self.layers.values():
            A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            A.data, B.data = A.data.new_empty(rank, A.shape[1]), B.data.new_empty(B.shape[0], rank)
            A.grad = B.grad = None
            layer.r[NAME], layer.scaling[NAME] = rank, self.scale

    def rename(self, stage: str) -> None:
        """Go on training the live pair, as the pair of ``stage``."""
        self.start = self.pair()
        self.kept.pop(self.live or "", None)
        self._live(stage)
        self.train(True)

    def begin_terms(
        self, stage: str, terms: Mapping[str, Term], shared: Mapping[str, nn.Parameter] | None = None
    ) -> None:
        """Terms of ``stage`` in the place of the pair, one for each target; all their parameters ask for gradients.

        ``shared`` are parameters that several terms hold, or none of them (a router's).
        """
        self.show(Terms(stage, dict(terms), dict(shared or {})))
        self.train(True)

    def _live(self, stage: str | None, terms: Terms | None = None) -> None:
        """Whose pair the layers hold. Without one they skip it: its product would be zero, at a sixth of a forward."""
        self.live = stage
        pair = self._of_pair().values()
        trains = [parameter.requires_grad for parameter in pair]
        for layer in self.layers.values():
            layer.enable_adapters(stage is not None and terms is None)  # PEFT lets what it enables ask for gradients
        for parameter, before in zip(pair, trains, strict=True):
            parameter.requires_grad_(before and terms is None)
        self._place(terms)

    def _place(self, terms: Terms | None) -> None:
        """Terms into the layers, those that were there out of them."""
        for hook in self._hooks:
            hook.remove()
        if self.terms:
            del self.model.shared_terms
            for target in self.terms.of:
                del self.layers[target].term
        self.terms, self._hooks = terms, []
        if terms:
            # Part of the model, for the engine and for forwards with other parameter values.
            self.model.shared_terms = nn.ParameterDict(terms.shared).to(next(iter(self.past.values())).weight.device)
            for target, term in terms.of.items():
                layer = self.layers[target]
                layer.term = term.to(self.past[target].weight.device)
                # Before those that observe, who see the output with the term in it.
                self._hooks.append(layer.register_forward_hook(self._added(term), prepend=True))

    def _added(self, term: Term) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._silent:
                return output
            addition: Tensor = term(inputs[0], self.condition)
            return output + addition.to(output.dtype)

        return hook

    @contextmanager
    def without_terms(self) -> Iterator[None]:
        """Inside, the layers answer as if no terms were live."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    def train(self, on: bool) -> None:
        """Whether the live pair's parameters ask for gradients."""
        for parameter in self.parameters().values():
            parameter.requires_grad_(on)

    def pair(self, stage: str | None = None) -> Pair:
        """A copy of the live pair, or of the factors of terms that all have some of one rank."""
        stage = stage or self.live
        assert stage is not None, "nothing is live"
        if self.terms:
            found = {target: term.factors() for target, term in self.terms.of.items()}
            A = {target: _copy(factors[0]) for target, factors in found.items() if factors}
            B = {target: _copy(factors[1]) for target, factors in found.items() if factors}
            [rank] = {len(rows) for rows in A.values()}
            assert len(A) == len(found), "a term without factors has no pair"
            return Pair(stage, rank, 1.0, A, B)
        return Pair(
            stage,
            self.rank,
            self.scale,
            {target: _copy(layer.lora_A[NAME].weight) for target, layer in self.layers.items()},
            {target: _copy(layer.lora_B[NAME].weight) for target, layer in self.layers.items()},
        )

    def live_update(self) -> dict[str, Tensor]:
        """ΔW of the live pair, or of the term, for every target, (m, n) fp32."""
        if self.terms:
            return {target: term.update().detach() for target, term in self.terms.of.items()}
        pair = self.pair()
        return {target: pair.update(target, past.weight.device) for target, past in self.past.items()}

    def shown(self) -> Pair | Terms | None:
        """What the layers hold, for ``show`` to put it back."""
        return self.terms or (self.pair() if self.live is not None else None)

    @torch.no_grad()
    def update_norm(self) -> float | None:
        """‖ΔW‖_F of what the stage has learned, over all targets, of a pair from r × r Gram matrices.

        Of a pair that trains on it is what changed since the stage began. None where nothing is live.
        """
        if self.terms:
            return math.sqrt(sum(float(term.own().square().sum()) for term in self.terms.of.values()))
        if self.live is None:
            return None
        square = 0.0
        for target, layer in self.layers.items():
            A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            if self.start is not None:
                A = torch.cat([A, self.start.A[target].to(A)])
                B = torch.cat([B, -self.start.B[target].to(B)], dim=1)
            square += float(norm((A, B))) ** 2
        return self.scale * math.sqrt(square)

    @torch.no_grad()
    def show(self, pair: Pair | Terms | None) -> None:
        """Put a pair or terms into the layers to answer with; None answers without any."""
        if isinstance(pair, Terms):
            self._live(pair.stage, pair)
            return
        if pair is not None:
            self._resize(pair.rank)
        for target, layer in self.layers.items():
            A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            if pair is None:
                B.data.zero_()
            else:
                A.data.copy_(pair.A[target])
                B.data.copy_(pair.B[target])
        self._live(pair.stage if pair else None)

    # Past pairs.

    @torch.no_grad()
    def fold(self, pair: Pair) -> None:
        """Add a pair to the sum of past updates of every target, in the order of the calls."""
        for target, accumulator in self.past.items():
            accumulator.add(pair.update(target, accumulator.weight.device))
        self.folded.append(pair)
        self._pairs_changed()

    def fold_live(self) -> None:
        """Fold the live pair; what answers from now on is the weight alone."""
        pair = self.pair()
        self.show(None)
        self.fold(pair)

    def fold_dense(self, stage: str, update: Mapping[str, Tensor]) -> None:
        """Add an update without factors, (m, n) a target, in place of the live pair, which is dropped."""
        self.show(None)
        for target, accumulator in self.past.items():
            accumulator.add(update[target].detach().to(accumulator.weight.device, torch.float32))
        self.dense.append(stage)

    def stored_whole(self, target: str, rank: int, pairs: int) -> bool:
        """Whether an adapter folder holds so many pairs of a target as one matrix, which is then the smaller form.

        A lone pair stays one: it would have to be stored beside its matrix anyway.
        """
        m, n = self.past[target].base.shape
        return bool(self.dense) or not pairs or (pairs > 1 and rank * (m + n) >= m * n)

    def let_go(self, reads: Mapping[str, str]) -> None:
        """Free the factors of folded pairs that neither a coming adapter folder nor the method will read.

        ``reads`` says what the method does (``Method.reads_past``). The sum of past updates is untouched. Where past
        pairs read the dropped-out input, all are needed at every step.
        """
        if self.past_dropout:
            return
        pairs, rank = self.folded, sum(pair.rank for pair in self.folded)
        if not pairs or not all(self.stored_whole(target, rank, len(pairs)) for target in self.layers):
            return
        side = max(max(past.base.shape) for past in self.past.values())
        if "rows" in reads.values() or (reads and rank <= side):
            return
        for targets in self._groups():
            past = self._past(targets)
            self._grams[targets] = {factor: past.gram(factor) for factor in reads}
        self.folded = [pair.let_go() for pair in pairs]
        self._pairs_changed()

    def keep_live(self) -> None:
        """Keep the live pair as a parameter set of its own, named by its stage; terms stay, and the method has them."""
        if self.terms:
            return
        pair = self.pair()
        self.kept[pair.stage] = pair

    @torch.no_grad()
    def restore(
        self,
        folded: Sequence[Pair],
        kept: Mapping[str, Pair],
        live: str | None,
        *,
        sums: Mapping[str, Tensor] | None = None,
        dense: Sequence[str] = (),
    ) -> None:
        """Put the adapters into the state that a stage committed.

        ``sums`` gives the sum of past updates of a target as it was committed; of other targets it is added up again,
        in the order of ``folded``. ``dense`` names the stages that folded without factors.
        """
        for target, accumulator in self.past.items():
            device = accumulator.weight.device
            total = sums[target].to(device) if sums and target in sums else None
            if total is None:
                for pair in folded:
                    update = pair.update(target, device)
                    total = update if total is None else total + update
            accumulator.set(total)
        self.folded, self.dense, self.kept = list(folded), list(dense), dict(kept)
        self._pairs_changed()
        self._grams.clear()
        self.show(self.kept[live] if live else None)

    def _pairs_changed(self) -> None:
        """What was made of the folded pairs is made anew when it is asked for."""
        self._past_factors.clear()
        if self.past_dropout:
            self.past_dropout.hold(self.folded)

    # Factors for methods.

    def groups(self) -> list[FactorGroup]:
        """The live pair, and the folded ones, in groups of equal shape. Terms have no such factors."""
        return [] if self.terms else [self._group(targets) for targets in self._groups()]

    def _groups(self) -> list[tuple[str, ...]]:
        by_shape: dict[tuple[torch.Size, torch.Size], list[str]] = {}
        for target, layer in self.layers.items():
            shape = (layer.lora_A[NAME].weight.shape, layer.lora_B[NAME].weight.shape)
            by_shape.setdefault(shape, []).append(target)
        return [tuple(targets) for targets in by_shape.values()]

    def _group(self, targets: tuple[str, ...]) -> FactorGroup:
        A = torch.stack([self.layers[target].lora_A[NAME].weight for target in targets])
        B = torch.stack([self.layers[target].lora_B[NAME].weight for target in targets])
        return FactorGroup(targets, A, B, self._past(targets) if self.folded else None)

    def _past(self, targets: tuple[str, ...]) -> PastFactors:
        if targets not in self._past_factors:
            device = self.past[targets[0]].weight.device
            self._past_factors[targets] = PastFactors(targets, tuple(self.folded), device, self._grams.get(targets, {}))
        return self._past_factors[targets]


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)


def target_shapes(model: nn.Module, config: AdapterConfig) -> list[tuple[int, int]]:
    """(m, n), out by in, of every layer that would get a pair, of a model that may be on the meta device.

    Raises:
        UserError: as ``check_targets``.
    """
    targets = config.target_modules or default_targets(model)
    check_targets(model, targets)
    layers = [module for name, module in model.named_modules() if _is_target(name, targets)]
    weights: list[Any] = [layer.weight.T if is_transposed(layer) else layer.weight for layer in layers]
    return [(weight.shape[0], weight.shape[1]) for weight in weights]


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
        UserError: it names none, something else, or one whose weight is another layer's too.
    """
    modules = dict(model.named_modules())
    endings = {name.rsplit(".", 1)[-1] for name, m in modules.items() if is_linear(m)}
    owners: dict[int, set[str]] = {}  # of each weight, tied ones counted at every place
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    for target in targets:
        found = {name: module for name, module in modules.items() if _is_target(name, [target])}
        if not found:
            hint = did_you_mean(target, endings) or f" (there are {', '.join(sorted(endings))})"
            raise UserError(f"adapter.target_modules: the model has no layer '{target}'{hint}")
        if not all(is_linear(module) for module in found.values()):
            raise UserError(f"adapter.target_modules: '{target}' is no linear layer")
        for name, module in found.items():
            for other in sorted(owners.get(id(module.weight), set()) - {name}):
                raise UserError(
                    f"adapter.target_modules: '{target}' shares its weight with {other}, which a folded update would "
                    "change too; leave it out"
                )


def _is_target(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def is_linear(module: nn.Module) -> bool:
    """Whether a layer is a matrix product."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """GPT-2's Conv1D: a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"
