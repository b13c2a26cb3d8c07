"""What a run's page is made of, read from its folder without model or torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from cl_runner.atomic import read_json
from cl_runner.errors import UserError
from cl_runner.methods import METHODS
from cl_runner.plain_files import lines
from cl_runner.report.page.run_page import RunPage
from cl_runner.runs.folder import RunDir, readable, stage_names
from cl_runner.runs.forgotten import Answered, RunForgetting, read_answered
from cl_runner.runs.results import summary_of
from cl_runner.runs.shapes import read_metrics
from cl_runner.runs.updates import peak_megabytes
from cl_runner.terminal.masking import masked

_WARNING = re.compile(r"(?:stage (\d+) of \d+ (\S+): )?warning: (.*)")


def read_page(run: RunDir) -> RunPage:
    """All that stands on the page of a run. Raises UserError where a file of it is broken."""
    summary = summary_of(run)
    forgetting: RunForgetting | None = None
    answered: Answered = {}
    untold = ""
    try:
        if summary.stages_done:
            forgetting, answered = read_answered(run)
    except UserError as error:
        untold = f"what was forgotten is not told: {error}"
    with readable(run):
        about = run.about()
        names = stage_names(about)[: summary.stages_done]
        stages = [read_metrics(run.stage_dir(index, name)) for index, name in enumerate(names)]
        environment = run.environment()
        rows = [row for row in run.log_rows() if row["stage"] in names]
        return RunPage(
            run=summary,
            title=METHODS.get(about["method"]).title if about["method"] in METHODS.ours else "",
            rows=_rows(about, summary.metrics),
            forgotten=[] if forgetting is None else forgetting.tasks,
            answered=answered,
            log=rows,
            stages=stages,
            peak=peak_megabytes(run),
            analysis=_analysis(run, names),
            health=[*filter(None, [untold]), *_warnings(run)],
            command=masked(str(environment.get("command", ""))),
            environment=environment_told(environment),
            again=shlex.quote(run.name),
            notes=_notes(forgetting),
        )


def _rows(about: Mapping[str, Any], metrics: Mapping[str, str]) -> list[list[str]]:
    """Of each task: its metric, train and test rows, those left out, test rows that are in train too, where from."""
    found = []
    for task in about["tasks"]:
        splits = about["identity"]["data"][task]
        dropped = sum(split["dropped"] + split.get("without_gold", 0) for split in splits.values())
        twice = splits.get("test", {}).get("in_train")  # of an earlier version: not counted
        sources = dict.fromkeys(split["source"] for split in splits.values())
        count = [f"{splits[name]['rows']:,}" if name in splits else "–" for name in ("train", "test")]
        found.append(
            [
                task,
                metrics.get(task, ""),
                *count,
                f"{dropped:,}",
                "–" if twice is None else f"{twice:,}",
                "; ".join(sources),
            ]
        )
    return found


def _analysis(run: RunDir, names: Sequence[str]) -> dict[str, Any] | None:
    """``analysis.json``, if it is of all layers, and of the stages that there are by now."""
    file = run.analysis_file
    if not names or not file.is_file():
        return None
    found = read_json(file)
    return found if "pattern" not in found and found.get("stages") == run.digests(names) else None


def _warnings(run: RunDir) -> list[str]:
    """What the screen warned of, each once."""
    if not run.log_file.is_file():
        return []
    said = (line.decode("utf-8", "replace").rstrip("\n") for line in lines(run.log_file))
    found = [match for line in said if (match := _WARNING.fullmatch(line))]
    return list(dict.fromkeys(f"stage {m[1]} {m[2]}: {m[3]}" if m[1] else m[3] for m in found))


def environment_told(environment: Mapping[str, Any]) -> dict[str, str]:
    """What a run ran on, in words."""
    words = {
        "cl_runner": "cl-runner",
        "git_commit": "commit",
        "python": "Python",
        "platform": "platform",
        "device": "device",
        "cpu": "instructions",
        "cuda": "CUDA",
        "processes": "processes",
        "threads": "threads",
        "started": "started",
    }
    told = {word: str(environment[key]) for key, word in words.items() if environment.get(key) is not None}
    if environment.get("git_dirty") and "commit" in told:
        told["commit"] += ", with changes that are not in it"
    packages = environment.get("packages", {})
    if packages:
        told["packages"] = ", ".join(f"{name} {version}" for name, version in packages.items())
    if environment.get("later"):
        told["went on"] = f"{len(environment['later'])} times after an interruption"
    return told


def _notes(forgetting: RunForgetting | None) -> list[str]:
    if forgetting is None:
        return []
    skipped = [f"{task}: no rows are right or wrong; {why}" for task, why in forgetting.skipped.items()]
    return [*skipped, *forgetting.notes]
