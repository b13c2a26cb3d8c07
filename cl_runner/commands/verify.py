"""``cl-runner verify``: whether a run is what was committed, says what its answers give, and still answers so."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cl_runner.atomic import read_json
from cl_runner.commands.given import own_settings
from cl_runner.errors import UserError
from cl_runner.imports import light_imports
from cl_runner.report.verified import Check, Verified
from cl_runner.runs import catalog
from cl_runner.runs.folder import BROKEN, RunDir
from cl_runner.runs.verifying import BASE, Folder, title, verify_folder
from cl_runner.settings import Resolved
from cl_runner.terminal.console import one_line, print_json, rich_print, say
from cl_runner.training.origins import check_origins, not_at_hand

if TYPE_CHECKING:
    from cl_runner.engine.process import Place
    from cl_runner.training.ask_again import AskedAgain


def verify(
    wanted: str | None,
    *,
    root: Path,
    stage: int | None,
    again: bool,
    data_dir: str | None,
    model: str | None,
    plugins: Sequence[str],
    trust: bool,
    as_json: bool,
) -> int:
    """``cl-runner verify``. Writes nothing into the run. Returns the exit code: 1 where something differs."""
    run = _run(root, wanted)
    index = None if stage is None else stage - 1
    folder = verify_folder(run, index)
    checks, said = list(folder.checks), list(folder.said)
    resolved: Resolved | None = None
    why = "run.json cannot be read"
    if folder.about is not None:
        try:
            run.refuse_foreign()
            resolved = own_settings(run, model=model, data_dir=data_dir, plugins=plugins, trust=trust)
            checks[1:1] = check_origins(run, folder.about, resolved)
        except UserError as error:
            why = str(error)
        except BROKEN as error:
            why = f"run.json is broken ({type(error).__name__}: {error})"
    if len(checks) == len(folder.checks):
        checks[1:1] = not_at_hand(why)
    if again:
        wanted_stages = folder.there if index is None else [index]
        said += _asked(run, folder, wanted_stages, resolved, why, checks)
    found = Verified(str(run.path), checks, said)
    if as_json:
        print_json(found.to_json())
    else:
        rich_print(found)
    return 0 if found.holds else 1


def _run(root: Path, wanted: str | None) -> RunDir:
    """The run that is meant, damaged as it may be: a folder with stages in it is one. Raises UserError."""
    with suppress(OSError):  # a name longer than names may be
        for path in [Path(wanted), root / wanted] if wanted else []:
            if (path / "stages").exists() or (path / "run.json").exists():
                return RunDir(path)
    run = catalog.find(root, wanted)
    if wanted is None:
        say(f"the newest run: {run.path}")
    return run


def _asked(
    run: RunDir, folder: Folder, stages: Sequence[int], resolved: Resolved | None, why: str, checks: list[Check]
) -> list[str]:
    """Ask stages again, and add what comes of it; returns lines that are no fault."""
    with light_imports():
        from cl_runner.engine.process import here
        from cl_runner.terminal.progress import Screen
        from cl_runner.training.ask_again import ask_again

        place = here()
    with Screen(enabled=place.rank == 0) as screen:
        for index in stages:
            check = Check(title(index, folder.names[index]), "asked again")
            checks.append(check)
            if resolved is None or not folder.whole(index):
                check.unchecked.append(f"answers of the model: {why if resolved is None else 'the stage is damaged'}")
                continue
            try:
                asked = ask_again(resolved, run, index, None, place, screen)
            except UserError as error:
                check.unchecked.append(f"answers of the model: {error}")
            else:
                path = run.stage_dir(index, folder.names[index])
                _compare(asked, read_json(path / "metrics.json")["counts"], check)
    if any(check.of == BASE for check in checks):
        checks.append(Check(BASE, "asked again", unchecked=["answers of the untouched base: stages alone are asked"]))
    return _devices(run, place)


def _compare(asked: AskedAgain, counts: dict[str, int], check: Check) -> None:
    """Answers and scores of now against those that were committed."""
    for task, now in asked.now.items():
        ids, then = asked.differing[task] or [], asked.committed.get(task)
        check.checked += counts[task]
        check.wrong += len(ids)
        if ids:
            few = ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
            scores = "the same score" if now == then else f"score {_percent(then)} → {_percent(now)}"
            check.differs.append(f"{task}: {len(ids)} of {counts[task]} answers differ ({few}); {scores}")
        elif now != then:
            check.differs.append(f"{task}: the same answers, and the score {then!r} → {now!r}")
    for extra in asked.extra:
        check.checked += extra.rows
        check.wrong += len(extra.differing or [])
        if extra.differing or extra.differing is None:
            check.differs.append(f"extra set {extra.name}: {extra.text}")


def _devices(run: RunDir, place: Place) -> list[str]:
    """A line where the run was computed on another device than what asks now, which rounds otherwise."""
    try:
        said = run.environment().get("device", "an unknown device")
    except UserError:
        said = "an unknown device"
    from cl_runner.training.environment import device_name

    now = device_name(place)
    if said == now:
        return []
    return [one_line(f"trained on {said}, asked again on {now}: answers in a near tie may differ by rounding")]


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"
