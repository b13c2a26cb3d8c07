"""``cl-runner doctor``: what there is on this machine, and what it is missing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cl_runner.doctor import child, devices, hub, packages, places
from cl_runner.doctor.asking import asked
from cl_runner.doctor.finding import Finding, as_text, ready
from cl_runner.doctor.finding import as_json as json_of
from cl_runner.terminal.console import print_json


def doctor(*, root: Path, as_json: bool) -> int:
    """``cl-runner doctor``. Returns the exit code: 2 where nothing would train, as it is."""
    findings = examined(root)
    if as_json:
        print_json(json_of(findings))
    else:
        print(as_text(findings))
    return 0 if ready(findings) else 2


def examined(runs: Path) -> list[Finding]:
    """All that there is to say."""
    with ThreadPoolExecutor(1) as beside:
        answering = beside.submit(lambda: list(hub.hub()))  # it may have to wait for nobody
        answers = asked(child.order(packages.modules()), packages.on_torch())
        return [
            *packages.packages(answers),
            *devices.devices(answers),
            *devices.talking(answers),
            *devices.ops(answers),
            *places.places(runs),
            *answering.result(),
            *packages.extras(answers),
        ]
