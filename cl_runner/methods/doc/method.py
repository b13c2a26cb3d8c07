"""DOC: what past tasks do to layers' outputs is tracked while new ones train, and B keeps off it (arXiv 2509.23893)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cl_runner.adapters.kind import Need
from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.protocol import State
from cl_runner.methods.shared.limits import refuse_by_task, refuse_too_large, size
from cl_runner.methods.shared.sequential import Sequential

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.doc.tracking import Components
    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch


class DOC(Sequential):
    """What is cut is the gradient of B: under Adam a step may have a part along past components, under sgd it has none.

    A layer's B keeps off the whole span of its slices of the components, where the paper takes them out one by one,
    although they are not orthogonal. Components that the stage itself adds are not cut. x̄ is the mean over all tokens
    of a step, h of the clipped gradients. Spared (as the official code) is a component along which this step goes the
    way that every past task has gone, by the sums of their coordinates (ours). Published with r 32, learning rate 1e-4.
    """

    class Config(Section):
        """Settings of DOC."""

        components: int = Field(48, ge=1, description="Components more that there may be with each task (published).")
        threshold: float = Field(
            0.1, gt=0, lt=1, description="δ: share of h that has to be left for a new one (published)."
        )
        amnesic: float = Field(2.0, ge=0, le=100, description="l: how much less older steps count (published).")
        tracking: float = Field(
            0.0,
            ge=0,
            lt=1,
            description="ε: what components forget beside that (published: 0 to 0.1, by a rule that is not given).",
        )
        spare: bool = Field(
            True, description="Leave a component alone along which this step and all past tasks go the same way."
        )
        max_gb: float = Field(8.0, gt=0, description="Most that the components of all tasks may take, 10⁹ bytes.")

    name = "doc"
    title = "DOC: one LoRA, whose B keeps off the tracked directions of past tasks"
    equation = (
        "h = [s (g_B A x̄ + B g_A x̄)]_layers;  v_k ← η v_k + (1 − η) h (h·v_k)/‖v_k‖,  h ← h without v_k,  "
        "η = (T − l)/(T + 1)·(1 − ε);  g_B ← g_B off span{v_k}, k of past tasks"
    )
    paper = "2509.23893 (Dynamic Orthogonal Continual Fine-tuning for Mitigating Catastrophic Forgettings)"
    carried = "A, B; the components v_k"
    growth = "components × Σ m numbers a task"
    by_shape = True

    @property
    def needs(self) -> tuple[Need, ...]:
        return (("pair",), ("A",), ("B",), ("product",))

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.components: Components | None = None
        self.layers: dict[str, int] = {}  # target → m, in the order that they have in h
        self._past = 0  # components that there were as the stage began
        self._left: float | None = None  # share of the last h that no component has
        self._inputs: dict[str, Tensor] = {}  # target → Σ x over this rank's tokens of the step, and how many (n + 1)
        self._step = -1  # whose inputs these are: a step that is left out takes none away

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        refuse_by_task(config, "components")
        if shapes is None:
            return
        past, rows = self.config.components * (self.stages - 1), min(m for m, _ in shapes)
        if past >= rows:
            raise UserError(
                f"method.components: {self.config.components} for each of {self.stages - 1} past tasks are {past} "
                f"directions, all that a layer of {rows} outputs has; set {max((rows - 1) // (self.stages - 1), 1)} or "
                "less"
                if rows > self.stages - 1
                else f"method.components: {self.stages - 1} past tasks leave a layer of {rows} outputs no direction; "
                "train fewer tasks, or other adapter.target_modules"
            )
        of = f"method.components: {self.config.components * self.stages} components of {len(shapes)} layers' outputs"
        refuse_too_large(of, self.state_bytes(shapes, 0, self.stages) / 1e9, self.config.max_gb, "set fewer")

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        one, all_of = (size(self.state_bytes(shapes, 0, tasks)) for tasks in (1, self.stages))
        return f"carries up to {one} a task, {all_of} in all: components of {len(shapes)} layers' outputs"

    def begin_task(self, stage: Stage) -> None:
        import torch

        from cl_runner.methods.doc.tracking import Components

        if self.components is None:
            self.layers = {target: m for target, (m, _) in stage.targets().items()}
            self.components = Components(torch.zeros(0, sum(self.layers.values())), torch.zeros(0, 0))
        found = self.components
        found.v, found.lean = found.v.to(stage.device), found.lean.to(stage.device)
        self._past, self._left, self._inputs = len(found.v), None, {}

    def loss(self, stage: Stage, batch: Batch) -> Tensor:
        if self._step != stage.progress.step:
            self._step, self._inputs = stage.progress.step, {}

        def see(target: str, rows: Tensor, counts: Tensor | None) -> None:
            import torch

            assert counts is not None, "no rows of this batch"
            total = torch.cat([(rows.float() * counts[..., None]).sum((0, 1)), counts.sum()[None]])
            self._inputs[target] = self._inputs[target] + total if target in self._inputs else total

        with stage.observe("inputs", see):
            return super().loss(stage, batch)

    def take_back(self, stage: Stage) -> None:
        self._inputs = {}

    def edit_gradients(self, stage: Stage, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
        found, own = self.components, self.config
        assert found is not None
        h = self._direction(stage, gradients)
        cut = ~found.agree(found.coordinates(h), stage.index) if own.spare else found.lean.new_ones(len(found.v)).bool()
        most = own.components * (stage.index + 1)
        self._left = found.take(h, stage.index, most, own.threshold, own.amnesic, own.tracking)
        v = found.v[: self._past][cut[: self._past]]
        return self._off(stage, gradients, v) if len(v) else None

    def _direction(self, stage: Stage, gradients: dict[str, Tensor]) -> Tensor:
        """h (Σ m): where the step would move each layer's output at its mean input, but for the sign."""
        import torch

        whole = stage.sum(torch.cat([self._inputs[target] for target in self.layers]))
        sums = torch.split(whole, [len(self._inputs[target]) for target in self.layers])
        parameters, A, B = stage.parameters(), stage.named("A"), stage.named("B")
        parts = []
        with torch.autocast(stage.device.type, enabled=False):
            for target, total in zip(self.layers, sums, strict=True):
                x, (a, b) = total[:-1] / total[-1].clamp(min=1), (A[target], B[target])
                moved = gradients[b] @ (parameters[a].detach() @ x) + parameters[b].detach() @ (gradients[a] @ x)
                parts.append(stage.scale_of(target) * moved)
        return stage.broadcast(torch.cat(parts))  # what becomes a component is decided by it, everywhere alike

    def _off(self, stage: Stage, gradients: dict[str, Tensor], v: Tensor) -> dict[str, Tensor]:
        """The gradients of B without their part in each layer's slices of v (K, Σ m)."""
        import torch

        from cl_runner.methods.doc.tracking import off_span

        names = stage.named("B")
        slices = torch.split(v, list(self.layers.values()), dim=1)
        return {names[t]: off_span(gradients[names[t]], part) for t, part in zip(self.layers, slices, strict=True)}

    def logged(self, stage: Stage) -> dict[str, Any]:
        """How many components there are, and the share of the last h that none of them has."""
        return {} if self.components is None else {"components": len(self.components.v), "left_of_h": self._left}

    def free_share(self, stage: Stage) -> float | None:
        import torch

        from cl_runner.methods.doc.tracking import rank

        if self.components is None:
            return None
        slices = torch.split(self.components.v, list(self.layers.values()), dim=1)
        return statistics.fmean(1 - rank(part) / part.shape[1] for part in slices)

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        return 4 * int(self.config.components) * stages * sum(m for m, _ in shapes)

    def state(self) -> State:
        if self.components is None:
            return State()
        found = self.components
        return State({"components": found.v, "lean": found.lean}, {"seen": found.seen, "layers": self.layers})

    def load_state(self, state: State) -> None:
        from cl_runner.methods.doc.tracking import Components

        if state.json:
            self.layers = dict(state.json["layers"])
            self.components = Components(state.tensors["components"], state.tensors["lean"], state.json["seen"])

    def step_state(self) -> State:
        held = self.state()
        return State(held.tensors, {**held.json, "past": self._past, "left": self._left})

    def load_step_state(self, stage: Stage, state: State) -> None:
        self.load_state(state)
        self.begin_task(stage)
        self._past, self._left = state.json["past"], state.json["left"]
