"""The command line: parse, call, print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import atexit
import os
import re
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from cl_runner import __version__
from cl_runner.commands import complete
from cl_runner.errors import TrainingError, UserError, no_memory, out_of_memory
from cl_runner.offline import cache_alone
from cl_runner.terminal import console
from cl_runner.terminal.console import one_line, say_error, stdout_kept_for_results
from cl_runner.terminal.stopping import Stopped, signals_stop

# Plain text, no boxes; errors are told in one line by main().
PLAIN: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None}
app = typer.Typer(
    name="cl-runner",
    help="Continual-learning experiments for language models: train a task order, see what was learned and forgotten.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    **PLAIN,
)
config_app = typer.Typer(help="Show the settings of a run, and their schema.", **PLAIN)
data_app = typer.Typer(help="Check and look at the data of an order.", **PLAIN)
new_app = typer.Typer(help="Write examples to start from.", **PLAIN)
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(new_app, name="new")

Order = Annotated[
    str | None, typer.Option("--order", help="Task order: a name or a YAML file.", autocompletion=complete.orders)
]
Text = Annotated[str | None, typer.Option()]
Presets = Annotated[
    list[str] | None, typer.Option("--preset", help="Preset; may be given again.", autocompletion=complete.presets)
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="section.key=value, tasks.NAME.section.key=value, stages.K.section.key=value.",
        autocompletion=complete.settings,
    ),
]
Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", metavar="FILE", help="Python file with methods, … of your own; may be given again."),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML of settings, or a run's run.yaml.")]
Method = Annotated[
    str | None, typer.Option("--method", help="Continual-learning method.", autocompletion=complete.methods)
]
Model = Annotated[
    str | None, typer.Option("--model", help="Embedded model, folder, or hub id.", autocompletion=complete.models)
]
From = Annotated[
    str | None, typer.Option("--from", metavar="FOLDER", help="Start from this PEFT folder of a LoRA adapter.")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that the run's base model brings, if you trust it.")
]
DataDir = Annotated[str | None, typer.Option("--data-dir", help="Benchmark folder (default $CL_RUNNER_DATA).")]
DataSource = Annotated[
    str | None,
    typer.Option("--data", help="folder, hub, synthetic, or another source.", autocompletion=complete.sources),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the run.")]
OutputDir = Annotated[str | None, typer.Option("--output-dir", help="Folder of the run folders (default runs).")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")]
AGAIN = "may be given again, or with commas."
FiguresIn = Annotated[
    Path | None, typer.Option("--figures", metavar="DIR", help="With --html: its figures too, as SVG and PNG.")
]
RunName = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]", help="Name, unique prefix or folder; default: the newest.", autocompletion=complete.runs
    ),
]
FolderName = Annotated[str | None, typer.Option("--name", help="Name of the run folder.")]
Gpus = Annotated[int | None, typer.Option("--gpus", help="Train on so many GPUs (processes without any).")]
Hostfile = Annotated[
    Path | None,
    typer.Option("--hostfile", metavar="FILE", help="Train on these machines, reached by ssh: HOST slots=N a line."),
]
Extend = Annotated[
    str | None,
    typer.Option(
        "--extend", help="A finished run that the order begins with: go on from its end.", autocompletion=complete.runs
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew, beside the old run.")]
RestartStage = Annotated[
    bool, typer.Option("--restart-stage", help="Begin the stage anew that was left in its middle.")
]


def _request(
    order: str | None,
    method: str | None,
    model: str | None,
    from_: str | None,
    preset: list[str] | None,
    plugin: list[str] | None,
    config: Path | None,
    data_dir: str | None,
    data: str | None,
    output_dir: str | None,
    name: str | None,
    seed: int | None,
    sets: list[str] | None,
    extend: str | None,
) -> Any:
    """The run that ``train`` and ``plan`` are asked for. Raises UserError."""
    from cl_runner.commands.request import Request

    flags = _flags(
        method__name=method, model__name=model, model__adapter=from_, data__dir=data_dir, data__source=data,
        output__dir=output_dir, output__name=name, seed=seed,
    )  # fmt: skip
    request = Request(order, preset or [], config, flags, sets or [], plugin or [])
    if extend is None:
        return request
    return Request.extending(extend, request, root=Path(output_dir or "runs"))


def _flags(**given: Any) -> dict[str, Any]:
    """Flags as dotted settings; what was not given is left out."""
    return {key.replace("__", "."): value for key, value in given.items() if value is not None}


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"cl-runner {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Settings of every command."""


@app.command()
def train(
    order: Order = None,
    method: Method = None,
    model: Model = None,
    from_: From = None,
    preset: Presets = None,
    plugin: Plugins = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    data: DataSource = None,
    output_dir: OutputDir = None,
    name: FolderName = None,
    seed: Seed = None,
    gpus: Gpus = None,
    hostfile: Hostfile = None,
    set_: Sets = None,
    extend: Extend = None,
    restart: Restart = False,
    restart_stage: RestartStage = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Json = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Train a task order; go on where a run stopped."""
    from cl_runner.commands import train as command

    request = _request(
        order, method, model, from_, preset, plugin, config, data_dir, data, output_dir, name, seed, set_, extend
    )
    anew = {"restart": restart, "restart_stage": restart_stage}
    raise typer.Exit(command.train(request, gpus=gpus, hostfile=hostfile, **anew, dry_run=dry_run, as_json=as_json))


@app.command()
def plan(
    order: Order = None,
    method: Method = None,
    model: Model = None,
    from_: From = None,
    preset: Presets = None,
    plugin: Plugins = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    data: DataSource = None,
    output_dir: OutputDir = None,
    name: FolderName = None,
    seed: Seed = None,
    gpus: Gpus = None,
    hostfile: Hostfile = None,
    set_: Sets = None,
    extend: Extend = None,
    restart: Restart = False,
    restart_stage: RestartStage = False,
    as_json: Json = False,
) -> None:
    """What train would take: steps, parameters, memory, disk, time, measured in a few real steps. Writes nothing."""
    from cl_runner.commands import plan as command

    request = _request(
        order, method, model, from_, preset, plugin, config, data_dir, data, output_dir, name, seed, set_, extend
    )
    command.plan(request, gpus=gpus, hostfile=hostfile, restart=restart, restart_stage=restart_stage, as_json=as_json)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="base, grid, list, seeds, when (docs/sweeps.md).")],
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="local, slurm or ray; default: the file's.", autocompletion=complete.engines),
    ] = None,
    slots: Annotated[int | None, typer.Option("--slots", help="Runs at a time; default: GPUs, or cores.")] = None,
    output_dir: Annotated[str | None, typer.Option("--output-dir", help="Default runs/NAME of the sweep.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs and what they share, and stop.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="With --dry-run: time, memory, disk, by a rehearsal of each method.")
    ] = False,
    print_commands: Annotated[
        bool, typer.Option("--print-commands", help="Print a shell line a run, for any other scheduler, and stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train many runs from one file, what they share once; go on where it stopped; compare them."""
    from cl_runner.commands import sweep as command

    form = _form(**{"dry-run": dry_run, "print-commands": print_commands})
    raise typer.Exit(
        command.sweep(
            file, engine=engine, slots=slots, output_dir=output_dir, form=form, measure=measure, as_json=as_json
        )
    )


@app.command(name="eval")
def evaluate(
    run: RunName = None,
    stage: Annotated[
        int | None, typer.Option("--stage", help="Stage, from 1; default: the last; 0 with --lm-eval: the base.")
    ] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Comma-separated; default: those scored then.")] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", metavar="TASKS", help="Tasks of lm-evaluation-harness instead, comma-separated."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="With --lm-eval: the first so many rows of each task.", min=1)
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", metavar="DIR", help="With --lm-eval: a folder of more task files.")
    ] = None,
    output_dir: OutputDir = None,
    data_dir: DataDir = None,
    model: Annotated[str | None, typer.Option("--model", help="Where the base model is now, if it moved.")] = None,
    plugin: Plugins = None,
    set_: Sets = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Score a finished stage again; compare with what was committed. Writes nothing into the run but with --lm-eval."""
    from cl_runner.commands import eval as command

    harness = command.Harness.given(lm_eval, limit, include_path)
    with cache_alone(harness is None):  # what a run's folder names is not fetched
        command.evaluate(
            run,
            root=Path(output_dir or "runs"),
            stage=stage,
            tasks=tasks,
            data_dir=data_dir,
            model=model,
            plugins=plugin or [],
            sets=set_ or [],
            trust=trust_remote_code,
            as_json=as_json,
            harness=harness,
        )


@app.command()
def rescore(
    run: RunName = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="[TASK=]NAME",
            help=f"exact, normalised, f1, … (docs/data.md), of all tasks or of one; default: each task's own; {AGAIN}",
            autocompletion=complete.metrics,
        ),
    ] = None,
    output_dir: OutputDir = None,
    csv: Annotated[bool, typer.Option("--csv", help="The new matrix as CSV.")] = False,
    as_json: Json = False,
) -> None:
    """Score the kept answers again by another metric, no model needed. Writes nothing into the run."""
    from cl_runner.commands import rescore as command

    form = _form(json=as_json, csv=csv)
    command.rescore(run, metric or [], root=Path(output_dir or "runs"), form=form)


Stage = Annotated[int | None, typer.Option("--stage", help="Stage, from 1; default: the last.", min=1)]
Merged = Annotated[bool, typer.Option("--merged", help="A whole model, with what was learned in its weights.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="With --merged: fp32 (default), bf16 or fp16.")]
OneTask = Annotated[
    str | None, typer.Option("--task", help="The task that it shall answer, where each has a folder of its own.")
]
License = Annotated[str | None, typer.Option("--license", help="For the card: a license as the hub names it.")]
HubBase = Annotated[str | None, typer.Option("--base", metavar="NAME", help="What the hub calls the base model.")]
Moved = Annotated[str | None, typer.Option("--model", help="Where the base model is now, if it moved.")]


@app.command()
def export(
    run: RunName = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="FOLDER", help="The folder to write.")] = None,
    stage: Stage = None,
    merged: Merged = False,
    dtype: Dtype = None,
    task: OneTask = None,
    license_: License = None,
    base: HubBase = None,
    model: Moved = None,
    output_dir: OutputDir = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """What a stage left as a folder for anybody, with a card: a PEFT adapter, or a whole model."""
    from cl_runner.commands import export as command

    if to is None:
        raise UserError("--to: say the folder to write")
    asked = command.Asked(stage, task, merged, dtype, license_, base, model, trust_remote_code)
    with cache_alone():  # what a run's folder names is not fetched
        command.export(run, to, asked, root=Path(output_dir or "runs"), as_json=as_json)


@app.command()
def push(
    what: Annotated[str, typer.Argument(metavar="FOLDER|RUN", help="An exported folder, or a run, as for export.")],
    repo: Annotated[str, typer.Option("--repo", metavar="NAME", help="On the hub: you/name, or a name of yours.")] = "",
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    stage: Stage = None,
    merged: Merged = False,
    dtype: Dtype = None,
    task: OneTask = None,
    license_: License = None,
    base: HubBase = None,
    model: Moved = None,
    output_dir: OutputDir = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Put an exported folder, or what a run's stage left, on the Hugging Face hub."""
    from cl_runner.commands import push as command
    from cl_runner.commands.export import Asked

    if not repo:
        raise UserError("--repo: say its name on the hub, you/name")
    asked = Asked(stage, task, merged, dtype, license_, base, model, trust_remote_code)
    command.push(what, repo, private, asked, root=Path(output_dir or "runs"), as_json=as_json)


@app.command()
def verify(
    run: RunName = None,
    stage: Annotated[int | None, typer.Option("--stage", help="One stage, from 1; default: all.", min=1)] = None,
    again: Annotated[bool, typer.Option("--again", help="Ask the model of each stage again, too.")] = False,
    output_dir: OutputDir = None,
    data_dir: DataDir = None,
    model: Annotated[str | None, typer.Option("--model", help="Where the base model is now, if it moved.")] = None,
    plugin: Plugins = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Check a run: hashes, scores from its answers, data, base model. Exit code 1 where something differs."""
    from cl_runner.commands import verify as command

    with cache_alone():  # what a run's folder names is not fetched
        code = command.verify(
            run,
            root=Path(output_dir or "runs"),
            stage=stage,
            again=again,
            data_dir=data_dir,
            model=model,
            plugins=plugin or [],
            trust=trust_remote_code,
            as_json=as_json,
        )
    raise typer.Exit(code)


@app.command()
def report(
    run: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]", help="As for eval; several: cl-runner compare.", autocompletion=complete.runs),
    ] = None,
    output_dir: OutputDir = None,
    csv: Annotated[bool, typer.Option("--csv", help="The matrix as CSV.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
    html: Annotated[bool, typer.Option("--html", help="Write report.html into the run's folder: one page.")] = False,
    figures: FiguresIn = None,
    as_json: Json = False,
) -> None:
    """Accuracy matrix, AA, forgetting, transfer of a run."""
    from cl_runner.commands import report as command

    form = _form(html=html, json=as_json, csv=csv, markdown=markdown)
    command.report(run or [], root=Path(output_dir or "runs"), form=form, figures_in=figures)


@app.command()
def compare(
    run: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="Names, unique prefixes, patterns ('order1-*'), folders that hold runs.",
            autocompletion=complete.runs,
        ),
    ] = None,
    output_dir: OutputDir = None,
    against: Annotated[
        str,
        typer.Option(
            "--against",
            metavar="METHOD",
            help="Hold all others against it alone; default: every pair.",
            autocompletion=complete.methods,
        ),
    ] = "",
    csv: Annotated[bool, typer.Option("--csv", help="A row for each method and order.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown tables.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="As LaTeX tabulars (booktabs).")] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write one page to this file.")] = None,
    figures: FiguresIn = None,
    as_json: Json = False,
) -> None:
    """Methods over orders and seeds: means, intervals, paired tests, ranks, cost."""
    from cl_runner.commands import compare as command

    form = _form(json=as_json, csv=csv, markdown=markdown, latex=latex, html=html is not None)
    root = Path(output_dir or "runs")
    if html is not None or figures is not None:
        command.write_page(run or [], root=root, against=against, file=html, figures_in=figures)
    else:
        command.compare(run or [], root=root, against=against, form=form)


@app.command()
def watch(
    run: RunName = None,
    output_dir: OutputDir = None,
    every: Annotated[float, typer.Option("--every", metavar="SECONDS", help="How often to look.", min=0.1)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="One picture, and out; so it is into a pipe, too.")] = False,
    as_json: Json = False,
) -> None:
    """Watch a run as it trains, here or on another machine that shares its folder. Writes nothing."""
    from cl_runner.commands import watch as command

    command.watch(run, root=Path(output_dir or "runs"), every=every, once=once, as_json=as_json)


@app.command()
def forgotten(
    run: RunName = None,
    task: Annotated[
        str | None,
        typer.Option("--task", help="One task; default: all that the run has learned.", autocompletion=complete.tasks),
    ] = None,
    stage: Annotated[int | None, typer.Option("--stage", help="As it was after it, from 1; default: the last.")] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="RUN", help="Only rows that one of the two runs keeps.", autocompletion=complete.runs
        ),
    ] = None,
    output_dir: OutputDir = None,
    as_json: Json = False,
) -> None:
    """Test rows that were right and are wrong now, and what is said."""
    from cl_runner.commands import forgotten as command

    command.forgotten(run, root=Path(output_dir or "runs"), task=task, stage=stage, against=against, as_json=as_json)


@app.command()
def analyze(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN|FOLDER]...",
            help="A run, as for eval, or folders of PEFT LoRA adapters.",
            autocompletion=complete.runs,
        ),
    ] = None,
    output_dir: OutputDir = None,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="REGEX", help="Only layers in whose names this is found.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The adapters' base; of a run, where it is now, if it moved.")
    ] = None,
    intruders: Annotated[
        bool, typer.Option("--intruders", help="Count intruder dimensions, which takes long.")
    ] = False,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Intruders: singular vectors looked at; default 10.", min=1)
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(
            "--epsilon", help="Intruders: |cos| with all of the base's is under it; default 0.5.", min=0, max=1
        ),
    ] = None,
    gradients: Annotated[
        int | None,
        typer.Option("--gradients", metavar="ROWS", help="Cosines of the tasks' gradients, of so many rows.", min=1),
    ] = None,
    routes: Annotated[
        int | None,
        typer.Option("--routes", metavar="ROWS", help="Whose part answers each task, of so many test rows.", min=1),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Loss on a text, or JSONL, before and after stages.")
    ] = None,
    unseen: Annotated[
        list[str] | None,
        typer.Option("--unseen", metavar="TASKS", help=f"Choices on these tasks, or an order's, as --text; {AGAIN}"),
    ] = None,
    data_dir: DataDir = None,
    csv: Annotated[bool, typer.Option("--csv", help="A row for each layer and update.")] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """What each stage, or adapter, changed of the weights, and how these updates overlap."""
    from cl_runner.commands import analyze as command

    form = _form(json=as_json, csv=csv)
    asked = command.Asked(
        layers, model, intruders, top_k, epsilon, gradients, routes, text, unseen or [], data_dir, trust_remote_code
    )
    with cache_alone():  # what a run's folder names is not fetched
        command.analyze(what or [], asked, root=Path(output_dir or "runs"), form=form)


@app.command(name="list")
def list_(
    what: Annotated[
        str,
        typer.Argument(
            help="orders, tasks, methods, adapters, compatibility, sources, models, presets, trackers, engines, runs.",
            autocompletion=complete.lists,
        ),
    ],
    output_dir: OutputDir = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help=f"Runs: of these methods alone; {AGAIN}", autocompletion=complete.methods),
    ] = None,
    order: Annotated[
        list[str] | None,
        typer.Option("--order", help=f"Runs: of these orders alone; {AGAIN}", autocompletion=complete.orders),
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(
            "--state",
            help=f"Runs: done, running, stopped, failed, broken or unfinished ones alone; {AGAIN}",
            autocompletion=complete.states,
        ),
    ] = None,
    sort: Annotated[
        list[str] | None,
        typer.Option(
            "--sort",
            help="Runs: by name, AA, forgetting, time (default, newest first), method, order, model, seed, state, or "
            f"a setting; {AGAIN}",
            autocompletion=complete.sorts,
        ),
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """List orders, tasks, methods, models, presets, runs."""
    from cl_runner.commands import list
    from cl_runner.settings import load_plugins

    load_plugins(plugin or [])
    flags = {"method": method, "order": order, "state": state, "sort": sort}
    if what != "runs":
        for flag, given in flags.items():
            if given is not None:
                raise UserError(f"--{flag}: goes with list runs, not with list {what}")
        list.show_list(what, as_json=as_json)
        return
    list.show_runs(
        root=Path(output_dir or "runs"),
        methods=method or [],
        orders=order or [],
        states=state or [],
        sort=sort or [],
        as_json=as_json,
    )


@app.command()
def show(
    method: Annotated[str, typer.Argument(help="A method's name.", autocompletion=complete.methods)],
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """A method: equation, paper, settings, what it carries."""
    from cl_runner.commands.show import show_method
    from cl_runner.settings import load_plugins

    load_plugins(plugin or [])
    show_method(method, as_json=as_json)


@app.command()
def doctor(output_dir: OutputDir = None, as_json: Json = False) -> None:
    """What this machine has and lacks: packages, GPUs, disk, hub. Exit code 2 where nothing would train."""
    from cl_runner.commands import doctor as command

    raise typer.Exit(command.doctor(root=Path(output_dir or "runs"), as_json=as_json))


@config_app.command("show")
def config_show(
    order: Order = None,
    method: Method = None,
    model: Model = None,
    from_: From = None,
    preset: Presets = None,
    plugin: Plugins = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    data: DataSource = None,
    seed: Seed = None,
    set_: Sets = None,
    as_json: Json = False,
) -> None:
    """The resolved settings, each with where it came from."""
    from cl_runner.commands import config as command
    from cl_runner.commands.request import Request

    flags = _flags(
        method__name=method, model__name=model, model__adapter=from_, data__dir=data_dir, data__source=data, seed=seed
    )
    command.config_show(Request(order, preset or [], config, flags, set_ or [], plugin or []), as_json=as_json)


@config_app.command("schema")
def config_schema(plugin: Plugins = None, as_json: Json = False) -> None:
    """JSON Schema of the settings, for editors (JSON in any case)."""
    from cl_runner.commands.config import show_schema
    from cl_runner.settings import load_plugins

    load_plugins(plugin or [])
    show_schema()


@data_app.command("check")
def data_check(
    order: Order = None,
    model: Model = None,
    preset: Presets = None,
    plugin: Plugins = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    data: DataSource = None,
    set_: Sets = None,
    near: Annotated[
        float | None,
        typer.Option("--near", metavar="J", help="Near duplicates: from this Jaccard similarity on (0.8)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Rows, labels, duplicates, lengths and truncation of every task of an order."""
    from cl_runner.commands import data as command
    from cl_runner.commands.request import Request

    flags = _flags(model__name=model, data__dir=data_dir, data__source=data)
    request = Request(order, preset or [], config, flags, set_ or [], plugin or [])
    command.data_check(request, near=near, as_json=as_json)


@data_app.command("show")
def data_show(
    task: Annotated[str, typer.Option("--task", help="A task of the order.", autocompletion=complete.tasks)],
    order: Order = None,
    n: Annotated[int, typer.Option("-n", help="How many rows.", min=1)] = 5,
    model: Model = None,
    preset: Presets = None,
    plugin: Plugins = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    data: DataSource = None,
    set_: Sets = None,
    as_json: Json = False,
) -> None:
    """The first test rows of a task: id, the model's exact input, the target."""
    from cl_runner.commands import data as command
    from cl_runner.commands.request import Request

    flags = _flags(model__name=model, data__dir=data_dir, data__source=data)
    command.data_show(Request(order, preset or [], config, flags, set_ or [], plugin or []), task, n, as_json=as_json)


@new_app.command("order")
def new_order(
    file: Annotated[Path, typer.Argument(help="The YAML file to write.")],
    from_folder: Annotated[
        Path | None, typer.Option("--from", metavar="FOLDER", help="A folder of data files: an order of what it holds.")
    ] = None,
    from_olora: Annotated[Path | None, typer.Option("--from-olora", help="An O-LoRA order folder.")] = None,
    as_json: Json = False,
) -> None:
    """Write a commented example of a task order, or one of the files in a folder."""
    from cl_runner.tasks.order import new_order as write

    lines = write(file, from_olora, from_folder)
    if as_json:
        found = {"found": lines[1:]} if from_folder is not None else {}
        console.print_json({"file": str(file), **found})
    else:
        for line in lines:
            print(line)


def _form(**given: bool) -> str:
    """The one form of output that is asked for; ``table`` without. Raises UserError for two."""
    wanted = [name for name, is_given in given.items() if is_given]
    if len(wanted) > 1:
        raise UserError(f"--{wanted[0]} and --{wanted[1]}: one form at a time")
    return wanted[0] if wanted else "table"


def main() -> None:
    """Run the command line; the exit code says how it ended (0 done, 1 training failed, 2 input, 130 stopped)."""
    # Before torch: its threads on the CPU spin only shortly while they wait for each other. By default they do so for
    # long, which costs a step four times its time where something else wants a core too (benchmarks/README.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    code = outcome(sys.argv[1:])
    if "torch" not in sys.modules:
        sys.exit(code)
    # To take torch's modules down one by one takes Python seconds, and serves nobody.
    if not (code and _part_of_many()):  # what other processes share may wait for one that is gone
        atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


def outcome(arguments: list[str]) -> int:
    """Do what the arguments say; returns the exit code. Whatever goes wrong is one line on stderr."""
    console.debugging = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    if registry := sys.modules.get("cl_runner.registry"):
        registry.forget_plugins()  # of an earlier command in this process
    try:
        with stdout_kept_for_results(), signals_stop(), complete.words_of_bash():
            code = app(arguments, prog_name="cl-runner", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except SystemExit as end:  # of completions, whose exit code the shell reads
        return end.code if isinstance(end.code, int) else 0
    except UserError as error:
        return _told(error, 2)
    except (Stopped, KeyboardInterrupt, typer.Abort) as error:
        return _told(error, 130, "stopped")
    except TrainingError as error:
        return _told(error, 1)
    except Exception as error:
        # Typer brings its own click, whose usage errors have one thing in common.
        if hasattr(error, "format_message"):
            return _told(error, 2, usage_line(error))
        if out_of_memory(error):
            return _told(error, 2, no_memory(error))
        if isinstance(error, ImportError):
            return _told(error, 2, f"{one_line(str(error))} (cl-runner doctor says what is missing here)")
        return _told(error, 1, unforeseen(error))


def _told(error: BaseException, code: int, message: str | None = None) -> int:
    """Say it, by one process of a run alone (without a launcher of ours, of each machine); returns the exit code."""
    from cl_runner.engine.process import assigned
    from cl_runner.launch.channel import STOP, TOLD, Channel

    part, channel = assigned(), Channel.given()
    if code == 130 and channel and STOP not in channel.heard():
        return 1  # another process of the run has failed: the one that started them says of what
    if part is None or part.rank == 0:
        say_error(error, message)
        channel.say(f"{TOLD}{code}")
    elif code == 130:  # it was stopped with the others
        pass
    elif channel:
        channel.fail(part.rank, one_line(message or str(error)))
    elif part.local_rank == 0:  # on another machine than rank 0's there may be other reasons
        say_error(error, f"process {part.rank} on {socket.gethostname()}: {message or error}")
    return code


def _part_of_many() -> bool:
    from cl_runner.engine.process import assigned

    part = assigned()
    return part is not None and part.ranks > 1


def unforeseen(error: Exception) -> str:
    """An error that nobody thought of; those of the system by what they are of."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else f"cannot write: {error.strerror}"
    return f"{type(error).__name__}: {one_line(str(error))} (--debug shows where)"


# What click and pydantic say of a value of the wrong type, in the words that the settings use.
TYPES = {"integer": "must be a whole number", "number": "must be a number", "boolean": "must be true or false"}


def usage_line(error: Any) -> str:
    """A usage error in one line, with the help that would tell more."""
    context: Any = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "cl-runner"
    if type(error).__name__ == "NoArgsIsHelpError":
        names = [name for name, each in context.command.commands.items() if not each.hidden]
        return f"say which command: {', '.join(names)} ({command} --help tells more)"
    message = one_line(str(error.format_message())).rstrip(".")
    found = re.fullmatch(r"Invalid value for '?([^':]+)'?: .*valid (integer|number|boolean).*", message)
    if found:
        message = f"{found[1]}: {TYPES[found[2]]}"
    return f"{message} ({command} --help tells more)"
