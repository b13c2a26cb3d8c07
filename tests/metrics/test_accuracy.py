"""The measures against naive loops, and against numbers worked out by hand from published ones."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_runner.metrics import accuracy
from cl_runner.metrics.accuracy import Matrix, from_csv, to_csv

ORDER1 = ["dbpedia", "amazon", "yahoo", "agnews"]


def square(rows: list[list[float | None]], **more: Any) -> Matrix:
    """One task a stage."""
    names = [f"t{k}" for k in range(len(rows[0]))]
    return Matrix(names[: len(rows)], names, rows, **more)


@st.composite
def full_runs(draw: st.DrawFn) -> tuple[list[list[float]], list[float], list[int], int]:
    """Every entry evaluated: scores (T × K), base scores, test rows, T ≤ K stages done."""
    total = draw(st.integers(1, 6))
    done = draw(st.integers(1, total))
    percent = st.floats(0, 100, allow_nan=False)
    a = [[draw(percent) for _ in range(total)] for _ in range(done)]
    return a, [draw(percent) for _ in range(total)], [draw(st.integers(1, 9000)) for _ in range(total)], done


@given(full_runs())
def test_measures_equal_naive_loops(run: tuple[list[list[float]], list[float], list[int], int]) -> None:
    a, a0, n, T = run
    m = square(
        [list(row) for row in a],
        base={f"t{k}": v for k, v in enumerate(a0)},
        counts={f"t{k}": v for k, v in enumerate(n)},
    )
    total = weighted = rows = learned = 0.0
    for k in range(T):
        total += a[T - 1][k]
        weighted += n[k] * a[T - 1][k]
        rows += n[k]
        learned += a[k][k]
    assert accuracy.average_accuracy(m) == pytest.approx(total / T)
    assert accuracy.weighted_average_accuracy(m) == pytest.approx(weighted / rows)
    assert accuracy.learning_accuracy(m) == pytest.approx(learned / T)
    reference = {f"t{k}": 50.0 + k for k in range(len(a0))}
    assert accuracy.intransigence(m, reference) == pytest.approx(sum(50.0 + k - a[k][k] for k in range(T)) / T)
    if T == 1:
        for measure in (
            accuracy.forgetting,
            accuracy.forgetting_signed,
            accuracy.backward_transfer,
            accuracy.forward_transfer,
        ):
            assert measure(m) is None
        return
    fgt = signed = bwt = fwt = 0.0
    for k in range(T - 1):
        best = before = -1.0
        for t in range(k, T):
            best = max(best, a[t][k])
            if t < T - 1:
                before = max(before, a[t][k])
        fgt += best - a[T - 1][k]
        signed += before - a[T - 1][k]
        bwt += a[T - 1][k] - a[k][k]
    for k in range(1, T):
        fwt += a[k - 1][k] - a0[k]
    assert accuracy.forgetting(m) == pytest.approx(fgt / (T - 1), abs=1e-9)
    assert accuracy.forgetting(m) >= 0  # type: ignore[operator]
    assert accuracy.forgetting_signed(m) == pytest.approx(signed / (T - 1), abs=1e-9)
    assert accuracy.backward_transfer(m) == pytest.approx(bwt / (T - 1), abs=1e-9)
    assert accuracy.forward_transfer(m) == pytest.approx(fwt / (T - 1), abs=1e-9)


def test_olora_order1_as_published() -> None:
    """Diagonal and last row of O-LoRA's logs; what lies between is not published, so forgetting is not defined."""
    diagonal, final = [98.71, 57.76, 71.91, 88.62], [97.74, 56.07, 71.04, 88.62]
    rows: list[list[float | None]] = [[diagonal[k] if k == t else None for k in range(4)] for t in range(3)]
    m = Matrix(ORDER1, ORDER1, [*rows, list(final)])
    assert accuracy.average_accuracy(m) == pytest.approx(78.3675)
    assert accuracy.learning_accuracy(m) == pytest.approx(79.25)
    assert accuracy.backward_transfer(m) == pytest.approx(-3.53 / 3)  # −0.97 − 1.69 − 0.87
    assert accuracy.forgetting(m) is None
    assert accuracy.forward_transfer(m) is None


def test_olora_order6_mean_over_rows_is_the_printed_one() -> None:
    scores = {
        "yelp": (62.14, 7600), "amazon": (60.00, 7600), "MNLI": (61.24, 7600), "CB": (73.21, 56), "COPA": (64.00, 100),
        "QQP": (72.79, 7600), "RTE": (69.68, 277), "IMDB": (94.93, 7600), "SST-2": (91.97, 872),
        "dbpedia": (98.41, 7600), "agnews": (86.42, 7600), "yahoo": (65.20, 7600), "MultiRC": (61.14, 4848),
        "BoolQA": (69.45, 3270), "WiC": (52.04, 638),
    }  # fmt: skip
    tasks = list(scores)
    values: list[list[float | None]] = [[None] * 15 for _ in range(14)]
    m = Matrix(tasks, tasks, [*values, [s for s, _ in scores.values()]], counts={t: n for t, (_, n) in scores.items()})
    assert accuracy.weighted_average_accuracy(m) == pytest.approx(73.88, abs=0.005)
    assert accuracy.average_accuracy(m) == pytest.approx(72.17, abs=0.005)  # 1082.62 / 15


def test_forgetting_and_its_signed_form_by_hand() -> None:
    m = square([[90.0, None, None], [70.0, 50.0, None], [80.0, 60.0, 40.0]])
    assert accuracy.forgetting(m) == pytest.approx(((90 - 80) + (60 - 60)) / 2)
    assert accuracy.forgetting_signed(m) == pytest.approx(((90 - 80) + (50 - 60)) / 2)
    assert accuracy.backward_transfer(m) == pytest.approx(((80 - 90) + (60 - 50)) / 2)


def test_unfinished_run_counts_the_tasks_seen_only() -> None:
    m = square([[90.0, 10.0, 20.0], [70.0, 50.0, 30.0]], base={"t0": 0.0, "t1": 4.0, "t2": 5.0})
    assert accuracy.average_accuracy(m) == pytest.approx(60.0)
    assert accuracy.forgetting(m) == pytest.approx(20.0)
    assert accuracy.forward_transfer(m) == pytest.approx(6.0)
    assert m.seen() == ["t0", "t1"] and m.earlier() == ["t0"]


def test_nothing_committed_is_all_undefined() -> None:
    m = Matrix([], ORDER1, [])
    assert set(accuracy.summary(m).values()) == {None}
    assert to_csv(m) == "stage,dbpedia,amazon,yahoo,agnews\n"


def test_union_of_all_tasks_has_an_average_but_no_forgetting() -> None:
    m = Matrix(["mtl"], ["a", "b"], [[80.0, 60.0]], trained=[["a", "b"]], counts={"a": 3, "b": 1})
    assert accuracy.summary(m) == {
        "average_accuracy": 70.0,
        "weighted_average_accuracy": 75.0,
        "forgetting": None,
        "forgetting_signed": None,
        "backward_transfer": None,
        "forward_transfer": None,
        "learning_accuracy": 70.0,
    }


def test_rounds_count_from_the_stage_that_trained_a_task() -> None:
    """Round 1 trains a and b, round 2 b and c: only a can have been forgotten; b was learned (again) in round 2."""
    m = Matrix(
        ["round1", "round2"],
        ["a", "b", "c"],
        [[90.0, 50.0, 30.0], [60.0, 70.0, 80.0]],
        trained=[["a", "b"], ["b", "c"]],
        base={"a": 1.0, "b": 2.0, "c": 3.0},
    )
    assert accuracy.average_accuracy(m) == pytest.approx(70.0)
    assert accuracy.forgetting(m) == pytest.approx(30.0)
    assert accuracy.backward_transfer(m) == pytest.approx(-30.0)
    assert accuracy.learning_accuracy(m) == pytest.approx((90 + 70 + 80) / 3)
    assert accuracy.forward_transfer(m) == pytest.approx(27.0)


def test_a_missing_entry_makes_a_measure_undefined_not_smaller() -> None:
    m = square([[90.0, None], [None, 50.0]])
    assert accuracy.average_accuracy(m) is None
    assert accuracy.forgetting(m) is None
    assert accuracy.learning_accuracy(m) == pytest.approx(70.0)
    assert accuracy.weighted_average_accuracy(square([[90.0]])) is None  # rows unknown
    assert accuracy.intransigence(m, {"t0": 95.0}) is None
    assert accuracy.forward_transfer(square([[90.0, None], [80.0, 50.0]], base={"t0": 1.0, "t1": 2.0})) is None


def test_an_undefined_score_leaves_the_means_to_the_other_tasks() -> None:
    """t1 is a correlation: undefined when learned, 40 a stage later, undefined again at the end."""
    why = [{}, {"t1": "the answers are all the same"}, {}, {"t1": "no answer is a number"}]
    rows = [[80.0, None, None, None], [70.0, None, None, None], [60.0, 40.0, 90.0, None], [50.0, None, 85.0, 95.0]]
    m = square(rows, counts={"t0": 1, "t1": 100, "t2": 3, "t3": 4}, undefined=why)
    assert accuracy.average_accuracy(m) == pytest.approx((50 + 85 + 95) / 3)
    assert accuracy.weighted_average_accuracy(m) == pytest.approx((50 + 3 * 85 + 4 * 95) / 8)
    assert accuracy.forgetting(m) == pytest.approx((30 + 5) / 2)
    assert accuracy.forgetting_signed(m) == pytest.approx((30 + 5) / 2)
    assert accuracy.backward_transfer(m) == pytest.approx((-30 - 5) / 2)
    assert accuracy.learning_accuracy(m) == pytest.approx((80 + 90 + 95) / 3)
    assert accuracy.intransigence(m, {"t0": 90.0, "t2": 90.0, "t3": 90.0}) == pytest.approx((10 + 0 - 5) / 3)
    third = square(rows[:3], undefined=why[:3])  # where it has a score again
    assert accuracy.average_accuracy(third) == pytest.approx((60 + 40 + 90) / 3)
    assert accuracy.forgetting(third) == pytest.approx(20.0), "t1 had no score before: nothing to forget"
    assert Matrix.from_dict(m.to_dict()) == m
    future = [[1.0, None, 3.0], [1.0, 5.0, 3.0], [1.0, 5.0, 3.0]]
    seen = square(future, base={"t0": 0.0, "t1": 2.0, "t2": None}, undefined=[{"t1": "-"}, {}, {}])
    assert accuracy.forward_transfer(seen) is None, "neither t1 nor t2 is left"
    seen = square(future, base={"t0": 0.0, "t1": 2.0, "t2": 1.0}, undefined=[{"t1": "-"}, {}, {}])
    assert accuracy.forward_transfer(seen) == 2.0
    with pytest.raises(ValueError, match="both there and undefined"):
        square([[1.0]], undefined=[{"t0": "-"}])


def test_csv_is_exactly_the_documented_form() -> None:
    m = Matrix(["01-a", '02-b, the "second"'], ["a", 'b, the "second"'], [[100 / 3, None], [0.0, 100.0]])
    assert to_csv(m) == 'stage,a,"b, the ""second"""\n01-a,33.3333,\n"02-b, the ""second""",0.0000,100.0000\n'


names = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=8),
    min_size=1,
    max_size=5,
    unique=True,
)


@given(names, st.data())
def test_csv_and_dict_read_back(tasks: list[str], data: st.DataObject) -> None:
    score = st.none() | st.integers(0, 1_000_000).map(lambda i: i / 10_000)
    values = [[data.draw(score) for _ in tasks] for _ in range(data.draw(st.integers(0, len(tasks))))]
    m = Matrix(tasks[: len(values)], tasks, values, counts={tasks[0]: 7}, base={tasks[0]: 1.5})
    assert Matrix.from_dict(m.to_dict()) == m
    assert from_csv(to_csv(m), counts=m.counts, base=m.base) == m


def test_what_a_stage_trained_is_read_off_its_name() -> None:
    m = from_csv("stage,SST-2,b\n01-SST-2,90.0,\n02-b,80.0,70.0\n")
    assert m.trained == [["SST-2"], ["b"]]
    assert from_csv("stage,a,b\nmtl,90.0,80.0\n").trained == [["a", "b"]]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "line 1"),
        ("task,a\n", "line 1"),
        ("stage,a\nx,1,2\n", "line 2"),
        ("stage,a\nx,high\n", "line 2"),
        ("stage,a\nx,nan\n", "not finite"),
        ("stage,a,a\nx,1,2\n", "twice"),
    ],
)
def test_what_is_no_matrix_is_refused(text: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        from_csv(text)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="2 stages but 1 rows"):
        Matrix(["a", "b"], ["a", "b"], [[1.0, 2.0]])
    with pytest.raises(ValueError, match="trained but not in the matrix: z"):
        Matrix(["a"], ["a"], [[1.0]], trained=[["z"]])
