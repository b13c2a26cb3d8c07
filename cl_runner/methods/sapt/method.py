"""SAPT: attention over the pairs of all tasks, held to what it was on pseudo inputs (arXiv 2401.08295)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cl_runner.config.schema import Section
from cl_runner.methods.protocol import Source, State
from cl_runner.methods.sapt.settings import Settings
from cl_runner.methods.sapt.writing import to_write, write
from cl_runner.methods.shared.frame import WRITING, Frame
from cl_runner.methods.shared.memory import Memory
from cl_runner.methods.shared.pooling import largest_embedding, largest_embeddings
from cl_runner.methods.shared.rates import times
from cl_runner.methods.shared.routed import Routed
from cl_runner.methods.shared.tensors import added

if TYPE_CHECKING:
    from torch import Tensor

    from cl_runner.engine.optim import ParameterGroup
    from cl_runner.methods.protocol import Stage
    from cl_runner.models.batch import Batch


class SAPT(Routed):
    """One query net for all tasks, which trains on; a key a task, of which the new one trains.

    e is the largest value over the prompt's own tokens (the official code's also over padding). ā_j is the mean over
    task j's own rows at its end (officially its validation rows). Officially pseudo inputs are those of a second LoRA,
    trained to write them, and each step draws a batch of them; here the task's own pair learns to write, as LFPT5's
    prompt does (ours), asked with what all inputs of the task begin with, and every step takes all of them.

    Published with learning rate 3e-4 (T5) or 5e-5 (LLaMA), constant, 10 or 20 epochs, batch 32, r 8 (4), alpha 32,
    without dropout.
    """

    class Config(Settings):
        """Settings of SAPT."""

    name = "sapt"
    title = "SAPT: shared attention over the pairs of all tasks"
    equation = (
        "h = W0 x + Σ_{i≤t} a_i·s·B_i A_i x,  a = softmax(K q / √d),  q = LayerNorm(SiLU(W2 W1 e)),  e the prompt's "
        "largest embedding;  CE(y | x) + λ_lm · CE(x | task) + κ Σ_{j<t} KL(ā_j ‖ a) on pseudo inputs of task j"
    )
    paper = "2401.08295 (SAPT: a shared attention framework for parameter-efficient continual learning of LLMs)"
    carried = "all pairs, keys and the query net; ā_j and pseudo inputs of each task (token ids)"
    growth = "a pair, a key and pseudo inputs a task; every forward reads all pairs"
    trains = "a LoRA pair, its key, and the query net"
    revision = 2  # 1: rows to be written were dealt to steps by length, apart from those to be answered

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.written = Memory()  # of each task
        self.wrote: dict[str, dict[str, int]] = {}  # of each task: inputs drawn, used
        self._frame: Frame | None = None
        self._pooled: dict[str, Tensor] = {}  # of each past task's pseudo inputs (N, d)
        self._moved: Tensor | None = None  # the mean KL of past tasks, as of the last step

    # The attention.

    def fresh_router(self, stage: Stage) -> dict[str, Tensor]:
        import torch

        from cl_runner.methods.sapt.attention import NET

        d, h, dice = stage.embedding_width, self.config.hidden, stage.rng("attention")
        key = torch.empty(d).uniform_(-1, 1, generator=dice)
        if self.router:
            return {**{name: self.router[name].clone() for name in NET}, "key": key}
        return {
            "W1": torch.empty(h, d).uniform_(-(d**-0.5), d**-0.5, generator=dice),
            "W2": torch.empty(d, h).uniform_(-(h**-0.5), h**-0.5, generator=dice),
            "gain": torch.ones(d),
            "bias": torch.zeros(d),
            "key": key,
        }

    def weights(self, stage: Stage, batch: Batch) -> Tensor:
        return self._scores(stage, largest_embedding(stage, batch)).exp()

    def _scores(self, stage: Stage, pooled: Tensor) -> Tensor:
        """log a (b, T) of pooled prompts."""
        import torch

        from cl_runner.methods.sapt.attention import NET, scores

        now, held = stage.all_parameters(), self.router
        keys = [held["keys"]] if held else []
        if "key" not in now:
            return scores(held, keys[0], pooled)
        net = {name: now[name] for name in NET}
        return scores(net, torch.cat([*keys, now["key"][None]]), pooled)

    def take_up_router(self, stage: Stage) -> None:
        import torch

        from cl_runner.methods.sapt.attention import NET

        now = {name: value.detach().clone() for name, value in stage.all_parameters().items() if name in (*NET, "key")}
        keys = [self.router["keys"]] if self.router else []
        self.router = {**{name: now[name] for name in NET}, "keys": torch.cat([*keys, now["key"][None]])}

    def router_entries(self, width: int, stages: int) -> int:
        return int((2 * self.config.hidden + 2 + stages) * width)

    # The stage.

    def parameter_groups(self, stage: Stage) -> list[ParameterGroup]:
        from cl_runner.methods.sapt.attention import NET

        router = {name: p for name, p in stage.parameters().items() if name in (*NET, "key")}
        others = {name: p for name, p in stage.parameters().items() if name not in router}
        return [*stage.ordinary_groups(others), *times(stage.ordinary_groups(router), self.config.router_lr)]

    def begin_task(self, stage: Stage) -> None:
        if self.config.writes:
            self._pooled = {
                task: largest_embeddings(stage, [example.source for example in examples])
                for task, examples in self.written.tasks.items()
                if examples
            }

    def training_data(self, stage: Stage, own: Source) -> list[Source]:
        if not self.config.writes:
            return [own]
        self._frame = Frame.of(own.examples)
        writing = to_write(stage, self.config, self._frame, own)
        # Each loss is to be a mean over its own tokens, in expectation; a step divides by those of both. As rows of two
        # sorts they are dealt to steps whatever their lengths.
        answers, texts = (sum(len(example.target) for example in rows) for rows in (own.examples, writing))
        both, weight = answers + texts, self.config.lambda_lm
        return [
            Source(own.examples, own.tasks, both / answers * own.weight, own.ids),
            Source(writing, [WRITING] * len(writing), weight * both / texts * own.weight),
        ]

    def penalty(self, stage: Stage) -> Tensor | None:
        if not (self.config.writes and self._pooled):
            return None
        from cl_runner.methods.sapt.attention import moved

        each = [moved(self.shares[task], self._scores(stage, pooled)) for task, pooled in self._pooled.items()]
        total = added(each)
        self._moved = total.detach() / len(each)
        weighed: Tensor = self.config.kappa * total
        return weighed

    def logged(self, stage: Stage) -> dict[str, Any]:
        return {**super().logged(stage), **({} if self._moved is None else {"moved": float(self._moved)})}

    def end_task(self, stage: Stage) -> None:
        super().end_task(stage)
        if self.config.writes:
            assert self._frame is not None, "the stage has had rows"
            task = stage.plan.name
            self.written.tasks[task], self.wrote[task] = write(stage, self.config, self._frame)

    # State.

    def state(self) -> State:
        pairs, written = super().state(), self.written.state()
        return State({**pairs.tensors, **written.tensors}, {**pairs.json, **written.json, "pseudo": self.wrote})

    def load_state(self, state: State) -> None:
        super().load_state(state)
        self.written, self.wrote = Memory.load(state), dict(state.json["pseudo"])
