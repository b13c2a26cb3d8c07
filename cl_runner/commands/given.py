"""What commands are given: flags that take several values, and a run whose own settings they go by."""

from __future__ import annotations

from collections.abc import Sequence

from cl_runner import methods
from cl_runner.errors import UserError
from cl_runner.runs.folder import RunDir, kept_order
from cl_runner.settings import Resolved, resolve


def several(flag: str, given: Sequence[str], known: Sequence[str] = ()) -> list[str]:
    """The values of a flag that may be given again, or with commas between values; each once.

    Raises:
        UserError: it was given, and names nothing; ``known`` are those there are, for the message.
    """
    values = list(dict.fromkeys(part.strip() for text in given for part in text.split(",") if part.strip()))
    if given and not values:
        there = f"there are {', '.join(known)}" if known else "leave it out, or say which"
        raise UserError(f"{flag} '{given[0]}': names nothing; {there}")
    return values


def own_settings(
    run: RunDir,
    *,
    model: str | None = None,
    data_dir: str | None = None,
    sets: Sequence[str] = (),
    plugins: Sequence[str] = (),
    trust: bool = False,
) -> Resolved:
    """A run's own settings, with its base model and its rows where they are now.

    trust: the code that its base model brings may be run. Raises UserError.
    """
    resolved = resolve(
        config_file=run.config_file,
        plugins=plugins,
        sets=sets,
        flags={"data.dir": data_dir or None, "model.name": model, "model.trust_remote_code": trust or None},
        method_schema=methods.method_schema,
        stage_names=methods.stage_names,
        kept_order=kept_order,
    )
    if resolved.order is None:
        raise UserError(f"{run.config_file}: names no order")
    return resolved
