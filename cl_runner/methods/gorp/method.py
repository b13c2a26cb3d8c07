"""GORP: LoRA on some layers, full-rank changes on others, both off the gradients of past tasks (arXiv 2507.02503)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from cl_runner.adapters.kind import Fold, Need, rank_at
from cl_runner.config.schema import RunConfig, Section
from cl_runner.methods.gorp.settings import Settings, in_full
from cl_runner.methods.protocol import Method, State
from cl_runner.methods.shared.limits import refuse_by_task, refuse_falling, refuse_too_large, size
from cl_runner.methods.shared.rates import times
from cl_runner.methods.shared.tensors import of_rank_0, under, within

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.engine.optim import ParameterGroup
    from cl_runner.methods.gorp.moving import Frame
    from cl_runner.methods.protocol import Stage


class GORP(Method):
    """Every tensor that trains has a basis S, which grows at a task's end by what its first moment is made of.

    LoRA's S lies on the long side (ours): the inputs of A, the outputs of B. Its gradients are off S; a step is too
    under sgd alone, as Adam divides each entry by its own size. A full-rank change E has Adam in a frame of k × k; with
    ``frame: full`` (ours) the frame is off S, and so is every step. What S holds of a moment counts towards ε (ours).
    Weight decay shrinks E, not W0. The paper's "λ 0.05" has no role here: which it has there is not known.
    """

    class Config(Settings):
        """Settings of GORP."""

    name = "gorp"
    title = "GORP: LoRA and full-rank changes, off the gradients of past tasks"
    equation = (
        "g_A ← g_A (I − S Sᵀ),  g_B ← (I − S Sᵀ) g_B;  E ← E − lr·α·U Adam(Uᵀ g V) Vᵀ,  U, V: top-k singular vectors "
        "of g off S, every 10 steps;  S ← [S, top of Adam's first moment] at the end"
    )
    paper = "2507.02503 (Continual Gradient Low-Rank Projection Fine-Tuning for LLMs)"
    carried = "past updates, folded into the weight; S"
    growth = "S: up to r columns a task for A and for B, k for E, never more than a side"
    trains = "a LoRA pair on some target layers, ΔW itself on others (method.full)"
    factors = "A (r × n), B (m × r), s·B A their update; E (m × n); on disk A = I, B = ΔW"
    past_as = "other"
    dense = True
    by_shape = True
    by_order = True
    revision = 2  # 1: a whole SVD of layers of any size

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("pair",), ("product",), ("terms",))

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.past: dict[str, Tensor] = {}  # parameter → S (d, s), orthonormal columns
        self.moments: dict[str, Tensor] = {}  # A or B → Adam's first moment, long side first
        self.frames: dict[str, Frame] = {}  # parameter E → its frame
        self._names: list[str] = []  # what trains
        self._columns = 0  # numbers in one task's bases, at most

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        refuse_by_task(config, "frame", "k", "full")  # past bases are of what trains, and lie in the frame
        refuse_falling(self.config.threshold, self.config.last_threshold)
        if self.targets is not None:
            in_full(self.targets, self.config.full)
        if shapes is not None:
            gigabytes = self._floats(config, shapes, self.stages) * 4e-9
            of = f"adapter.target_modules: past bases of {len(shapes)} layers over {self.stages} tasks"
            refuse_too_large(of, gigabytes, self.config.max_gb, "name fewer layers")

    def _floats(self, config: RunConfig, shapes: Sequence[tuple[int, int]], tasks: int) -> int:
        """Numbers in the bases of so many tasks, at most: of A and B, or of E, whichever is more, of each layer."""
        total = 0
        for m, n in shapes:
            r, k = rank_at(config.adapter, (m, n)), self.config.k
            total += max(min(tasks * r, m) * m + min(tasks * r, n) * n, min(tasks * k, m) * m)
        return total

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        one, all_of = (size(4 * self._floats(config, shapes, tasks)) for tasks in (1, self.stages))
        return f"carries up to {one} a task, {all_of} in all: past bases of {len(shapes)} layers"

    def build(self, stage: Stage) -> None:
        if stage.evaluating:
            return
        from cl_runner.methods.shared.dense import Dense

        shapes = stage.targets()
        full = in_full(list(shapes), self.config.full)
        # Of E a device holds the parameter, its gradient, the engine's master copy, the step's update, and both added.
        gigabytes = sum(5 * shapes[target][0] * shapes[target][1] for target in full) * 4e-9
        of = f"method.full: full-rank changes of {len(full)} layers"
        refuse_too_large(of, gigabytes, self.config.max_gb, "name fewer")
        stage.begin()
        if full:
            stage.begin_terms({target: Dense(*shapes[target]) for target in full})
        self.past = {name: S.to(stage.device) for name, S in self.past.items()}
        self.moments, self.frames = {}, {}
        own = stage.parameters()
        self._names = list(own)
        of_pairs = sum(p.numel() for name, p in own.items() if not name.endswith(".delta"))
        self._columns = of_pairs + sum(self.config.k * shapes[target][0] for target in full)

    def parameter_groups(self, stage: Stage) -> list[ParameterGroup]:
        own, full = stage.parameters(), set(stage.named("delta").values())
        pairs = {name: p for name, p in own.items() if name not in full}
        whole = {name: own[name] for name in own if name in full}
        found = stage.ordinary_groups(pairs) if pairs else []
        if whole:
            groups = times(stage.ordinary_groups(whole), self.config.lr / stage.config.training.lr)
            found += [replace(group, rule="whole", weight_decay=0.0) for group in groups]
        return found

    def edit_gradients(self, stage: Stage, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
        from cl_runner.maths.subspace import without
        from cl_runner.methods.gorp.moving import BETAS

        edited = {}
        for name, turned in self._of_pairs(stage):
            g = gradients[name].mT if turned else gradients[name]  # (d, r)
            if name in self.past:
                g = without(without(g, self.past[name]), self.past[name])
                edited[name] = g.mT.contiguous() if turned else g
            held = self.moments.get(name)
            self.moments[name] = (1 - BETAS[0]) * g if held is None else held.lerp(g, 1 - BETAS[0])
        return edited or None

    @staticmethod
    def _of_pairs(stage: Stage) -> Iterator[tuple[str, bool]]:
        """Names of A and B, and whether the long side is the second."""
        for name in stage.named("A").values():
            yield name, True
        for name in stage.named("B").values():
            yield name, False

    def whole_step(self, stage: Stage, name: str, gradient: Tensor, lr: float) -> Tensor:
        from cl_runner.maths.subspace import without
        from cl_runner.methods.gorp.moving import looked

        S, done, norm = self.past.get(name), stage.progress.taken, float(gradient.norm())
        on_outputs = S if self.config.frame == "full" else None
        G = without(without(gradient, on_outputs), on_outputs)
        if name not in self.frames or done % self.config.every == 0:
            self.frames[name] = looked(stage, self.config.k, self.frames.get(name), G, on_outputs, norm)
        frame = self.frames[name]
        g = frame.of(G, norm)
        if self.config.frame == "k":
            g = without(g, S)
        update: Tensor = -lr * self.config.scale * frame.step(g, done)
        decay = stage.config.training.weight_decay
        return update - lr * decay * stage.parameters()[name].detach() if decay else update

    def step_state(self) -> State:
        held = under("moment", self.moments)
        for name, frame in self.frames.items():
            held |= under(name, vars(frame))
        return State(held, {"frames": list(self.frames)})

    def load_step_state(self, stage: Stage, state: State) -> None:
        from cl_runner.methods.gorp.moving import Frame

        held = {name: value.to(stage.device) for name, value in state.tensors.items()}
        self.moments = within("moment", held)
        self.frames = {
            name: Frame(*(held[f"{name}.{part.name}"] for part in fields(Frame))) for name in state.json["frames"]
        }

    def end_task(self, stage: Stage) -> None:
        from cl_runner.methods.gorp.moving import extended

        first, last = self.config.threshold, self.config.last_threshold
        share = first + (last - first) * stage.index / len(stage.order)
        moments = dict(self.moments)
        for name, frame in self.frames.items():
            moments[name] = frame.U @ frame.mean if self.config.frame == "full" else frame.mean
        for name, M in moments.items():
            # Rank 0's: another library on another rank may turn directions of equal energy.
            self.past[name] = of_rank_0(stage, extended(self.past.get(name), M, share))
        self.moments, self.frames = {}, {}

    def fold(self, stage: Stage) -> Fold:
        return "dense"

    def free_share(self, stage: Stage) -> float:
        taken = {name: S.shape[1] / len(S) for name, S in self.past.items()}
        return statistics.fmean(1 - taken.get(name, 0.0) for name in self._names)

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return 4 * stages * (self._columns or sum(self.config.k * (m + n) for m, n in shapes))

    def state(self) -> State:
        return State(dict(self.past), {"columns": {name: S.shape[1] for name, S in self.past.items()}})

    def load_state(self, state: State) -> None:
        self.past = {name: state.tensors[name] for name in state.json["columns"]}
