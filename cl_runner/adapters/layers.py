"""The LoRA adapters of a run: PEFT's own pair in every target layer, or a method's own terms in its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.adapters import patterns
from cl_runner.adapters.base import Held
from cl_runner.adapters.beside import Beside, copied, quiet
from cl_runner.adapters.kind import NAME
from cl_runner.adapters.pairs import Fresh, Pair, fresh_pair
from cl_runner.adapters.past_dropout import PastDropout
from cl_runner.adapters.saved import Saved
from cl_runner.adapters.target_sets import chosen_targets
from cl_runner.adapters.targets import is_target, is_transposed, target_shapes
from cl_runner.adapters.terms import Term, Terms
from cl_runner.config.schema import AdapterConfig
from cl_runner.imports import light_imports
from cl_runner.maths.directions import norm


class Layers(Beside):
    """The adapters of one model.

    Args:
        model: the frozen base; it is wrapped, reach the whole through ``model`` afterwards.
        config: rank, alpha, dropout, targets.
        name_or_path, revision: what a saved adapter names as its base.
        encoder_decoder: for PEFT's task type.
        compute: precision of the forward, where autocast makes it another than the base's.
        fresh, trains: how the kind begins a pair, and which of its factors train.

    Raises:
        UserError: a target that the model does not have, that is no linear layer, or that shares its weight; a pattern
            that decides for no target.
    """

    past_dropout: PastDropout | None = None  # where past pairs read the dropped-out input too
    began: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # A0, B0 by target: what the live pair has of the weight
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
        targets = chosen_targets(model, config.target_modules)
        names = list(target_shapes(model, targets))
        self.target_modules = list(targets)
        self.rank, self._config = config.largest, config  # of the live pair; a stage may begin with another rank
        self.ranks, self._alphas = patterns.ranks(config, names), patterns.alphas(config, names)
        peft_config = LoraConfig(
            r=config.largest,
            lora_alpha=config.alpha,
            use_rslora=config.rslora,
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=dict(config.alpha_pattern),
            lora_dropout=config.dropout,
            target_modules=list(targets),
            task_type=self.task_type,
            fan_in_fan_out=any(is_transposed(m) for name, m in model.named_modules() if is_target(name, targets)),
            bias="none",
        )
        with quiet():
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
        self._stand_beside(self.layers, compute)
        self._borrow({}, {})
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    @property
    def scale(self) -> float:
        """s of the live pair, alpha / r, or alpha / √r."""
        return self._config.scale(self.rank)

    def scale_of(self, target: str) -> float:
        return self._config.scale(self.rank_of(target), self._alphas.get(target))

    # The live pair.

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → parameter of the live pair, ``<target>.lora_A`` and ``<target>.lora_B``, fp32; and of the terms."""
        return {**(self.terms.parameters() if self.terms else {}), **self._of_pair()}

    def set_size(self) -> int:
        return super().set_size() + sum(part.numel() for of_targets in self.began for part in of_targets.values())

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

    def _factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        pairs = {target: self.layers[target] for target in self._paired()}
        return {target: (layer.lora_A[NAME].weight, layer.lora_B[NAME].weight) for target, layer in pairs.items()}

    def begin(self, stage: str, generator: torch.Generator | None = None, rank: int | None = None) -> None:
        """A new pair for ``stage``, as its kind begins one."""
        self.start = None
        self._borrow({}, {})
        self._resize(rank or self.rank)
        for target, layer in self.layers.items():
            A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            fresh_A, fresh_B = self._fresh(B.shape[0], A.shape[1], self.rank_of(target), generator)
            A.data, B.data = fresh_A.to(A.device), fresh_B.to(B.device)
        self._live(stage)
        self.train(True)

    @torch.no_grad()
    def begin_from_weight(self, A: Mapping[str, Tensor], B: Mapping[str, Tensor]) -> None:
        for target, layer in self.layers.items():
            layer.lora_A[NAME].weight.data.copy_(A[target])
            layer.lora_B[NAME].weight.data.copy_(B[target])
        self._borrow({target: copied(A[target]) for target in A}, {target: copied(B[target]) for target in B})

    @torch.no_grad()
    def _borrow(self, A0: Mapping[str, Tensor], B0: Mapping[str, Tensor]) -> None:
        """From now on the weight is without s·B0 A0, which the live pair has in its place; without nothing where both
        are empty."""
        self.began = A0, B0
        scales = {target: self.scale_of(target) for target in A0}
        lender = Pair("", self.rank, self.scale, {}, {}, scales=scales, A0=A0, B0=B0)
        for target, past in self.past.items():
            part = lender.lent(target, past.weight.device)
            if part is None:
                past.give_back()
            else:
                past.lend(part)

    def train(self, on: bool) -> None:
        """Whether the parameters ask for gradients, but for those that the kind freezes."""
        roles = self.roles()
        for name, parameter in self.parameters().items():
            of_pair = not self.terms or (name in roles and roles[name][0] not in self.terms.of)
            frozen = of_pair and roles[name][1] not in self._trains
            parameter.requires_grad_(on and not frozen)

    def _resize(self, rank: int) -> None:
        """Give the live pair another rank, where no pattern says it; its values are undefined then."""
        if rank == self.rank:
            return
        self.rank = rank
        for target, layer in self.layers.items():
            own = self.rank_of(target)
            A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            A.data, B.data = A.data.new_empty(own, A.shape[1]), B.data.new_empty(B.shape[0], own)
            A.grad = B.grad = None
            layer.r[NAME], layer.scaling[NAME] = own, self.scale_of(target)

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
            x = inputs[0]
            if x.dim() == 2 and self.condition:  # all tokens end to end, as OPT's MLP reads them
                x = x.reshape(len(next(iter(self.condition.values()))), -1, x.shape[-1])
            addition: Tensor = term(x, self.condition)
            return output + addition.to(output.dtype).reshape(output.shape)

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

    def learning_rates(self) -> dict[str, float]:
        ratio = self._config.lr_ratio_B
        return dict.fromkeys(self.named("B").values(), ratio) if ratio != 1 else {}

    def pair(self, stage: str | None = None) -> Pair:
        """A copy of the live pair, or of the factors of terms that all have some."""
        stage = stage or self.live
        assert stage is not None, "nothing is live"
        if self.terms and not self.terms.pair:
            found = {target: term.factors() for target, term in self.terms.of.items()}
            A = {target: copied(factors[0]) for target, factors in found.items() if factors}
            B = {target: copied(factors[1]) for target, factors in found.items() if factors}
            assert len(A) == len(found), "a term without factors has no pair"
            rank = len(next(iter(A.values())))
            return Pair(stage, rank, 1.0, A, B, {t: len(rows) for t, rows in A.items() if len(rows) != rank})
        paired = self._paired()
        return Pair(
            stage,
            self.rank,
            self.scale,
            {target: copied(self.layers[target].lora_A[NAME].weight) for target in paired},
            {target: copied(self.layers[target].lora_B[NAME].weight) for target in paired},
            {target: rank for target, rank in self.ranks.items() if target in paired},
            {target: s for target in paired if (s := self.scale_of(target)) != self.scale},
            *self.began,
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

        Of a pair that trains on, or that began with a part of the weight, it is what changed since the stage began.
        None where nothing is live.
        """
        if self.live is None:
            return None
        of_terms = sum(float(term.own().square().sum()) for term in self.terms.of.values()) if self.terms else 0.0
        if not self._paired():
            return math.sqrt(of_terms)
        square = 0.0
        A0, B0 = (self.start.A, self.start.B) if self.start else self.began
        for target in self._paired():
            A, B = self.layers[target].lora_A[NAME].weight, self.layers[target].lora_B[NAME].weight
            if target in A0:
                A = torch.cat([A, A0[target].to(A)])
                B = torch.cat([B, -B0[target].to(B)], dim=1)
            square += (self.scale_of(target) / self.scale) ** 2 * float(norm((A, B))) ** 2
        if not of_terms:
            return self.scale * math.sqrt(square)
        return math.sqrt(self.scale**2 * square + of_terms)

    @torch.no_grad()
    def show(self, pair: Pair | Terms | None) -> None:
        """Put a pair or terms into the layers to answer with; None answers without any."""
        terms = pair if isinstance(pair, Terms) else None
        values = terms.pair if terms else pair
        self._borrow({}, {})
        if isinstance(values, Pair):
            self._resize(values.rank)
            self._borrow(values.A0, values.B0)
        for target, layer in self.layers.items():
            A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            if isinstance(values, Pair) and target in values.A:
                A.data.copy_(values.A[target])
                B.data.copy_(values.B[target])
            elif pair is None:
                B.data.zero_()
        self._live(pair.stage if pair else None, terms)

    # Past pairs.

    def fold_live(self) -> None:
        """Fold the live pair as factors, terms beside it densely; what answers from now on is the weight alone."""
        pair = self.pair()
        beside = self.terms.of if self.terms and self.terms.pair else {}
        update = {target: term.update() for target, term in beside.items()}
        self.show(None)
        self.fold(pair)
        if update:
            self.fold_dense(pair.stage, update)

    def keep_live(self) -> None:
        """Keep the live pair as a parameter set of its own, named by its stage; terms stay, and the method has them."""
        assert not (self.terms and self.terms.pair), "a pair beside terms is folded, or all of it is the method's terms"
        if self.terms:
            return
        pair = self.pair()
        self.kept[pair.stage] = pair

    def _pairs_changed(self) -> None:
        super()._pairs_changed()
        if self.past_dropout:
            self.past_dropout.hold(self.folded)

    def _reads_all_past(self) -> bool:
        return self.past_dropout is not None

    # To disk and back.

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
