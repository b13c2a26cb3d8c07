"""``python -m cl_runner``: what the launchers start."""

from cl_runner.cli import main

if __name__ == "__main__":
    main()
