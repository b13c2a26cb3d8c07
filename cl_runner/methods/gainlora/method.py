"""GainLoRA: each task's pair has a gate that reads the prompt and is shut to past ones (arXiv 2505.15424)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from cl_runner.config.schema import RunConfig, Section
from cl_runner.methods.gainlora.settings import Settings
from cl_runner.methods.protocol import State
from cl_runner.methods.shared.designed import (
    Memories,
    check_design,
    design,
    free_inputs,
    of_state,
    remembered,
    take_up,
    take_up_inputs,
    to_state,
)
from cl_runner.methods.shared.pooling import mean_embedding
from cl_runner.methods.shared.routed import Routed, mean_over_rows
from cl_runner.methods.shared.tensors import added, under, within

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.methods.protocol import Stage
    from cl_runner.methods.shared.gpm import Memory
    from cl_runner.models.batch import Batch


class GainLoRA(Routed):
    """p0 is the mean embedding of the prompt's own tokens (the official code's mean is over the padded batch, so that
    a row's gates depend on the rows beside it). A gate begins with the last one's G1 and G2 and with a k off all past
    p2; what past gates read is then left alone by every step, so that past prompts find the new gate shut, as far as
    they lie in its memory. ε is of the squares of a second moment's singular values, as in GPM: of prompts that begin
    alike one direction may make it up, and what else is in them opens the gate. Where past p2 have left no direction
    (ours), k stays as it was drawn. With ``centred`` (ours) p0 is counted from the first task's mean prompt: what all
    prompts begin with is then no direction at all.

    Published with learning rate 3e-4, constant, 10 epochs, batch 32, r 8, alpha 32.
    """

    class Config(Settings):
        """Settings of GainLoRA."""

    name = "gainlora"
    title = "GainLoRA: gated integration of every task's pair, shut to past prompts"
    equation = (
        "h = W0 x + Σ_{i≤t} a_i·s·B_i A_i x,  a = |2σ(4 cos(k, p2)) − 1|,  p2 = SiLU(G2 p1),  p1 = SiLU(G1 p0),  p0 "
        "the prompt's mean embedding;  ΔG1 off past p0, ΔG2 off past p1, k off past p2;  branch: inflora (A designed), "
        "olora (+ λ1 Σ |A_i A_tᵀ|)"
    )
    paper = "2505.15424 (GainLoRA: gated integration of low-rank adaptation for continual learning of LMs)"
    carried = "all pairs and gates; bases of what gates read (inflora: and of what layers read)"
    growth = "a pair and a gate of (2·hidden + 1)·d numbers a task, in every forward; bases up to half of d × d"
    since_second = ("lambda1",)
    trains = "a LoRA pair (inflora: its B) and its gate"
    by_order = True
    of_all_tasks = ("hidden", "branch", "gate", "centred")

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.memories: Memories = {}  # of a gate's parts by their names, of layers by the first that shares an input
        self.centre: Tensor | None = None  # (d): what p0 is counted from, if from anything
        self._start: dict[str, Tensor] = {}  # the gate, as changes of it are counted from
        self._past: dict[str, Memory] = {}  # memories of a gate's parts, where the stage computes

    @property
    def _designed(self) -> bool:
        return bool(self.config.branch == "inflora")

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        super().check(config, shapes)
        if self._designed and shapes is not None:
            check_design(config, shapes, self.config.max_gb)

    # The gates.

    def fresh_router(self, stage: Stage) -> dict[str, Tensor]:
        import torch

        d, h, dice = stage.embedding_width, self.config.hidden, stage.rng("gate")
        k = torch.empty(d).uniform_(-1, 1, generator=dice)
        if self.router:
            return {"G1": self.router["G1"][-1].clone(), "G2": self.router["G2"][-1].clone(), "k": k}
        return {
            "G1": torch.empty(h, d).uniform_(-(d**-0.5), d**-0.5, generator=dice),
            "G2": torch.empty(d, h).uniform_(-(h**-0.5), h**-0.5, generator=dice),
            "k": k,
        }

    def weights(self, stage: Stage, batch: Batch) -> Tensor:
        import torch

        from cl_runner.methods.gainlora.gating import openness

        p0, live = self._prompts(stage, batch), self._live(stage)
        gates = [gate for gate in (self.router, {name: value[None] for name, value in live.items()}) if gate]
        return torch.cat([openness(gate, p0, self.config.gate) for gate in gates], 1)

    def _prompts(self, stage: Stage, batch: Batch) -> Tensor:
        """p0 of each row, (b, d)."""
        p0 = mean_embedding(stage, batch)
        return p0 if self.centre is None else p0 - self.centre

    def _live(self, stage: Stage) -> dict[str, Tensor]:
        """The gate that trains, if one does."""
        from cl_runner.methods.gainlora.gating import NAMES

        parameters = stage.all_parameters()
        return {name: parameters[name] for name in NAMES if name in parameters}

    def take_up_router(self, stage: Stage) -> None:
        import torch

        for name, value in self._live(stage).items():
            new = value.detach()[None]
            self.router[name] = torch.cat([self.router[name], new]) if name in self.router else new.clone()

    def router_entries(self, width: int, stages: int) -> int:
        return int(stages * (2 * self.config.hidden + 1) * width)

    # The stage.

    def build(self, stage: Stage) -> None:
        super().build(stage)
        if self.centre is not None:
            self.centre = self.centre.to(stage.device)
        if self._designed and not stage.evaluating:
            parameters = stage.all_parameters()
            for name in stage.named("A").values():
                parameters[name].requires_grad_(False)

    def begin_task(self, stage: Stage) -> None:
        import torch

        from cl_runner.methods.shared.gpm import designed_rows

        if self._designed:
            design(stage, self.memories)
        if self.config.centred and self.centre is None:
            self.centre = mean_over_rows(stage, partial(mean_embedding, stage))
        moment = self._moments(stage)["k"]
        [k] = stage.broadcast(designed_rows(moment, remembered(self.memories, "k", moment), 1))
        if k.any():
            drawn = self._live(stage)["k"].detach()
            k = torch.where(k @ drawn.to(k) < 0, -k, k)  # either opens the gate alike: not for rounding to choose
            stage.write({"k": (k / torch.linalg.vector_norm(k)).float() * torch.linalg.vector_norm(drawn)})
        self._hold(stage, {name: value.detach().clone() for name, value in self._live(stage).items()})

    def _hold(self, stage: Stage, start: dict[str, Tensor]) -> None:
        self._start = {name: value.to(stage.device) for name, value in start.items()}
        past = {name: remembered(self.memories, name, value) for name, value in self._start.items()}
        self._past = {name: memory for name, memory in past.items() if memory}

    def _moments(self, stage: Stage) -> dict[str, Tensor]:
        """The mean of p pᵀ over the stage's own rows, fp64: of what each part of its gate reads. *Collective*."""
        import torch

        from cl_runner.methods.gainlora.gating import NAMES, path

        gate = {name: value.detach()[None] for name, value in self._live(stage).items()}
        totals: dict[str, Tensor] = {}
        count = torch.zeros((), dtype=torch.float64, device=stage.device)
        with torch.no_grad():
            for batch in stage.batches():
                real = batch.counts[:, 0]  # not those that only fill a rank's share
                p0 = self._prompts(stage, batch)
                for name, p in zip(NAMES, (p0[None], *path(gate, p0)), strict=True):
                    rows = p[0].double() * real[:, None]
                    totals[name] = rows.mT @ rows + totals.get(name, 0.0)
                count += real.sum()
        rows_of_all = stage.sum(count)
        return {name: stage.sum(totals[name]) / rows_of_all for name in NAMES}

    def penalty(self, stage: Stage) -> Tensor | None:
        if self._designed or not self.config.lambda1 or not self.pairs:
            return None
        total: Tensor = self.config.lambda1 * added(
            [(term.past_A @ term.A.mT).abs().sum() for term in stage.terms().values()]
        )
        return total

    def after_step(self, stage: Stage) -> None:
        from cl_runner.methods.gainlora.gating import of_length, off_past

        values, live = {}, self._live(stage)
        for name, memory in self._past.items():
            now = live[name].detach()
            values[name] = off_past(self._start[name], now, memory)
            if self.config.renormalise:
                values[name] = of_length(values[name], now)
        if values:
            stage.write(values)
        if self.config.renormalise:  # each step's own change is projected; else all of it since the stage began
            self._start |= values

    def end_task(self, stage: Stage) -> None:
        super().end_task(stage)
        for name, moment in self._moments(stage).items():
            take_up(stage, self.memories, name, moment, self._at(stage, self.config.threshold))
        if self._designed:
            take_up_inputs(stage, self.memories, self._at(stage, self.config.input_threshold))

    def _at(self, stage: Stage, threshold: float) -> float:
        """A threshold at this stage, on its way to 1."""
        return threshold + (1 - threshold) * stage.index / len(stage.order)

    def free_share(self, stage: Stage) -> float | None:
        return free_inputs(stage, self.memories) if self._designed else super().free_share(stage)

    # State.

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        d, h = min(n for _, n in shapes), self.config.hidden
        centre = d if self.config.centred else 0
        bases = 2 * d * d + h * h + (sum(n * n for _, n in shapes) if self._designed else 0)
        return int(super().state_bytes(shapes, trained, stages) + 4 * (bases + centre))  # fp64, half of each at most

    def state(self) -> State:
        pairs, memories = super().state(), to_state(self.memories)
        # By name, as a file gives them back.
        tensors = dict(sorted({**pairs.tensors, **memories.tensors, **self._centre()}.items()))
        return State(tensors, {**pairs.json, **memories.json})

    def _centre(self) -> dict[str, Tensor]:
        return {} if self.centre is None else {"centre": self.centre}

    def load_state(self, state: State) -> None:
        super().load_state(state)
        self.memories, self.centre = of_state(state), state.tensors.get("centre")

    def step_state(self) -> State:
        return State({**under("start", self._start), **self._centre()})

    def load_step_state(self, stage: Stage, state: State) -> None:
        """A is among the parameters."""
        self.centre = state.tensors["centre"].to(stage.device) if self.config.centred else None
        self._hold(stage, within("start", state.tensors))
