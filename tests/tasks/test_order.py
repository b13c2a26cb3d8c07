"""Task orders: those that come along, a user's own, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cl_runner.config.schema import DataConfig
from cl_runner.errors import UserError
from cl_runner.settings import dump_order
from cl_runner.tasks.new_order import new_order
from cl_runner.tasks.order import load_order, order_names
from cl_runner.tasks.rows import load_rows

ORDERS = {
    "order1": "dbpedia amazon yahoo agnews",
    "order1-three": "dbpedia amazon agnews",
    "order2": "dbpedia amazon agnews yahoo",
    "order3": "yahoo amazon agnews dbpedia",
    "order4": "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
    "order4-eight": "MNLI QQP BoolQA IMDB amazon SST-2 dbpedia agnews",
    "order5": "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
    "order6": "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
}
OWN = "{name: mine, kind: TC, labels: [a, b], source: {train: a.csv, test: b.csv}}"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "f.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


@pytest.mark.parametrize("name", ORDERS)
def test_published_orders(name: str) -> None:
    order = load_order(name)
    assert order.name == name and order.names == ORDERS[name].split()
    assert not any(entry.set or entry.own for entry in order.entries)


def test_names() -> None:
    write("tasks: [dbpedia]", "task_orders/mine.yaml")
    assert {*ORDERS, "example-mcq", "mine"} <= set(order_names())


def test_own_order_wins_over_ours_and_a_path_over_both() -> None:
    write("tasks: [CB]", "task_orders/order1.yaml")
    write("tasks: [RTE]", "order1.yaml")
    assert load_order("order1").names == ["CB"]
    assert load_order("./order1.yaml").names == load_order("order1.yaml").names == ["RTE"]
    assert load_order(str(Path("order1.yaml").resolve())).name == "order1"


def test_the_example_is_complete() -> None:
    task = load_order("example-mcq").tasks[-1]
    assert task.source is not None and task.labels == ["A", "B", "C", "D"]
    rows = [json.loads(line) for line in Path(task.source.train).read_text().splitlines()]
    assert len(rows) == 10
    for split in (task.source.train, task.source.test):
        for line in Path(split).read_text().splitlines():
            row = json.loads(line)
            assert row[task.columns.label] in task.labels
            assert all(f"\n{letter}. " in row[task.columns.text] for letter in task.labels)


def test_all_forms_of_an_entry() -> None:
    file = write(
        "name: my-order\ndescription: three\ntasks:\n"
        "  - dbpedia\n"
        "  - {task: MNLI, set: {training.epochs: 2, data: {max_train: 10}}}\n"
        "  - name: 2024\n"
        "    kind: free\n"
        "    instruction: Say it.\n"
        "    metric: rouge-l\n"
        "    source: {train: rows/a.csv, test: /data/b.csv}\n"
        "    columns: {text: body, label: y}\n"
        "    set: {training.lr: 1e-3}\n",
        "orders/f.yaml",
    )
    order = load_order(file)
    assert order.name == "my-order" and order.description == "three" and order.names == ["dbpedia", "MNLI", "2024"]
    _, mnli, own = order.entries
    assert mnli.set == {"training.epochs": 2, "data.max_train": 10}
    column = Path(file).read_text().splitlines()[4].index("10") + 1
    assert mnli.places["data.max_train"] == f"orders/f.yaml:5:{column}"
    assert own.set == {"training.lr": 1e-3} and own.own and not mnli.own
    assert own.task.labels is None and own.task.metric == "rouge-l" and own.task.columns.text == "body"
    assert own.task.source is not None
    assert own.task.source.train == str(Path("orders/rows/a.csv").resolve())
    assert own.task.source.test == "/data/b.csv"


AGAIN = """\
name: aba
description: "back: to the first"
tasks:
- {task: MNLI, set: {training.epochs: 2, data: {max_train: 10}}}
- {name: mine, kind: TC, labels: [-1, 007, "a: b", C++], source: {train: r/a.csv, test: r/b.csv},
   set: {training.lr: 1e-3}}
- {task: MNLI, as: MNLI-2}
- {task: mine, as: mine-2, set: {training.epochs: 3}}
- {name: free, kind: QA, instruction: "Say \\"it\\"\\tnow", metric: numeric, tolerance: 0.5,
   source: {train: x.csv, test: x.csv}}
"""


def test_a_task_may_come_again_under_another_name() -> None:
    order = load_order(write(AGAIN, "orders/aba.yaml"))
    assert order.names == ["MNLI", "mine", "MNLI-2", "mine-2", "free"]
    for first, again in ((0, 2), (1, 3)):
        one, two = order.tasks[first], order.tasks[again]
        assert two.name != one.name and two.called == one.called == one.name
        assert two.prompt("x") == one.prompt("x") and two.asked == one.asked and two.source == one.source
    assert order.entries[3].set == {"training.epochs": 3}, "not those of the first time"
    third = load_order(write("tasks: [CB, {task: CB, as: b}, {task: b, as: c}]")).tasks[2]
    assert (third.name, third.called) == ("c", "CB")


def test_an_order_written_out_is_the_same_order_anywhere() -> None:
    order = load_order(write(AGAIN, "orders/aba.yaml"))
    kept = load_order(write(dump_order(order.written()), "elsewhere/kept.yaml"))
    assert (kept.name, kept.description, kept.folder, kept.tasks) == (
        order.name, order.description, order.folder, order.tasks,
    )  # fmt: skip
    assert [entry.set for entry in kept.entries] == [entry.set for entry in order.entries]
    assert kept.folder == Path("orders").resolve()
    own = {entry.task.name: entry.own.source for entry in order.entries if entry.own and entry.own.source}
    there = order.at(Path("/there"), own)
    assert there.tasks[1].source is not None and there.tasks[1].source.train == "/there/r/a.csv"
    assert load_order(write(dump_order(there.written()), "kept.yaml")).tasks == there.tasks
    there = order.at(Path("/there"), {"mine": own["mine"]})
    assert there.tasks[3] == order.tasks[3] and there.tasks[1] != order.tasks[1], "the others stay where they were"
    assert load_order(write(dump_order(there.written()), "kept.yaml")).tasks == there.tasks


def test_a_kept_order_says_every_metric() -> None:
    """What is left out is as it is today, and a later version's default may be another."""
    free = "{name: free, kind: QA, source: {train: a.csv, test: a.csv}}"
    number = "{name: n, kind: QA, metric: numeric, source: {train: a.csv, test: a.csv}}"
    written = load_order(write(f"tasks: [dbpedia, {OWN}, {free}, {number}, {{task: free, as: again}}]")).written()
    assert written["tasks"][0] == {"task": "dbpedia"}
    assert [entry["metric"] for entry in written["tasks"][1:]] == ["exact", "exact", "numeric", "exact"]


def test_files_count_from_the_folder_that_is_said() -> None:
    order = load_order(write(f"folder: ../data\ntasks: [{OWN}]", "orders/f.yaml"))
    assert order.tasks[0].source is not None
    assert Path(order.tasks[0].source.train).parent.resolve() == Path("data").resolve()


def test_the_model_may_read_another_name_than_the_columns() -> None:
    """``dataset:`` is what stands in the input and what the benchmark's folder is looked for by."""
    own = "{name: mine-2024, dataset: mine, kind: TC, labels: [a, b]}"
    (task,) = load_order(write(f"tasks: [{own}]")).tasks
    assert (task.name, task.called) == ("mine-2024", "mine")
    assert str(task.prompt("x")).startswith("Task:TC\nDataset:mine\n")
    for split in ("train", "test"):
        write(json.dumps([{"sentence": "x", "label": "a"}]), f"d/TC/mine/{split}.json")
    rows = load_rows(task, DataConfig(source="folder", dir="d"), "train")
    assert [(row.text, row.label) for row in rows.rows] == [("x", "a")]


def test_labels_are_taken_as_written() -> None:
    entry = OWN.replace("[a, b]", "[1, 1.0, 1e-4, 007, true, True, no, null, 2020-01-01, 'a, b']")
    labels = load_order(write(f"tasks: [{entry}]")).tasks[0].labels
    assert labels == ["1", "1.0", "1e-4", "007", "true", "True", "no", "null", "2020-01-01", "a, b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [dbpedia, amazon, dbpedia]", "f.yaml:1:26: task 'dbpedia' is in the order twice"),
        (f"tasks:\n- {OWN}\n- {OWN.replace('mine', 'Mine')}", "f.yaml:3:3: task 'Mine' is in the order twice"),
        ("tasks: []", "f.yaml:1:8: the task list is empty"),
        ("tasks:", "f.yaml:1:7: the task list is empty"),
        ("name: x", "f.yaml:1:1: the task list is empty"),
        ("tasks: dbpedia", "f.yaml:1:8: tasks must be a list"),
        ("tasks: [dbpedia, dbpeda]", "f.yaml:1:18: no task 'dbpeda'; did you mean 'dbpedia'?"),
        ("tasks: [{task: dbpeda}]", "f.yaml:1:16: no task 'dbpeda'; did you mean"),
        ("tasks: [{task: [x]}]", "f.yaml:1:16: no task"),
        ("task: [dbpedia]", "f.yaml:1:1: 'task' is no key of an order; did you mean 'tasks'?"),
        ("tasks: [[dbpedia]]", "f.yaml:1:9: a task is a name or a mapping"),
        ("tasks: [dbpedia]\nname: ../x", "f.yaml:2:7: name '../x' must be of letters"),
        ("tasks: [dbpedia]\nname: a/b", "must be of letters"),
        ("tasks: [dbpedia]\nname: a..b", "must be of letters"),
        ('tasks: [dbpedia]\nname: "a\\x07b"', r"name 'a\x07b' must be of letters"),
        ("tasks: [dbpedia]\nname:", "must be of letters"),
        ("tasks: [dbpedia]\nname: [a]", "must be of letters"),
        (f"tasks: [{OWN.replace('mine', '../up')}]", "f.yaml:1:16: name '../up' must be of letters"),
        (f"tasks: [{OWN.replace('mine', '/abs')}]", "must be of letters"),
        (f"tasks: [{OWN.replace('kind:', 'kinds:')}]", "f.yaml:1:22: kinds is not a setting; did you mean 'kind'?"),
        (f"tasks: [{OWN.replace(' kind: TC,', '')}]", "f.yaml:1:9: kind is missing"),
        (f"tasks: [{OWN.replace('test:', 'tests:')}]", "source.test"),
        (f"tasks: [{OWN.replace('[a, b]', '[]')}]", "f.yaml:1:40: labels is empty"),
        (f"tasks: [{OWN.replace('[a, b]', 'a')}]", "labels must be a list"),
        (f"tasks: [{OWN.replace('[a, b]', '[a, b, a]')}]", "f.yaml:1:47: label 'a' is here twice"),
        (f"tasks: [{OWN.replace('[a, b]', '[a, {b: c}]')}]", "a label must be text"),
        (f"tasks: [{OWN.replace('[a, b]', '[a, ]')}]".replace("[a, ]", "[a, '']"), "an empty label"),
        (f"tasks: [{OWN.replace('}}', '}, metric: rogue-l}')}]", "did you mean 'rouge-l'?"),
        ("tasks: [CB, CB]", "a second time it needs another name: {task: CB, as: CB-again}"),
        ("tasks: [CB, {task: CB, as: CB}]", "f.yaml:1:13: task 'CB' is in the order twice"),
        ("tasks: [CB, {task: CB, as: cb}]", "task 'cb' is in the order twice"),
        ("tasks: [CB, {task: CB, as: a/b}]", "f.yaml:1:28: as 'a/b' must be of letters"),
        ("tasks: [CB, {task: CB, as: }]", "as '' must be of letters"),
        ("tasks: [CB, {task: CB, as: [x]}]", "as 'None' must be of letters"),
        (f"tasks: [{{task: mine, as: b}}, {OWN}]", "f.yaml:1:16: no task 'mine'"),
        (f"folder: [x]\ntasks: [{OWN}]", "f.yaml:1:9: folder must be text"),
        ("tasks: [{task: CB, sets: {}}]", "f.yaml:1:20: 'sets' does not go with task:"),
        ("tasks: [{task: CB, set: [1]}]", "f.yaml:1:25: set must be a mapping"),
        ("tasks: [{task: CB, set: {training.epoch: 1}}]", "f.yaml:1:26: training.epoch is not a setting; did you mean"),
        ("tasks: [{task: CB, set: {epochs: 1}}]", "f.yaml:1:26: 'epochs' is not a setting of a task; write"),
        ("tasks: [{task: CB, set: {trainin.epochs: 1}}]", "'trainin' is not a section; did you mean 'training'?"),
        ("tasks: [{task: CB, set: {method.lambda1: 1}}]", "f.yaml:1:26: method settings do not belong in an order"),
        ("tasks: [{task: CB, set: {method: {lambda1: 1}}}]", "method settings do not belong in an order"),
        ("tasks: [{task: CB, set: {model.name: x}}]", "model settings are not set by task; only training, data"),
    ],
)
def test_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_order(write(text))
    assert message in str(caught.value) and str(caught.value).startswith("f.yaml:") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "/no/such", "a/../b", "..", ".", "", "a\0b", "a\nb", "../order1", "no.yaml"])
def test_names_do_not_leave_their_folder(name: str) -> None:
    Path("x.yaml").write_text("tasks: [CB]")
    Path("task_orders").mkdir()
    with pytest.raises(UserError) as caught:
        load_order(name)
    assert "\n" not in str(caught.value)


def test_unknown_order_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no order 'oder1'; did you mean 'order1'"):
        load_order("oder1")


def test_new_order_is_valid_and_never_overwrites() -> None:
    assert new_order(Path("mine.yaml")) == ["wrote mine.yaml, an example to change"]
    assert load_order("mine.yaml").names == ["dbpedia", "amazon"]
    text = Path("mine.yaml").read_text()
    uncommented = "".join(line.replace("  # ", "  ", 1) for line in text[text.index("  # - name") :].splitlines(True))
    Path("more.yaml").write_text(text[: text.index("  # - name")] + uncommented)
    assert load_order("more.yaml").tasks[-1].labels == ["sports", "politics"]
    Path("mine.yaml").write_text("keep")
    with pytest.raises(UserError, match="already there"):
        new_order(Path("mine.yaml"))
    assert Path("mine.yaml").read_text() == "keep"
    for bad in ("no/folder.yaml", "x.txt", "a b.yaml", "..yaml"):
        with pytest.raises(UserError, match=r"cannot be written|letters"):
            new_order(Path(bad))


def olora_stage(folder: str, train: list[str], test: list[str]) -> None:
    path = Path("old") / folder
    path.mkdir(parents=True)
    for split, names in (("train", train), ("test", test)):
        entries = [{"sampling strategy": "full", "dataset name": name} for name in names]
        (path / f"{split}_tasks.json").write_text(json.dumps({"TC": entries, "SC": []}))


def test_from_an_olora_folder() -> None:
    olora_stage("agnews", ["agnews"], ["agnews", "yahoo", "amazon"])  # folders are by name, not by stage
    olora_stage("second", ["amazon"], ["amazon", "yahoo"])
    olora_stage("yahoo", ["yahoo"], ["yahoo"])
    assert new_order(Path("new.yaml"), Path("old")) == ["wrote new.yaml: yahoo, amazon, agnews"]
    assert load_order("new.yaml").names == ["yahoo", "amazon", "agnews"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "no stage folders"),
        ([("a", ["CB", "RTE"], ["CB", "RTE"])], "a stage trains one task; here are 2"),
        ([("a", ["CB"], ["CB"]), ("b", ["RTE"], ["RTE"])], "it differs in CB"),
        ([("a", ["CB"], ["CB"]), ("b", ["CB"], ["CB", "RTE"])], "trains CB, which an earlier stage"),
        ([("a", ["CBs"], ["CBs"])], "no task 'CBs'"),
    ],
)
def test_inconsistent_olora_folders(stages: list[tuple[str, list[str], list[str]]], message: str) -> None:
    Path("old").mkdir()
    for stage in stages:
        olora_stage(*stage)
    with pytest.raises(UserError, match=message):
        new_order(Path("new.yaml"), Path("old"))
    assert not Path("new.yaml").exists()


def test_broken_olora_files() -> None:
    olora_stage("a", ["CB"], ["CB"])
    test_file = Path("old/a/test_tasks.json")
    test_file.write_text('{"TC": [\n{,}]}')
    with pytest.raises(UserError, match=r"test_tasks.json:2:2: malformed JSON"):
        new_order(Path("new.yaml"), Path("old"))
    test_file.write_text('["x"]')
    with pytest.raises(UserError, match="not of the form"):
        new_order(Path("new.yaml"), Path("old"))
    test_file.unlink()
    with pytest.raises(UserError, match="no such file"):
        new_order(Path("new.yaml"), Path("old"))
    with pytest.raises(UserError, match="no such folder"):
        new_order(Path("new.yaml"), Path("none"))
