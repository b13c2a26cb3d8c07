"""What each command prints, for people and as JSON, and what a run leaves behind."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cl_runner.settings import resolve
from tests.command_line import ORDER, SMALL, STAGES, call, environment, tree, variables
from tests.commands.test_errors import benchmark_folder
from tests.conftest import Finished


def jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def naive_scores(run: Path) -> list[dict[str, float]]:
    """Percent correct of each stage and task, from the predictions alone: exact match without case and punctuation."""

    def plain(text: str) -> str:
        return " ".join(re.sub(r"[^\w\s]|_", "", text.lower()).split())

    stages = []
    for index, stage in enumerate(STAGES, 1):
        rows = jsonl(run / f"stages/{index:02d}-{stage}/predictions.jsonl")
        scores = {}
        for task in STAGES[:index]:
            hits = [plain(row["output"]) == plain(row["gold"]) for row in rows if row["task"] == task]
            assert [row["correct"] for row in rows if row["task"] == task] == hits
            scores[task] = 100 * sum(hits) / len(hits)
        stages.append(scores)
    return stages


def test_train_ends_with_table_folder_and_next_command(finished: Finished) -> None:
    lines = finished.result.out.splitlines()
    assert lines[0].startswith("three · olora")
    assert "synthetic" in lines[0]
    assert lines[-2] == f"run folder: runs/{finished.name}"
    command = lines[-1].removeprefix("again at any time: cl-runner ")
    assert call(*command.split(), cwd=finished.cwd).out == "\n".join(lines[:-3]) + "\n"
    said = finished.result.err.splitlines()
    assert said[0] == "model tiny-t5: embedded"
    assert said[1].startswith("synthetic stand-in data")
    assert "--data-dir CL_Benchmark" in said[1], "what to type for the real thing"
    first = said.index(f"run folder: runs/{finished.name}")
    assert all(re.search(" no (train|test) row of ", line) for line in said[2:first]), "so few rows lack some labels"
    assert all(re.match(r"stage \d of 3 \w+: ", line) for line in said[first + 1 :])
    assert len([line for line in said if "done in" in line]) == 3


def test_what_a_run_leaves(finished: Finished) -> None:
    run = finished.run
    top = sorted(path.name for path in run.iterdir())
    assert top == [".lock", "environment.json", "log.jsonl", "matrix.csv", "metrics.json", "order.yaml", "run.json",
                   "run.log", "run.yaml", "stages", "status.json"]  # fmt: skip
    assert sorted(path.name for path in (run / "stages").iterdir()) == ["01-dbpedia", "02-amazon", "03-agnews"]
    for stage in (run / "stages").iterdir():
        assert {"DONE", "adapter", "metrics.json", "predictions.jsonl", "state.json"} <= {
            p.name for p in stage.iterdir()
        }
        assert {p.name for p in (stage / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        hashes = json.loads((stage / "DONE").read_text())["sha256"]
        files = {name: digest for name, digest in tree(stage).items() if digest != "folder" and name != "DONE"}
        assert hashes == files
    log = jsonl(run / "log.jsonl")
    assert [(row["stage"], row["step"], row["steps"]) for row in log] == [(s, k, 2) for s in STAGES for k in (1, 2)]
    for row in log:
        assert {"loss", "penalty", "lr", "examples_per_second", "memory_mb"} <= set(row)
        assert all(value is None or isinstance(value, str) or math.isfinite(value) for value in row.values())
    about = json.loads((run / "environment.json").read_text())
    assert about["packages"]["torch"]
    assert about["data"]["agnews"]["test"]["rows"] == 4
    assert len(about["data"]["agnews"]["train"]["fingerprint"]) == 64
    plain = (run / "run.log").read_text()
    assert "\x1b" not in plain
    assert plain.splitlines()[1:] == finished.result.err.splitlines()


def test_scores_everywhere_are_those_of_the_predictions(finished: Finished) -> None:
    stages = naive_scores(finished.run)
    with (finished.run / "matrix.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["stage", *STAGES]
    wanted = [[f"{stage[t]:.4f}" if t in stage else "" for t in STAGES] for stage in stages]
    assert [row[1:] for row in rows[1:]] == wanted
    assert [row[0] for row in rows[1:]] == STAGES
    report = call("report", "--json", cwd=finished.cwd).json
    last = stages[-1]
    average = sum(last.values()) / 3
    best = {task: max(stage[task] for stage in stages if task in stage) for task in STAGES}
    assert report["average_accuracy"] == pytest.approx(average)
    assert report["forgetting"] == pytest.approx(sum(best[t] - last[t] for t in STAGES[:-1]) / 2)
    learned = {task: stages[index][task] for index, task in enumerate(STAGES)}
    assert report["backward_transfer"] == pytest.approx(sum(last[t] - learned[t] for t in STAGES[:-1]) / 2)
    assert report["forward_transfer"] is None
    assert report["matrix"]["values"] == [[stage.get(task) for task in STAGES] for stage in stages]
    metrics = json.loads((finished.run / "metrics.json").read_text())
    assert metrics["average_accuracy"] == pytest.approx(average)
    [listed] = call("list", "runs", "--json", cwd=finished.cwd).json["runs"]
    assert listed["average_accuracy"] == pytest.approx(average)


def timings(value: object, at: str = "") -> list[str]:
    """Keys anywhere that smell of time."""
    if isinstance(value, dict):
        return [k for key, each in value.items() for k in [*([f"{at}{key}"] if "second" in key else []),
                *timings(each, f"{at}{key}.")]]  # fmt: skip
    return []


def test_report_in_every_form(finished: Finished) -> None:
    before = tree(finished.cwd)
    found = call("report", "--json", cwd=finished.cwd)
    assert found.json["seconds"]
    assert [key for key in timings(found.json) if not key.startswith("seconds")] == []
    assert found.json["synthetic"] is True
    assert found.err == f"the newest run: runs/{finished.name}\n"
    table = call("report", finished.name[:8], cwd=finished.cwd)
    assert (table.code, table.err) == (0, "")
    assert "average accuracy (AA)" in table.out
    comma = call("report", str(finished.run), "--csv", cwd=finished.cwd.parent)
    assert comma.out == (finished.run / "matrix.csv").read_text()
    assert "synthetic" in comma.err, "the format has no place for the word"
    markdown = call("report", finished.name, "--markdown", cwd=finished.cwd)
    assert "| after stage, % (synthetic) | dbpedia | amazon | agnews |" in markdown.out
    again = call("train", *finished.arguments[1:], "--json", cwd=finished.cwd).json
    assert {key: value for key, value in again.items() if key != "run"} == found.json
    assert again["run"] == f"runs/{finished.name}"
    assert tree(finished.cwd) == before


def test_unfinished_runs_are_reported(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.cwd, tmp_path / "copy")
    cwd, run = tmp_path / "copy", tmp_path / "copy" / "runs" / finished.name
    shutil.rmtree(run / "stages" / "03-agnews")
    (run / "status.json").write_text('{"state": "failed"}')
    report = call("report", "--json", cwd=cwd).json
    assert (report["stage"], report["stages"], report["finished"]) == (2, 3, False)
    assert report["average_accuracy"] == pytest.approx(sum(naive_scores(finished.run)[1].values()) / 2)
    assert "stage 2 of 3" in " ".join(call("report", cwd=cwd).out.split())
    [listed] = call("list", "runs", "--json", cwd=cwd).json["runs"]
    assert (listed["stage"], listed["stages"], listed["state"]) == (2, 3, "failed")
    for stage in ("01-dbpedia", "02-amazon"):
        shutil.rmtree(run / "stages" / stage)
    for form in ([], ["--json"], ["--csv"], ["--markdown"]):
        nothing = call("report", *form, cwd=cwd)
        assert nothing.code == 0, nothing.err
    assert call("report", "--json", cwd=cwd).json["average_accuracy"] is None
    assert "no finished stage" in call("eval", cwd=cwd).err


def test_eval_gives_the_committed_numbers_and_writes_nothing(finished: Finished) -> None:
    before = tree(finished.cwd)
    stages = naive_scores(finished.run)
    for number in (3, 1):
        found = call("eval", "--stage", str(number), "--json", cwd=finished.cwd)
        assert found.code == 0, found.err
        assert found.json["scores"] == found.json["committed"] == pytest.approx(stages[number - 1])
        assert found.json["differing_rows"] == {task: [] for task in STAGES[:number]}
        assert (found.json["stage"], found.json["name"]) == (number, STAGES[number - 1])
        assert found.json["run"] == f"runs/{finished.name}"
    some = call("eval", finished.name, "--stage", "2", "--tasks", "agnews, dbpedia", cwd=finished.cwd)
    lines = some.out.splitlines()
    assert lines[0] == f"run folder: runs/{finished.name}"
    assert lines[1] == "stage 2 (amazon), percent, synthetic:"
    assert re.fullmatch(r"  agnews: \d+\.\d{4} \(not scored when the stage was committed\)", lines[2])
    assert lines[3] == f"  dbpedia: {stages[1]['dbpedia']:.4f}, as committed"
    assert tree(finished.cwd) == before


def test_eval_says_what_differs(finished: Finished, tmp_path: Path) -> None:
    """On another kind of device answers may differ; here the committed ones are changed instead."""
    shutil.copytree(finished.cwd, tmp_path / "copy")
    stage = tmp_path / "copy" / "runs" / finished.name / "stages" / "03-agnews"
    rows = jsonl(stage / "predictions.jsonl")
    changed = [row for row in rows if row["task"] == "amazon"][2]
    changed["output"] = "something else"
    (stage / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = json.loads((stage / "DONE").read_text())
    done["sha256"]["predictions.jsonl"] = tree(stage)["predictions.jsonl"]
    (stage / "DONE").write_text(json.dumps(done))
    found = call("eval", "--json", "--tasks", "amazon", cwd=tmp_path / "copy").json
    assert found["differing_rows"] == {"amazon": [changed["id"]]}
    said = call("eval", "--tasks", "amazon", cwd=tmp_path / "copy").out
    assert f"other answers: {changed['id']}" in said


def test_lists(finished: Finished) -> None:
    kinds = {
        "orders": {"order1", "order6", "example-mcq"},
        "tasks": {"dbpedia", "MNLI"},
        "methods": {"seqlora", "inclora", "pertask", "mtl", "olora", "nlora", "replay", "ewc", "ogd"},
        "adapters": {"lora"},
        "models": {"tiny-t5", "tiny-llama"},
        "presets": {"tiny", "t5-large", "published"},
        "runs": {finished.name},
    }
    for kind, names in kinds.items():
        found = call("list", kind, "--json", cwd=finished.cwd)
        assert found.err == ""
        rows = found.json[kind]
        assert names <= {next(iter(row.values())) for row in rows}, kind
        text = call("list", kind, cwd=finished.cwd)
        assert (text.code, text.err) == (0, "")
        assert all(name in text.out for name in names)
    text, rows = (call("list", "compatibility", *form, cwd=finished.cwd) for form in ((), ("--json",)))
    assert max(map(len, text.out.splitlines())) < 160  # a screen's
    lacking = next(row for row in rows.json["compatibility"] if row["method"] == "olora")["vera"]
    letters = dict(reversed(line.strip().split("  ", 1)) for line in text.out.partition("lacks\n")[2].splitlines())
    [cells] = [line.split() for line in text.out.splitlines() if line.startswith("olora ")]
    assert cells[3] == "".join(letters[gap] for gap in lacking.removeprefix("no: ").split(", "))
    [run] = call("list", "runs", "--json", cwd=finished.cwd).json["runs"]
    assert run.pop("average_accuracy") is not None and run.pop("forgetting") is not None and run.pop("trained_at")
    assert run == {
        "name": finished.name, "method": "olora", "order": "three", "model": "tiny-t5", "seed": 42, "stage": 3,
        "stages": 3, "step": 0, "state": "done", "undefined": [], "synthetic": True, "chosen": False, "differs": {},
    }  # fmt: skip


def test_list_runs_where_there_are_none(tmp_path: Path) -> None:
    assert call("list", "runs", cwd=tmp_path).out == "there are no runs in runs\n"
    assert call("list", "runs", "--json", cwd=tmp_path).json == {"runs": []}
    assert list(tmp_path.iterdir()) == []


def test_show_method(tmp_path: Path) -> None:
    shown = call("show", "olora", "--json", cwd=tmp_path).json
    assert shown["name"] == "olora"
    assert "2310.14152" in shown["paper"]
    assert shown["settings"]["lambda1"]["what"]
    assert "method.lambda1 = " in call("show", "olora", cwd=tmp_path).out
    offered = {
        name: call("show", name, "--json", cwd=tmp_path).json["options"] for name in ("seqlora", "ella", "inflora")
    }
    begins = {name: [title for key, title in found.items() if "adapter.init" in key] for name, found in offered.items()}
    assert ["pissa" in title for title in begins["seqlora"]] == [True]
    assert ["pissa" in title or "eva" not in title for title in begins["ella"]] == [False]
    assert begins["inflora"] == []  # it makes A itself, and refuses every other
    shown = call("show", "oa", cwd=tmp_path).out
    assert "sets:                 adapter.target_modules=[outputs], unless it is given\n" in shown
    assert "Assumptions, as there is no public code: tasks' adapters stand side by side" in shown and "``" not in shown


def test_config_show_tells_where_each_value_is_from(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("training: {lr: 1e-4}\n")
    arguments = ("--order", "order1", "--config", "mine.yaml", "--seed", "7", "--set", "adapter.r=4")
    shown = call("config", "show", *arguments, cwd=tmp_path)
    text = shown.out
    assert re.search(r"^seed: 7 +# --seed$", text, re.MULTILINE)
    assert re.search(r"^  lr: 0.0001 +# mine.yaml:1$", text, re.MULTILINE)
    assert re.search(r"^  r: 4 +# --set$", text, re.MULTILINE)
    assert re.search(r"^  global_batch: \d+ +# preset tiny$", text, re.MULTILINE)
    found = call("config", "show", *arguments, "--json", cwd=tmp_path).json
    assert found["config"]["training"]["lr"] == 1e-4
    assert found["origin"]["training.lr"] == "mine.yaml:1"
    # What is shown is a config file that gives the same again.
    (tmp_path / "shown.yaml").write_text(text)
    again = resolve(config_file=tmp_path / "shown.yaml").config.model_dump(mode="json")
    assert again == {**found["config"], "order": again["order"]}


def test_config_schema(tmp_path: Path) -> None:
    schema = call("config", "schema", "--json", cwd=tmp_path)
    assert schema.json["$schema"].startswith("https://json-schema.org/")
    assert schema.out == call("config", "schema", cwd=tmp_path).out


def test_data_show_prints_the_exact_input(tmp_path: Path) -> None:
    benchmark_folder(tmp_path / "data")
    arguments = ("--order", "order1", "--task", "agnews", "-n", "2", "--data-dir", "data")
    shown = call("data", "show", *arguments, "--json", cwd=tmp_path).json
    assert [row["id"] for row in shown["rows"]] == ["test/0", "test/1"]
    assert shown["rows"][0]["input"] == (
        "Task:TC\nDataset:agnews\nWhat is the topic of the following paragraph? Choose one from the option.\n"
        "Option: World, Sports, Business, Science or Technology \ntest 0\nAnswer:"
    )
    assert shown["rows"][0]["target"] == "World"
    text = call("data", "show", *arguments, cwd=tmp_path).out
    assert text.startswith(f"--- test/0\n{shown['rows'][0]['input']}\n→ World\n--- test/1\n")
    assert text.endswith("\n--- metric normalised: case, punctuation and white space do not count\n")
    assert (shown["metric"], shown["scoring"]) == ("normalised", "normalised")
    without = call("data", "show", *arguments, "--set", "data.add_task_name=false", "--json", cwd=tmp_path).json
    assert without["rows"][0]["input"].startswith("Dataset:agnews\n")


def test_data_show_keeps_what_utf8_cannot_hold(tmp_path: Path) -> None:
    benchmark_folder(tmp_path / "data")
    file = tmp_path / "data" / "TC" / "agnews" / "test.json"
    file.write_text('[{"sentence": "half \\ud800 a pair é", "label": "World"}]')
    found = call("data", "show", "--order", "order1", "--task", "agnews", "--data-dir", "data", "--json", cwd=tmp_path)
    assert found.code in (0, 2)
    if found.code == 0:
        assert "half \ud800 a pair é" in found.json["rows"][0]["input"]


def test_data_check_counts(tmp_path: Path) -> None:
    benchmark_folder(tmp_path / "data")
    agnews = tmp_path / "data" / "TC" / "agnews"
    (agnews / "train.json").write_text(
        json.dumps(
            [
                {"sentence": "same", "label": "World"},
                {"sentence": "same", "label": "Sports"},
                {"sentence": "test 0", "label": "Wolrd"},
            ]
        )
    )
    (tmp_path / "three.yaml").write_text(ORDER)
    with variables(CL_RUNNER_DATA="data"):
        found = call("data", "check", "--order", "three.yaml", "--json", cwd=tmp_path).json
    [task] = [task for task in found["tasks"] if task["task"] == "agnews"]
    assert task["splits"]["train"]["rows"] == 2
    assert task["splits"]["train"]["unknown_labels"] == {"Wolrd": 1}
    assert task["duplicates"]["train"] == 1
    assert task["duplicates"]["conflicting"] == 1
    assert task["splits"]["train"]["length"]["unit"] == "tokens"
    text = call("data", "check", "--order", "three.yaml", "--data-dir", "data", cwd=tmp_path)
    assert (text.code, text.err) == (0, "")
    assert "Wolrd" in text.out


def test_new_order_can_be_trained(tmp_path: Path) -> None:
    made = call("new", "order", "mine.yaml", "--json", cwd=tmp_path)
    assert made.json == {"file": "mine.yaml"}
    plan = call("train", "--order", "mine.yaml", "--dry-run", "--json", cwd=tmp_path).json
    assert [stage["name"] for stage in plan["stages"]] == ["dbpedia", "amazon"]
    second = call("new", "order", "other.yaml", cwd=tmp_path)
    assert second.out.startswith("wrote other.yaml")


def test_dry_run_tells_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "three.yaml").write_text(ORDER)
    before = tree(tmp_path)
    arguments = ("train", "--order", "three.yaml", "--set", "data.max_train=100", "--set", "data.max_test=10", "--set",
                 "training.global_batch=32", "--set", "training.micro_batch=8", "--set", "training.epochs=3", "--set",
                 "stages.3.training.epochs=1")  # fmt: skip
    plan = call(*arguments, "--dry-run", "--json", cwd=tmp_path).json
    assert [stage["steps"] for stage in plan["stages"]] == [12, 12, 4]  # ⌈100 / 32⌉ a pass
    assert [stage["test_rows"] for stage in plan["stages"]] == [10, 20, 30]
    assert {stage["train_rows"] for stage in plan["stages"]} == {100}
    assert {(s["global_batch"], s["micro_batch"], s["accumulation"]) for s in plan["stages"]} == {(32, 8, 4)}
    assert plan["synthetic"] is True
    text = call(*arguments, "--dry-run", cwd=tmp_path)
    assert "32 = 8 × 4 × 1" in text.out
    assert "nothing was written" in text.out
    joint = call(*arguments[:3], "--method", "mtl", *SMALL, "--dry-run", "--json", cwd=tmp_path).json
    assert [(stage["train_rows"], stage["test_rows"]) for stage in joint["stages"]] == [(24, 12)]
    assert tree(tmp_path) == before


def test_version(tmp_path: Path) -> None:
    from cl_runner import __version__

    assert call("--version", cwd=tmp_path).out == f"cl-runner {__version__}\n"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, "None 10000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"), ({"GOMP_SPINCOUNT": "7"}, "None 7")],
)
def test_threads_spin_shortly_unless_told(given: dict[str, str], wanted: str) -> None:
    """It has to be in the environment before torch is there, which reads it once."""
    asked = (
        "import os, sys; from cl_runner import cli; before = 'torch' in sys.modules;"
        "found = lambda: [os.environ.get(name) for name in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')];"
        "cli.outcome = lambda _: print(before, *found()) or 0; cli.main()"
    )
    env = {**environment(), **given}
    for name in {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} - set(given):
        env.pop(name, None)
    said = subprocess.run([sys.executable, "-c", asked], env=env, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", *wanted.split()]
