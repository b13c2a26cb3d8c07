"""The hub's data sets, from a server on 127.0.0.1 that speaks the hub's protocol; then the same without network."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_runner.tasks import benchmark, hub_rows
from cl_runner.tasks.task import Hub
from tests.hub_server import HubServer

# What runs in a process of its own, whose hub is the server: each request is a task, a split, a seed.
LOADER = """
import json, sys
from cl_runner.config.schema import DataConfig
from cl_runner.errors import UserError
from cl_runner.tasks import benchmark
from cl_runner.tasks.rows import load_rows

answers = []
for entry, split, seed in json.load(sys.stdin):
    task = benchmark.get(entry) if isinstance(entry, str) else benchmark.build(entry)
    try:
        rows = load_rows(task, DataConfig(source="hub", seed=seed), split)
        answers.append({"rows": [[r.id, r.text, r.label] for r in rows.rows], "source": rows.source})
    except UserError as error:
        answers.append({"error": str(error)})
json.dump(answers, sys.stdout)
"""


def of_catalog(name: str) -> Hub:
    found = benchmark.get(name).hub
    assert found is not None
    return found


GLUE, AMAZON = of_catalog("RTE"), of_catalog("amazon")
REVISION = GLUE.revision or ""

CLASSES = ["entailment", "not_entailment"]
PAIRS: dict[str, list[Any]] = {
    "sentence1": [f"premise {k} {{label}}" for k in range(40)],
    "sentence2": [f"claim {k}" for k in range(40)],
    "label": [int(k % 4 == 0) for k in range(40)],
}
HUB = {
    "id": GLUE.id, "config": "rte", "splits": {"train": "train", "test": "validation"},
    "text": "sentence 1: {sentence1}\nsentence 2: {sentence2}", "labels": GLUE.labels,
}  # fmt: skip


def own(sizes: dict[str, int] | None = None, name: str = "mine", **hub: Any) -> dict[str, Any]:
    labels = ["contradiction", "entailment"]
    return {"name": name, "kind": "NLI", "labels": labels, "sizes": sizes or {}, "hub": HUB | hub}


REQUESTS: dict[str, tuple[Any, str, int]] = {
    "train": ("RTE", "train", 42),
    "test": ("RTE", "test", 42),
    "cut": (own({"train": 12}), "train", 42),
    "cut again": (own({"train": 12}), "train", 42),
    "cut, other seed": (own({"train": 12}), "train", 43),
    "cut, other task": (own({"train": 12}, "other"), "train", 42),
    "amazon train": ("amazon", "train", 42),
    "amazon test": ("amazon", "test", 42),
    "two templates": (own(text=["A {sentence1} B {sentence2}", "only {sentence2}"], config="gaps"), "train", 42),
    "missing class": (own(labels={"entailment": "entailment"}), "train", 42),
    "missing column": (own(text="{question}"), "train", 42),
    "missing split": (own(splits={"train": "train", "test": "test"}), "test", 42),
    "missing config": (own(config="nil"), "train", 42),
    "hidden labels": (own(config="hidden"), "train", 42),
    "missing set": (own(id="nobody/nothing"), "train", 42),
    "missing revision": (own(revision="0" * 40), "train", 42),
    "script": (own(id="someone/script"), "train", 42),
    "dev": ("RTE", "dev", 42),
}


def parquet(columns: dict[str, list[Any]]) -> bytes:
    from datasets import ClassLabel, Dataset, Features, Value, disable_progress_bars

    disable_progress_bars()
    text = {name: Value("string") for name in columns if name != "label"}
    stream = io.BytesIO()
    Dataset.from_dict(columns, features=Features({**text, "label": ClassLabel(names=CLASSES)})).to_parquet(stream)
    return stream.getvalue()


def first(n: int) -> dict[str, list[Any]]:
    return {name: values[:n] for name, values in PAIRS.items()}


def repository() -> dict[str, bytes]:
    card = "---\nconfigs:\n"
    for config, splits in {"rte": ["train", "validation"], "gaps": ["train"], "hidden": ["train"]}.items():
        card += f"- config_name: {config}\n  data_files:\n"
        card += "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
    return {
        "README.md": (card + "---\n").encode(),
        "rte/train-00000-of-00001.parquet": parquet(PAIRS),
        "rte/validation-00000-of-00001.parquet": parquet(first(6)),
        "gaps/train-00000-of-00001.parquet": parquet(first(3) | {"sentence1": ["full", " ", None]}),
        "hidden/train-00000-of-00001.parquet": parquet(first(3) | {"label": [-1, -1, -1]}),
    }


def reviews(n: int, header: bool) -> bytes:
    rows = "".join(f'"{k % 5 + 1}","NA","said ""{k}"" \\n, twice"\n' for k in range(n))
    return (("class_index,review_title,review_text\n" if header else "") + rows).encode()


def load(server: HubServer, home: Path, names: list[str], cwd: Path) -> dict[str, Any]:
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", LOADER], input=json.dumps([REQUESTS[name] for name in names]), text=True,
        capture_output=True, env=server.environment(home, PYTHONPATH=root), cwd=cwd, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), f"bars or warnings: {done.stderr}"
    return dict(zip(names, json.loads(done.stdout), strict=True))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the loader says with the server up, and under ``offline: …`` what it says afterwards, with it gone."""
    home, here = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("here")
    with HubServer() as server:
        server.add("datasets", GLUE.id, repository(), commit=REVISION)
        csv = {"train.csv": reviews(20, header=True), "test.csv": reviews(10, header=False)}
        server.add("datasets", AMAZON.id, {"README.md": b"---\nlicense: apache-2.0\n---\n", **csv})
        server.add("datasets", "someone/script", {"script.py": b"raise SystemExit", "README.md": b""})
        found = load(server, home, list(REQUESTS), here)
    begin = time.monotonic()
    gone = load(server, home, ["test", "cut", "amazon train", "missing set", "missing revision"], here)
    assert time.monotonic() - begin < 20, "an unreachable hub is not retried for long"
    assert not list(here.iterdir()), "nothing is written into the current folder"
    return found | {f"offline: {name}": answer for name, answer in gone.items()}


def test_fields_and_classes_become_text_and_labels(answers: dict[str, Any]) -> None:
    rows = {row[0]: row[1:] for row in answers["train"]["rows"]}
    assert len(rows) == 40
    assert rows["train/0"] == ["sentence 1: premise 0 {label}\nsentence 2: claim 0", "contradiction"]
    assert rows["train/1"] == ["sentence 1: premise 1 {label}\nsentence 2: claim 1", "entailment"]
    assert len(answers["test"]["rows"]) == 6, "test is the hub's validation"
    assert answers["test"]["source"] == f"hub {GLUE.id} rte@{REVISION[:12]}, split validation"


def test_cut_is_balanced_and_by_seed_and_task_alone(answers: dict[str, Any]) -> None:
    cut = answers["cut"]["rows"]
    assert Counter(row[2] for row in cut) == {"contradiction": 6, "entailment": 6}, "10 and 30 in the whole"
    assert cut == answers["cut again"]["rows"] == answers["offline: cut"]["rows"]
    assert cut != answers["cut, other seed"]["rows"] and cut != answers["cut, other task"]["rows"]


def test_csv_mirror_with_and_without_a_header(answers: dict[str, Any]) -> None:
    assert len(answers["amazon train"]["rows"]) == 20 and len(answers["amazon test"]["rows"]) == 10
    test = {row[0]: row[1:] for row in answers["amazon test"]["rows"]}
    assert test["test/0"] == ['Title: NA\nText: said "0" \\n, twice\n', "very negative"]
    assert test["test/4"][1] == "very positive"


def test_second_template_where_a_field_is_empty(answers: dict[str, Any]) -> None:
    texts = sorted(row[1] for row in answers["two templates"]["rows"])
    assert texts == ["A full B claim 0", "only claim 1", "only claim 2"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("missing class", ["class 'not_entailment' of 'label' is not in the task's mapping", "row 1"]),
        ("missing column", ["no column 'question', only sentence1, sentence2, label"]),
        ("missing split", ["split test: cannot be loaded", "Unknown split"]),
        ("missing config", ["cannot be loaded", "nil"]),
        ("hidden labels", ["every label is hidden"]),
        ("missing set", ["hub nobody/nothing", "no such data set"]),
        ("missing revision", ["@000000000000", "no such revision"]),
        ("script", ["someone/script", "cannot be loaded", "scripts are no longer supported"]),
        ("dev", ["no dev split"]),
        ("offline: missing set", ["no network for nobody/nothing", "--data-dir FOLDER", "--data synthetic"]),
        ("offline: missing revision", ["no network", f"the local cache has only revision {REVISION}"]),
    ],
)
def test_what_goes_wrong_is_one_clear_line(answers: dict[str, Any], name: str, parts: list[str]) -> None:
    message = answers[name]["error"]
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_offline_takes_what_the_cache_has(answers: dict[str, Any]) -> None:
    for name in ("test", "amazon train"):
        assert answers[f"offline: {name}"] == answers[name]


@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=60), st.integers(1, 70), st.integers(0, 5))
def test_cut_takes_what_it_can_as_evenly_as_it_can(labels: list[str | None], size: int, seed: int) -> None:
    chosen = hub_rows.cut(labels, size, random.Random(seed))
    there = Counter(label for label in labels if label is not None)
    taken = Counter(labels[k] for k in chosen)
    assert len(set(chosen)) == len(chosen) == min(size, there.total())
    assert None not in taken
    most = max(taken.values(), default=0)
    for label in there:
        assert taken[label] >= most - 1 or taken[label] == there[label], "short only where there is no more"


def test_a_folder_of_the_same_name_does_not_pass_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_runner.errors import UserError

    (tmp_path / GLUE.id).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"\./nyu-mll/glue in the current folder"):
        hub_rows.read(benchmark.get("RTE"), "train", 42)
