"""Two methods on the same seeds and rows: which count, what the tests say of them, and what the two differ in."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest
from scipy import stats

from cl_runner.errors import UserError
from cl_runner.report.comparison.compared import compare
from cl_runner.report.comparison.found import Answers, Entry
from cl_runner.report.comparison.markdown import markdown
from tests.report.comparison.made import entry, methods, seen

A = [{"dbpedia": "111101", "amazon": "1110"}, {"dbpedia": "111110", "amazon": "0110"},
     {"dbpedia": "111111", "amazon": "1010"}]  # fmt: skip
B = [{"dbpedia": "110001", "amazon": "1100"}, {"dbpedia": "011000", "amazon": "0111"},
     {"dbpedia": "110110", "amazon": "0010"}]  # fmt: skip


def runs(method: str, rights: Sequence[dict[str, str]], **about: object) -> list[Entry]:
    return [entry(right, method=method, seed=seed, **about) for seed, right in enumerate(rights, 1)]


def average(right: dict[str, str]) -> float:
    return statistics.fmean(100 * digits.count("1") / len(digits) for digits in right.values())


def test_a_pair_is_what_scipy_says_of_the_averages_and_of_the_rows() -> None:
    found = compare([*runs("olora", A), *runs("seqlora", B)])
    [pair] = found.pairs
    a, b = [average(right) for right in A], [average(right) for right in B]
    assert (pair.first, pair.second, pair.seeds) == ("olora", "seqlora", (1, 2, 3))
    assert pair.difference == pytest.approx(statistics.fmean(a) - statistics.fmean(b))
    assert pair.t == pytest.approx(stats.ttest_rel(a, b).pvalue) and pair.t_holm == pair.t
    assert pair.flip == 0.25
    for each, one, other in zip(pair.by_seed, A, B, strict=True):
        both = [(x, y) for task in one for x, y in zip(one[task], other[task], strict=True)]
        only = both.count(("1", "0")), both.count(("0", "1"))
        assert (each.only_first, each.only_second, each.rows) == (*only, 10)
        assert each.p == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    sums = [
        sum(int(one[task][i]) - int(other[task][i]) for one, other in zip(A, B, strict=True))
        for task in A[0]
        for i in range(len(A[0][task]))
    ]
    flipped = stats.permutation_test((sums,), sum, permutation_type="samples", n_resamples=2**12, vectorized=False)
    assert pair.rows == pytest.approx(flipped.pvalue)
    one_seed = compare([*runs("olora", A[:1]), *runs("seqlora", B[:1])]).pairs[0]
    assert one_seed.rows == pytest.approx(one_seed.by_seed[0].p) and (one_seed.t, one_seed.flip) == (None, None)


def test_seeds_that_one_has_alone_do_not_count() -> None:
    found = compare([*runs("olora", A), entry(B[1], method="seqlora", seed=2), entry(B[0], method="seqlora", seed=9)])
    [pair] = found.pairs
    assert pair.seeds == (2,) and pair.difference == pytest.approx(average(A[1]) - average(B[1]))
    assert [each.seed for each in pair.by_seed] == [2]
    none = compare([*runs("olora", A[:1]), entry(B[0], method="seqlora", seed=9)]).pairs[0]
    assert (none.seeds, none.difference, none.rows, none.by_seed) == ((), None, None, ())
    assert "| olora – seqlora | - | - | - | - | - | - | - |" in markdown(
        compare([*runs("olora", A[:1]), entry(B[0], method="seqlora", seed=9)])
    )


def test_only_rows_that_both_were_scored_on_by_the_same_rule() -> None:
    one = entry({"dbpedia": "1111", "amazon": "11", "agnews": "11", "yahoo": "11"}, method="a", seed=1)
    two = entry({"dbpedia": "000", "amazon": "00", "agnews": "00", "boolq": "0"}, method="b", seed=1)
    by = {"amazon": Answers(two.answers["amazon"].right, "text"),
          "agnews": Answers({(row, "other"): right for (row, _), right in two.answers["agnews"].right.items()},
                            "normalised")}  # fmt: skip
    found = compare([one, replace(two, answers={**two.answers, **by}, unjudged={"boolq": "by the metric f1 …"})])
    [pair] = found.pairs
    assert [(each.rows, each.only_first, each.only_second) for each in pair.by_seed] == [(3, 3, 0)]
    assert pair.left_out == {
        "amazon": "right by the rule 'normalised' in one, 'text' in the other",
        "agnews": "no test row in common",
        "yahoo": "not scored in both",
        "boolq": "by the metric f1 …",
    }
    assert "no test over rows of agnews: no test row in common" in found.left_out


def test_holm_is_over_all_pairs_of_all_orders() -> None:
    found = compare(methods(3, orders=("order1", "order2")))
    assert len(found.pairs) == 6 and {pair.order for pair in found.pairs} == {"order1", "order2"}
    least = min(pair.rows for pair in found.pairs if pair.rows is not None)
    assert min(p.rows_holm for p in found.pairs if p.rows_holm is not None) == pytest.approx(min(1.0, 6 * least))
    for pair in found.pairs:
        assert pair.flip_holm == 1.0


def test_against_one_method_there_are_fewer_pairs() -> None:
    found = compare(methods(4, orders=("order1", "order2")), against="seqlora")
    assert [(pair.first, pair.second) for pair in found.pairs][:3] == [
        ("olora (reference)", "seqlora"), ("shared-basis", "seqlora"), ("progprompt", "seqlora"),
    ]  # fmt: skip
    assert len(found.pairs) == 6 and found.to_json()["against"] == "seqlora"
    assert len(compare(methods(4), against="olora (reference)").pairs) == 3
    with pytest.raises(UserError, match=r"--against seqlroa: no finished run is of it.*did you mean 'seqlora'"):
        compare(methods(4), against="seqlroa")


def test_what_else_differs_is_flagged_with_its_key() -> None:
    def one(method: str, seed: int = 1, entry_: dict[str, object] | None = None, **about: object) -> Entry:
        return entry(A[0], method=method, seed=seed, entry=entry_, **about)

    same = {"method.lambda1": "0.5", "training.lr": "0.001", "adapter.r": "8"}
    facts = {"device": "cpu", "test rows of dbpedia": "aa", "test rows of amazon": "bb"}
    found = compare([
        one("olora", entry_={"settings": same, "facts": facts}),
        one("seqlora", entry_={"settings": {"training.lr": "0.002", "adapter.r": "8"}, "facts": facts}),
        one("replay", entry_={"settings": {"training.lr": "0.001", "adapter.r": "8"},
                              "facts": {"device": "gpu", "test rows of dbpedia": "cc", "test rows of amazon": "dd"}}),
    ])  # fmt: skip
    assert found.flags == (
        "not the same in all: training.lr: 0.002 in seqlora; 0.001 in olora, replay",
        "not the same in all: device: gpu in replay; cpu in olora, seqlora",
        "not the same in all: test rows of dbpedia, amazon: replay has others",
    )
    differs = {(pair.first, pair.second): pair.differs for pair in found.pairs}
    rows = ("device", "test rows of dbpedia", "test rows of amazon")
    assert differs == {
        ("olora", "seqlora"): ("training.lr",),
        ("olora", "replay"): rows,
        ("seqlora", "replay"): ("training.lr", *rows),
    }
    assert "olora – seqlora !" in seen(found) and "!: they differ in more" in " ".join(seen(found).split())
    alike = compare([one("olora", entry_={"settings": same}), one("replay", entry_={"settings": same})])
    assert alike.flags == () and alike.pairs[0].differs == () and "!" not in seen(alike)


def test_settings_split_groups_and_are_named_by_what_is_theirs() -> None:
    def one(seed: int, lr: str, method: str = "inclora", **about: object) -> Entry:
        return entry(A[0], method=method, seed=seed, entry={"settings": {"training.lr": lr}}, **about)

    found = compare([one(1, "0.1"), one(2, "0.1"), one(1, "0.2", variant="3fa91c"), one(1, "0.1", "replay")])
    assert [(g.label, g.seeds, g.changed) for g in found.groups] == [
        ("inclora", (1, 2), ("training.lr=0.1",)),
        ("inclora 3fa91c", (1,), ("training.lr=0.2",)),
        ("replay", (1,), ()),
    ]
    assert found.variants() == ["inclora: training.lr=0.1", "inclora 3fa91c: training.lr=0.2"]
    # The same digits, and yet others: two presets.
    twice = compare([one(1, "0.1"), one(1, "0.2")])
    assert [group.label for group in twice.groups] == ["inclora", "inclora (2)"]
    # Seeds of one group on two machines.
    device = [entry(A[0], seed=s, entry={"facts": {"device": d}}) for s, d in ((1, "cpu"), (2, "gpu"))]
    assert compare(device).flags == ("not the same in all: device: cpu / gpu in olora",)


def test_between_orders_what_differs_is_said_of_each_method() -> None:
    found = compare([
        entry(A[0], order=order, entry={"settings": {"training.epochs": epochs, "tasks.x.training.lr": epochs}})
        for order, epochs in (("order1", "1"), ("order4", "3"))
    ])  # fmt: skip
    assert found.flags == ("olora: not the same in all orders: training.epochs: 1 in order1; 3 in order4",)


def test_ranks_by_order_and_their_mean() -> None:
    def one(method: str, order: str, right: str) -> Entry:
        return entry({"dbpedia": right}, method=method, order=order)

    found = compare([
        one("a", "o1", "1110"), one("b", "o1", "1100"), one("c", "o1", "1100"),
        one("a", "o2", "1000"), one("b", "o2", "1110"), one("d", "o2", "1111"),
    ])  # fmt: skip
    assert [(r.label, dict(r.by_order), r.mean) for r in found.ranks] == [
        ("d", {"o1": None, "o2": 1.0}, 1.0),
        ("a", {"o1": 1.0, "o2": 3.0}, 2.0),
        ("b", {"o1": 2.5, "o2": 2.0}, 2.25),
        ("c", {"o1": 2.5, "o2": None}, 2.5),
    ]
    assert [group.rank for group in found.groups] == [1.0, 2.5, 2.5, 3.0, 2.0, 1.0]
    assert "| b | 2.5 | 2 | 2.25 |" in markdown(found)


def test_pareto_fronts_are_named_cheapest_first() -> None:
    def one(method: str, right: str, seconds: float, megabytes: float) -> Entry:
        return entry({"dbpedia": right}, method=method, seconds={"train": seconds}, megabytes=megabytes)

    found = compare(
        [one("a", "1110", 30, 1), one("b", "1100", 10, 2), one("c", "1000", 20, 3), one("d", "1111", 40, 1)]
    )
    assert [(cost, [group.label for group in on]) for _, cost, on in found.fronts()] == [
        ("train_seconds", ["b", "a", "d"]),
        ("state_megabytes", ["d"]),
    ]
    assert "Pareto front of AA and train s: b, a, d\n" in markdown(found)


def test_intervals_of_a_group() -> None:
    group = compare(runs("olora", A)).groups[0]
    values = sorted(average(right) for right in A)
    assert group.over_seeds == pytest.approx((values[0], values[2]))
    assert group.over_rows is not None and group.over_rows.low < group.average < group.over_rows.high  # type: ignore[operator]
    one = compare(runs("olora", A[:1]))
    assert one.groups[0].over_seeds is None and one.groups[0].over_rows is not None
    assert any("of one seed" in note for note in one.notes)
    assert any("of 3 seeds" in note and "75 %" in note for note in compare(runs("olora", A)).notes)
    other = compare(
        [entry({"sums": "1100"}, metrics={"sums": "rouge-l"}, entry={"unjudged": {"sums": "no"}, "answers": {}})]
    )
    assert other.groups[0].over_rows is None and "no interval over rows of olora: sums: no" in other.left_out


def test_no_interval_stands_beside_an_average_that_there_is_not() -> None:
    whole = entry({"dbpedia": "1101", "sums": "1010"}, metrics={"dbpedia": "normalised", "sums": "pearson"})
    matrix = replace(whole.summary.matrix, values=[[100.0, None], [75.0, None]], undefined=[{}, {"sums": "all same"}])
    answers = {"dbpedia": whole.answers["dbpedia"]}
    lacking = replace(whole, summary=replace(whole.summary, matrix=matrix), answers=answers, unjudged={"sums": "no"})
    group = compare([lacking]).groups[0]
    assert group.average is None and group.over_rows is None


@pytest.mark.parametrize("count", [3, 10])
@pytest.mark.parametrize("orders", [("order1",), ("order1", "order2")])
@pytest.mark.parametrize("width", [80, 60])
def test_everything_is_legible_at_any_width(count: int, orders: tuple[str, ...], width: int) -> None:
    found = compare(methods(count, orders=orders, synthetic=True))
    text = seen(found, width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for pair in found.pairs:
        assert f"{pair.only[0]}:{pair.only[1]}" in text
    for group in found.groups:
        mean = group.measures["average_accuracy"]
        assert mean is not None and mean.text() in text
    assert "synthetic" in text.splitlines()[0]
    plain = seen(found, width, "ascii")
    assert "+-" in plain and "?" not in plain


def test_more_pairs_than_anybody_reads_are_counted() -> None:
    found = compare([entry({"t": "1" * k + "0" * (12 - k)}, method=f"m{k}") for k in range(11)])
    assert len(found.pairs) == 55 and len(found.to_json()["pairs"]) == 55
    for text in (seen(found), markdown(found)):
        assert "55 pairs: --against METHOD" in text and "m1 – m2" not in text
