"""What only a GPU can show, in one call of under nine minutes: T5-large- and LLaMA-7B-shaped models, random weights.

Real code all through (adapters, engine, stages, evaluation), the published settings (LoRA r 8 on query and value, bf16,
batch 64), real row counts and lengths; weights and ids are random, see shapes.py for how a random model comes to
answer right. Every section prints and saves what it found before the next begins; one that fails says so and the
others go on.

    python -m benchmarks.gpu --json gpu.jsonl                       one GPU
    python -m benchmarks.gpu --shape tiny --device cpu              the same code in a minute, its numbers mean nothing
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import flops, shapes, world
from benchmarks.common import median, parser, publish, spread, take_turns
from benchmarks.compiled import compare
from benchmarks.penalty import shares
from benchmarks.world import World, synchronise
from cl_runner.methods.protocol import Source
from cl_runner.models.batch import Example
from cl_runner.tasks import benchmark
from cl_runner.tasks.task import Row
from cl_runner.training.evaluation import TestSet, evaluate
from cl_runner.training.loop import train_stage
from cl_runner.training.stage import StageRun, commit_update

ORDER = ("dbpedia", "amazon", "yahoo", "agnews")
POSITIONS = (2, 8, 15)
LLAMA_SECONDS = 80  # what the LLaMA part takes, kept free for it
PUBLISHED = {"training": 2018.0, "evaluation": 832.0}  # seconds of O-LoRA's own logs, order 1, 8 GPUs, fp32

Table = Sequence[Mapping[str, Any]]


@dataclass
class Session:
    """The time there is, and what was found so far that a later section needs."""

    given: argparse.Namespace
    started: float = field(default_factory=time.perf_counter)
    pace: dict[str, float] = field(default_factory=dict)  # examples/s

    @property
    def left(self) -> float:
        """Seconds."""
        return float(self.given.budget) - (time.perf_counter() - self.started)

    @property
    def small(self) -> bool:
        return str(self.given.shape) == "tiny"

    def shape(self, family: str) -> str:
        """Name in ``shapes.SHAPES``."""
        return {"t5": "tiny-shape", "llama": "tiny-llama-shape"}[family] if self.small else self.large(family)

    @staticmethod
    def large(family: str) -> str:
        return {"t5": "t5-large", "llama": "llama-7b"}[family]

    def section(self, title: str, need: float, work: Callable[[], Mapping[str, Table]]) -> None:
        """Do a part if there is time for it, and publish it; a failure is told and ends nothing else."""
        if self.left < need:
            print(
                f"\n## gpu: {title}\n\nleft out: {self.left:.0f} s are left, and it takes about {need:.0f}", flush=True
            )
            return
        began = time.perf_counter()
        try:
            found = work()
        except Exception:  # whatever it is: the machine is lent for this one call
            print(f"\n## gpu: {title}\n\nFAILED\n\n{traceback.format_exc()}", flush=True)
            return
        publish(f"gpu: {title}", self.given, found)
        print(f"\n({time.perf_counter() - began:.0f} s, {self.left:.0f} s left)", flush=True)


# Memory.


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


# Sections.


def fit_micro_batch(made: World) -> None:
    """Halve the micro-batch until a step of the longest rows fits: what a run has to be able to take."""
    training = made.config.training
    longest = shapes.longest_rows(training.global_batch)
    while True:
        try:
            world.step_seconds(made.stage("olora (absolute)", 2), longest)
            return
        except torch.OutOfMemoryError:
            if training.micro_batch == 1:
                raise
        print(f"a micro-batch of {training.micro_batch} longest rows does not fit", flush=True)
        training.micro_batch //= 2
        reset_peak(made.device)


def pace_of_training(session: Session, made: World, family: str, steps: int) -> Table:
    """Examples, tokens and FLOP/s of training, with rows of all tasks as order 1 mixes them."""
    fit_micro_batch(made)
    batch = made.config.training.global_batch
    examples = mixed_rows(made, batch * steps, session.given.data_dir)
    reset_peak(made.device)
    seconds = world.step_seconds(made.stage("olora (absolute)", 2), examples)
    # Mean, not median: steps differ in length, and the mean over random batches is what an epoch takes.
    step = sum(seconds) / len(seconds)
    lengths = [(len(e.source), len(e.target)) for e in examples]
    tokens = sum(s + t for s, t in lengths) / len(lengths)
    of_all = flops.total(made.room.base.model.config, lengths)
    frozen, full = (value / len(lengths) * batch / step for value in (of_all.frozen, of_all.full))
    session.pace[f"{family} training"] = batch / step
    return [
        {
            "model": made.room.base.name_or_path,
            "batch": batch,
            "micro-batch": made.config.training.micro_batch,
            "tokens an example": tokens,
            "step ms": 1e3 * step,
            "range ms": spread([1e3 * s for s in seconds]),
            "examples/s": batch / step,
            "tokens/s": batch * tokens / step,
            "TFLOP/s (4 P)": frozen / 1e12,
            "MFU % (4 P)": 100 * frozen / flops.PEAK,
            "MFU % (6 P)": 100 * full / flops.PEAK,
            "peak GiB": peak_gb(made.device),
        }
    ]


def mixed_rows(made: World, count: int, data_dir: Path | None) -> list[Example]:
    """Rows of the four tasks, as many of each as the published order has of them."""
    total = sum(train for train, _ in shapes.ROWS.values())
    found: list[Example] = []
    for task in ORDER:
        found += shapes.rows(made.room.base, [task], -(-count * shapes.ROWS[task][0] // total), data_dir)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i] for i in order[:count]]


def test_set(made: World, task: str, count: int, data_dir: Path | None) -> TestSet:
    """Test rows, 80 % of which the rigged model answers right."""
    examples = shapes.rows(made.room.base, [task], count, data_dir, right=shapes.RIGHT, seed=1)
    labels = [made.room.encoder.decode(example.target[:-1]) for example in examples]
    return TestSet(
        benchmark.get(task), [Row(id=str(i), text="", label=label) for i, label in enumerate(labels)], examples
    )


def answering(made: World, position: int = 2) -> StageRun:
    """A stage that only answers."""
    built = made.stage("inclora", position)
    built.close()
    made.room.adapters.show(None)
    return StageRun(made.room, built.config, position - 1, evaluating=True)


def timed_evaluation(
    stage: StageRun,
    tests: Mapping[str, TestSet],
    mode: Any,
    tokens: int | None = None,  # the default
) -> tuple[float, float]:
    """Seconds, and exact match in percent."""
    stage.config.eval.mode = mode
    stage.config.eval.batch_tokens = tokens
    synchronise(stage.device)
    started = time.perf_counter()
    scored = evaluate(stage, tests)
    synchronise(stage.device)
    right = [row["correct"] for one in scored for row in one.predictions]
    return time.perf_counter() - started, 100 * sum(right) / len(right)


def pace_of_evaluation(session: Session, made: World, count: int) -> Table:
    """Answered examples/s in both modes, in turns, with batches of the default size and of 16384 tokens."""
    stage = answering(made)
    tests = {task: test_set(made, task, count, session.given.data_dir) for task in ORDER}
    total = count * len(tests)
    ways = {
        (mode, tokens): partial(timed_evaluation, stage, tests, mode, tokens)
        for tokens in (None, 16384)
        for mode in ("verify", "generate")
    }
    found = {way: runs[1:] for way, runs in take_turns(ways, 3).items()}  # the first turn warms up
    stage.close()
    seconds = {way: median([one for one, _ in runs]) for way, runs in found.items()}
    session.pace["t5 evaluation"] = total / seconds["verify", None]
    return [
        {
            "mode": mode,
            "tokens a batch": tokens or "default",
            "rows": total,
            "right %": runs[0][1],
            "s": seconds[mode, tokens],
            "examples/s": total / seconds[mode, tokens],
            "time ÷ verify": seconds[mode, tokens] / seconds["verify", tokens],
        }
        for (mode, tokens), runs in found.items()
    ]


def stages(session: Session, made: World, steps: int, rounds: int) -> Table:
    """Step time (in turns) and peak memory at stages 2, 8 and 15."""
    batch = made.config.training.global_batch
    examples = mixed_rows(made, batch * steps, session.given.data_dir)
    times = world.steps_in_turns(made, POSITIONS, list(world.METHODS), examples, rounds)
    rows = []
    for method in world.METHODS:
        row: dict[str, Any] = {"method": method}
        for position in POSITIONS:
            stage = made.stage(method, position)
            reset_peak(made.device)
            world.step_seconds(stage, examples[: 2 * batch])
            row[f"stage {position}: step ms"] = 1e3 * median(times[method, position])
            row[f"stage {position}: peak GiB"] = peak_gb(made.device)
        row["stage 15 ÷ 2"] = row["stage 15: step ms"] / row["stage 2: step ms"]
        rows.append(row)
    return rows


def extrapolated(session: Session) -> dict[str, float]:
    """Seconds of order 1 at the published size, from the paces measured."""
    train = sum(rows for rows, _ in shapes.ROWS.values())
    tested = sum(test * (len(ORDER) - i) for i, (_, test) in enumerate(shapes.ROWS.values()))  # every task seen so far
    return {
        "training": train / session.pace["t5 training"],
        "evaluation": tested / session.pace["t5 evaluation"],
    }


def whole_order(session: Session, made: World, share: float) -> Table:
    """Order 1 from the first stage to the last, with the published numbers of rows."""
    made.pairs.clear()
    made.room.adapters.restore([], {}, None)
    data_dir = session.given.data_dir
    spent = {"training": 0.0, "evaluation": 0.0}
    counts = {"training": 0, "evaluation": 0}
    right = 0.0
    tests: dict[str, TestSet] = {}
    config = None
    for index, task in enumerate(ORDER):
        train, test = (max(8, round(share * rows)) for rows in shapes.ROWS[task])
        own = shapes.rows(made.room.base, [task], train, data_dir)
        tests[task] = test_set(made, task, test, data_dir)
        if config is None:
            first = made.stage("olora (absolute)", 1)
            config = first.config
            first.close()
        stage = StageRun(made.room, config, index)
        made.room.method.build(stage)
        synchronise(stage.device)
        began = time.perf_counter()
        train_stage(stage, Source(own, [task] * len(own)), log=lambda _: None, tick=lambda *_: None)
        made.room.adapters.train(False)
        commit_update(made.room.method, stage)
        synchronise(stage.device)
        spent["training"] += time.perf_counter() - began
        seconds, right = timed_evaluation(stage, tests, "verify")
        stage.close()
        spent["evaluation"] += seconds
        counts["training"] += len(own)
        counts["evaluation"] += sum(len(test.rows) for test in tests.values())
    guess = extrapolated(session)
    return [
        {
            "part": part,
            "rows": counts[part],
            "s": spent[part],
            "examples/s": counts[part] / spent[part],
            "extrapolated s": guess[part],
            "published s, 8 GPUs fp32": PUBLISHED[part],
            "right % at the end": right if part == "evaluation" else None,
        }
        for part in spent
    ]


def extrapolation(session: Session) -> Table:
    return [
        {"part": part, "extrapolated s": seconds, "published s, 8 GPUs fp32": PUBLISHED[part]}
        for part, seconds in extrapolated(session).items()
    ]


def main() -> None:
    made = parser(__doc__)
    made.add_argument(
        "--shape", choices=("full", "tiny"), default="full", help="tiny: a rehearsal (default %(default)s)"
    )
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default %(default)s")
    made.add_argument("--budget", type=float, default=480, help="seconds there are in all (default %(default)s)")
    made.add_argument("--data-dir", type=Path, help="benchmark folder: take text lengths from its training files")
    made.add_argument("--batch", type=int, default=64, help="global batch (default %(default)s)")
    made.add_argument("--micro", type=int, default=64, help="largest T5 micro-batch to try (default %(default)s)")
    made.add_argument(
        "--llama-micro", type=int, default=16, help="largest LLaMA micro-batch to try (default %(default)s)"
    )
    given = made.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; a rehearsal: --shape tiny --device cpu")
    session = Session(given)
    of_t5(session)
    of_llama(session)
    print(f"\n{given.budget - session.left:.0f} s in all", flush=True)


def of_t5(session: Session) -> None:
    """Everything about the T5 shape; its memory is free again afterwards."""
    given, small, name = session.given, session.small, session.shape("t5")
    t5 = shapes.random_world(name, given.device, POSITIONS[-1], batch=given.batch, micro=given.micro)
    session.section("training", 20, lambda: {name: pace_of_training(session, t5, "t5", 6 if small else 32)})
    session.section("evaluation", 30, lambda: {name: pace_of_evaluation(session, t5, 32 if small else 1024)})
    measured = len(session.pace) == 2
    if measured:
        title = "33,000 rows trained, 76,000 scored"
        session.section("order 1, extrapolated", 0, lambda: {title: extrapolation(session)})
    session.section("stages", 60, lambda: {name: stages(session, t5, 2 if small else 4, 1 if small else 2)})
    agnews = shapes.rows(t5.room.base, ["agnews"], given.batch * (2 if small else 6), given.data_dir)
    session.section("penalty", 40, lambda: {name: shares(t5, agnews, POSITIONS[-1], 1 if small else 2)})
    if measured:
        # What the extrapolation says and a third more, and enough to be left for LLaMA.
        share = 0.002 if small else 1.0
        need = 1.3 * share * sum(extrapolated(session).values()) + 10 + LLAMA_SECONDS
        session.section("order 1 at its published size", need, lambda: {name: whole_order(session, t5, share)})
    session.section("compile", 150 + LLAMA_SECONDS, lambda: {name: compare(t5, agnews, 2, 1 if small else 2)})
    t5.close()


def of_llama(session: Session) -> None:
    """Training of the LLaMA shape."""
    given, small, name = session.given, session.small, session.shape("llama")

    def work() -> dict[str, Table]:
        made = shapes.random_world(name, given.device, 2, batch=given.batch, micro=given.llama_micro)
        try:
            return {name: pace_of_training(session, made, "llama", 5 if small else 12)}
        finally:
            made.close()

    session.section("LLaMA", 10 if small else 60, work)


if __name__ == "__main__":
    main()
