"""A stage's pair that begins from the weight, from what its layers read, or from what 4 bits lost (``adapter.init``).

olora, pissa and corda take a part ``s·B0 A0`` of the weight W, as it stands with all past updates in it, and the weight
is computed with without it: what the stage learns is ``ΔW = s (B A − B0 A0)``. eva and corda read ``adapter.init_rows``
of the stage's rows. loftq takes nothing: beside a base in 4 bits the pair begins as the best of its rank for what that
lost, which is part of what it leaves, so that pairs after it begin as usual. A pair that trains on from stage to stage
begins once, at the first. Drawn pairs (gaussian, orthogonal) are the kind's own; what does not fit them
is refused here too, as is all that only a pair can have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cl_runner.adapters.kind import rank_at
from cl_runner.config.schema import AdapterConfig, RunConfig
from cl_runner.errors import UserError
from cl_runner.methods.protocol import Method, Source, State
from cl_runner.methods.shared.moments import input_sums
from cl_runner.methods.shared.tensors import under, within
from cl_runner.registry import KINDS
from cl_runner.training.options.protocol import Option, Shapes

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.training.stage import StageRun

OF_A_PAIR = ("init", "rslora", "lr_ratio_B")
# What a pair may begin from, and a way of each.
WAYS = {
    "the weight (olora, pissa, corda)": "pissa",
    "what its layers read (eva)": "eva",
    "what 4 bits lost (loftq)": "loftq",
}


class Initialisation(Option):
    """Of every method that trains the kind's pair; one that sets A itself, or goes by B A, refuses what it cannot."""

    name = "initialise"
    title = (
        "a pair that begins from the weight (olora, pissa, corda), from inputs (eva, corda), or 4 bits' loss (loftq)"
    )
    setting = "adapter.init=pissa"
    paper = "2406.01775 (OLoRA), 2404.02948 (PiSSA), 2406.05223 (CorDA), 2410.07170 (EVA), 2310.08659 (LoftQ)"
    by_shape = True

    def __init__(self) -> None:
        self.began: dict[str, Tensor] = {}  # A0 and B0, where they are a part of the weight
        self.spans: dict[str, int] = {}  # eva: target → directions that its inputs have, where that is less than r
        self.lost: dict[str, float] = {}  # loftq: norms over all targets, of what 4 bits lost and of what is left of it

    def takes(self, method: type[Method]) -> bool:
        return not method.only_kind and method.past_as != "other"

    def offered(self, method: type[Method]) -> tuple[str, str] | None:
        """Those of its ways that the method, with its defaults, does not refuse."""
        ways = [way for way, init in WAYS.items() if self.takes(method) and _goes_with(method, init)]
        return (f"adapter.init={WAYS[ways[0]]}", f"a pair that begins from {', '.join(ways)}") if ways else None

    def wanted(self, config: RunConfig, method: Method) -> bool:
        return config.adapter.borrows or config.adapter.reads_inputs or config.adapter.init == "loftq"

    def check(self, config: RunConfig, method: Method, shapes: Shapes | None = None) -> None:
        adapter = config.adapter
        if method.full or not self.takes(type(method)) or "pair" not in KINDS.get(adapter.kind).offers:
            trains = "all weights" if method.full else "no pair of the adapter kind's own"
            for name in OF_A_PAIR:
                if getattr(adapter, name) != AdapterConfig.model_fields[name].default:
                    raise UserError(f"adapter.{name}: {method.name} trains {trains}; leave it out")
        _check_settings(adapter)
        for shape in (shapes or ()) if self.wanted(config, method) and adapter.r != "auto" else ():
            r, most = rank_at(adapter, shape), shape[1] if adapter.init == "eva" else min(shape)
            if r > most:
                raise UserError(
                    f"adapter.r: adapter.init={adapter.init} takes {r} directions of each layer, and one has {most}; "
                    "set it to that or less"
                )

    def notes(self, stages: Sequence[tuple[RunConfig, Method, int]]) -> list[str]:
        adapter = stages[0][0].adapter
        if not adapter.borrows or not adapter.dropout:
            return []
        return [
            f"adapter.init={adapter.init}: the pair holds a part of the weight, and while it trains adapter.dropout "
            f"({adapter.dropout:g}) drops of that too; set it to 0 to begin as the weight answers"
        ]

    def begin(self, stage: StageRun, own: Source) -> None:
        self.began, self.spans, self.lost = {}, {}, {}
        if stage.start is not None:
            return  # it trains on
        adapter = stage.config.adapter
        if adapter.init == "loftq":
            self._of_loss(stage)
            return
        moments = dict(_moments(stage, own)) if adapter.reads_inputs else {}
        if adapter.init == "eva":
            names = stage.named("A")
            stage.write({names[target]: A for target, A in self._of_inputs(stage, moments)})
            return
        pairs = dict(_of_weight(stage, moments))
        A, B = ({target: factors[i] for target, factors in pairs.items()} for i in (0, 1))
        self._begin_from_weight(stage, A, B)

    def _begin_from_weight(self, stage: StageRun, A: Mapping[str, Tensor], B: Mapping[str, Tensor]) -> None:
        stage.adapters.begin_from_weight(A, B)
        self.began = under("A", A) | under("B", B)

    def _of_loss(self, stage: StageRun) -> None:
        """The pair's s·B A is the best of its rank for what 4 bits lost of each layer. *Collective*; rank 0 reads it.

        Layers that are not in 4 bits, or that hold what an earlier pair learned of it, begin as usual.
        """
        import torch

        from cl_runner.adapters.initialise import singular_part
        from cl_runner.adapters.quantized import is_quantized
        from cl_runner.models.base import before_quantising

        names, parameters = {role: stage.named(role) for role in ("A", "B")}, stage.all_parameters()
        within_4_bits = [t for t, past in stage.adapters.past.items() if is_quantized(past.layer) and past.empty]
        values: dict[str, Tensor] = {}
        lost = left = 0.0
        whole = before_quantising(stage.config.model, stage.device, within_4_bits if stage.rank == 0 else [])
        for target in within_4_bits:
            A, B = (torch.zeros_like(parameters[names[role][target]]) for role in ("A", "B"))
            if stage.rank == 0:
                _, W = next(whole)
                loss = W.to(stage.device) - stage.whole_weight(target)
                A, B = singular_part(loss, len(A), stage.scale_of(target))
                lost += float(loss.square().sum())
                left += float((loss - stage.scale_of(target) * B @ A).square().sum())
            values |= {names["A"][target]: stage.broadcast(A), names["B"][target]: stage.broadcast(B)}
        stage.write(values)
        if within_4_bits:
            self.lost = {"lost": lost**0.5, "left": left**0.5}

    def _of_inputs(self, stage: StageRun, moments: Mapping[tuple[str, ...], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Each target with its A (r, n): layers that share an input begin alike. *Collective*."""
        from cl_runner.adapters.initialise import leading_inputs

        ranks, rng = _ranks(stage), stage.rng("beside inputs")
        for targets, moment in moments.items():
            A, found = leading_inputs(moment, max(ranks[target] for target in targets), rng)
            A = stage.broadcast(A)  # another library on another rank may turn directions of equal energy
            self.spans.update({target: found for target in targets if found < ranks[target]})
            yield from ((target, A[: ranks[target]]) for target in targets)

    def about(self) -> dict[str, Any]:
        return {
            **({"init_spans": self.spans} if self.spans else {}),
            **({"init_residual": self.lost} if self.lost else {}),
        }

    def said(self) -> str:
        if self.lost:
            lost, left = self.lost["lost"], self.lost["left"]
            return (
                f"adapter.init=loftq: of what 4 bits lost (norm {lost:.3g}) the pairs begin without {left / lost:.0%}"
            )
        if not self.spans:
            return ""
        return (
            f"adapter.init=eva: the inputs of {len(self.spans)} layers span fewer directions than their rank (of one "
            f"{min(self.spans.values())}); the other rows of A were drawn"
        )

    def step_state(self) -> State:
        return State(dict(self.began), {"spans": self.spans, "lost": self.lost})

    def load_step_state(self, stage: StageRun, state: State) -> None:
        self.began, self.spans, self.lost = {}, state.json["spans"], state.json.get("lost", {})
        if state.tensors:
            self._begin_from_weight(stage, within("A", state.tensors), within("B", state.tensors))


def _goes_with(method: type[Method], init: str) -> bool:
    """Whether a method with its defaults takes the initialisation."""
    made = method(method.Config())
    made.plan(["one", "two"])
    try:
        made.check(RunConfig(adapter=AdapterConfig.model_validate({"init": init})))
    except UserError as error:
        return not str(error).startswith("adapter.init")
    return True


def _check_settings(adapter: AdapterConfig) -> None:
    """Refuse what the beginnings cannot do with each other's settings, or without their own. Raises UserError."""
    if adapter.init == "corda" and adapter.corda is None:
        raise UserError("adapter.init=corda: set adapter.corda to ipm (the largest components) or kpm (the smallest)")
    if adapter.init != "corda" and adapter.corda is not None:
        raise UserError(f"adapter.corda: adapter.init is {adapter.init}; leave it out, or set adapter.init=corda")
    for name, r in (("adapter.r", adapter.r), *(("adapter.rank_pattern", r) for r in adapter.rank_pattern.values())):
        if adapter.init == "orthogonal" and (r == "auto" or r % 2):
            raise UserError(
                f"adapter.init=orthogonal: half of the rank is A's, half B's, and {name} is {r}; set an even one"
            )


def _ranks(stage: StageRun) -> dict[str, int]:
    """Target → rank of its pair."""
    parameters = stage.all_parameters()
    return {target: len(parameters[name]) for target, name in stage.named("A").items()}


def _moments(stage: StageRun, own: Source) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Targets that share an input, with the mean of x xᵀ over the tokens of some of the stage's rows. *Collective*.

    Raises:
        UserError: there are fewer tokens than the pair has directions.
    """
    import torch

    adapter, ranks = stage.config.adapter, _ranks(stage)
    drawn = torch.randperm(len(own.examples), generator=stage.rng("inputs"))[: adapter.init_rows]
    rows = own.take(drawn.sort().values.tolist())
    for targets, total, count in input_sums(stage, rows):
        r = max(ranks[target] for target in targets)
        if count < r:
            raise UserError(
                f"adapter.init={adapter.init}: {targets[0]} reads {count} tokens in {len(rows.examples)} rows of "
                f"{stage.plan.name} (adapter.init_rows {adapter.init_rows}), and its rank is {r}; give it more rows, "
                "or set adapter.r lower"
            )
        yield targets, total.div_(count)


def _of_weight(
    stage: StageRun, moments: Mapping[tuple[str, ...], Tensor]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Each target with the A (r, n) and B (m, r) that it takes of its weight. *Collective*."""
    from cl_runner.adapters.initialise import context_part, qr_part, singular_part

    adapter = stage.config.adapter
    of_target = {target: moment for targets, moment in moments.items() for target in targets}
    for target, rank in _ranks(stage).items():
        W, scale = stage.whole_weight(target), stage.scale_of(target)
        if adapter.init == "olora":
            A, B = qr_part(W, rank)
        elif adapter.init == "pissa":
            A, B = singular_part(W, rank, scale)
        else:
            A, B = context_part(W, of_target[target], rank, scale, largest=adapter.corda == "ipm")
        yield target, (stage.broadcast(A), stage.broadcast(B))  # as above
