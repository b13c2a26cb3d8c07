"""A run in the reference codes' ways (``configs/published.yaml``): what it says, and that it goes on to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cl_runner.config.schema import ModelConfig
from cl_runner.tasks import benchmark
from tests.command_line import ORDER, SMALL, STAGES, call

WAYS = (
    "adapter.dropout_past=true", "data.unknown_test=score", "data.truncate=reference", "data.max_source=40",
    "data.long_targets=cut", "data.max_target=2", "training.penalty_at=micro",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """Three stages on the benchmark's layout; a test row of agnews has a label of its own."""
    cwd = tmp_path_factory.mktemp("reference")
    (cwd / "three.yaml").write_text(ORDER)
    for name in STAGES:
        task = benchmark.get(name)
        folder = cwd / "data" / task.kind / name
        folder.mkdir(parents=True)
        labels = task.labels or []
        rows = [{"sentence": f"he said , n't {n} . " * 9, "label": labels[n % len(labels)]} for n in range(32)]
        (folder / "train.json").write_text(json.dumps(rows))
        if name == "agnews":
            rows[1]["label"] = "-"
        (folder / "test.json").write_text(json.dumps(rows[:4]))
    arguments = ("train", "--order", "three.yaml", "--data-dir", "data", "--name", "mine", *SMALL)
    arguments += tuple(f"--set={way}" for way in WAYS)
    ended = call(*arguments, cwd=cwd)
    assert ended.code == 0, ended.err
    (cwd / "said").write_text(ended.err)
    return cwd, arguments


def committed(cwd: Path) -> dict[str, Any]:
    stages = cwd / "runs" / "mine" / "stages"
    return {
        stage.name: (json.loads((stage / "DONE").read_text())["sha256"], (stage / "predictions.jsonl").read_text())
        for stage in stages.iterdir()
    }


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    hashes = {stage: {k: v for k, v in of.items() if k != "metrics.json"} for stage, (of, _) in found.items()}
    return {stage: (hashes[stage], answers) for stage, (_, answers) in found.items()}


def test_it_goes_on_to_the_bit(run: tuple[Path, tuple[str, ...]], tmp_path: Path) -> None:
    cwd, arguments = run
    shutil.copytree(cwd, tmp_path / "copy")
    again = tmp_path / "copy"
    for stage in ("02-amazon", "03-agnews"):
        shutil.rmtree(again / "runs" / "mine" / "stages" / stage)
    (again / "runs" / "mine" / "status.json").write_text('{"state": "stopped"}')
    ended = call(*arguments, cwd=again)
    assert ended.code == 0, ended.err
    assert without_times(committed(again)) == without_times(committed(cwd))


def test_what_is_done_with_rows_and_labels_is_said(run: tuple[Path, tuple[str, ...]]) -> None:
    cwd, _ = run
    line = "rows scored all the same, their label being none of the task's: agnews 1 test (-: 1)"
    said = (cwd / "said").read_text().splitlines()
    assert line in said
    assert any(one.startswith("train targets cut to data.max_target: dbpedia ") for one in said)
    assert line in call("report", "mine", "--json", cwd=cwd).json["notes"]
    about = json.loads((cwd / "runs" / "mine" / "run.json").read_text())
    assert about["identity"]["penalty_times"] == [2, 2, 2] and about["notes"][-2] == line
    assert about["notes"][-1].startswith("test rows whose text is in train too: dbpedia 4 of 4, ")


def test_a_row_of_another_label_is_wrong_like_any_other(run: tuple[Path, tuple[str, ...]]) -> None:
    cwd, _ = run
    stage = cwd / "runs" / "mine" / "stages" / "03-agnews"
    rows = [json.loads(line) for line in (stage / "predictions.jsonl").read_text().splitlines()]
    mine = [row for row in rows if row["task"] == "agnews"]
    assert [row["gold"] for row in mine][1] == "-" and len(mine) == 4
    right = sum(row["output"].strip().lower() == row["gold"].lower() for row in mine)
    assert json.loads((stage / "metrics.json").read_text())["scores"]["agnews"] == 100 * right / 4
    assert not mine[1]["correct"]


def test_train_targets_are_cut_as_the_tokenizer_cuts_them(run: tuple[Path, tuple[str, ...]]) -> None:
    import torch

    from cl_runner.models.base import load_base
    from cl_runner.models.encoding import Encoder

    base = load_base(ModelConfig(), torch.device("cpu"))
    labels = [label for name in STAGES for label in benchmark.get(name).labels or []]
    prompts = [benchmark.get("agnews").prompt("a text")] * len(labels)
    found = Encoder(base.tokenizer, base.layout, 40, 2, "reference").encode_many(prompts, labels, cut_target=True)
    wanted = [base.tokenizer(label, truncation=True, max_length=2)["input_ids"] for label in labels]
    assert [example.target for example in found] == wanted
    assert {example.target_cut for example in found} == {True, False}


def test_long_targets_are_refused_by_default(run: tuple[Path, tuple[str, ...]]) -> None:
    cwd, arguments = run
    kept = [argument for argument in arguments if "long_targets" not in argument]
    ended = call(*kept, "--name", "other", cwd=cwd)
    assert ended.code == 2 and "data.max_target 2; raise it to" in ended.err
    assert "or set data.long_targets to cut" in ended.err
