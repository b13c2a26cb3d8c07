"""The LoRA adapters of a run: the live pair of every target layer (PEFT's own), past ones folded or kept.

Arithmetic that has to be the same to the bit wherever it happens stands here once: an update is ``(s·B) A`` in fp32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.adapters.base import Adapters, Held
from cl_runner.adapters.folding import Accumulator
from cl_runner.adapters.pairs import FactorGroup, Fresh, Pair, PastFactors, fresh_pair
from cl_runner.adapters.past_dropout import PastDropout
from cl_runner.adapters.saved import Saved
from cl_runner.adapters.targets import check_targets, default_targets, is_target, is_transposed
from cl_runner.adapters.terms import Term, Terms
from cl_runner.config.schema import AdapterConfig
from cl_runner.imports import light_imports
from cl_runner.maths.directions import norm

NAME = "default"


class Layers(Adapters):
    """The adapters of one model.

    Args:
        model: the frozen base; it is wrapped, reach the whole through ``model`` afterwards.
        config: rank, alpha, dropout, targets.
        name_or_path, revision: what a saved adapter names as its base.
        encoder_decoder: for PEFT's task type.
        compute: precision of the forward, where autocast makes it another than the base's.
        fresh, trains: how the kind begins a pair, and which of its factors train.

    Raises:
        UserError: a target that the model does not have, that is no linear layer, or that shares its weight.
    """

    past_dropout: PastDropout | None = None  # where past pairs read the dropped-out input too
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
        fresh: Fresh = fresh_pair,
        trains: Sequence[str] = ("A", "B"),
    ) -> None:
        with light_imports():
            from peft import LoraConfig, get_peft_model
            from peft.tuners.lora import LoraLayer

        self._fresh, self._trains = fresh, tuple(trains)
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
            fan_in_fan_out=any(is_transposed(m) for name, m in model.named_modules() if is_target(name, targets)),
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
        self.start = None
        self._past_factors: dict[tuple[str, ...], PastFactors] = {}
        self._grams: dict[tuple[str, ...], dict[str, Tensor]] = {}  # of the pairs that were let go of
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    @property
    def scale(self) -> float:
        """s of the live pair, alpha / r."""
        return self._alpha / self.rank

    # The live pair.

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → parameter of the live pair, ``<target>.lora_A`` and ``<target>.lora_B``, fp32; and of the terms."""
        return {**(self.terms.parameters() if self.terms else {}), **self._of_pair()}

    def _paired(self) -> list[str]:
        """The targets with the pair in them."""
        if self.terms is None:
            return list(self.layers)
        return [target for target in self.layers if target not in self.terms.of] if self.terms.pair else []

    def _of_pair(self) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for target in self._paired():
            found[f"{target}.lora_A"] = self.layers[target].lora_A[NAME].weight
            found[f"{target}.lora_B"] = self.layers[target].lora_B[NAME].weight
        return found

    def begin(self, stage: str, generator: torch.Generator | None = None, rank: int | None = None) -> None:
        """A new pair for ``stage``, as its kind begins one."""
        self.start = None
        self._resize(rank or self.rank)
        for layer in self.layers.values():
            A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            fresh_A, fresh_B = self._fresh(B.shape[0], A.shape[1], self.rank, generator)
            A.data, B.data = fresh_A.to(A.device), fresh_B.to(B.device)
        self._live(stage)
        self.train(True)

    def train(self, on: bool) -> None:
        """Whether the parameters ask for gradients, but for those that the kind freezes."""
        roles = self.roles()
        for name, parameter in self.parameters().items():
            of_pair = not self.terms or (name in roles and roles[name][0] not in self.terms.of)
            frozen = of_pair and roles[name][1] not in self._trains
            parameter.requires_grad_(on and not frozen)

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
        """Terms of ``stage`` in the place of the pair; all their parameters ask for gradients.

        ``shared`` are parameters that several terms hold, or none of them (a router's). Targets without a term have the
        pair, where one was begun.
        """
        beside = self.pair() if self.live is not None and not self.terms and len(terms) < len(self.layers) else None
        self.show(Terms(stage, dict(terms), dict(shared or {}), beside))
        self.train(True)

    def _live(self, stage: str | None, terms: Terms | None = None) -> None:
        """Whose pair the layers hold. Without one they skip it: its product would be zero, at a sixth of a forward."""
        self.live = stage
        for target, layer in self.layers.items():
            with_pair = stage is not None and (terms is None or (terms.pair is not None and target not in terms.of))
            pair = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            trains = [parameter.requires_grad for parameter in pair]
            layer.enable_adapters(with_pair)  # PEFT lets what it enables ask for gradients
            for parameter, before in zip(pair, trains, strict=True):
                parameter.requires_grad_(before and (with_pair or terms is None))
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

    def roles(self) -> dict[str, tuple[str, str]]:
        found = {f"{target}.lora_{role}": (target, role) for target in self._paired() for role in "AB"}
        for target, term in self.terms.of.items() if self.terms else ():
            found.update({f"{target}.{name}": (target, name) for name, _ in term.named_parameters()})
        return {name: found[name] for name in self.parameters() if name in found}

    def pair(self, stage: str | None = None) -> Pair:
        """A copy of the live pair, or of the factors of terms that all have some of one rank."""
        stage = stage or self.live
        assert stage is not None, "nothing is live"
        if self.terms and not self.terms.pair:
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
            {target: _copy(self.layers[target].lora_A[NAME].weight) for target in self._paired()},
            {target: _copy(self.layers[target].lora_B[NAME].weight) for target in self._paired()},
        )

    def live_update(self) -> dict[str, Tensor]:
        """ΔW of the live pair, or of the term, for every target, (m, n) fp32."""
        found = {target: term.update().detach() for target, term in self.terms.of.items()} if self.terms else {}
        if len(found) < len(self.layers):
            pair = self.pair()
            found |= {target: pair.update(target, self.past[target].weight.device) for target in pair.A}
        return found

    def shown(self) -> Pair | Terms | None:
        """What the layers hold, for ``show`` to put it back."""
        if self.terms:
            return replace(self.terms, pair=self.pair()) if self.terms.pair else self.terms
        return self.pair() if self.live is not None else None

    @torch.no_grad()
    def update_norm(self) -> float | None:
        """‖ΔW‖_F of what the stage has learned, over all targets, of a pair from r × r Gram matrices.

        Of a pair that trains on it is what changed since the stage began. None where nothing is live.
        """
        if self.live is None:
            return None
        of_terms = sum(float(term.own().square().sum()) for term in self.terms.of.values()) if self.terms else 0.0
        if not self._paired():
            return math.sqrt(of_terms)
        square = 0.0
        for target in self._paired():
            A, B = self.layers[target].lora_A[NAME].weight, self.layers[target].lora_B[NAME].weight
            if self.start is not None:
                A = torch.cat([A, self.start.A[target].to(A)])
                B = torch.cat([B, -self.start.B[target].to(B)], dim=1)
            square += float(norm((A, B))) ** 2
        if not of_terms:
            return self.scale * math.sqrt(square)
        return math.sqrt(self.scale**2 * square + of_terms)

    @torch.no_grad()
    def show(self, pair: Pair | Terms | None) -> None:
        """Put a pair or terms into the layers to answer with; None answers without any."""
        terms = pair if isinstance(pair, Terms) else None
        values = terms.pair if terms else pair
        if isinstance(values, Pair):
            self._resize(values.rank)
        for target, layer in self.layers.items():
            A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            if isinstance(values, Pair) and target in values.A:
                A.data.copy_(values.A[target])
                B.data.copy_(values.B[target])
            elif pair is None:
                B.data.zero_()
        self._live(pair.stage if pair else None, terms)

    # Past pairs.

    @torch.no_grad()
    def fold(self, pair: Pair) -> None:
        """Add a pair to the sum of past updates of every target, in the order of the calls."""
        for target, accumulator in self.past.items():
            if target in pair.A:
                accumulator.add(pair.update(target, accumulator.weight.device))
        self.folded.append(pair)
        self._pairs_changed()

    def fold_live(self) -> None:
        """Fold the live pair as factors, terms beside it densely; what answers from now on is the weight alone."""
        pair = self.pair()
        beside = self.terms.of if self.terms and self.terms.pair else {}
        update = {target: term.update() for target, term in beside.items()}
        self.show(None)
        self.fold(pair)
        if update:
            self.fold_dense(pair.stage, update)

    def fold_dense(self, stage: str, update: Mapping[str, Tensor]) -> None:
        self.show(None)
        for target, accumulator in self.past.items():
            if target in update:
                accumulator.add(update[target].detach().to(accumulator.weight.device, torch.float32))
        self.dense.append(stage)

    @torch.no_grad()
    def replace(self, stage: str, total: Mapping[str, Tensor]) -> None:
        """The sum of past updates becomes exactly ``total``, by target (m, n); there are no past pairs any more."""
        self.show(None)
        for target, accumulator in self.past.items():
            accumulator.set(total[target].detach().to(accumulator.weight.device, torch.float32))
        self.folded, self.dense = [], [*self.dense, stage]
        self._grams.clear()
        self._pairs_changed()

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
        assert not (self.terms and self.terms.pair), "a pair beside terms is folded, or all of it is the method's terms"
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
        sums: Mapping[str, Tensor | None] | None = None,
        dense: Sequence[str] = (),
    ) -> None:
        """Put the adapters into the state that a stage committed.

        ``sums`` gives the sum of past updates of a target as it was committed; of other targets it is added up again,
        in the order of ``folded``. ``dense`` names the stages that folded without factors.
        """
        for target, accumulator in self.past.items():
            device = accumulator.weight.device
            given = sums.get(target) if sums else None
            total = None if given is None else given.to(device)
            for pair in folded if total is None else ():
                update = pair.update(target, device)
                total = update if total is None else total + update
            accumulator.set(total)
        self.folded, self.dense, self.kept = list(folded), list(dense), dict(kept)
        self._pairs_changed()
        self._grams.clear()
        self.show(self.kept[live] if live else None)

    # To disk and back.

    def held(self, copied: bool = False) -> Held:
        sums = {target: accumulator.sum for target, accumulator in self.past.items()}
        return Held(tuple(self.folded), tuple(self.dense), dict(self.kept), self.live, self.shown(), sums)

    def folder_bytes(self, pairs: int, rank: int, dense: bool) -> int:
        total = 0
        for target, past in self.past.items():
            m, n = past.base.shape
            whole = dense or self.stored_whole(target, pairs * rank, pairs)
            total += (n + rank if whole else pairs * rank) * (m + n)  # an identity and the sum, its own pair beside it
        return 4 * total

    def save(self, where: Path, stage: str, held: Held) -> tuple[Saved, dict[str, Tensor]]:
        from cl_runner.adapters import peft_folder

        saved = peft_folder.save_adapter(where, self, held)
        return saved, peft_folder.beside(saved, stage, held)

    def own(self, where: Path, stage: str, saved: Saved, tensors: Mapping[str, Tensor]) -> Pair:
        from cl_runner.adapters import peft_folder

        return peft_folder.own_pair(where, stage, saved, tensors)

    def load(
        self,
        where: Path,
        stage: str,
        saved: Saved,
        tensors: Mapping[str, Tensor],
        live: str | None,
        earlier: Callable[[str], Pair],
        kept: Mapping[str, Any],
    ) -> Held:
        from cl_runner.adapters import peft_folder

        return peft_folder.load_adapter(where, stage, saved, tensors, live, earlier, kept)

    def _pairs_changed(self) -> None:
        """What was made of the folded pairs is made anew when it is asked for."""
        self._past_factors.clear()
        if self.past_dropout:
            self.past_dropout.hold(self.folded)

    # Factors for methods.

    def groups(self) -> list[FactorGroup]:
        """The live pair, and the folded ones, in groups of equal shape. Terms have no such factors."""
        return [self._group(targets) for targets in self._groups()]

    def _groups(self) -> list[tuple[str, ...]]:
        by_shape: dict[tuple[torch.Size, torch.Size], list[str]] = {}
        for target in self._paired():
            layer = self.layers[target]
            shape = (layer.lora_A[NAME].weight.shape, layer.lora_B[NAME].weight.shape)
            by_shape.setdefault(shape, []).append(target)
        return [tuple(targets) for targets in by_shape.values()]

    def _group(self, targets: tuple[str, ...]) -> FactorGroup:
        A = torch.stack([self.layers[target].lora_A[NAME].weight for target in targets])
        B = torch.stack([self.layers[target].lora_B[NAME].weight for target in targets])
        past = self._past(targets) if self.folded else None
        return FactorGroup(targets, A, B, past, tuple(self.past[target] for target in targets))

    def _past(self, targets: tuple[str, ...]) -> PastFactors:
        if targets not in self._past_factors:
            device = self.past[targets[0]].weight.device
            pairs = tuple(pair for pair in self.folded if not pair.held or targets[0] in pair.A)
            self._past_factors[targets] = PastFactors(targets, pairs, device, self._grams.get(targets, {}))
        return self._past_factors[targets]


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)
