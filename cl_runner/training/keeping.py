"""What a stage holds is kept now and then, and when it is to stop, so that it goes on in its middle.

Ranks agree after every step: what one has been told, by the clock or by a signal, all do at the same step.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from cl_runner.atomic import append_jsonl, put_folder, sync
from cl_runner.config.schema import CheckpointConfig
from cl_runner.runs import checkpoints
from cl_runner.runs.checkpoints import Checkpoint
from cl_runner.runs.folder import RunDir
from cl_runner.terminal import stopping
from cl_runner.terminal.console import one_line
from cl_runner.terminal.stopping import Stopped
from cl_runner.training.stage import StageRun
from cl_runner.training.step_files import read, write_own, write_shared
from cl_runner.training.step_state import StepState

ANSWERS = "answers.jsonl"  # beside the last step's state: what evaluation has answered so far, no part of DONE


class Keeper:
    """The checkpoints of one stage, on every rank.

    Args:
        settings: None: nothing is kept.
        facts: what has to be the same where it goes on (``checkpoints.facts``).
        entered: the checkpoint that the stage goes on from.
        warn: takes a line.
    """

    def __init__(
        self,
        run: RunDir,
        stage: StageRun,
        settings: CheckpointConfig | None,
        facts: Mapping[str, Any],
        entered: Checkpoint | None = None,
        warn: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run, self.stage, self.settings, self.facts, self.warn, self._clock = (
            run,
            stage,
            settings,
            facts,
            warn,
            clock,
        )
        self.state: StepState | None = None  # to enter the stage with
        self._newest = entered
        self._before = 0.0  # seconds that the stage took in earlier processes
        if entered:
            self.state = read(entered.folder, entered.step, stage.rank)
            self._before = float(entered.about()["seconds"])
        self._began = self._last = clock()

    @property
    def seconds(self) -> float:
        """Since the stage began, in this process and earlier ones, as far as they count."""
        return self._before + self._clock() - self._began

    def between(self, take: Callable[[], StepState]) -> None:
        """After a step: keep what the stage holds, where that is due; stop, where that was asked. *Collective*.

        From the first step on a signal waits for the end of a step, until the last one is done.

        Raises:
            Stopped: a signal has come; what the stage holds is kept.
        """
        if self.settings is None:
            return
        stop, due = self._agreed()
        if stop or due:
            self._keep(take())
        if stop:
            raise Stopped(stopping.asked() or "a signal to another process")
        if self.stage.step < self.stage.steps:
            stopping.put_off()
        else:
            stopping.heed()

    def close(self) -> None:
        """The stage is over, or was left: signals are heeded at once again."""
        stopping.heed()

    def committed(self) -> None:
        """The stage is on disk, and what was kept of it of no use any more. On every rank."""
        if self.stage.rank == 0:
            checkpoints.clear(self.run)

    # Evaluation.

    def answered(self, how: str) -> dict[str, list[str]]:
        """Task → the answers that an earlier process has kept, of those who answer alike (``how``)."""
        file = self._answers()
        found: dict[str, list[str]] = {}
        if file is not None and file.is_file():
            for line in file.read_text("utf-8").split("\n"):
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # not written to its end
                if row["how"] == how:
                    found[row["task"]] = row["answers"]
        return found

    def answers(self, how: str, task: str, given: Sequence[str]) -> None:
        """All rows of a task are answered."""
        file = self._answers()
        if file is not None and self.stage.rank == 0:
            append_jsonl(file, [{"how": how, "task": task, "answers": list(given)}])

    def _answers(self) -> Path | None:
        """The file; None where the last step is not kept, so that another process would train some of the stage."""
        newest = self._newest
        return newest.folder / ANSWERS if newest and newest.step == self.stage.steps else None

    # How.

    def _agreed(self) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether rank 0 finds that a checkpoint is due."""
        told = [stopping.asked() is not None, self.stage.rank == 0 and self._due()]
        if self.stage.ranks > 1:
            told = self.stage.sum(torch.tensor(told, dtype=torch.int32, device=self.stage.device)).tolist()
        return bool(told[0]), bool(told[1])

    def _due(self) -> bool:
        assert self.settings is not None
        step, every, minutes = self.stage.step, self.settings.every_steps, self.settings.every_minutes
        if step == self.stage.steps and self._newest:
            return True  # evaluation may take long, too; but a short stage leaves nothing
        late = minutes is not None and self._clock() - self._last >= 60 * minutes
        return late or (every is not None and step % every == 0)

    def _keep(self, state: StepState) -> None:
        """Write it beside its place, then move it there; one that cannot be written is said, and the run goes on."""
        stage, rank = self.stage, self.stage.rank
        final = checkpoints.place(self.run, stage.index, stage.plan.name, state.step)
        draft = final.with_name(f".{final.name}.draft")

        def begin() -> None:
            if rank == 0:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
                write_shared(draft, state)

        def end() -> None:
            if rank == 0:
                log = self.run.path / "log.jsonl"
                if log.is_file():
                    sync(log)
                about = {
                    "step": state.step,
                    "steps": stage.steps,
                    "seconds": round(self.seconds, 3),
                    "log_rows": self.run.count_log_rows(stage.plan.name),
                    "facts": dict(self.facts),
                }
                checkpoints.seal(draft, about)
                shutil.rmtree(final, ignore_errors=True)
                put_folder(draft, final)

        try:
            failed = self._all(begin) or self._all(lambda: write_own(draft, state, rank)) or self._all(end)
        finally:
            if rank == 0:
                shutil.rmtree(draft, ignore_errors=True)  # on a full disk, its room is wanted
        self._last = self._clock()
        if failed:
            self.warn(f"warning: no checkpoint at step {state.step}: {failed}; the stage goes on without")
            return
        self._newest = Checkpoint(final, stage.index, stage.plan.name, state.step)
        if rank == 0:
            assert self.settings is not None
            checkpoints.rotate(self.run, stage.index, stage.plan.name, self.settings.keep)

    def _all(self, work: Callable[[], None]) -> str:
        """Work on every rank; why it failed on the first one that it failed on, the same on all."""
        failed = ""
        try:
            work()
        except (OSError, SafetensorError) as error:
            failed = one_line(str(error))
        return next(filter(None, dict(sorted(self.stage.gather({self.stage.rank: failed}).items())).values()), "")
