"""Runs that stop and go on: the same bits as in one go, under the same name, and never with other numbers."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from cl_runner.errors import UserError
from cl_runner.methods import method_schema
from cl_runner.metrics.accuracy import to_csv
from cl_runner.runs.catalog import changed as settings_changed
from cl_runner.runs.catalog import folder_name, model_label, variant
from cl_runner.runs.folder import RunDir
from cl_runner.runs.results import read_matrix
from cl_runner.runs.resume_guard import recorded
from cl_runner.settings import resolve
from tests.breadth import wide
from tests.command_line import ORDER, SMALL, STAGES, call, finish, logged, results, start, times, tree, variables
from tests.commands.test_errors import benchmark_folder, refused
from tests.conftest import Finished


def setup(cwd: Path) -> Path:
    cwd.mkdir(exist_ok=True)
    (cwd / "three.yaml").write_text(ORDER)
    return cwd


def the_run(cwd: Path) -> Path:
    [run] = [path for path in (cwd / "runs").iterdir() if not path.name.startswith(".")]
    return run


@pytest.mark.parametrize(
    "method",
    [
        ("olora",),
        pytest.param(("seqlora",), marks=wide),
        # a task's own adapter; the base scored before; the dense form of a sum, from the second stage on
        pytest.param(("pertask", "--set", "eval.future=true"), marks=wide),
        pytest.param(("inclora", "--set", "adapter.r=64"), marks=wide),
    ],
    ids=lambda words: words[0],
)
def test_restarted_at_every_stage_gives_the_same_bits(
    tmp_path: Path,
    method: tuple[str, ...],
    cut: Callable[[], None],
    finished: Finished,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ("train", "--order", "three.yaml", *SMALL, "--method", *method)
    if method == ("olora",):
        through = finished.run
    else:
        done = call(*arguments, cwd=setup(tmp_path / "through"))
        assert done.code == 0, done.err
        through = the_run(tmp_path / "through")
    cwd = setup(tmp_path / "cut")
    cut()
    stages = ["base", *STAGES] if "eval.future=true" in method else STAGES
    for stage in stages:
        ended = call(*arguments, cwd=cwd)
        assert ended.code == 1
        assert f": PowerCut: {stage}" in ended.err.splitlines()[-1]
        kept = ", ".join(STAGES[: STAGES.index(stage) + 1]) if stage in STAGES else ""
        assert (f"kept: {kept}; go on: cl-runner train" if kept else "no stage is finished yet") in ended.err
    monkeypatch.undo()
    last = call(*arguments, cwd=cwd)
    assert last.code == 0
    assert "done already" in last.line if not last.out else "done already" in last.err
    assert results(the_run(cwd)) == results(through)
    log = [json.loads(line) for line in (the_run(cwd) / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in log] == [(stage, step) for stage in STAGES for step in (1, 2)]


def test_kill_in_the_middle_of_stage_2(tmp_path: Path, finished: Finished) -> None:
    """kill -9, then the very same command: the bits of one go, the rows of the cut stage logged once."""
    cwd = setup(tmp_path)
    process = start(*finished.arguments, cwd=cwd)
    run = cwd / "runs" / finished.name
    logged(run, "amazon", 1, process)
    process.send_signal(signal.SIGKILL)
    assert finish(process).code == -signal.SIGKILL
    assert [path.name for path in (run / "stages").iterdir() if not path.name.startswith(".")] == ["01-dbpedia"]
    [listed] = call("list", "runs", "--json", cwd=cwd).json["runs"]
    assert (listed["state"], listed["stage"], listed["stages"]) == ("stopped", 1, 3)
    # What else a kill may leave behind: half a commit, half a line, half a file.
    draft = run / "stages" / ".02-amazon.draft"
    draft.mkdir(exist_ok=True)
    (draft / "state.json").write_text("{")
    (run / ".matrix.csv.draft").write_text("half")
    with (run / "log.jsonl").open("a") as log:
        log.write('{"stage": "amazon", "st')
    first = times(run / "stages" / "01-dbpedia")
    again = call(*finished.arguments, cwd=cwd)
    assert again.code == 0, again.err
    assert "stage 1 of 3" not in again.err
    assert "stage 2 of 3 amazon: 2 steps" in again.err
    assert times(run / "stages" / "01-dbpedia") == first
    assert results(run) == results(finished.run)
    assert not [path for path in tree(run) if path.endswith(".draft")]
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [(stage, step) for stage in STAGES for step in (1, 2)]
    later = json.loads((run / "environment.json").read_text())["later"]
    assert len(later) == 1
    assert set(later[0]) <= {"started"}, "only what is otherwise; of the same second nothing is"
    assert (run / "run.log").read_text().count("--- 20") == 2


def test_finished_run_says_so_and_does_nothing(finished: Finished) -> None:
    before = times(finished.cwd)
    again = call(*finished.arguments, cwd=finished.cwd)
    assert again.code == 0
    assert again.err == f"the run runs/{finished.name} is done already; --restart begins anew beside it\n"
    assert again.out == finished.result.out
    assert times(finished.cwd) == before


def test_run_yaml_gives_that_run_again(finished: Finished, tmp_path: Path) -> None:
    config = finished.run / "run.yaml"
    again = call("train", "--config", str(config), cwd=finished.cwd)
    assert again.code == 0
    assert f"the run runs/{finished.name} is done already" in again.err
    # From another folder it is the same run too: name, plan and identity.
    plan = call("train", "--config", str(config), "--dry-run", "--json", cwd=tmp_path).json
    assert plan["folder"] == f"runs/{finished.name}"
    assert plan["stages_done"] == 0


@pytest.fixture
def stopped(finished: Finished, tmp_path: Path) -> Finished:
    """A copy of the run that lacks its last stage."""
    shutil.copytree(finished.cwd, tmp_path / "copy")
    run = tmp_path / "copy" / "runs" / finished.name
    shutil.rmtree(run / "stages" / "03-agnews")
    (run / "status.json").write_text('{"state": "stopped"}')
    return Finished(tmp_path / "copy", run, finished.result, finished.arguments)


def with_name(stopped: Finished, *more: str) -> tuple[str, ...]:
    return (*stopped.arguments, *more, "--name", stopped.name, "--dry-run")


def test_other_numbers_under_the_same_name_are_refused(stopped: Finished) -> None:
    before = tree(stopped.cwd)
    for more, words in [
        (("--set", "training.lr=1e-4"), ("other settings", "training.lr")),
        (("--seed", "7", "--method", "inclora"), ("seed, method.name",)),
        (("--set", "data.max_train=6"), ("data.max_train",)),
        (("--set", "stages.3.training.epochs=2"), ("stages.3.training.epochs",)),
        (("--set", "eval.future=true"), ("eval.future",)),
        (("--gpus", "4"), ("micro-batches of 2", "would take 1", "--gpus")),
    ]:
        refused(call(*with_name(stopped, *more), cwd=stopped.cwd), (*words, "--name", "--restart"))
    assert tree(stopped.cwd) == before


def test_as_many_processes_where_the_penalty_counts_by_micro_batch(stopped: Finished) -> None:
    """16 = 8 × 2 × 1 and 8 × 1 × 2: the same gradient of the loss, and half the penalty."""
    config, about = stopped.run / "run.yaml", stopped.run / "run.json"
    config.write_text(config.read_text().replace("penalty_at: step", "penalty_at: micro"))
    known = json.loads(about.read_text())
    assert "penalty_times" not in known["identity"]
    known["identity"]["penalty_times"] = [2, 2, 2]
    about.write_text(json.dumps(known))
    micro = ("--set", "training.penalty_at=micro")
    assert call(*with_name(stopped, *micro), cwd=stopped.cwd).code == 0
    two = call(*with_name(stopped, *micro, "--gpus", "2"), cwd=stopped.cwd)
    refused(two, ("counts the penalty 2 times a step (training.penalty_at: micro)", "would count it 1 times", "--gpus"))


def test_what_changes_no_number_goes_on(stopped: Finished, tmp_path: Path) -> None:
    elsewhere = setup(tmp_path / "elsewhere")
    moved = elsewhere / "three.yaml"
    shutil.copytree(stopped.cwd / "runs", elsewhere / "results")
    for cwd, arguments in [
        (stopped.cwd, (*stopped.arguments, "--dry-run")),
        (stopped.cwd, with_name(stopped, "--set", "output.log_every=3")),
        (stopped.cwd, with_name(stopped, "--gpus", "2")),  # 16 = 8 × 2 × 1 = 8 × 1 × 2
        (elsewhere, ("train", "--order", str(moved), *SMALL, "--output-dir", "results", "--dry-run")),
    ]:
        plan = call(*arguments, cwd=cwd)
        assert plan.code == 0, plan.err
        assert f"{stopped.name} (goes on after stage 2; nothing was written)" in plan.out


def test_changed_order_is_refused_by_name(stopped: Finished) -> None:
    order = stopped.cwd / "three.yaml"
    order.write_text("name: three\ntasks: [amazon, dbpedia, agnews]\n")
    refused(call(*stopped.arguments, cwd=stopped.cwd), ("other stages (dbpedia, amazon, agnews)",))
    assert "as committed" in call("eval", stopped.name, cwd=stopped.cwd).out, "the run has an order of its own"
    (stopped.run / "order.yaml").unlink()  # as a run of an earlier version
    name_order(stopped.run, order)
    refused(call("eval", stopped.name, cwd=stopped.cwd), ("order three has changed", "dbpedia, amazon, agnews"))
    order.write_text("name: three\ntasks: [dbpedia, amazon]\n")
    refused(call(*stopped.arguments, cwd=stopped.cwd), ("other stages",))


def name_order(run: Path, order: Path) -> None:
    """A run's order is named, and does not stand in its settings."""
    text, count = re.subn(r"(?m)^order:\n(  .*\n)+", f"order: {order}\n", (run / "run.yaml").read_text())
    assert count == 1
    (run / "run.yaml").write_text(text)


def own_order(cwd: Path, name: str, instruction: str = "Which?") -> None:
    (cwd / name).write_text(
        f"name: mine\ntasks:\n  - dbpedia\n  - {{name: own, kind: TC, instruction: '{instruction}', labels: [a, b], "
        "source: {train: own.csv, test: own.csv}}\n"
    )
    (cwd / "own.csv").write_text("text,label\none,a\ntwo,b\n")


def test_another_path_to_the_same_data_goes_on_and_other_data_do_not(tmp_path: Path, cut: Callable[[], None]) -> None:
    benchmark_folder(tmp_path / "one", ("dbpedia",))
    own_order(tmp_path, "mine.yaml")
    arguments = ("train", "--order", "mine.yaml", *SMALL)
    cut()
    assert call(*arguments, "--data-dir", "one", cwd=tmp_path).code == 1
    shutil.move(tmp_path / "one", tmp_path / "two")
    with variables(CL_RUNNER_DATA="two"):
        assert "goes on after stage 1" in call(*arguments, "--dry-run", cwd=tmp_path).out
    rows = tmp_path / "two" / "TC" / "dbpedia" / "test.json"
    kept = rows.read_text()
    rows.write_text(kept.replace("test 0", "test zero"))
    refused(call(*arguments, "--data-dir", "two", cwd=tmp_path), ("other test data of dbpedia",))
    rows.write_text(kept)
    own_order(tmp_path, "mine.yaml", "Which one?")
    refused(call(*arguments, "--data-dir", "two", cwd=tmp_path), ("asked own otherwise",))
    [run] = (tmp_path / "runs").iterdir()
    assert "as committed" in call("eval", "mine", "--data-dir", "two", cwd=tmp_path).out
    kept = (run / "order.yaml").rename(tmp_path / "kept.yaml")  # as a run of an earlier version
    whole = (run / "run.yaml").read_text()
    name_order(run, tmp_path / "mine.yaml")
    refused(call("eval", "mine", "--tasks", "own", "--data-dir", "two", cwd=tmp_path), ("asked own otherwise",))
    kept.rename(run / "order.yaml")
    (run / "run.yaml").write_text(whole)
    # The order's file may move too: what it says is the same.
    (tmp_path / "sub").mkdir()
    own_order(tmp_path / "sub", "mine.yaml")
    (tmp_path / "mine.yaml").unlink()
    moved = call("train", "--order", "sub/mine.yaml", *SMALL, "--data-dir", "two", "--dry-run", cwd=tmp_path)
    assert "goes on after stage 1" in moved.out, moved.err


def test_restart_begins_beside(stopped: Finished) -> None:
    before = tree(stopped.run)
    name = f"{stopped.name}-2"
    plan = call(*stopped.arguments, "--restart", "--dry-run", "--json", cwd=stopped.cwd).json
    assert plan["folder"] == f"runs/{name}"
    short = (*SMALL, "--set", "training.epochs=0")
    first = call("train", "--order", "three.yaml", *short, cwd=stopped.cwd)
    assert first.code == 0, first.err
    second = call("train", "--order", "three.yaml", *short, "--restart", cwd=stopped.cwd)
    assert second.code == 0, second.err
    made = Path(first.out.split("run folder: ")[1].split()[0])
    beside = made.with_name(f"{made.name}-2")
    assert f"run folder: {beside}\n" in second.out
    cwd = stopped.cwd
    assert results(cwd / beside) == results(cwd / made)
    about = json.loads((cwd / beside / "run.json").read_text())
    assert about["variant"] == made.name[-6:] and "training.epochs=0" in about["changed"]
    again = call("train", "--config", f"{beside}/run.yaml", cwd=cwd)
    assert f"the run {beside} is done already" in again.err
    assert tree(stopped.run) == before


def test_the_command_that_goes_on_after_a_restart_names_the_run(tmp_path: Path, cut: Callable[[], None]) -> None:
    cwd = setup(tmp_path)
    (cwd / "runs" / "mine").mkdir(parents=True)
    cut()
    ended = call("train", "--order", "three.yaml", *SMALL, "--name", "mine", "--restart", cwd=cwd)
    assert ended.code == 1
    command = ended.err.rsplit("go on: cl-runner ", 1)[1].split()
    assert "--restart" not in command
    assert command[-2:] == ["--name", "mine-2"]
    assert "goes on after stage 1" in call(*command, "--dry-run", cwd=cwd).out


def test_a_run_that_another_process_began_while_we_loaded(
    stopped: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both saw no folder; the slower one must not train in the quicker one's."""
    import fcntl

    from cl_runner.training.run import Run

    prepare = Run.prepare
    cwd = setup(tmp_path / "fresh")
    run = cwd / "runs" / stopped.name
    held = []

    def prepare_slowly(self: Run) -> object:
        done = prepare(self)
        if not run.exists():
            shutil.copytree(stopped.run, run)
            held.append((run / ".lock").open("w"))
            fcntl.flock(held[0], fcntl.LOCK_EX)
        return done

    monkeypatch.setattr(Run, "prepare", prepare_slowly)
    second = call("train", "--order", str(stopped.cwd / "three.yaml"), *SMALL, cwd=cwd)
    refused(second, (f"the run runs/{stopped.name} is being trained by another process",))
    held[0].close()
    assert tree(run) == tree(stopped.run)
    assert [path.name for path in run.parent.iterdir()] == [run.name]


def test_results_that_were_cut_off_are_written(finished: Finished, tmp_path: Path) -> None:
    """Killed after the last commit and before its results: nothing to train, but not done."""
    shutil.copytree(finished.cwd, tmp_path / "copy")
    run = tmp_path / "copy" / "runs" / finished.name
    (run / "matrix.csv").write_text("stage\n")
    (run / "metrics.json").unlink()
    (run / "status.json").write_text('{"state": "running"}')
    again = call(*finished.arguments, cwd=tmp_path / "copy")
    assert again.code == 0
    assert "done already" in again.err
    assert results(run) == results(finished.run)
    assert json.loads((run / "status.json").read_text()) == {"state": "done"}


def test_names_of_folders() -> None:
    def name(*sets: str, order: str = "order1", **flags: object) -> str:
        return folder_name(
            resolve(order=order, sets=sets, flags={key.replace("__", "."): v for key, v in flags.items()})
        )

    plain = name()
    assert plain == "order1-olora-tiny-t5-s42"
    assert name(seed=7, method__name="nlora", model__name="tiny-llama") == "order1-nlora-tiny-llama-s7"
    changed = name("training.lr=0.5")
    assert changed.startswith(f"{plain}-")
    assert len(changed) == len(plain) + 7
    assert changed != name("training.lr=0.25")
    assert name("output.log_every=3", "output.dir=x") == plain
    assert name(data__dir="somewhere") == name(data__dir="elsewhere") != plain
    lr = resolve(order="order1", sets=["training.lr=0.5"]), resolve(order="order1", sets=["training.lr=0.5", "seed=3"])
    assert variant(lr[0]) == variant(lr[1]) == changed[-6:]
    sets = ["method.reorthogonalise={how: soft}", "adapter.target_modules=[q, o]", "training.lr=0.5"]
    given = resolve(order="order1", sets=sets, method_schema=method_schema)
    told = settings_changed(given)
    assert variant(resolve(order="order1", sets=told, method_schema=method_schema)) == variant(given)
    assert "training.lr=0.5" in told and "adapter.target_modules=[q, o]" in told
    assert model_label("/models/t5 large/") == "t5_large"
    assert model_label("google/t5-v1_1-xl") == "t5-v1_1-xl"
    assert len(model_label("x" * 300)) == 60


def test_recorded_settings_are_those_of_the_run(finished: Finished) -> None:
    run = RunDir(finished.run)
    config = recorded(run)
    assert config.data.max_train == 8
    assert "lambda1" in config.method.own()
    assert config.order == {"name": "three", "tasks": [{"task": name} for name in STAGES]}
    assert (finished.run / "matrix.csv").read_text() == to_csv(read_matrix(run))
    with pytest.raises(UserError, match="no run folder"):
        RunDir(finished.cwd).about()
