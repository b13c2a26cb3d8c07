"""What a report prints: numbers where they belong, marks where they must be, and legible at 80 columns."""

from __future__ import annotations

import csv as csvlib
import io
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from cl_runner.metrics.accuracy import Matrix, to_csv
from cl_runner.report import published, tables
from cl_runner.report.tables import RunSummary

ORDER1 = ["dbpedia", "amazon", "yahoo", "agnews"]
ORDER6 = list(next(e for e in published.results() if e.order == "order6" and e.final).final)


def a_run(tasks: list[str] = ORDER1, done: int | None = None, shift: float = 0.0, **more: Any) -> RunSummary:
    """Score after stage t on task k: 60 + k + t/4 + shift, so that every cell is another number."""
    done = len(tasks) if done is None else done
    stages = [f"{t + 1:02d}-{task}" for t, task in enumerate(tasks)][:done]
    values = [[60 + k + t / 4 + shift if k <= t else None for k in range(len(tasks))] for t in range(done)]
    given: dict[str, Any] = {
        "name": "order1-olora-t5-large-s42",
        "method": "olora",
        "order": "order1",
        "model": "t5-large",
        "seed": 42,
        "synthetic": False,
        "stages_done": done,
        "stages_total": len(tasks),
        "matrix": Matrix(stages, tasks, values, counts=dict.fromkeys(tasks, 10)),
        "form": "reference",
    }
    return RunSummary(**{**given, **more})


def shown(renderable: Any, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=file, width=width, color_system=None, legacy_windows=False).print(renderable)
    file.flush()
    return raw.getvalue().decode(encoding)


def cells(text: str, first: str) -> list[str]:
    """The words after ``first`` on the line that starts with it."""
    return next(line.split()[1:] for line in text.splitlines() if line.split()[:1] == [first])


def test_small_matrix_is_shown_as_it_is() -> None:
    text = shown(tables.table(a_run()))
    assert cells(text, "stage") == ORDER1
    assert cells(text, "02-amazon") == ["60.25", "61.25"]
    assert cells(text, "04-agnews") == ["60.75", "61.75", "62.75", "63.75"]
    assert "average accuracy (AA)     62.25" in text
    assert "synthetic" not in text


def test_fifteen_tasks_fit_eighty_columns_with_every_number_and_name() -> None:
    run = a_run(ORDER6, order="order6")
    text = shown(tables.table(run))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    for k, task in enumerate(ORDER6):
        row = cells(text, task)
        assert len(row) == 15 - k
        assert row[-1] == f"{60 + k + 14 / 4:.1f}"
        assert row[:-1] == [f"{60 + k + t / 4:.0f}" for t in range(k, 14)]


def test_base_row_and_full_hundreds_still_fit() -> None:
    matrix = replace(
        a_run(ORDER6).matrix,
        values=[[100.0] * 15 for _ in ORDER6],
        base=dict.fromkeys(ORDER6, 100.0),
    )
    text = shown(tables.table(a_run(ORDER6, matrix=matrix)))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert cells(text, "MultiRC") == ["100"] * 15 + ["100.0"]


def test_too_narrow_for_any_matrix_shows_one_line_a_task() -> None:
    text = shown(tables.table(a_run(ORDER6)), width=44)
    assert cells(text, "task") == ["learned", "best", "now", "change"]
    assert cells(text, "amazon") == ["61.25", "64.50", "64.50", "3.25"]


@pytest.mark.parametrize("width", [20, 44, 60, 80, 200])
@pytest.mark.parametrize("done", [0, 1, 7, 15])
def test_any_width_and_stage_can_be_shown(width: int, done: int) -> None:
    run = a_run(ORDER6, done=done, synthetic=True)
    text = shown(tables.table(run), width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "synthetic" in text


def test_synthetic_stands_in_the_title_and_beside_the_numbers() -> None:
    run = a_run(synthetic=True, model="tiny-t5")
    text = shown(tables.table(run))
    assert "synthetic data" in text.splitlines()[0]
    assert "62.25 (synthetic)" in text
    assert "percent correct (synthetic)" in text
    assert tables.markdown(run).count("synthetic") >= 4
    assert tables.report_json(run)["synthetic"] is True


def several_metrics() -> RunSummary:
    tasks = ["topic", "sts", "dbpedia"]
    values: list[list[float | None]] = [[50.0, None, None], [40.0, None, None], [30.0, -20.0, 60.0]]
    why = [{}, {"sts": "the answers are all the same"}, {}]
    return a_run(
        tasks,
        matrix=Matrix([f"0{t + 1}-{task}" for t, task in enumerate(tasks)], tasks, values, undefined=why),
        metrics={"topic": "exact", "sts": "pearson", "dbpedia": "normalised"},
        scoring={"topic": "label", "sts": "number", "dbpedia": "normalised"},
        synthetic=True,
        real=("topic", "sts"),
    )


def test_columns_are_headed_by_their_metric_and_undefined_scores_say_why() -> None:
    run = several_metrics()
    text = shown(tables.table(run))
    assert [line.split() for line in text.splitlines()[3:5]] == [
        ["topic", "sts", "dbpedia"],
        ["stage", "exact", "pearson", "normalised"],
    ]
    assert "score, % (partly synthetic) on each task (across) after each stage (down)\n" in text
    assert cells(text, "02-sts") == ["40.00", "-"] and cells(text, "03-dbpedia") == ["30.00", "-20.00", "60.00"]
    said = "sts: pearson is undefined after stage 2: the answers are all the same; means are without it"
    assert said in " ".join(text.split())
    assert "synthetic data of dbpedia: these numbers say nothing" in text
    assert said in tables.markdown(run)
    assert "| after stage, % (partly synthetic) | topic exact | sts pearson | dbpedia normalised |" in tables.markdown(
        run
    )
    assert tables.report_json(run)["undefined"][1] == {"sts": "the answers are all the same"}
    two = replace(run, matrix=replace(run.matrix, stages=run.matrix.stages[:2], values=run.matrix.values[:2],
                                      trained=[], undefined=run.matrix.undefined[:2]))  # fmt: skip
    assert "average accuracy (AA)" in shown(tables.table(two))
    assert cells(shown(tables.table(two)), "average")[:3] == ["accuracy", "(AA)", "40.00"], "of topic alone"
    assert "mean over the 2 tasks seen, 1 undefined" in shown(tables.table(two), width=120)
    for width in (20, 30, 44):
        assert max(len(line) for line in shown(tables.table(run), width=width).splitlines()) <= width


def test_one_metric_is_named_once() -> None:
    of = dict.fromkeys(ORDER1, "normalised")
    text = shown(tables.table(a_run(metrics=of, scoring=of)))
    assert "percent correct on each task" in text
    assert "metric: normalised (case, punctuation and white space do not count)" in text
    assert tables.scored_by("number within 0.1") == "as numbers, off by at most 0.1"


def test_unfinished_run_says_how_far_it_is() -> None:
    run = a_run(done=2)
    assert "stage 2 of 4" in shown(tables.table(run)).splitlines()[0]
    assert "stage 2 of 4" in tables.markdown(run)
    report = tables.report_json(run)
    assert (report["stage"], report["stages"], report["finished"]) == (2, 4, False)
    assert report["average_accuracy"] == pytest.approx(60.75)


def test_hidden_task_name_in_the_input_is_said() -> None:
    assert "did not name the task" in shown(tables.table(a_run(named_task=False)))
    assert "did not name the task" not in shown(tables.table(a_run()))


def test_text_of_users_is_never_markup_or_beyond_ascii_where_that_is_all_there_is() -> None:
    run = a_run(["[red]x[/red]", "b"], notes=["[bold]n[/bold]"], done=1)
    text = shown(tables.table(run))
    assert "[red]x[/red]" in text and "[bold]n[/bold]" in text
    shown(tables.table(a_run(ORDER6, synthetic=True)), encoding="ascii")


def test_markdown_is_one_table_of_equal_rows_and_escapes_pipes() -> None:
    text = tables.markdown(a_run(["a|b", "c"]))
    assert "| after stage, % | a\\|b | c |" in text
    assert "| 02-c | 60.25 | 61.25 |" in text
    for block in text.split("\n\n"):
        rows = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


def test_csv_is_the_matrix_file() -> None:
    run = a_run()
    assert tables.csv(run) == to_csv(run.matrix)
    assert list(csvlib.reader(io.StringIO(tables.csv(run))))[1] == ["01-dbpedia", "60.0000", "", "", ""]


def test_json_is_json_with_null_for_the_undefined_and_timings_apart() -> None:
    run = a_run(done=1, seconds={"train": 12.5})
    report = json.loads(json.dumps(tables.report_json(run), allow_nan=False))
    assert report["forgetting"] is None and report["forward_transfer"] is None
    assert report["matrix"] == {"stages": ["01-dbpedia"], "tasks": ORDER1, "values": [[60.0, None, None, None]]}
    assert report["seconds"] == {"train": 12.5}
    assert {"name", "method", "order", "model", "seed", "backward_transfer"} <= set(report)


def test_numbers_never_read_minus_zero() -> None:
    assert tables.number(-0.001) == "0.00"
    assert tables.number(-0.006) == "-0.01"
    assert tables.number(None) == "-"


# --- published results ------------------------------------------------------------------------------------------


def test_published_results_agree_with_themselves() -> None:
    """The printed mean is the mean of the printed scores."""
    entries = published.results()
    assert {(e.order, e.method) for e in entries} >= {("order1", m) for m in ("seqft", "seqlora", "inclora", "olora")}
    for entry in entries:
        if entry.final and entry.average is not None:
            assert statistics.fmean(entry.final.values()) == pytest.approx(entry.average, abs=0.006)
    assert len(ORDER6) == 15


def test_published_stands_beside_the_same_order_model_and_method() -> None:
    text = shown(tables.table(a_run(model="google-t5/t5-large")))
    assert cells(text, "dbpedia") == ["60.75", "97.74", "-36.99"]
    assert cells(text.split("beside the published")[1], "average") == ["62.25", "78.37", "-16.12"]
    assert "arXiv 2310.14152" in text
    assert "| average | 62.25 | 78.37 | -16.12 |" in tables.markdown(a_run())
    assert tables.report_json(a_run())["published"]["average_accuracy"] == 78.37


@pytest.mark.parametrize(
    "other",
    [
        {"order": "order2"},
        {"model": "t5-base"},
        {"model": "google/t5-v1_1-large"},
        {"method": "nlora"},
        {"form": "paper"},
        {"synthetic": True},
        {"chosen": True},
        {"done": 3},
    ],
)
def test_published_stands_beside_nothing_else(other: dict[str, Any]) -> None:
    run = a_run(**other)
    assert tables.comparable(run) is None
    assert "ublished" not in shown(tables.table(run)) + tables.markdown(run)


def counted(trained: int, **files: int) -> dict[str, Any]:
    """What a stage says of its parameters, with the bytes of its files."""
    on_disk = {name.replace("__", "."): {"numbers": 1, "bytes": size} for name, size in files.items()}
    return {"trained": trained, "trained_by_formula": None, "own": trained, "stored_by_formula": None, "carried": 0,
            "on_disk": on_disk}  # fmt: skip


def test_what_trained_stands_below_the_measures() -> None:
    same = [counted(294_912, adapter=5), counted(294_912, adapter=3 * 2**20, state__json=400, state__safetensors=2**12)]
    run = a_run(["a", "b"], parameters=same)
    line = "294,912 parameters trained a stage; left on disk: adapter 3.0 MB, state 4 KB"
    lines = shown(tables.table(run)).splitlines()
    assert lines[lines.index(line) - 1].startswith("learning accuracy"), "in one line of 80 columns"
    assert f"\n\n{line}\n" in tables.markdown(run)
    assert tables.report_json(run)["parameters"] == same
    other = a_run(["a", "b"], parameters=[counted(4_096), counted(64, answers__json=90, next=2**30, adapters=2**21)])
    assert tables.what_trained(other) == (
        "64 to 4,096 parameters trained a stage; left on disk: next 1.0 GB, adapters 2.0 MB"
    )
    assert tables.what_trained(a_run(["a"], parameters=[counted(1, state__json=300)])) == "1 parameters trained a stage"
    for width in (20, 44):
        assert max(map(len, shown(tables.table(other), width=width).splitlines())) <= width


def test_stages_of_before_say_nothing_of_parameters() -> None:
    for parameters in ((), [None, None], [counted(8), None]):
        run = a_run(["a", "b"], parameters=parameters)
        assert "parameters" not in shown(tables.table(run)) + tables.markdown(run) and run.trained is None
    assert tables.report_json(a_run(["a", "b"], parameters=[None, None]))["parameters"] is None
    extended = a_run(["a", "b"], parameters=[None, counted(8, adapter=2**10)])
    assert tables.what_trained(extended) == "8 parameters trained a stage; left on disk: adapter 1 KB"
    assert tables.report_json(extended)["parameters"][0] is None and extended.trained is None


def test_reports_do_not_import_torch() -> None:
    code = "import sys, cl_runner.report.tables, cl_runner.terminal.progress; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_published_backward_transfer_stands_beside_ours() -> None:
    run = a_run(order="trace", model="Llama-2-7b-chat-hf", method="seqlora", form="")
    text = shown(tables.table(run)).split("beside the published")[1]
    assert cells(text, "average")[1] == "12.70" and cells(text, "backward")[-2] == "-45.70"
    assert tables.report_json(run)["published"]["backward_transfer"] == -45.7
