"""Shared basis: new pairs that write into output directions which all tasks share, beside their own."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field

from cl_runner.config import RunConfig, Section
from cl_runner.errors import UserError
from cl_runner.methods.base import Fold, Method, StagePlan, State
from cl_runner.methods.limits import refuse_too_large, size
from cl_runner.metrics.subspace import free_share

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.adapters.shared import Mixture, SharedBasis
    from cl_runner.methods.base import Stage
    from cl_runner.models.batch import Batch
    from cl_runner.optim import ParameterGroup


class SharedBasisMethod(Method):
    """U (m, r) learns at the first task and slowly, or not at all, later. A task begins with ΔW = 0.

    ``similarity`` keeps every task's update apart and weighs the others' by how near their row spaces are; a row whose
    task is unknown is answered by their plain sum. Without it updates are folded. C learns at the first task as U does,
    also where U is made later, by ``pca``.
    """

    class Config(Section):
        """Settings of shared-basis; all coefficients are ours."""

        form: Literal["sum", "block"] = Field(
            "sum", description="sum: (α U + B_t) A_t; block: α U A_t,1 + B_t A_t,2, twice the rows of A."
        )
        shared_lr: float = Field(
            0.1, ge=0, description="Learning rate of U after the first task, as a share of training.lr; 0: frozen."
        )
        mixing: Literal["learned", "fixed", "similarity"] = Field(
            "learned",
            description="learned: α trains; fixed: α = 1; similarity: α = 1, and other tasks' updates count by "
            "β_ij = Sim(i, j) / Σ_k Sim(i, k), not 1.",
        )
        every: int = Field(10, ge=1, description="similarity: steps between two looks at how near the new task is.")
        sparse: float = Field(
            0.0, ge=0, description="λ of the mean |entry| of S and of C: A_t is S_t C, C shared like U. 0: A_t itself."
        )
        dictionary: int | None = Field(None, ge=1, description="sparse: rows of C; null: four times the rank.")
        support: float | None = Field(
            None,
            gt=0,
            lt=1,
            description="Share of entries of α U A_t that count: those where every past |ΔW_i| is among its largest.",
        )
        pca: int = Field(0, ge=0, description="U by the principal components of the B of the first so many tasks.")
        non_negative: bool = Field(False, description="A, B, U (and S, C) are kept at 0 or above.")
        max_gb: float = Field(
            16.0, gt=0, description="support: most that masks and updates as whole matrices may take, 10⁹ bytes."
        )

    name = "shared-basis"
    title = "Shared basis: new pairs that share output directions, and mix by similarity"
    equation = (
        "ΔW_t = s (α_t U A_t + B_t A_t);  similarity: W_i = W0 + ΔW_i + Σ_{j≠i} β_ij ΔW_j,  "
        "β_ij = Sim(i,j) / Σ_{k≠i} Sim(i,k),  Sim = 1 − d_chordal(span A_i, span A_j) / √r"
    )
    paper = "2602.06043 (Shared LoRA Subspaces) is near; the equations are ours"
    trains = "A_t (r × n), B_t (m × r) and α_t of each task; U (m × r), slowly"
    past_as = "other"
    factors = "lora_A is A_t, lora_B is alpha/r · (α_t U + B_t); in blocks both one under, and beside, the other"
    carried = "U (and C, mask); past updates: folded, or under similarity the pairs of all tasks"
    growth = (
        "constant (support: a matrix a layer); similarity (which also needs the task id): r rows a task in the forward"
    )
    task_id = "optional"
    by_shape = True

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.shared: dict[str, Tensor] = {}  # "U" and "C" of each target: <name>.<target>
        self.large: dict[str, Tensor] = {}  # target → min_i |ΔW_i| / ‖ΔW_i‖ over past tasks (m, n)
        self.pairs: list[dict[str, Tensor]] = []  # of each task, A.<target> and B.<target>: to mix, or for the PCA
        self.tasks: list[str] = []  # of ``pairs``
        self._mix: Tensor | None = None  # the new task's β over past ones (T)
        self._known: dict[str, Tensor] = {}  # what ``weights`` found for the tasks there are
        self._spans: list[dict[str, Tensor]] = []  # of ``pairs``, as far as they were asked for
        self._tasks = 1
        self.dense = self.config.support is not None  # type: ignore[misc]  # a mask leaves no factors

    def plan(self, order: Sequence[str]) -> list[StagePlan]:
        self._tasks = len(order)
        if self.config.pca >= max(self._tasks, 1):
            raise UserError(
                f"method.pca: a basis by {self.config.pca} tasks would come after the last of {self._tasks}; set it to "
                f"{self._tasks - 1} or less"
            )
        return super().plan(order)

    def check(self, config: RunConfig, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        own, r = self.config, config.adapter.largest
        if own.mixing == "similarity" and own.support is not None:
            raise UserError("method.support: under method.mixing=similarity updates stay pairs, which have no mask")
        if own.sparse and own.form == "block":
            raise UserError("method.sparse: needs method.form=sum")
        small = min((min(shape) for shape in shapes or ()), default=r)
        if r > small:
            raise UserError(f"adapter.r: {r} is more than the {small} rows or columns of a target layer; set it lower")
        if own.support is not None and shapes is not None:
            gigabytes = 2 * sum(m * n for m, n in shapes) * 4e-9  # the mask, and ΔW in the graph of a step
            of = f"method.support: masks and updates of {len(shapes)} layers"
            refuse_too_large(of, gigabytes, own.max_gb, "name fewer adapter.target_modules")

    def grows(self, config: RunConfig, shapes: Sequence[tuple[int, int]]) -> str:
        if self.config.support is not None:
            least = size(4 * sum(m * n for m, n in shapes))
            return f"carries {least}: the least share that past updates have in each entry of {len(shapes)} layers"
        if not self.mixes:
            return ""
        pair = 4 * self._blocks * config.adapter.largest * sum(m + n for m, n in shapes)
        return f"carries {size(pair)} a task, {size(self._tasks * pair)} in all: pairs of {len(shapes)} layers"

    @property
    def _blocks(self) -> int:
        """How many times the rank a task's pair has rows."""
        return 2 if self.config.form == "block" else 1

    @property
    def mixes(self) -> bool:
        return bool(self.config.mixing == "similarity")

    @property
    def knows_task(self) -> bool:
        return self.mixes

    def reads_past(self) -> Mapping[str, str]:
        return {}  # what it needs of past pairs it keeps itself

    def build(self, stage: Stage) -> None:
        from cl_runner.adapters.shared import Mixture
        from cl_runner.maths.mixing import shares

        if stage.evaluating:
            if self.mixes:
                self._begin_mixture(stage)
            return
        past = {t: Mixture(*self._factors(t)) if self.mixes and self.pairs else None for t in stage.adapters.past}
        generator = stage.rng("adapter")
        terms = {t: self._term(stage, t, generator, past[t]) for t in stage.adapters.past}
        stage.adapters.begin_terms(stage.plan.name, terms)
        self._mix = shares([1.0] * len(self.pairs))

    def _term(self, stage: Stage, target: str, generator: Any, past: Mixture | None) -> SharedBasis:
        """A task's own term: it begins at ΔW = 0, with A = 0 where U is not, else with U or B = 0."""
        import torch

        from cl_runner.adapters.shared import SharedBasis

        own, adapter, r = self.config, stage.config.adapter, stage.adapters.rank
        m, n = stage.adapters.past[target].base.shape
        first = stage.index == 0 and not own.pca  # U itself learns, in the place of a B
        U, C = self.shared.get(f"U.{target}"), self.shared.get(f"C.{target}")
        if first:
            U = torch.zeros(m, r)
        rows = own.dictionary or 4 * r
        if own.sparse and C is None:
            C = self._fresh(rows, n, generator)
        width = rows if own.sparse else n
        A = self._fresh(r, width, generator)
        if U is not None and not first:
            A = torch.cat([torch.zeros_like(A), A]) if own.form == "block" else torch.zeros_like(A)
        return SharedBasis(
            A,
            m,
            stage.adapters.scale,
            basis=U,
            dictionary=C,
            shared_trains=not self.shared or own.shared_lr > 0,
            own=not first,
            mixing=own.mixing == "learned" and U is not None and not first,
            mask=self._mask(target) if U is not None and not first else None,
            past=past,
            p=adapter.dropout,
        )

    def _fresh(self, rows: int, columns: int, generator: Any) -> Tensor:
        """Kaiming-uniform, as PEFT's A."""
        import torch

        made = torch.empty(rows, columns)
        torch.nn.init.kaiming_uniform_(made, a=5**0.5, generator=generator)
        return made.abs() if self.config.non_negative else made

    def _mask(self, target: str) -> Tensor | None:
        """Where every past update is among its largest entries: the share ``support`` of them, equal ones or not."""
        import torch

        large = self.large.get(target)
        if self.config.support is None or large is None:
            return None
        kept = large.flatten().topk(max(1, round(self.config.support * large.numel()))).indices
        mask = torch.zeros(large.numel())
        mask[kept] = 1.0
        return mask.view_as(large)

    def parameter_groups(self, stage: Stage) -> list[ParameterGroup]:
        from cl_runner.optim import ordinary_groups

        every = stage.parameters()
        slow = {name: p for name, p in every.items() if name.endswith((".U", ".C"))} if self.shared else {}
        groups = []
        for parameters, scale in (
            (slow, self.config.shared_lr),
            ({n: p for n, p in every.items() if n not in slow}, 1.0),
        ):
            for group in ordinary_groups(parameters, stage.config.training, stage.adapters.model):
                group.lr_scale = scale
                groups.append(group)
        return groups

    def penalty(self, stage: Stage) -> Tensor | None:
        if not self.config.sparse:
            return None
        sizes = [p.abs().mean() for name, p in stage.parameters().items() if name.endswith((".A", ".C"))]
        total: Tensor = self.config.sparse * sum(sizes[1:], sizes[0]) / len(sizes)
        return total

    def after_step(self, stage: Stage) -> None:
        if self.config.non_negative:
            signed = {name: p for name, p in stage.parameters().items() if not name.endswith(".alpha")}
            stage.write({name: p.detach().clamp(min=0) for name, p in signed.items()})
        from cl_runner.maths.mixing import nearness, shares, spans

        if self.mixes and self.pairs and stage.progress.step % self.config.every == 0:
            terms = stage.adapters.terms
            assert terms is not None
            now = {f"A.{target}": cast("SharedBasis", term).rows().detach() for target, term in terms.of.items()}
            # A process group of GPUs has no way for tensors of the CPU.
            self._mix = stage.broadcast(shares(nearness(spans(now), self._past_spans())).to(stage.device))

    def _past_spans(self) -> list[dict[str, Tensor]]:
        """``spans`` of each finished task's pair. Pairs do not change: each one's are made once."""
        from cl_runner.maths.mixing import spans

        self._spans += [spans(pair) for pair in self.pairs[len(self._spans) :]]
        return self._spans

    def condition(self, stage: Stage, batch: Batch, task: str | None) -> dict[str, Tensor] | None:
        if not self.mixes or not self.pairs:
            return None
        if len(self.pairs) == stage.index:  # the new task learns beside past ones
            assert self._mix is not None
            weights = self._mix
        elif task in self.tasks:
            weights = self.weights(task)
        else:
            return None
        return {"mix": weights.to(stage.device).expand(batch.size, -1)}

    def weights(self, task: str) -> Tensor:
        """How much each task's update counts (T) where ``task`` is answered: 1 for its own, β for the others."""
        import torch

        from cl_runner.maths.mixing import nearness, shares

        if task not in self._known:
            mine = self.tasks.index(task)
            others, of = [i for i in range(len(self.tasks)) if i != mine], self._past_spans()
            found = torch.ones(len(self.tasks))
            found[others] = shares(nearness(of[mine], [of[i] for i in others]))
            self._known[task] = found
        return self._known[task]

    def end_task(self, stage: Stage) -> None:
        terms = stage.adapters.terms
        assert terms is not None
        pair: dict[str, Tensor] = {}
        for target, term in terms.of.items():
            mine = cast("SharedBasis", term)
            for name in "UC":
                if (shared := getattr(mine, name)) is not None:
                    self.shared[f"{name}.{target}"] = copy(shared)
            if mine.mask is None:
                pair[f"A.{target}"], pair[f"B.{target}"] = map(copy, mine.pair())
            if self.config.support is not None:
                size = copy(mine.own()).abs()
                size /= size.norm().clamp(min=1e-30)
                self.large[target] = size.minimum(self.large.get(target, size))
        if self.mixes or stage.index < self.config.pca:
            self.pairs.append(pair)
            self.tasks.append(stage.plan.tasks[0])
            self._known = {}
        if stage.index + 1 == self.config.pca:
            from cl_runner.maths.mixing import principal

            rank = stage.adapters.rank
            for target in terms.of:
                U = principal([one[f"B.{target}"] for one in self.pairs], rank)
                self.shared[f"U.{target}"] = U.clamp(min=0) if self.config.non_negative else U
            if not self.mixes:
                self.pairs, self.tasks = [], []

    def fold(self, stage: Stage) -> Fold:
        if not self.mixes:
            return "dense" if self.config.support is not None else "factors"
        self._begin_mixture(stage)  # every task's update is one of many from now on
        return "keep"

    def _begin_mixture(self, stage: Stage) -> None:
        from cl_runner.adapters.shared import Mixture

        terms = {target: Mixture(*self._factors(target)) for target in stage.adapters.past}
        stage.adapters.begin_terms(stage.plan.name, terms)

    def _factors(self, target: str) -> tuple[list[Tensor], list[Tensor]]:
        return [pair[f"A.{target}"] for pair in self.pairs], [pair[f"B.{target}"] for pair in self.pairs]

    def each_answer(self, stage: Stage) -> Iterator[str]:
        if not self.mixes:
            return
        assert stage.adapters.terms is not None
        terms: Any = list(stage.adapters.terms.of.values())
        for task in self.tasks:
            for term in terms:
                term.asked = self.weights(task)
            yield task
        for term in terms:
            term.asked = None

    def free_share(self, stage: Stage) -> float | None:
        if not self.mixes:
            return None
        rows = ([pair[f"A.{target}"].numpy() for pair in self.pairs] for target in stage.adapters.past)
        return statistics.fmean(map(free_share, rows))

    def state_bytes(self, shapes: Sequence[tuple[int, int]], trained: int, stages: int) -> int:
        large = 0 if self.config.support is None else sum(m * n for m, n in shapes)
        # All pairs in the state, and again in the folder of each task.
        pairs = stages * (1 + stages) * self._blocks if self.mixes else 0
        return 4 * (trained * (1 + pairs) + large)

    def state(self) -> State:
        tensors = {f"shared.{name}": value for name, value in self.shared.items()}
        tensors |= {f"large.{target}": value for target, value in self.large.items()}
        for number, pair in enumerate(self.pairs):
            tensors |= {f"{number}.{name}": value for name, value in pair.items()}
        return State(dict(sorted(tensors.items())), {"tasks": self.tasks})

    def load_state(self, state: State) -> None:
        self.tasks = list(state.json.get("tasks", []))
        self.shared, self.large, self.pairs = {}, {}, [{} for _ in self.tasks]
        self._known, self._spans = {}, []
        for key, value in state.tensors.items():
            kind, _, name = key.partition(".")
            if kind == "shared":
                self.shared[name] = value
            elif kind == "large":
                self.large[name] = value
            else:
                self.pairs[int(kind)][name] = value


def copy(tensor: Tensor) -> Tensor:
    """On the CPU, out of the graph."""
    return tensor.detach().to("cpu", copy=True)


METHOD = SharedBasisMethod
