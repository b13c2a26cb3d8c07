"""The page of a comparison: one file, numbers as in the tables, fronts and intervals drawn where they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cl_runner.report.comparison.compared import compare
from cl_runner.report.comparison.found import Comparison
from cl_runner.report.figures import comparison as figure
from cl_runner.report.page.comparison_page import comparison_page, drawn, figures
from tests.command_line import call
from tests.report.comparison.made import entry, methods
from tests.report.comparison.test_forms import beside
from tests.report.pages import SPENT, Read
from tests.run_folders import RunFolder


def page(found: Comparison) -> str:
    return comparison_page(found, [], figures(found))


def test_it_says_who_is_ahead_and_how_sure_that_is() -> None:
    found = compare(methods(3))
    read = Read(page(found))
    ahead = "olora (reference) has the highest AA, 95.0 ± 2.5 %, 12.5 points above seqlora"
    first = found.pairs[0]
    assert first.t_holm is not None
    assert f"{ahead} (corrected p over seeds {first.t_holm:.3f}, over rows <.001)." in read.text
    sure = sum(pair.t_holm is not None and pair.t_holm < 0.05 for pair in found.pairs)
    verbs = [f"{count} differ{'s' * (count == 1)}" for count in (sure, 3)]
    assert f"Of 3 pairs {verbs[0]} over seeds (paired t) and {verbs[1]} over rows, corrected p below 0.05" in read.text
    for words in ("95.0 ± 2.5", "olora (reference) – seqlora", "+12.5", "30:0", "0.250"):
        assert words in read.cells
    one = Read(page(compare([entry({"t": "1110"})])))
    assert "olora has an AA of 75.0 %." in one.text
    assert "No finished run to compare" in Read(page(compare([]))).text


def test_orders_ranks_flags_and_published_are_there_and_ids_are_each_ones_own() -> None:
    late = entry({"dbpedia": "1010"}, method="late", seed=1, entry={"facts": {"device": "gpu"}})
    found = compare([*methods(3, orders=("order1", "order2")), late])
    read = Read(page(found))
    assert len(read.ids) == len(set(read.ids)) > 0 and read.asked == []
    assert "rank by AA" in read.cells and "not the same in all: device: gpu in late" in read.text
    assert "Pareto front of AA and train s on order1:" in read.text
    assert len(list(drawn(figures(found)))) == 4
    with_published = Read(page(beside(("training.lr=1 (published 2)",))))
    assert "settings that differ: training.lr=1 (published 2)" in with_published.text
    assert {"98.71", "-37.71"} <= set(with_published.cells)


def test_what_users_call_things_is_text() -> None:
    name = "<script>alert(1)</script>&$x$"
    text = page(compare([entry({"t": "1110"}, method=name, seconds={"train": 1.0}, model=name),
                         entry({"t": "1100"}, method="b", seconds={"train": 2.0}, order=name)]))  # fmt: skip
    assert "<script" not in text and name in Read(text).text


@pytest.mark.parametrize("count", [2, 10, 30])
def test_synthetic_stands_at_the_top_and_many_pairs_are_folded(count: int) -> None:
    entries = [entry({"t": "1" * (k % 12) + "0" * (12 - k % 12)}, method=f"m{k}", synthetic=True,
                     seconds={"train": 1.0 + k}) for k in range(count)]  # fmt: skip
    text = page(compare(entries))
    assert '<span class="tag">synthetic data</span>' in text and "say nothing about the real tasks" in text
    assert ("<details><summary>45 pairs" in text) == (count == 10) and ("435 pairs: --against" in text) == (count == 30)


def test_points_and_intervals_stand_where_the_numbers_are() -> None:
    found = compare(methods(4))
    groups = found.of("order1")
    shown = figure.intervals(groups, "a")
    assert shown is not None
    [axis] = shown._figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [group.label for group in groups]
    lines = [tuple(map(float, line.get_xdata())) for line in axis.lines]
    for group in groups:
        assert group.over_seeds is not None and group.over_rows is not None
        assert tuple(group.over_seeds) in lines and tuple(group.over_rows) in lines
        assert group.values["average_accuracy"] in lines and (group.average,) in lines
    costs = figure.fronts(groups, "b")
    assert costs is not None
    assert [axis.get_xlabel() for axis in costs._figure.axes] == ["train s", "state MB", "peak MB"]
    for axis, (_, cost, on) in zip(costs._figure.axes, found.fronts(), strict=True):
        front = axis.lines[0]
        assert list(front.get_ydata()) == [group.average for group in on]
        assert list(front.get_xdata()) == [group.measures[cost].mean for group in on]  # type: ignore[union-attr]
        assert {text.get_text() for text in axis.texts} == {group.label for group in groups}


def test_what_is_synthetic_is_said_in_figures_and_beside_the_answer() -> None:
    real, made = (compare(methods(2, synthetic=synthetic)) for synthetic in (False, True))
    some = [*real.groups, *made.groups]
    for groups, mark in ((real.groups, ""), (made.groups, " (synthetic)"), (some, " (partly synthetic)")):
        label = f"AA, %{mark}"
        intervals, fronts = figure.intervals(groups, "x"), figure.fronts(groups, "y")
        assert intervals is not None and intervals._figure.axes[0].get_xlabel() == label
        assert fronts is not None and {axis.get_ylabel() for axis in fronts._figure.axes} == {label}
    assert "over rows <.001). (synthetic)" in Read(page(made)).text
    assert "synthetic" not in Read(page(real)).text


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    alone = compare([entry({"t": "1110"})]).groups
    assert figure.fronts(alone, "x") is None, "one method has no front"
    far = compare([entry({"t": "1110"}, method="a", megabytes=0.1), entry({"t": "1111"}, method="b", megabytes=500.0)])
    fronts = figure.fronts(far.groups, "x")
    assert fronts is not None and fronts._figure.axes[0].get_xscale() == "log"
    assert sorted(path.name for path in fronts.save(tmp_path)) == ["x.png", "x.svg"]
    assert re.search(r"var\(--ink\)", fronts.svg())


def test_the_page_says_what_the_best_keeps_and_the_next_has_lost(tmp_path: Path) -> None:
    golds = ["Film", "Plant", "Animal", "Village"]
    saids = {"olora": ["Film", "Plant", "Animal", "negative"], "seqlora": ["Film", "negative", "negative", "Village"]}
    for method, said in saids.items():
        run = RunFolder(tmp_path / "runs", method, "tasks: [dbpedia, amazon]", method=method)
        run.commit({"dbpedia": list(zip(golds, golds, strict=True))}, **SPENT)
        run.commit({"dbpedia": list(zip(golds, said, strict=True)), "amazon": [("negative", "negative")]}, **SPENT)
    done = call("compare", "runs", "--html", "page.html", cwd=tmp_path)
    assert done.code == 0, done.err
    page = Read((tmp_path / "page.html").read_text()).text
    # By hand: of 4 rows olora alone keeps Plant and Animal, seqlora alone Village. Nothing was trained after amazon.
    assert (
        "Of the 4 test rows of earlier tasks that both had right when learned, olora keeps 2 that seqlora has lost "
        "(dbpedia 2); seqlora keeps 1 that olora has lost (dbpedia 1)." in page
    )
    assert "keeps and loses right in both only the first keeps only the second both keep both lose" in page
    assert "olora seqlora 4 2 1 1 0" in page


def test_equal_ones_are_equal_whatever_their_sums_are_rounded_to() -> None:
    # 3 of 14 rows in both of the first two; 0 / 7 + 3 / 7 is no sum of floats that 1 / 7 + 2 / 7 is.
    rights = [{"a": "0000000", "b": "1110000"}, {"a": "1000000", "b": "1100000"}, {"a": "0000000", "b": "0000000"}]
    found = compare([entry(right, method=f"m{i}", megabytes=1.0 + i) for i, right in enumerate(rights)])
    assert [group.rank for group in found.groups] == [1.5, 1.5, 3.0]
    assert [group.fronts for group in found.groups] == [("state_megabytes",), (), ()]
    assert "m0 and m1 have the highest AA, 21.4 % each." in Read(page(found)).text


def test_tests_that_there_are_not_find_nothing_and_do_not_fail_to() -> None:
    found = compare([entry({"t": right}, method=f"m{i}") for i, right in enumerate(("1111", "1110", "0000"))])
    text = Read(page(found)).text
    assert "Of 3 pairs 0 differ over rows, corrected p below 0.05." in text and "paired t)" not in text
    assert "3 runs; seed 42" in text
    assert "1 run; seed 42" in Read(page(compare([entry({"t": "1110"})]))).text


def test_a_lead_over_other_seeds_is_not_the_one_that_is_tested() -> None:
    runs = [entry({"t": "1111"}, method="a", seed=1), entry({"t": "1100"}, method="a", seed=2)]
    runs += [entry({"t": "1000"}, method="b", seed=2)]
    # By hand: 75 − 25 of all seeds; of seed 2 alone 50 − 25.
    ahead = "a has the highest AA, 75.0 ± 35.4 %, 50.0 points above b (of the 1 seed of both +25.0 points, corrected p"
    assert ahead in Read(page(compare(runs))).text
