"""The reference pages of the documentation, told from the code: settings, commands, methods, kinds, metrics.

``scripts/docs_site.py`` puts them into the site as it is built; none is kept. To look at one:

    python scripts/docs_reference.py settings
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from cl_runner.adapters.kind import OFFERS
from cl_runner.cli import app
from cl_runner.commands.show import about_method
from cl_runner.config.schema import AdapterConfig, RunConfig, Section, settings_of_kind
from cl_runner.config.yamlfile import as_yaml
from cl_runner.registry import KINDS, METHODS, OPTIONS
from cl_runner.settings.keys import Setting, settings

CODE = Path(__file__).resolve().parents[1] / "cl_runner"
WIDTH = 100
BREAK = "\n\n"  # the end of a paragraph


def settings_page() -> str:
    """Every setting of a run but those of methods and of kinds other than LoRA."""
    listed: dict[str, list[Setting]] = {}
    for each in settings(Section):
        listed.setdefault(each.key.partition(".")[0] if "." in each.key else "", []).append(each)
    lines = [
        "# Settings", "",
        "Each goes behind `--set`, as `section.key=value`, or into a YAML file that `--config` names.",
        "`cl-runner config show` has the values of a run, and where each came from; `cl-runner config schema` is this",
        "page for an editor. A method's own settings are with [the methods](methods.md), an adapter kind's with",
        "[the kinds](kinds.md).", "",
    ]  # fmt: skip
    for section, members in listed.items():
        model = RunConfig.model_fields[section].annotation if section else None
        said = " ".join(str(model.__doc__ or "").split()) if model is not None else "Beside all sections."
        lines += [f"## {section or 'The run'}", "", said, "", *_table(members), ""]
    for name in ("tasks", "stages"):
        lines += [f"## {name}", "", _text(RunConfig.model_fields[name].description or ""), ""]
    return "\n".join(lines)


def _table(members: Iterable[Setting]) -> list[str]:
    return [
        "| setting | default | may be | what |", "|---|---|---|---|",
        *(
            f"| `{each.key}` | {_code(each.default)} | {_cell(_may_be(each))} | {_cell(each.what)} |"
            for each in members
        ),
    ]  # fmt: skip


def _may_be(setting: Setting) -> str:
    values = ", ".join(f"`{value}`" for value in setting.values)
    return " or ".join(filter(None, [setting.kind, values]))


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _text(text: str) -> str:
    """Text on one line, in which `<` outside code is no tag."""
    parts = " ".join(text.replace("``", "`").split()).split("`")
    return "`".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts))


def _cell(text: str) -> str:
    """Such a text in a table, where a bar would end the cell."""
    return _text(text).replace("|", "\\|")


def commands_page() -> str:
    """``--help`` of every command."""
    lines = ["# Commands", "", "What `--help` says of each.", ""]
    for words, command in _commands(get_command(app), ("cl-runner",)):
        context = typer.Context(command, info_name=" ".join(words), terminal_width=WIDTH, max_content_width=WIDTH)
        lines += [f"## {' '.join(words)}", "", "```text", command.get_help(context).strip(), "```", ""]
    return "\n".join(lines)


def _commands(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, each in getattr(command, "commands", {}).items():
        if not each.hidden:
            yield from _commands(each, (*words, name))


def methods_page() -> str:
    """What ``cl-runner show`` says of every method of ours."""
    lines = [
        "# Methods", "",
        "What `cl-runner show METHOD` says. How each was verified, and what it is built from:",
        "[methods](../methods.md).", "",
    ]  # fmt: skip
    for name in METHODS.ours:
        about = about_method(name)
        lines += [f"## {name}", "", _text(about["title"]) + ".", "", "```text", about["equation"], "```", ""]
        told = ("paper", "trains", "factors", "frozen", "forms", "carried", "growth", "task id at inference", "about")
        lines += [f"- {key}: {_text(str(about[key]))}" for key in told if key in about]
        lines += [
            f"- sets: `{key}={as_yaml(value)}`, unless it is given" for key, value in about.get("sets", {}).items()
        ]
        lines += [f"- option `{setting}`: {_text(title)}" for setting, title in about["options"].items()]
        if about["settings"]:
            lines += ["", "| setting | default | what |", "|---|---|---|"]
            lines += [
                f"| `method.{key}` | `{as_yaml(each['default'])}` | {_cell(each['what'])} |"
                for key, each in about["settings"].items()
            ]
        lines.append("")
    return "\n".join(lines)


def kinds_page() -> str:
    """Every adapter kind: its update, what it offers to methods, its own settings; and the options."""
    offers = [f"| `{name}` | {what} |" for name, what in OFFERS.items()]
    lines = [
        "# Adapter kinds and options", "",
        "`adapter.kind` is one of these. Which method goes with which: [adapters](../adapters.md).", "",
    ]  # fmt: skip
    for name in KINDS.ours:
        kind = KINDS.get(name)
        config = settings_of_kind(name)
        lines += [f"## {name}", "", _text(kind.title) + ".", "", "```text", kind.equation, "```", ""]
        lines += [
            f"- paper: {_text(kind.paper)}",
            f"- offers: {', '.join(f'`{each}`' for each in sorted(kind.offers))}",
            f"- folds: {', '.join(kind.folds) or 'never'}",
            f"- on a base in 4 bits: {'yes' if kind.quantized else 'no'}",
        ]  # fmt: skip
        own = [each for each in settings(Section, config) if each.key.startswith("adapter.") and "kind" not in each.key]
        # Those of LoRA are with the settings.
        lines += ["", *_table(own)] if config is not AdapterConfig and own else []
        lines.append("")
    lines += ["## What kinds offer", "", "| word | what a method may count on |", "|---|---|", *offers, ""]
    lines += ["## Options", "", "Of any method that takes them.", "", "| setting | what |", "|---|---|"]
    lines += [f"| `{OPTIONS.get(name).setting}` | {_cell(OPTIONS.get(name).title)} |" for name in OPTIONS.ours]
    return "\n".join([*lines, ""])


# Where measures are computed: read as text, since to import them would import torch.
MEASURES = {
    "Of the matrix": ("metrics/accuracy.py",),
    "Of answers": ("metrics/scores.py", "metrics/exact_match.py"),
    "Of what is forgotten": ("metrics/forgotten.py",),
    "Of several runs": ("metrics/significance.py",),
    "Of updates": tuple(
        f"metrics/updates/{name}.py"
        for name in (
            "entries", "spectrum", "overlap", "angles", "decomposition", "gradients", "intruders", "against_base",
        )
    ),
    "Of the base's drift": ("metrics/drift.py",),
}  # fmt: skip


def metrics_page() -> str:
    """The functions that compute measures, in the words of their docstrings."""
    lines = ["# Metrics", "", "The functions of `cl_runner/metrics`, in their own words.", ""]
    for title, files in MEASURES.items():
        lines += [f"## {title}", ""]
        for file in files:
            tree = ast.parse((CODE / file).read_text("utf-8"))
            told = [(node.name, ast.get_docstring(node)) for node in tree.body if isinstance(node, ast.FunctionDef)]
            lines += [_text(str(ast.get_docstring(tree) or "").partition(BREAK)[0]), "", f"`cl_runner/{file}`", ""]
            for name, said in told:
                if said and not name.startswith("_"):
                    lines += [f"- `{name}`: {_text(said.partition(BREAK)[0])}", *_listed(said)]
            lines.append("")
    return "\n".join(lines)


def _listed(said: str) -> Iterator[str]:
    """The points of a docstring's list, below the function."""
    for paragraph in said.split(BREAK)[1:]:
        if paragraph.startswith("- "):
            yield from (f"    - {_text(point)}" for point in paragraph.removeprefix("- ").split("\n- "))


PAGES: Mapping[str, Callable[[], str]] = {
    "settings": settings_page,
    "commands": commands_page,
    "methods": methods_page,
    "kinds": kinds_page,
    "metrics": metrics_page,
}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PAGES:
        sys.exit(f"say which page: {', '.join(PAGES)}")
    print(PAGES[sys.argv[1]]())
