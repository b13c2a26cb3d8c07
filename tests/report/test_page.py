"""A run's page: what it says is what the files say, it stands alone, and nothing in it is run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cl_runner.commands.report import write_page
from cl_runner.errors import UserError
from cl_runner.metrics.accuracy import Matrix
from cl_runner.metrics.forgotten import Whose
from cl_runner.report.figures.scores import accuracy_matrix, forgotten_by, over_stages
from cl_runner.report.figures.training import POINTS, Curves, _thin, training_curves
from cl_runner.report.page.run_page import _bar, _share, figures, run_page
from cl_runner.runs.folder import RunDir
from cl_runner.runs.forgotten import read_answered
from cl_runner.runs.page import read_page
from tests.command_line import call
from tests.report.pages import SPENT, Read
from tests.run_folders import RunFolder

EVIL = '<img src=x onerror=alert(1)>&"$'


def three(root: Path, name: str = "mine", **more: object) -> RunFolder:
    """dbpedia 4 rows right, then 2 of these lost to amazon and to nothing, then one of these back."""
    split = {"source": EVIL, "synthetic": False, "rows": 7, "fingerprint": "x", "dropped": 1}
    run = RunFolder(root, name, about={"changed": [f"output.dir={EVIL}"], "notes": [EVIL], **more})
    about = json.loads((run.path / "run.json").read_text())
    for data in about["identity"]["data"].values():
        data.update(train=split, test=split)
    (run.path / "run.json").write_text(json.dumps(about))
    golds = ["Film", "Plant", "Animal", "Village"]
    amazon = ["very negative", "negative"]
    agnews = ["World", "Sports"]
    run.commit({"dbpedia": list(zip(golds, golds, strict=True))}, **SPENT)
    said = ["Film", "negative", "what?", "Village"]
    run.commit(
        {"dbpedia": list(zip(golds, said, strict=True)), "amazon": list(zip(amazon, amazon, strict=True))}, **SPENT
    )
    said = ["Film", "negative", "Animal", "Sports"]
    run.commit(
        {
            "dbpedia": list(zip(golds, said, strict=True)),
            "amazon": [("very negative", "very negative"), ("negative", "neutral")],
            "agnews": list(zip(agnews, agnews, strict=True)),
        },
        **SPENT,
    )
    rows = [
        {
            "stage": stage,
            "step": step,
            "steps": 20,
            "loss": 1 / step,
            "penalty": None if stage == "dbpedia" else 1e-3 * step,
        }
        for stage in ("dbpedia", "amazon", "agnews")
        for step in (10, 20)
    ]
    rows.insert(4, {"stage": "amazon", "step": 20, "steps": 20, "reorthogonalised": "A"})
    rows.insert(
        5, {"stage": "amazon", "step": 20, "steps": 20, "probe": {"dbpedia": 50.0}, "probe_rows": {"dbpedia": 4}}
    )
    (run.path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.path / "run.log").write_text(f"stage 2 of 3 amazon: warning: the penalty {EVIL}\nstage 2 of 3 amazon: done\n")
    (run.path / "environment.json").write_text(json.dumps({"command": f"cl-runner train {EVIL}", "later": []}))
    return run


def test_the_first_screen_says_what_was_kept_and_lost(tmp_path: Path) -> None:
    page = Read(write_page(three(tmp_path).dir).read_text())
    # By hand: 4 + 2 rows were right, dbpedia's Plant and Village and amazon's second row are wrong now.
    assert (
        "Of the 6 test rows of earlier tasks that were right when their task had been learned, 3 still are (50 %), "
        "3 are lost. dbpedia lost most, 2 of 4: 1 now answered with labels of amazon and 1 now answered with labels of "
        "agnews." in page.text
    )
    assert "66.7 average accuracy (AA), %" in page.text  # (50 + 50 + 100) / 3
    assert "50.0 forgetting, points" in page.text and "100.0 learned" in page.text
    assert "amazon 100.0 50.0 -50.0 1 of 2 its own 1" in page.text
    assert "stage 2 amazon: the penalty" in page.text
    assert (
        "30 s: training 60 %, evaluation 30 %, the rest (what is built and looked at before and after) 10 %. Of all, "
        "the method's own work is 10 %, in training and before it." in page.text
    )


def two(root: Path, first: list[str], now: list[str], **more: object) -> str:
    """The first screen of a run that answered dbpedia's four rows so, and so again after amazon."""
    golds = ["Film", "Plant", "Animal", "Village"]
    run = three(root, "other", **more)
    shutil.rmtree(run.path / "stages")
    run.done = 0
    run.commit({"dbpedia": list(zip(golds, first, strict=True))}, **SPENT)
    run.commit({"dbpedia": list(zip(golds, now, strict=True)), "amazon": [("negative", "negative")]}, **SPENT)
    return Read(write_page(run.dir).read_text()).text


def test_one_row_is_one_row(tmp_path: Path) -> None:
    none = ["x"] * 4
    assert (
        "Of the 1 test row of earlier tasks that was right when their task had been learned, 0 still are (0 %), 1 is "
        "lost." in two(tmp_path / "lost", ["Film", "x", "x", "x"], none)
    )
    assert "1 still is (100 %), 0 are lost." in two(tmp_path / "kept", ["Film", "x", "x", "x"], ["Film", "x", "x", "x"])
    text = two(tmp_path / "none", none, none)
    assert "there is nothing to forget yet: none of its earlier tasks' rows was right before." in text
    assert "20 s for 2 stages" in text  # of three


def test_a_row_of_many_is_not_none_and_not_all() -> None:
    assert [_share(*of) for of in ((999, 1000), (1, 1000), (1000, 1000), (0, 7), (2, 3))] == [
        "over 99 %", "under 1 %", "100 %", "0 %", "67 %"
    ]  # fmt: skip


def test_those_that_lost_as_much_are_named_together(tmp_path: Path) -> None:
    run = three(tmp_path)
    page = read_page(run.dir)
    dbpedia, amazon, agnews = page.forgotten
    again = replace(page, forgotten=[dbpedia, replace(dbpedia, task="amazon", learned=2), agnews])
    text = " ".join(Read(run_page(again, figures(again))).texts)
    assert "dbpedia and amazon lost most, 2 each." in text and amazon.task == "amazon"


def test_tasks_that_have_no_right_answers_are_not_said_to_be_untouched(tmp_path: Path) -> None:
    page = read_page(three(tmp_path).dir)
    page = replace(page, forgotten=[], answered={})
    text = " ".join(Read(run_page(page, figures(page))).texts)
    assert "nothing has been trained since" not in text
    # By hand: AA (50 + 50 + 100) / 3, both earlier ones fell by 50.
    assert "is 66.7 %, forgetting 50.0 points; of its earlier tasks no answer is right or wrong" in text


def test_what_is_synthetic_is_said_beside_the_answer_and_in_figures(tmp_path: Path) -> None:
    page = read_page(three(tmp_path, synthetic=True).dir)
    page = replace(page, run=replace(page.run, real=()))
    drawn = figures(page)
    text = " ".join(" ".join(Read(run_page(page, drawn)).texts).split())
    assert "labels of agnews. (synthetic)" in text
    assert "66.7 average accuracy (AA), % (synthetic)" in text and "for all stages (synthetic)" not in text
    for each in (drawn.accuracy, drawn.over_stages, drawn.answers, drawn.training):
        assert each is not None and "(synthetic)" in " ".join(Read(each.svg()).texts), each


def test_a_bar_is_as_long_as_the_score_was() -> None:
    assert _bar(80.0, 60.0) == (60.0, 20.0) and _bar(60.0, 80.0) == (80.0, 0.0)
    assert _bar(30.0, -20.0) == (0.0, 30.0), "a correlation has fallen by 50 points, and 30 could be seen"
    assert _bar(None, 50.0) == (50.0, 0.0) and _bar(50.0, None) == (0.0, 0.0)


def test_rows_are_counted_by_what_they_are_answered_with(tmp_path: Path) -> None:
    own, amazon, agnews = Whose("own", ("amazon",)), Whose("later", ("amazon",)), Whose("later", ("agnews",))
    _, answered = read_answered(three(tmp_path).dir)
    assert answered == {
        "dbpedia": {
            1: Counter({None: 4}),
            2: Counter({None: 2, amazon: 1, Whose("none"): 1}),
            3: Counter({None: 2, amazon: 1, agnews: 1}),
        },
        "amazon": {2: Counter({None: 2}), 3: Counter({None: 1, own: 1})},
        "agnews": {3: Counter({None: 2})},
    }


def test_forgetting_of_each_cell_is_the_best_before_minus_now() -> None:
    matrix = Matrix(["a", "b", "c"], ["a", "b", "c"], [[80.0, 5.0, None], [60.0, 70.0, 1.0], [90.0, None, 50.0]])
    assert forgotten_by(matrix) == [[0.0, None, None], [20.0, 0.0, None], [0.0, None, 0.0]]
    below = Matrix(["a", "b"], ["a", "b"], [[-30.0, None], [-50.0, -5.0]])  # correlations
    assert forgotten_by(below) == [[0.0, None], [20.0, 0.0]]


def test_a_negative_score_is_in_the_picture() -> None:
    below = Matrix(["a", "b"], ["a", "b"], [[-30.0, None], [-50.0, -5.0]])
    curves = Curves(probes={"a": [(1, -40.0)]}, stages=[("a", 1)])
    drawn = [over_stages(below, "score, %"), training_curves(curves)]
    for figure, least in zip(drawn, (-50.0, -40.0), strict=True):
        assert figure is not None and figure._figure.axes[0].get_ylim()[0] < least


@pytest.mark.parametrize(("stages", "tasks"), [(1, 1), (1, 40), (2, 2), (3, 9), (40, 1)])
def test_no_figure_is_too_small_for_what_is_in_it(stages: int, tasks: int) -> None:
    names = [f"a_rather_long_name_{k}" for k in range(tasks)]
    trained = [names if stages == 1 else [names[t % tasks]] for t in range(stages)]
    matrix = Matrix([f"stage{t}" for t in range(stages)], names, [[50.0] * tasks] * stages, trained)
    assert "<svg" in accuracy_matrix(matrix, "percent correct").svg()  # what matplotlib warns of is an error here
    assert "<svg" in over_stages(matrix, "percent correct").svg()


def test_curves_go_on_from_stage_to_stage(tmp_path: Path) -> None:
    curves = Curves.of(read_page(three(tmp_path).dir).log)
    assert [at for at, _ in curves.loss] == [10, 20, 30, 40, 50, 60]
    assert [at for at, _ in curves.penalty] == [30, 40, 50, 60]
    assert curves.marks == [40] and curves.probes == {"dbpedia": [(40, 50.0)]}
    assert curves.stages == [("dbpedia", 20), ("amazon", 40), ("agnews", 60)]


def test_one_point_is_a_curve() -> None:
    drawn = training_curves(Curves.of([{"stage": "mine", "step": 1, "steps": 1, "loss": 1.0, "penalty": 0.5}]))
    assert drawn is not None and "mine" in drawn.svg()


def test_a_long_curve_keeps_its_ends_and_its_peaks() -> None:
    points = [(step, 0.0) for step in range(10_000)]
    points[1234], points[7777] = (1234, 9.0), (7777, -9.0)
    steps, values = _thin(points)
    assert len(steps) <= POINTS + 2 and steps == sorted(steps) and {0, 9999, 1234, 7777} <= set(steps)
    assert max(values) == 9.0 and min(values) == -9.0


def test_a_page_stands_alone_and_nothing_in_it_is_run(tmp_path: Path) -> None:
    html = write_page(three(tmp_path).dir).read_text()
    page = Read(html)
    assert not {"script", "img", "link", "iframe", "object", "embed", "image"} & set(page.tags)
    # What is referred to is in the page, once.
    assert page.refers and all(ref.startswith("#") and ref[1:] in page.ids for ref in page.refers)
    assert len(set(page.ids)) == len(page.ids)
    assert EVIL in page.text and "<img" not in html
    assert len(html) < 300_000


def test_names_of_tasks_are_text_in_figures_too(tmp_path: Path) -> None:
    page = read_page(three(tmp_path).dir)
    evil = {f"$x_{{{EVIL}": each for each in page.answered.values()}
    drawn = figures(type(page)(**{**page.__dict__, "answered": dict(list(evil.items())[:1])}))
    assert drawn.answers is not None
    svg = drawn.answers.svg()
    assert "<img" not in svg and "$x_" in "".join(Read(svg).texts)


def test_letters_that_our_font_lacks_are_the_browsers(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    page = read_page(three(tmp_path).dir)
    drawn = figures(type(page)(**{**page.__dict__, "answered": {"情感": page.answered["dbpedia"]}}))
    assert drawn.answers is not None and "情感" in drawn.answers.svg()
    assert not recwarn.list


def test_figures_follow_the_page_in_light_and_dark(tmp_path: Path) -> None:
    for drawn in figures(read_page(three(tmp_path).dir)):
        svg = drawn.svg()
        assert "var(--ink)" in svg and "var(--muted)" in svg and "<image" not in svg
        assert "#111213" not in svg and "DejaVu" not in svg
        assert drawn.svg() == svg  # the same run makes the same page


def test_the_command_writes_the_page_and_its_figures(tmp_path: Path) -> None:
    three(tmp_path / "runs")
    done = call("report", "mine", "--html", "--figures", "pictures", cwd=tmp_path)
    assert done.code == 0 and done.out.split() == ["runs/mine/report.html"]
    assert (tmp_path / "runs/mine/report.html").read_text().startswith("<!doctype html>")
    names = {file.name for file in (tmp_path / "pictures").iterdir()}
    assert names == {
        f"{name}.{form}" for name in ("accuracy", "over-stages", "answers", "training") for form in ("svg", "png")
    }
    assert (tmp_path / "pictures/accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "var(--" not in (tmp_path / "pictures/accuracy.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--figures", "pictures"), "--figures: the figures are those of the page; say --html too"),
        (("--html", "--json"), "--html and --json: one form at a time"),
        (("--html", "--figures", "runs/mine/run.json"), "cannot write figures into runs/mine/run.json: File exists"),
    ],
)
def test_what_cannot_be_written_is_said(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    three(tmp_path / "runs")
    done = call("report", "mine", *arguments, cwd=tmp_path)
    assert done.code == 2 and done.line == f"cl-runner: {said}"


def test_damaged_answers_are_said(tmp_path: Path) -> None:
    run = three(tmp_path)
    (run.path / "stages/02-amazon/predictions.jsonl").unlink()
    page = Read(write_page(run.dir).read_text()).text
    assert "what was forgotten is not told: " in page and "predictions.jsonl is missing" in page


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    run = three(tmp_path)
    (run.path / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="has a broken file"):
        write_page(run.dir)


def test_a_row_that_the_power_cut_in_two_is_none(tmp_path: Path) -> None:
    run = three(tmp_path)
    before = read_page(run.dir).log
    with (run.path / "log.jsonl").open("a") as file:
        file.write('{"stage": "agnews", "st')
    assert read_page(run.dir).log == before


def test_a_run_without_a_finished_stage_has_a_page(tmp_path: Path) -> None:
    run = three(tmp_path)
    shutil.rmtree(run.path / "stages")
    assert "No stage is finished yet." in Read(write_page(RunDir(run.path)).read_text()).text


def analysis(run: RunDir) -> dict[str, Any]:
    """As ``cl-runner analyze`` writes it, of three updates and one layer."""
    by_update = [
        {
            "name": name,
            "update_norm": 1.5 + t,
            "nuclear_norm": 2.0,
            "effective_rank": 3.25,
            "free_share": 0.5,
            "orthogonal_overlap": 0.25 * t,
            "singular_values": [2.0, 1.0, 1e-12],
        }
        for t, name in enumerate(run.about()["tasks"])
    ]
    between = [[0.0, None, None], [1.0, 0.0, None], [2.0, 3.0, 0.0]]
    keys = ("orthogonal_overlap", "input_angle_mean", "output_angle_mean")
    names = [update["name"] for update in by_update]
    cosines = {"cosine": [[1.0, 0.1, None], [0.1, 1.0, -0.2], [None, -0.2, 1.0]]}
    at = [{"stage": name, "loss": 2.0 + t, "mean_accuracy": None} for t, name in enumerate(["base", *names])]
    return {
        "stages": run.digests(names),
        "updates": names,
        "together": {"by_update": by_update, "between": dict.fromkeys(keys, between)},
        "by_layer": {"q": {"by_update": by_update}},
        "intruders": {"by_update": [{"left": 7 + t, "right": 0} for t in range(3)]},
        "gradients": {"tasks": names, "at": [{"stage": "base", **cosines}, {"stage": "agnews", **cosines}]},
        "routes": {"at": [{"stage": "agnews", "parts": names, "weights": {name: [0.5, 0.0, 1.0] for name in names}}]},
        "drift": {"tasks": {}, "at": at},
        "notes": ["a note"],
        "skipped": [EVIL],
    }


def test_the_page_has_what_was_analysed(tmp_path: Path) -> None:
    run = three(tmp_path)
    before = Read(write_page(run.dir).read_text())
    assert "cl-runner analyze mine" in before.text
    (run.path / "analysis.json").write_text(json.dumps(analysis(run.dir)))
    page = Read(write_page(run.dir).read_text())
    assert "update size ‖ΔW‖ nuclear eff. rank OO free, % intruders, left right" in page.text
    assert "2 amazon 2.5 2 3.25 0.25 50 8 0" in page.text
    assert EVIL in page.text and "cl-runner analyze mine" not in page.text
    names = [drawn.name for drawn in figures(read_page(run.dir))]
    wanted = ["accuracy", "over-stages", "answers", "training", "overlap", "spectra", "gradients", "routes", "drift"]
    assert names == wanted


def test_analysis_counts_while_it_is_of_these_stages_and_all_layers(tmp_path: Path) -> None:
    run = three(tmp_path)
    file, found = run.path / "analysis.json", analysis(run.dir)
    file.write_text(json.dumps(found))
    assert read_page(run.dir).analysis == found
    file.write_text(json.dumps({**found, "pattern": "layer.1"}))
    assert read_page(run.dir).analysis is None
    file.write_text(json.dumps({**found, "stages": {**found["stages"], "amazon": "another"}}))
    assert read_page(run.dir).analysis is None


def many(root: Path, count: int) -> RunFolder:
    """A run of so many tasks of three labels each, in which every stage takes a row of each task before."""
    root.mkdir()
    names = [f"a_rather_long_name_{t:02d}" if t % 3 else f"t{t}" for t in range(count)]
    tasks = []
    for name in names:
        row = json.dumps({"text": "x", "label": "a"}) + "\n"
        (root / f"{name}.jsonl").write_text(row)
        file = str(root / f"{name}.jsonl")
        tasks.append(
            {
                "name": name,
                "kind": "TC",
                "labels": [f"{name}_{c}" for c in "abc"],
                "source": {"train": file, "test": file},
            }
        )
    run = RunFolder(root / "runs", "many", yaml.safe_dump({"tasks": tasks}))
    about = json.loads((run.path / "run.json").read_text())
    for data in about["identity"]["data"].values():
        data["train"]["dropped"] = data["test"]["dropped"] = 0
    (run.path / "run.json").write_text(json.dumps(about))
    for t, last in enumerate(names):
        rows = {
            name: [(f"{name}_a", f"{names[min(k + i, t)]}_a" if i <= t - k else f"{name}_a") for i in range(10)]
            for k, name in enumerate(names[: t + 1])
        }
        assert last in rows
        run.commit(rows, **SPENT)
    return run


@pytest.fixture(scope="module")
def fifteen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_page(many(tmp_path_factory.mktemp("fifteen") / "many", 15).dir).read_text()


def test_many_stages_fit_into_a_page(tmp_path: Path, fifteen: str) -> None:
    fifty = write_page(many(tmp_path / "many", 50).dir).read_text()
    assert len(fifteen) < 1_000_000 and len(fifty) < 3_000_000
    assert "15 tasks of" in Read(fifteen).text and "50 tasks of" in Read(fifty).text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [500, 1200])  # a window of Chromium has 500 at least
def test_no_page_is_wider_than_its_window(tmp_path: Path, fifteen: str, width: int) -> None:
    html = re.sub("<meta http-equiv[^>]*>", "", fifteen)  # the page itself lets no script run
    measure = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    (tmp_path / "page.html").write_text(html.replace("</body>", measure))
    command = [
        str(CHROMIUM),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},900",
        "--dump-dom",
    ]
    done = subprocess.run([*command, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert found is not None and int(found[1]) <= int(found[2]) == width
