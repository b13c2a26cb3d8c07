"""A run's machinery without its files: base, adapters, engine and stages, put at any position of a long order.

To measure stage 15 nobody has to train fourteen: past pairs are drawn at random and folded as a run folds them. Every
stage is given the same rows, so that what differs between positions is the position.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import take_turns
from benchmarks.job import Job
from cl_runner.adapters.layers import Layers
from cl_runner.adapters.pairs import Pair
from cl_runner.config.schema import ModelConfig, RunConfig
from cl_runner.engine import zero as engine
from cl_runner.engine.process import Place
from cl_runner.methods import make_method
from cl_runner.methods.protocol import Source, StagePlan
from cl_runner.models.base import Base, load_base
from cl_runner.models.batch import Example
from cl_runner.models.encoding import Encoder
from cl_runner.settings import resolve
from cl_runner.tasks import benchmark
from cl_runner.tasks.synthetic import sample
from cl_runner.training.loop import train_stage
from cl_runner.training.plan import Plan
from cl_runner.training.prepare import Tokens, open_room
from cl_runner.training.stage import Room, StageRun

# What a part calls a method → its settings.
METHODS: dict[str, dict[str, Any]] = {
    "inclora": {"name": "inclora"},
    "nlora": {"name": "nlora"},
    "olora (absolute)": {"name": "olora"},
    "olora (squared)": {"name": "olora", "reference": False},
}

PAST_B = 2e-3  # standard deviation of past B: updates of a few percent of the weight, as trained ones are


@dataclass
class World:
    """Base and adapters, an order of ``len(pairs) + 1`` stages, and the pairs of its past."""

    room: Room
    config: RunConfig
    pairs: list[Pair]

    @property
    def device(self) -> torch.device:
        return self.room.place.torch_device

    def stage(self, method: str, position: int) -> StageRun:
        """The stage at ``position`` (from 1), built and ready to train; ``method`` is a key of METHODS, or a name."""
        values = {**self.config.model_dump(), "method": METHODS.get(method, {"name": method})}
        config = RunConfig.model_validate(values)
        self.room.method = make_method(config)
        self.room.method.plan([stage.name for stage in self.room.order])
        self.room.adapters.restore(self.pairs[: position - 1], {}, None)
        stage = StageRun(self.room, config, position - 1)
        self.room.method.build(stage)
        return stage

    def close(self) -> None:
        """Let go of the base's memory."""
        self.room.adapters.restore([], {}, None)
        self.pairs.clear()
        del self.room
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def make(base: Base, encoder: Any, config: RunConfig, device: str, bf16: bool, positions: int) -> World:
    """A world with a past of ``positions - 1`` random pairs."""
    place = Place(device=device)
    engine.start(place)
    adapters = Layers(
        base.model,
        config.adapter,
        name_or_path=base.name_or_path,
        encoder_decoder=base.encoder_decoder,
        compute=torch.bfloat16 if bf16 else None,
    )
    root = engine.Autocast(adapters.model, place.torch_device, bf16)
    order = tuple(StagePlan(f"task{i}", (f"task{i}",)) for i in range(1, positions + 1))
    room = Room(base, encoder, adapters, make_method(config), place, root, order)
    return World(room, config, [random_pair(adapters, f"task{i}", i) for i in range(1, positions)])


def of(job: Job, positions: int) -> World:
    """The model of a job with its settings, on the CPU."""
    base, config = job.base(), job.config
    return make(base, job.encoder(base), config, "cpu", config.training.precision == "bf16", positions)


def tiny(positions: int, device: str = "cpu", precision: str = "fp32", epochs: int = 1) -> World:
    """The embedded tiny-t5 with the settings of its preset, but for these."""
    sets = [f"training.precision={precision}", f"training.epochs={epochs}", "data.source=synthetic"]
    config = resolve(presets=["tiny"], sets=sets).config
    base = load_base(ModelConfig(name=config.model.name), Place(device=device).torch_device)
    data = config.data
    encoder = Encoder(base.tokenizer, base.layout, data.max_source, data.max_target, data.truncate)
    return make(base, encoder, config, device, precision == "bf16", positions)


def prepared(given: argparse.Namespace, tasks: str, sets: Sequence[str], folder: Path) -> tuple[Plan, Room, Tokens]:
    """An order of ``tasks`` (with commas), made ready to train; each step is one micro-batch.

    Args:
        given: what ``job.add_model_arguments`` adds, and ``--rows``, of each task.
        sets: other settings, ``key=value``.
        folder: where the order is written.
    """
    job = Job(
        train=given.rows, test=given.rows, epochs=1, model=given.model, micro_batch=given.micro_batch,
        max_source=given.max_source, data_dir=given.data_dir,
    )  # fmt: skip
    (order := folder / "order.yaml").write_text(f"name: benchmark\ntasks: [{tasks}]\n")
    asked = [*(f"{key}={value}" for key, value in job.sets.items()), *sets]
    resolved = resolve(presets=job.presets, order=str(order), sets=asked)
    assert resolved.order is not None
    plan = Plan.make(resolved.config, resolved.order.name, resolved.order.tasks)
    engine.start(place := Place())
    return plan, *open_room(plan, place)


def tiny_rows(world: World, count: int, task: str = "agnews", split: str = "train") -> list[Example]:
    """Synthetic rows of a benchmark task as ids."""
    known = benchmark.get(task)
    rows = sample(task, split, count)
    return world.room.encoder.encode_many([known.prompt(row.text) for row in rows], [row.label for row in rows])


def random_pair(adapters: Layers, name: str, seed: int) -> Pair:
    """A pair as a stage might have left it."""
    generator = torch.Generator().manual_seed(seed)
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    for target, past in adapters.past.items():
        m, n = past.base.shape
        A[target] = (torch.rand(adapters.rank, n, generator=generator) * 2 - 1) / n**0.5
        B[target] = torch.randn(m, adapters.rank, generator=generator) * PAST_B
    return Pair(name, adapters.rank, adapters.scale, A, B)


def synchronise(device: torch.device) -> None:
    """Wait for what was started on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_seconds(stage: StageRun, examples: Sequence[Example], warm: int = 1) -> list[float]:
    """Train a stage; the seconds of every optimizer step but the first ``warm``. Closes the stage."""
    times: list[float] = []

    def tick(*_: object) -> None:
        synchronise(stage.device)
        times.append(time.perf_counter())

    try:
        train_stage(stage, Source(examples, [stage.plan.name] * len(examples)), log=lambda _: None, tick=tick)
    finally:
        stage.close()
    # The first tick ends the first step: a step is what lies between two.
    return [later - earlier for earlier, later in zip(times[warm - 1 :], times[warm:], strict=False)]


def steps_in_turns(
    world: World, positions: Sequence[int], methods: Sequence[str], examples: Sequence[Example], rounds: int
) -> dict[tuple[str, int], list[float]]:
    """(method, position) → seconds of its steps, all of them measured in turns.

    The first round is thrown away: allocators and kernels settle in it.
    """
    ways: Mapping[tuple[str, int], Callable[[], list[float]]] = {
        (method, position): partial(lambda m, p: step_seconds(world.stage(m, p), examples), method, position)
        for position in positions
        for method in methods
    }
    found = take_turns(ways, rounds + 1)
    return {way: [seconds for run in runs[1:] for seconds in run] for way, runs in found.items()}


def penalty_seconds(world: World, method: str, position: int, repeats: int) -> list[float]:
    """Seconds of the penalty's forward and backward by themselves, at a position."""
    stage = world.stage(method, position)
    world.room.adapters.train(True)
    times = []
    for _ in range(repeats + 1):
        synchronise(stage.device)
        started = time.perf_counter()
        penalty = stage.room.method.penalty(stage)
        if penalty is not None:
            torch.autograd.backward(penalty)
        synchronise(stage.device)
        times.append(time.perf_counter() - started)
        for parameter in stage.parameters().values():
            parameter.grad = None
    stage.close()
    return times[1:]  # the first also makes the constants of the stage
