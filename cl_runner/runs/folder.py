"""What lies where in a run folder, who may write into it, and which of its stages are there."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cl_runner.atomic import sha256, sync, umask, write_json, write_text
from cl_runner.config.lookup import is_name
from cl_runner.errors import UserError
from cl_runner.plain_files import lines, refuse_foreign
from cl_runner.runs import lock
from cl_runner.runs.process import Process
from cl_runner.runs.shapes import About, Environment, Status, read_shaped
from cl_runner.terminal.masking import masked

LAYOUT = 2
READABLE = (1, LAYOUT)  # 1 had no state of its own for the next stage, and no options
# What a run writes into its folder; in the place of any of it there may be nothing that leads elsewhere.
OWN = (
    "run.yaml", "order.yaml", "run.json", "environment.json", "status.json", "analysis.json", "log.jsonl", "run.log",
    "report.html", "matrix.csv", "metrics.json", "stages", "checkpoint", "lm-eval", ".lock", ".writer",
)  # fmt: skip


class RunDir:
    """One run folder. Reading needs no lock; writing happens under ``lock()`` on rank 0."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._looked_through = False

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def config_file(self) -> Path:
        """The resolved config: running it again gives this run."""
        return self.path / "run.yaml"

    @property
    def order_file(self) -> Path:
        """The order as the run has it: its own tasks stand in it. Runs of earlier versions have none."""
        return self.path / "order.yaml"

    @property
    def log_file(self) -> Path:
        """What the screen said, plain lines."""
        return self.path / "run.log"

    @property
    def page_file(self) -> Path:
        """The run's page."""
        return self.path / "report.html"

    @property
    def analysis_file(self) -> Path:
        """What ``cl-runner analyze`` found."""
        return self.path / "analysis.json"

    @property
    def stages_dir(self) -> Path:
        """Folder of the committed stages."""
        return self.path / "stages"

    def exists(self) -> bool:
        """Whether this folder is a run."""
        try:
            return self.config_file.is_file() and (self.path / "run.json").is_file()
        except OSError:  # a name longer than names may be
            return False

    def create(
        self,
        config_yaml: str,
        order_yaml: str,
        about: Mapping[str, Any],
        fill: Callable[[Path], None] | None = None,
    ) -> None:
        """Make the folder with ``run.yaml``, ``order.yaml`` and ``run.json`` (what the run is of), in one atomic step.

        ``fill`` may put more into the folder before anybody sees it. A run that another process has made there in the
        meantime is left as it is.

        Raises:
            UserError: it cannot be written, or something else is there.
        """
        made: list[Path] = []
        draft: Path | None = None
        try:
            for folder in reversed([self.path.parent, *self.path.parent.parents]):
                if not folder.exists():
                    folder.mkdir(exist_ok=True)
                    made.append(folder)
            maker = f".{self.name[:30]}.{Process.here().word}."
            draft = Path(tempfile.mkdtemp(prefix=maker, suffix=".draft", dir=self.path.parent))
            draft.chmod(0o777 & ~umask())
            (draft / "stages").mkdir()
            write_text(draft / "run.yaml", config_yaml)
            write_text(draft / "order.yaml", order_yaml)
            written = {"layout": LAYOUT, "folder": str(self.path.absolute()), **about}
            write_json(draft / "run.json", {**written, "sha256": seals(draft, written)})
            if fill is not None:
                fill(draft)
            for file in ("run.yaml", "order.yaml", "run.json", ""):
                sync(draft / file)
            draft.rename(self.path)
            sync(self.path.parent)
        except BaseException as error:
            if draft is not None:
                shutil.rmtree(draft, ignore_errors=True)
            if isinstance(error, OSError) and self.exists():
                return
            with suppress(OSError):  # a folder that others use by now stays
                for folder in reversed(made):
                    folder.rmdir()
            if isinstance(error, OSError):
                raise UserError(f"cannot write the run folder {self.path}: {error.strerror or error}") from None
            raise

    def clear_drafts(self) -> None:
        """Remove what processes that were killed in ``create`` have left beside the folder."""
        for draft in self.path.parent.glob(f".{glob.escape(self.name[:30])}.*.draft"):
            maker = Process.of_word(draft.name.split(".")[-3])
            if maker is not None and maker.alive() is False:
                shutil.rmtree(draft, ignore_errors=True)

    def refuse_foreign(self) -> None:
        """Refuse a folder in which, in the place of a run's own files, there are links, pipes or devices.

        It may come from somebody else, and who reads or writes through a link does so elsewhere. What trackers and
        users have put beside the run's own files is not looked at. Raises UserError.
        """
        if self._looked_through:
            return
        try:
            for name in OWN:
                path = self.path / name
                try:
                    mode = path.lstat().st_mode  # once: a run that trains makes and removes files meanwhile
                except FileNotFoundError:
                    continue
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    what = "a symlink" if stat.S_ISLNK(mode) else "neither a file nor a folder"
                    raise UserError(f"{path} is {what}, which no run writes, and is not followed")
                if stat.S_ISDIR(mode):
                    with suppress(FileNotFoundError):
                        refuse_foreign(path, links=False)
        except OSError as error:
            raise UserError(f"{error.filename or self.path}: {error.strerror}") from None
        self._looked_through = True

    def about(self) -> dict[str, Any]:
        """``run.json``: the plan and what identifies the run.

        Raises:
            UserError: this is no run folder, its ``run.json`` is broken or of another version, or there is something
                in it that no run writes.
        """
        if self.exists():
            self.refuse_foreign()
        return self.unsafe_about()

    def unsafe_about(self) -> dict[str, Any]:
        """The same for who tells of what is wrong, and looks at each file himself."""
        if not self.exists():
            what = (
                "is no run folder (it has no run.yaml and run.json)" if os.path.lexists(self.path) else "does not exist"
            )
            raise UserError(f"{self.path} {what}")
        about = read_shaped(self.path / "run.json", About)
        if about.get("layout") not in READABLE:
            known = " and ".join(map(str, READABLE))
            raise UserError(f"{self.path / 'run.json'}: layout {about.get('layout')}; this version reads {known}")
        return about

    def lock(self) -> AbstractContextManager[None]:
        """Hold the run for writing; ends with the process. Raises UserError, naming it, where another process does."""
        self._looked_through = False  # what was right when it was read may not be now
        self.refuse_foreign()
        return lock.held(self.path)

    def locked(self) -> bool:
        """Whether a living process holds the run."""
        return lock.is_held(self.path)

    # Stages.

    def stage_dir(self, index: int, name: str) -> Path:
        """Folder of stage ``index`` (from 0): ``01-dbpedia``."""
        return self.stages_dir / f"{index + 1:02d}-{name}"

    def committed(self, names: Sequence[str]) -> int:
        """How many of the planned stages are committed, without a gap."""
        for index, name in enumerate(names):
            if not (self.stage_dir(index, name) / "DONE").is_file():
                return index
        return len(names)

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        """Committed stage → what it committed: the hash of its last file, which has those of all others."""
        return {name: sha256(self.stage_dir(index, name) / "DONE") for index, name in enumerate(names)}

    def finished(self, names: Sequence[str], wanted: int | None = None) -> int:
        """The finished stage (from 1) that is asked for; the last one without. Raises UserError if it is not there."""
        done = self.committed(names)
        if done == 0:
            raise UserError(f"the run {self.path} has no finished stage yet")
        number = done if wanted is None else wanted
        if not 1 <= number <= done:
            there = "stage 1 alone" if done == 1 else f"stages 1 to {done}"
            raise UserError(f"--stage {number}: the run {self.path} has finished {there}")
        return number

    def refuse_gaps(self, names: Sequence[str]) -> None:
        """A stage stands on those before it.

        Raises:
            UserError: one is committed, and one before it is not.
        """
        done = self.committed(names)
        for index in range(done + 1, len(names)):
            if (self.stage_dir(index, names[index]) / "DONE").exists():
                raise UserError(
                    f"{self.path} is damaged: stage {index + 1} ({names[index]}) is there and stage {done + 1} "
                    f"({names[done]}) is not; put it back, or --restart to begin anew beside it"
                )

    def log_rows(self) -> list[dict[str, Any]]:
        """The rows of ``log.jsonl``, without a last one that is not written to its end (the power went).

        Raises UserError where another is broken.
        """
        file = self.path / "log.jsonl"
        if not file.is_file():
            return []
        rows: list[dict[str, Any]] = []
        try:
            for line in lines(file):
                if line.endswith(b"\n") and line != b"\n":
                    rows.append(dict(json.loads(line.decode("utf-8", "replace"))))  # noqa: PERF401 - the fault counts them
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{file}: broken JSON behind row {len(rows)}") from None
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}") from None
        return rows

    def count_log_rows(self, stage: str) -> int:
        """How many rows of ``log.jsonl`` are of a stage."""
        file = self.path / "log.jsonl"
        if not file.is_file():
            return 0
        return sum(_stage_of(line.decode("utf-8", "replace")) == stage for line in lines(file))

    def keep_log_rows(self, stages: Sequence[str], entered: str = "", rows: int = 0) -> None:
        """Take out of ``log.jsonl`` what an interrupted stage logged: it is going to be trained again.

        Of the one that is ``entered`` in its middle the first ``rows`` rows stay.
        """
        file = self.path / "log.jsonl"
        if not file.is_file():
            return
        every = [line.decode("utf-8", "replace") for line in lines(file)]
        own = [number for number, line in enumerate(every) if _stage_of(line) == entered]
        stay = set(own[:rows])
        kept = [line for number, line in enumerate(every) if _stage_of(line) in stages or number in stay]
        if kept != every:
            write_text(file, "".join(kept))

    def status(self) -> dict[str, Any]:
        """``status.json``: how the last process ended; ``{}`` if none said."""
        file = self.path / "status.json"
        return read_shaped(file, Status) if file.is_file() else {}

    def environment(self) -> dict[str, Any]:
        """``environment.json``: what the run's processes ran on; ``{}`` before the first. Raises UserError."""
        file = self.path / "environment.json"
        return read_shaped(file, Environment) if file.is_file() else {}

    def set_status(self, state: str, **more: Any) -> None:
        """Record how the run stands: running, stopped, failed, done."""
        write_json(self.path / "status.json", {"state": state, **{k: _masked(v) for k, v in more.items()}})


def _masked(value: Any) -> Any:
    return masked(value) if isinstance(value, str) else value


def seals(folder: Path, about: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of what a run begins with, none of which is written again; of ``run.json`` that of all else in it."""
    rest = json.dumps({key: value for key, value in about.items() if key != "sha256"}, sort_keys=True)
    files = {name: sha256(folder / name) for name in ("run.yaml", "order.yaml") if (folder / name).is_file()}
    return {**files, "run.json": hashlib.sha256(rest.encode()).hexdigest()}


def _stage_of(line: str) -> str | None:
    """The stage that a line of ``log.jsonl`` is of; None where the line is not whole."""
    try:
        row = json.loads(line) if line.endswith("\n") else None
    except (ValueError, RecursionError):
        return None
    stage = row.get("stage") if isinstance(row, dict) else None
    return stage if isinstance(stage, str) else None


def kept_order(config_file: Path) -> str | None:
    """The order that a run keeps beside its ``run.yaml``: the file it was made from may have changed, or be gone."""
    run = RunDir(config_file.parent)
    is_own = config_file.name == run.config_file.name and run.exists() and run.order_file.is_file()
    if is_own:
        run.refuse_foreign()
    return str(run.order_file) if is_own else None


# What reading a broken file ends in.
BROKEN: tuple[type[Exception], ...] = (
    LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError, SafetensorError, OSError
)  # fmt: skip


@contextmanager
def readable(run: RunDir, *more: type[Exception]) -> Iterator[None]:
    """Inside, a key that a run's file lacks, or that holds something else, is a fault of that run; as are ``more``."""
    try:
        yield
    except (*BROKEN, *more) as error:
        what = f"{type(error).__name__}: {str(error)[:300]}"
        raise UserError(f"the run {run.path} has a broken file ({what})") from error


def stage_names(about: Mapping[str, Any]) -> list[str]:
    """The planned stages of a ``run.json``."""
    names = [stage["name"] for stage in about["stages"]]
    for name in names:
        if not isinstance(name, str) or not is_name(name):
            raise ValueError(f"{name!r} is no name of a stage")
    return names
