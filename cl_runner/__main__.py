"""``cl-runner`` and ``python -m cl_runner``: what the launchers start."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """The command line; without the package that reads it, what is missing here."""
    try:
        from cl_runner.cli import main as command_line
    except ImportError as error:
        sys.exit(_without(error))
    command_line()


def _without(error: ImportError) -> int:
    """Of a command line that cannot be read: ``doctor`` is answered all the same. Returns the exit code."""
    if sys.argv[1:2] == ["doctor"]:
        from cl_runner.commands.doctor import doctor

        return doctor(root=Path("runs"), as_json="--json" in sys.argv)
    print(f"cl-runner: {' '.join(str(error).split())}; cl-runner doctor says what is missing here", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
