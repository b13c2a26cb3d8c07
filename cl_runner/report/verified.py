"""What ``verify`` found of a run: what was checked, what differs, what could not be checked and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from cl_runner.config.yamlfile import printable

Part = Literal["files", "scores", "data", "model", "asked again"]
PARTS: tuple[Part, ...] = ("files", "scores", "data", "model", "asked again")
MOST = 8  # lines of one check that are shown; --json has all


@dataclass
class Check:
    """One part of a stage, or of the run itself, held against what it has to be.

    of: a stage as ``2 amazon``, or ``run``. checked: how many files, scores, splits or answers were held against what
    they have to be; wrong: how many of these differ. differs: a line for each difference, in the order found, some of
    them of no single one. unchecked: what could not be, with why.
    """

    of: str
    part: Part
    checked: int = 0
    wrong: int = 0
    differs: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def holds(self, *faults: str) -> bool:
        """Count one thing that was checked; ``faults`` are what is wrong with it. Returns whether nothing is."""
        self.checked += 1
        self.wrong += bool(faults)
        self.differs += faults
        return not faults

    @property
    def cell(self) -> str:
        """In the table: ``6 ok``, ``1 of 6 differ``, ``-`` where nothing could be checked."""
        if self.wrong or self.differs:
            return f"{self.wrong} of {self.checked} differ" if self.wrong else "differs"
        return f"{self.checked} ok" if self.checked else "-"

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "of": self.of,
            "part": self.part,
            "checked": self.checked,
            "wrong": self.wrong,
            "differs": list(self.differs),
            "unchecked": list(self.unchecked),
        }


@dataclass(frozen=True)
class Verified:
    """All checks of a run; ``said`` are lines that are no fault."""

    run: str
    checks: Sequence[Check]
    said: Sequence[str] = ()

    @property
    def holds(self) -> bool:
        """Whether nothing that was checked differs."""
        return not any(check.differs for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The same for machines, uncut."""
        return {
            "run": self.run,
            "holds": self.holds,
            "checks": [check.to_json() for check in self.checks],
            "said": list(self.said),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"run folder: {self.run}")
        yield self._table()
        yield from map(Text, self._lines("differs", [(check.of, check.differs) for check in self.checks]))
        yield from map(Text, self._lines("not checked", [(check.of, check.unchecked) for check in self.checks]))
        yield from map(Text, self.said)
        yield Text("")
        count = sum(len(check.differs) for check in self.checks)
        some = "1 thing differs" if count == 1 else f"{count} things differ"
        yield Text(f"{some} from what the run says" if count else "all that was checked holds", style="bold")

    def _table(self) -> Table:
        parts = [part for part in PARTS if any(check.part == part for check in self.checks)]
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("", max_width=20, no_wrap=True)
        for part in parts:
            table.add_column(part)
        for of in dict.fromkeys(check.of for check in self.checks):
            cells = {check.part: check.cell for check in self.checks if check.of == of}
            table.add_row(Text(printable(of)), *(Text(cells.get(part, "")) for part in parts))
        return table

    @staticmethod
    def _lines(head: str, found: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
        if not any(lines for _, lines in found):
            return
        yield ""
        yield f"{head}:"
        for of, lines in found:
            yield from (f"  {printable(of)}: {printable(line)}" for line in lines[:MOST])
            if len(lines) > MOST:
                yield f"  {printable(of)}: and {len(lines) - MOST} more (--json has all)"
