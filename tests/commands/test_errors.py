"""Bad input: one short line that names the culprit, exit code 2, nothing written, and no torch to say so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cl_runner.tasks import benchmark
from tests.command_line import SMALL, Result, call, environment, tree, variables
from tests.conftest import Finished

ROWS = 3


def benchmark_folder(root: Path, names: tuple[str, ...] = ("dbpedia", "amazon", "agnews")) -> Path:
    """A benchmark folder of a few rows a task."""
    for name in names:
        task = benchmark.get(name)
        assert task.labels is not None
        folder = root / task.kind / name
        folder.mkdir(parents=True)
        (folder / "labels.json").write_text(json.dumps(task.labels))
        for split in ("train", "test"):
            rows = [{"sentence": f"{split} {i}", "label": task.labels[i % len(task.labels)]} for i in range(ROWS)]
            (folder / f"{split}.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the bad inputs below are about."""
    cwd = tmp_path_factory.mktemp("bad")
    text = {
        "three.yaml": "name: three\ntasks: [dbpedia, amazon, agnews]\n",
        "twice.yaml": "tasks: [dbpedia, amazon, dbpedia]\n",
        "empty.yaml": "tasks: []\n",
        "nothing.yaml": "",
        "list.yaml": "[dbpedia]\n",
        "broken.yaml": "tasks: [dbpedia\n",
        "hostile.yaml": "tasks: !!python/object/apply:os.system ['touch hacked']\n",
        "leaving.yaml": "name: ../../x\ntasks: [dbpedia]\n",
        "leaving-task.yaml": "tasks: [{name: ../x, kind: TC, source: {train: a.csv, test: a.csv}}]\n",
        "unknown-task.yaml": "tasks: [dbpedai]\n",
        "unknown-key.yaml": "tasks: [dbpedia]\nmethod: olora\n",
        "own.yaml": "tasks: [{name: own, kind: TC, labels: [a, b], source: {train: own.csv, test: own.csv}}]\n",
        "own.csv": "text,lable\nhello,a\n",
        "gone.yaml": "tasks: [{name: own, kind: TC, labels: [a, b], source: {train: gone.csv, test: gone.csv}}]\n",
        "config.yaml": "training:\n  epochs: 1\n  lrr: 3\n",
        "config-type.yaml": "training:\n  epochs: many\n",
        "config-twice.yaml": "seed: 1\nseed: 2\n",
        "ds.json": '{"fp16": {"enabled": true}}',
        "model-file": "x",
    }
    for name, content in text.items():
        (cwd / name).write_text(content)
    (cwd / "binary.yaml").write_bytes(bytes(range(256)))
    benchmark_folder(cwd / "good")
    (cwd / "bad").mkdir()
    last = "TC/agnews/train.json"
    for name, break_it in {
        "no-split": lambda root: (root / "TC/agnews/test.json").unlink(),
        "no-task": lambda root: shutil.rmtree(root / "TC/agnews"),
        "malformed": lambda root: (root / last).write_text('[{"sentence": "a", "label": "World"}, {"sentence": 3}]'),
        "not-json": lambda root: (root / last).write_text('[{"sentence": "a",\n "label": "World"\n'),
        "no-rows": lambda root: (root / last).write_text("[]"),
        "other-label": lambda root: (root / last).write_text('[{"sentence": "a", "label": "Wolrd"}]'),
    }.items():
        break_it(benchmark_folder(cwd / "bad" / name))
    for name, files in {
        "no-config": {"x.txt": "x"},
        "no-weights": {"config.json": '{"model_type": "t5"}'},
        "broken-config": {"config.json": "{"},
        "adapter": {"adapter_config.json": '{"base_model_name_or_path": "t5-large"}'},
    }.items():
        (cwd / name).mkdir()
        for file, content in files.items():
            (cwd / name / file).write_text(content)
    (cwd / "taken" / "mine").mkdir(parents=True)
    (cwd / "taken" / "mine" / "notes.txt").write_text("mine")
    (cwd / "taken" / "file").write_text("")
    return cwd


THREE = ("train", "--order", "three.yaml")
# Arguments, and what the line has to name.
USAGE: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((), ("say which command", "train", "eval")),
    (("config",), ("show, schema", "cl-runner config --help")),
    (("tran",), ("'tran'", "Did you mean 'train'")),
    (("--bogus",), ("--bogus",)),
    (("train", "--sede", "3"), ("--sede", "--seed", "cl-runner train --help")),
    (("train", "--seed"), ("--seed", "argument")),
    (("train", "--seed", "x"), ("--seed: must be a whole number",)),
    (("train", "--gpus", "1.5"), ("--gpus: must be a whole number",)),
    (("train", "order1"), ("order1", "unexpected")),
    (("data", "show", "--order", "order1"), ("--task",)),
    (("data", "show", "--order", "order1", "--task", "amazn"), ("amazn", "did you mean 'amazon'")),
    (("data", "show", "--order", "order1", "--task", "amazon", "-n", "0"), ("-n",)),
    (("data", "check"), ("no task order", "order1")),
    (("list",), ("what",)),
    (("list", "run"), ("did you mean 'runs'",)),
    (("show", "olra"), ("olra", "did you mean 'olora'")),
    (("new", "order", "../x.txt"), ("x.txt", ".yaml")),
    (("new", "order", "three.yaml"), ("three.yaml", "already there")),
    (("new", "order", "nowhere/x.yaml"), ("nowhere/x.yaml",)),
    (("new", "order", "new.yaml", "--from-olora", "good"), ("good", "stage")),
    (("new", "order", "new.yaml", "--from", "nowhere"), ("nowhere", "no such folder")),
    (("new", "order", "new.yaml", "--from", "taken"), ("taken: no task was found there", "NAME-train.*")),
    (("new", "order", "new.yaml", "--from", "good", "--from-olora", "good"), ("--from and --from-olora", "one")),
    (("new", "order", "three.yaml", "--from", "good"), ("three.yaml", "already there")),
]
SETTINGS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("train",), ("no task order", "--order")),
    (("train", "--order", "ordr1"), ("--order", "ordr1", "did you mean 'order1'")),
    (("train", "--order", ""), ("--order",)),
    (("train", "--order", "nowhere.yaml"), ("nowhere.yaml", "no such")),
    (("train", "--order", "../order1"), ("../order1",)),
    (("train", "--order", "twice.yaml"), ("twice.yaml:1:", "'dbpedia'", "twice")),
    (("train", "--order", "empty.yaml"), ("empty.yaml:1:", "empty")),
    (("train", "--order", "nothing.yaml"), ("nothing.yaml", "empty")),
    (("train", "--order", "list.yaml"), ("list.yaml:1:1", "mapping")),
    (("train", "--order", "broken.yaml"), ("broken.yaml:", "broken YAML")),
    (("train", "--order", "binary.yaml"), ("binary.yaml",)),
    (("train", "--order", "hostile.yaml"), ("hostile.yaml:1:",)),
    (("train", "--order", "leaving.yaml"), ("leaving.yaml:1:7", "../../x")),
    (("train", "--order", "leaving-task.yaml"), ("leaving-task.yaml:1:", "../x")),
    (("train", "--order", "unknown-task.yaml"), ("dbpedai", "did you mean 'dbpedia'")),
    (("train", "--order", "unknown-key.yaml"), ("unknown-key.yaml:2:1", "method")),
    (("train", "--order", "good"), ("good",)),
    ((*THREE, "--method", "olra"), ("--method", "olra", "did you mean 'olora'")),
    ((*THREE, "--preset", "tny"), ("--preset", "tny", "did you mean 'tiny'")),
    ((*THREE, "--preset", "published"), ("published", "three")),
    ((*THREE, "--set", "training.lrr=3"), ("--set training.lrr=3", "did you mean")),
    ((*THREE, "--set", "trainin.lr=3"), ("trainin",)),
    ((*THREE, "--set", "training.lr=fast"), ("training.lr must be a number",)),
    ((*THREE, "--set", "training.lr=nan"), ("training.lr",)),
    ((*THREE, "--set", "training.epochs=true"), ("training.epochs",)),
    ((*THREE, "--set", "training.epochs=-1"), ("training.epochs", "at least 0")),
    ((*THREE, "--set", "training.epochs=1000000000000"), ("training.epochs", "at most 100000")),
    ((*THREE, "--set", "training.global_batch=1000000"), ("training.global_batch", "at most 100000")),
    ((*THREE, "--set", "training"), ("--set training",)),
    ((*THREE, "--set", "method.lamda1=3"), ("method.lamda1", "lambda1")),
    ((*THREE, "--set", "tasks.yahoo.training.lr=3"), ("yahoo",)),
    ((*THREE, "--set", "stages.4.training.lr=3"), ("stage 4",)),
    ((*THREE, "--seed", "-1"), ("--seed", "at least 0")),
    ((*THREE, "--data", "cloud"), ("--data", "folder, hub, synthetic")),
    ((*THREE, "--config", "nowhere.yaml"), ("nowhere.yaml", "no such file")),
    ((*THREE, "--config", "config.yaml"), ("config.yaml:3:3", "lrr")),
    ((*THREE, "--config", "config-type.yaml"), ("config-type.yaml:2:", "training.epochs", "whole number")),
    ((*THREE, "--config", "config-twice.yaml"), ("config-twice.yaml:2:1", "seed")),
    ((*THREE, "--config", "good"), ("good", "folder")),
    ((*THREE, "--gpus", "0"), ("--gpus 0",)),
    ((*THREE, "--name", "../x"), ("--name", "../x")),
    ((*THREE, "--name", "../x", "--dry-run"), ("--name", "../x")),
    ((*THREE, "--name", ".hidden"), ("--name", ".hidden")),
    ((*THREE, "--name", "x" * 150), ("--name",)),
    ((*THREE, "--set", "output.name=a/b"), ("a/b",)),
]
TINY = (*THREE, "--preset", "tiny", "--data", "synthetic", "--method")
METHOD: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    *[
        ((*TINY, m, "--set", "method.memory_per_task=0"), ("method.memory_per_task", m))
        for m in ("replay", "agem", "gem")
    ],
    ((*TINY, "agem", "--set", "method.memory_batch=0"), ("method.memory_batch", "at least 1")),
    ((*TINY, "replay", "--set", "method.replay_ratio=0"), ("method.replay_ratio", "more than 0")),
    ((*TINY, "lwf", "--set", "method.temperature=0"), ("method.temperature", "more than 0")),
    ((*TINY, "ogd", "--set", "method.vectors=0"), ("method.vectors", "at least 1")),
    ((*TINY, "ewc", "--set", "method.online=2"), ("method.online", "at most 1")),
    ((*TINY, "migu", "--set", "method.quantile=1"), ("method.quantile", "less than 1")),
    ((*TINY, "olora", "--set", "method.train=full"), ("method.train", "not a setting of olora", "lambda1")),
    ((*TINY, "seqft", "--set", "adapter.kind=dora"), ("adapter.kind: dora", "leave it out")),
    ((*TINY, "l2p", "--set", "method.top=20"), ("method.top", "pool of 10")),
    ((*TINY, "progprompt", "--set", "training.optimizer=muon"), ("muon", "progprompt", "adamw")),
]
# What only the model's shapes tell: by its config, with no weights loaded.
SHAPES: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (
        (*TINY, "seqlora", "--set", "adapter.r=1000000000"),
        ("adapter.r", "5,376,000,000,000 numbers", "43008 GB", "memory; set a smaller rank"),
    ),
    ((*TINY, "ogd", "--set", "method.vectors=60000"), ("method.vectors", "180000 directions", "172032 trained")),
    ((*TINY, "ogd", "--set", "method.vectors=9000", "--set", "method.variant=all"), ("18.6 GB", "method.max_gb 8")),
    (
        (*TINY, "nlora", "--set", "method.of=reference", "--set", "adapter.target_modules=[wi]"),
        ("method.of", "576 × 192", "adapter.target_modules"),
    ),
    ((*TINY, "ogd", "--set", "adapter.target_modules=[qq]"), ("adapter.target_modules", "'qq'")),
]
DATA: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((*THREE, "--data-dir", "nowhere"), ("nowhere", "does not exist", "--data-dir")),
    ((*THREE, "--data-dir", "own.csv"), ("own.csv", "not a folder")),
    ((*THREE, "--data-dir", "bad/no-task"), ("agnews", "no folder")),
    ((*THREE, "--data-dir", "bad/no-split"), ("agnews", "test.json")),
    ((*THREE, "--data-dir", "bad/malformed"), ("agnews/train.json", "row")),
    ((*THREE, "--data-dir", "bad/not-json"), ("agnews/train.json",)),
    ((*THREE, "--data-dir", "bad/no-rows"), ("agnews", "empty")),
    ((*THREE, "--data-dir", "bad/other-label"), ("agnews/train.json", "Wolrd", "World")),
    ((*THREE, "--data", "folder"), ("no data", "--data-dir", "--data hub", "--data synthetic")),
    (("train", "--order", "gone.yaml"), ("gone.csv",)),
    (("data", "check", "--order", "three.yaml", "--data-dir", "bad/no-split"), ("agnews", "test.json")),
]
MODEL: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((*THREE, "--model", "no-config"), ("no-config", "config.json")),
    ((*THREE, "--model", "no-weights"), ("no-weights", "no weights")),
    ((*THREE, "--model", "broken-config"), ("broken-config", "config.json")),
    ((*THREE, "--model", "adapter"), ("adapter", "t5-large")),
    ((*THREE, "--model", "model-file"), ("model-file", "file")),
    ((*THREE, "--model", "../../x/../y"), ("../../x/../y",)),
    ((*THREE, "--model", "tiny_t5"), ("tiny_t5", "tiny-t5")),
]
OUTPUT: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((*THREE, "--output-dir", "own.csv"), ("own.csv", "no folder", "--output-dir")),
    ((*THREE, "--output-dir", "own.csv/runs"), ("own.csv", "no folder")),
    ((*THREE, "--output-dir", "taken", "--name", "mine"), ("taken/mine", "no run", "--name")),
    ((*THREE, "--output-dir", "taken", "--name", "file"), ("taken/file", "no folder")),
    ((*THREE, "--output-dir", "own.csv", "--dry-run"), ("own.csv", "no folder")),
]
READERS = ("eval", "report", "rescore", "forgotten", "verify")
RUNS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    *[((command, "taken/mine"), ("taken/mine", "no run folder")) for command in READERS],
    *[((command, "nowhere/x"), ("nowhere/x", "does not exist")) for command in READERS],
    *[((command, "nope"), ("nope", "in runs")) for command in READERS],
    *[((command,), ("no run in runs", "cl-runner train")) for command in READERS],
    *[((command, ""), ("empty",)) for command in READERS],
    *[((command, "own.csv"), ("own.csv",)) for command in READERS],
    (("forgotten", "--against", ""), ("--against", "empty")),
    (("compare",), ("say which runs", "cl-runner compare runs")),
    (("compare", "nope"), ("nope", "in runs")),
    (("compare", ""), ("empty",)),
    (("compare", "no*pe"), ("no run in runs is called 'no*pe'",)),
    (("compare", "taken/*"), ("no run in taken is called '*'",)),
    (("compare", "taken/mine"), ("taken/mine", "no run folder")),
    (("compare", "nowhere/x"), ("nowhere/x", "does not exist")),
    (("forgotten", "--stage", "x"), ("--stage: must be a whole number",)),
]
ALL = [*USAGE, *SETTINGS, *METHOD, *DATA, *MODEL, *OUTPUT, *RUNS]


def refused(result: Result, words: tuple[str, ...]) -> None:
    assert result.code == 2, result
    line = result.line
    assert line.startswith("cl-runner: ")
    assert "Traceback" not in line
    assert len(line) <= 450, "short"
    for word in words:
        assert word in line


@pytest.mark.parametrize(("arguments", "words"), ALL, ids=lambda value: " ".join(value)[:60] or "nothing")
def test_one_line_names_the_culprit_and_nothing_is_written(
    place: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    before = tree(place)
    with variables(HF_HUB_OFFLINE="1"):
        refused(call(*arguments, cwd=place), words)
    assert tree(place) == before


@pytest.mark.parametrize(("arguments", "words"), SHAPES, ids=lambda value: " ".join(value)[-60:])
@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--gpus", "2")])
def test_shapes_that_cannot_work_are_refused_before_any_weight_is_loaded(
    place: Path, arguments: tuple[str, ...], words: tuple[str, ...], more: tuple[str, ...], monkeypatch: Any
) -> None:
    import transformers

    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", load)
    before = tree(place)
    refused(call(*arguments, *more, cwd=place), words)
    assert tree(place) == before


def test_none_of_it_needs_torch(place: Path) -> None:
    """All bad inputs one after the other in one fresh process, and the help of every command."""
    script = """
        import contextlib, io, json, sys
        from cl_runner.cli import outcome
        said = io.StringIO()
        for arguments in json.loads(sys.argv.pop()):
            sys.argv[1:] = arguments
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = outcome(arguments)
            heavy = {"torch", "transformers", "deepspeed", "peft", "datasets"} & set(sys.modules)
            assert not heavy, (arguments, heavy)
            assert code == (0 if "--help" in arguments else 2), (arguments, code, said.getvalue()[-2000:])
        """
    # A config.json is judged by transformers; whether there are GPUs only torch knows.
    heavy = ("--model", "good", "data", "--gpus")
    bad = [list(a) for a, _ in ALL if not {"--model", "good"} & set(a) and a[:2] not in {("data", "check")}]
    helps = [
        [*command.split(), "--help"]
        for command in (
            "", "train", "eval", "rescore", "verify", "report", "compare", "forgotten", "list", "show", "config",
            "config show", "config schema", "data", "data check", "data show", "new", "new order",
        )
    ]  # fmt: skip
    assert len(bad) > 60, heavy
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), json.dumps(bad + helps)],
        cwd=place, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_help_is_quick() -> None:
    """What takes long to load is not loaded for it; its seconds are in benchmarks/README.md."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cl_runner", "train", "--help"],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "--order" in done.stdout
    assert "╭" not in done.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    heavy = {
        "torch",
        "numpy",
        "transformers",
        "peft",
        "deepspeed",
        "datasets",
        "pyarrow",
        "pandas",
        "huggingface_hub",
        "matplotlib",
    }
    assert "typer" in loaded and not loaded & heavy


def test_debug_shows_the_traceback_anywhere_on_the_line(place: Path) -> None:
    for arguments in (("--debug", "report", "nope"), ("report", "nope", "--debug")):
        result = call(*arguments, cwd=place)
        assert result.code == 2
        assert "Traceback" in result.err
        assert result.err.splitlines()[-1] == "cl-runner: there is no run 'nope' in runs"


def test_hub_name_without_network_says_what_to_do(place: Path) -> None:
    with variables(HF_HUB_OFFLINE="1"):
        result = call(*THREE, "--model", "someone/no-such-model", "--data", "synthetic", cwd=place)
    refused(result, ("someone/no-such-model", "cannot be reached", "hf download", "tiny-t5"))


def test_model_without_data_is_told_the_three_ways(place: Path) -> None:
    with variables(HF_HUB_OFFLINE="1"):
        result = call("train", "--order", "order1", "--config", "config-none.yaml", cwd=place)
    refused(result, ("config-none.yaml",))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_folder_that_cannot_be_made_leaves_nothing(place: Path) -> None:
    """Root may write everywhere; the kernel's own folder takes no new ones all the same."""
    before = tree(place)
    result = call(*THREE, *SMALL, "--output-dir", "/proc/runs", cwd=place)
    refused(result, ("/proc/runs",))
    assert tree(place) == before


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Iterator[Finished]:
    """The finished run, for a test to spoil."""
    shutil.copytree(finished.cwd, tmp_path / "copy")
    cwd = tmp_path / "copy"
    yield Finished(cwd, cwd / "runs" / finished.name, finished.result, finished.arguments)


def test_eval_refuses_what_the_run_has_not(finished: Finished) -> None:
    before = tree(finished.cwd)
    for arguments, words in [
        (("--stage", "4"), ("--stage 4", "stages 1 to 3")),
        (("--stage", "0"), ("--stage 0",)),
        (("--tasks", "agnew"), ("agnew", "did you mean 'agnews'")),
        (("--tasks", " , "), ("--tasks", "dbpedia")),
        (("--set", "training.lr=3"), ("training.lr=3", "eval.")),
        (("--set", "eval.bacth_tokens=3"), ("eval.bacth_tokens", "batch_tokens")),
        (("--data-dir", "."), ("--data-dir", "synthetic")),
    ]:
        refused(call("eval", *arguments, cwd=finished.cwd), words)
    assert tree(finished.cwd) == before


def test_names_of_runs(copied: Finished) -> None:
    shutil.copytree(copied.run, copied.run.with_name("three-nlora"))
    refused(call("report", "three", cwd=copied.cwd), ("'three'", "2 runs", "three-nlora"))
    refused(call("report", "thre-nlora", cwd=copied.cwd), ("thre-nlora", "did you mean 'three-nlora'"))
    refused(call("report", "three-n", "three-o", cwd=copied.cwd), ("of one run", "cl-runner compare three-n three-o"))
    assert call("report", "three-n", cwd=copied.cwd).code == 0


SPOILED: list[tuple[str, Any, tuple[str, ...]]] = [
    ("run.json", "{", ("run.json", "broken JSON")),
    ("run.json", b"\xff\xfe\x00", ("run.json", "broken JSON")),
    ("run.json", "[]", ("run.json", "JSON object")),
    ("run.json", '{"layout": 7}', ("run.json", "layout 7")),
    ("run.json", '{"layout": 1}', ("broken", "'stages'")),
    ("run.json", '{"layout": 1, "stages": [{"name": "../../x"}]}', ("broken", "../../x")),
    ("run.json", "[" * 100_000, ("run.json", "broken JSON")),
    ("stages/01-dbpedia/metrics.json", None, ("01-dbpedia/metrics.json",)),
    ("stages/02-amazon/metrics.json", "{}", ("broken", "'counts'")),
]


@pytest.mark.parametrize(("file", "content", "words"), SPOILED)
def test_a_run_with_a_broken_file(copied: Finished, file: str, content: Any, words: tuple[str, ...]) -> None:
    if content is None:
        (copied.run / file).unlink()
    else:
        (copied.run / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(call("report", cwd=copied.cwd), words)
    listed = call("list", "runs", "--json", cwd=copied.cwd).json["runs"]
    assert [run["state"] for run in listed] == ["broken"]
    assert call("list", "runs", cwd=copied.cwd).code == 0
    assert call(*copied.arguments, cwd=copied.cwd).code == 2 or "metrics" in file


def test_a_damaged_stage_is_refused(copied: Finished) -> None:
    (copied.run / "stages" / "02-amazon" / "DONE").unlink()
    before = tree(copied.cwd)
    refused(call(*copied.arguments, cwd=copied.cwd), ("damaged", "stage 3 (agnews)", "stage 2 (amazon)"))
    assert tree(copied.cwd) == before
