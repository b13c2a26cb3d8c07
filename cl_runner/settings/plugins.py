"""Which Python files of a user's are run: those that the user names, never those that a run folder names alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cl_runner import registry
from cl_runner.config.validation import refuse
from cl_runner.errors import UserError
from cl_runner.settings.layers import Given


def load_plugins(given: Sequence[str], named: Given | None = None, config_file: Path | None = None) -> Given:
    """Import the files of ``--plugin``, and those that a config file names (``plugins:``); the setting of all.

    A run folder may come from somebody else: what its ``run.yaml`` names is not imported. ``--plugin`` says it then.

    Raises:
        UserError: a plugin cannot be imported, or a run names some and none was given.
    """
    wanted = [(file, "--plugin") for file in given]
    if named is not None and (files := _files(named)):
        if config_file is None or not is_of_run(config_file):
            wanted = [*((file, named.where) for file in files), *wanted]
        elif not given:
            flags = " ".join(f"--plugin {file}" for file in files)
            raise refuse(named.where, f"a run's plugins are run only if you say so: look at them, and give {flags}")
    found = dict.fromkeys(_imported(file, where) for file, where in wanted)
    origin = "--plugin" if given else named.origin if named is not None else "default"
    return Given(list(found), origin, "--plugin", "--plugin")


def _imported(file: str, where: str) -> str:
    """The absolute path of a plugin, which is imported by then; refused where it was named."""
    try:
        return str(registry.load_plugin(file).file)
    except UserError as error:
        raise refuse(where, str(error)) from error


def is_of_run(config_file: Path) -> bool:
    """Whether a config file is a run's own, by its name or by what lies beside it."""
    file = config_file.resolve()
    return file.name == "run.yaml" or (file.parent / "run.json").exists()


def _files(named: Given) -> list[str]:
    if named.value is None:
        return []
    if not isinstance(named.value, list) or not all(isinstance(file, str) for file in named.value):
        raise refuse(named.where, "plugins must be a list of Python files, such as [mine.py]")
    return named.value
