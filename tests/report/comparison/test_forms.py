"""The same comparison as LaTeX, CSV, JSON and Markdown, and what was published beside it."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cl_runner.report import published
from cl_runner.report.comparison.compared import compare
from cl_runner.report.comparison.found import Beside, Comparison
from cl_runner.report.comparison.latex import escaped, latex
from cl_runner.report.comparison.markdown import markdown
from tests.report.comparison.made import alone, entry, methods, seen
from tests.report.test_tables import ORDER1, a_run, cells

HOSTILE = r"a_b&c%d$e#f{g}h~i^j\k<l>m|n"


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every tabular."""
    lines = [line.removesuffix(r" \\") for line in text.splitlines() if line.endswith(r"\\")]
    return [re.split(r"(?<!\\) & ", line) for line in lines if not line.startswith(r"\multicolumn")]


def test_latex_is_two_booktabs_tabulars_with_rows_of_equal_length() -> None:
    text = latex(compare(methods(3, orders=("order1", "order2"))))
    first, second = text.split(r"\end{tabular}")[:2]
    for tabular, columns in ((first, "lrrrrrr"), (second, "lrrrrrrrr")):
        assert rf"\begin{{tabular}}{{{columns}}}" in tabular
        assert [tabular.count(rule) for rule in (r"\toprule", r"\bottomrule")] == [1, 1]
        assert {len(row) for row in rows(tabular)} == {len(columns)}
        assert r"\emph{order2}" in tabular and "hline" not in tabular
    assert r"\usepackage{booktabs}" in text
    assert "olora (reference) -- seqlora" in second and "$<.001$" in second
    assert not re.search(r"(?<!\\)[_#]", text)


def test_latex_says_what_the_comparison_says_and_the_best_is_bold() -> None:
    def one(method: str, right: str, seconds: float) -> Any:
        return entry({"dbpedia": right, "amazon": right}, method=method, seconds={"train": seconds})

    text = latex(compare([one("a_b", "1110", 30.0), one("c", "1100", 20.2), one("d", "1111", 20.4)]))
    body = {row[0]: row[1:] for row in rows(text)}
    assert body["Method"] == ["AA", "forgetting", "BWT", "train s", "state MB", "seeds"]
    assert body[r"a\_b"] == ["$75.0$", "$25.0$", "$-25.0$", "$30$", "--", "1"]
    assert body["c"] == ["$50.0$", "$50.0$", "$-50.0$", r"$\mathbf{20}$", "--", "1"]
    assert body["d"] == [r"$\mathbf{100.0}$", r"$\mathbf{0.0}$", r"$\mathbf{0.0}$", r"$\mathbf{20}$", "--", "1"]
    two = latex(compare([entry({"t": "1110"}, seed=1), entry({"t": "1100"}, seed=2)]))
    assert r"olora & $62.5 \pm 17.7$ & -- &" in two, "alone it is not the best of anything"


def test_latex_escapes_what_it_would_read() -> None:
    said = escaped(HOSTILE)
    assert said == (
        r"a\_b\&c\%d\$e\#f\{g\}h\textasciitilde{}i\textasciicircum{}j\textbackslash{}k\textless{}l\textgreater{}m"
        r"\textbar{}n"
    )
    found = compare([entry({"t": "10"}, method=HOSTILE, order=f"{HOSTILE}\n\\end", model="m_\n\\input{x}"),
                     entry({"t": "11"}, method="b", order="o"), entry({"t": "11"}, method="c", order="o")])  # fmt: skip
    text = latex(found)
    assert said in text
    for line in text.splitlines():
        assert line.startswith("%") or r"\input" not in line.replace(r"\textbackslash{}", "")
        if not line.startswith("%"):
            assert line.count("{") - line.count(r"\{") == line.count("}") - line.count(r"\}")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(tmp_path: Path) -> None:
    hostile = [entry({"t": "10"}, method=HOSTILE, seed=seed) for seed in (1, 2)]
    found = [latex(compare(methods(10, orders=("order1", "order2")))), latex(compare([*hostile, *methods(2)]))]
    for index, body in enumerate(found):
        page = r"\documentclass{article}\usepackage{booktabs}\begin{document}\tiny" + f"\n{body}\n" + r"\end{document}"
        (tmp_path / f"{index}.tex").write_text(page)
        command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", f"{index}.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120)
        assert done.returncode == 0, done.stdout[-2000:]
        assert (tmp_path / f"{index}.pdf").stat().st_size > 1000


def test_csv_has_a_row_a_group_with_every_number() -> None:
    found = compare(methods(3, orders=("order1", "order2")))
    table = list(csv.DictReader(io.StringIO(found.csv())))
    assert [(row["order"], row["label"]) for row in table][:4] == [
        ("order1", "olora (reference)"), ("order1", "seqlora"), ("order1", "shared-basis"),
        ("order2", "olora (reference)"),
    ]  # fmt: skip
    for row, group in zip(table, found.groups, strict=True):
        values = [value for value in group.values["average_accuracy"] if value is not None]
        assert float(row["average_accuracy"]) == pytest.approx(statistics.fmean(values), rel=1e-5)
        assert float(row["average_accuracy_std"]) == pytest.approx(statistics.stdev(values), rel=1e-4)
        assert [float(row["seeds_low"]), float(row["seeds_high"])] == pytest.approx(
            [min(values), max(values)], rel=1e-5
        )
        assert float(row["rows_low"]) < float(row["average_accuracy"]) < float(row["rows_high"])
        assert (row["seeds"], row["update_norm"]) == ("1 2 3", "") and float(row["rank"]) == group.rank
        assert row["pareto"] == " ".join(group.fronts)


def test_json_has_everything() -> None:
    found = compare(methods(3))
    whole = json.loads(json.dumps(found.to_json(), allow_nan=False))
    group = whole["groups"][0]
    assert group["label"] == "olora (reference)" and group["seeds"] == [1, 2, 3]
    assert group["values"]["average_accuracy"] == list(found.groups[0].values["average_accuracy"])
    assert group["over_rows"] == list(found.groups[0].over_rows or ())
    assert group["average_accuracy"]["n"] == 3 and group["runs"][0] == "order1-olora-s1"
    pair = whole["pairs"][0]
    assert set(pair["paired_t"]) == {"p", "holm"} and len(pair["mcnemar"]) == 3
    assert whole["bootstrap"] == {"level": 0.95, "resamples": 10_000, "seed": 0, "exact_up_to_seeds": 8}
    assert compare([]).to_json()["groups"] == [] and "no finished run" in seen(compare([]))


def test_markdown_is_made_of_tables_of_equal_rows() -> None:
    text = markdown(
        compare([*methods(3, orders=("order1", "order2")), entry({"t": "10"}, method="a|b", order="order3")])
    )
    for block in text.split("\n\n"):
        lines = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1
    assert "| a\\|b |" in text


# --- published --------------------------------------------------------------------------------------------------


def beside(differing: tuple[str, ...] | None = (), refused: str = "") -> Comparison:
    result = published.lookup("order1", "t5-large", "olora", "reference")
    assert result is not None
    runs = [a_run(seed=s, shift=x, seconds={"train": 900 + 2 * x}) for s, x in ((1, 0.0), (2, 2.0))]
    return compare([replace(each, published=Beside(result, differing, refused)) for each in alone(*runs)])


def test_published_stands_beside_ours_stage_by_stage() -> None:
    found = beside(("training.lr=0.0005 (published 0.001)",))
    [shown] = found.published
    # a_run scores 60 + k + t/4 on task k after stage t; the second seed 2 more.
    wanted = [(1, "dbpedia", 98.71, 61.0), (2, "amazon", 57.76, 62.25), (3, "yahoo", 71.91, 63.5)]
    wanted += [(4, task, theirs, 61.0 + k + 0.75) for k, (task, theirs) in
               enumerate(zip(ORDER1, (97.74, 56.07, 71.04, 88.62), strict=True))]  # fmt: skip
    wanted += [(4, "AA", 78.37, 63.25), (0, "train s", 2018, 902.0)]
    got = [(line.stage, line.what, line.published, line.ours.mean) for line in shown.lines if line.ours is not None]
    assert [g[:3] for g in got] == [w[:3] for w in wanted]
    assert [g[3] for g in got] == pytest.approx([w[3] for w in wanted])
    assert [line.what for line in shown.lines if line.ours is None] == ["evaluate s"]
    text = seen(found)
    assert cells(text, "dbpedia") == ["1", "98.71", "61.00", "±", "1.41", "-37.71"]
    assert "settings that differ: training.lr=0.0005 (published 0.001)" in text and "arXiv 2310.14152" in text
    assert "| AA | 4 | 78.37 | 63.25 ± 1.41 | -15.12 |" in markdown(found)
    assert found.to_json()["published"][0]["differing"] == ["training.lr=0.0005 (published 0.001)"]


def test_published_on_other_rows_is_not_beside_ours() -> None:
    found = beside(refused="data.max_test=100")
    assert found.published == () and "settings that differ" not in seen(found)
    line = "published O-LoRA on order1 is not beside olora (reference): data.max_test=100"
    assert line in found.left_out
    assert "settings that differ: none" in seen(beside(()))
    assert "which settings differ is not known" in seen(beside(None))
