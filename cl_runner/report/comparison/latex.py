r"""A comparison as LaTeX (booktabs): a tabular of the groups, the best of each column bold, and one of the pairs.

Put each into a ``table`` of yours; the document needs ``\usepackage{booktabs}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from cl_runner.report.comparison import text
from cl_runner.report.comparison.found import Comparison, Group, Pair, chance, place, signed
from cl_runner.report.comparison.measures import ALL, MEASURES
from cl_runner.report.tables import number

HIGHER = ("average_accuracy", "backward_transfer")  # is better; of the other measures lower is
ESCAPED = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "–": "--", "±": r"$\pm$", "Δ": r"$\Delta$", "‖": r"$\|$", "·": r"$\cdot$", "−": "$-$",
}  # fmt: skip


def latex(found: Comparison) -> str:
    """Two tabulars with comments on what they are; nothing else of a document."""
    lines = [f"% {line}" for line in [text.title(found), r"needs \usepackage{booktabs}; the best of a column is bold"]]
    if found.groups:
        lines += _groups(found)
    pairs = [pair for order in found.orders for pair in text.pairs_of(found, order)]
    if pairs:
        lines += ["", f"% {text.pairs_title(found)}", *_pairs(found)]
    lines += [f"% {line}" for line in [*text.fronts(found), *found.lines()]]
    return "\n".join(" ".join(line.splitlines()) for line in lines) + "\n"


def escaped(words: str) -> str:
    """Text that LaTeX prints as it is; what is no letter of Latin script is left to the document's own fonts."""
    return re.sub(r"[\s\S]", lambda found: ESCAPED.get(found[0], found[0]), " ".join(words.split()))


def _groups(found: Comparison) -> Iterator[str]:
    heads = [ALL[key][0] for key in MEASURES]
    columns = len(heads) + 2
    yield rf"\begin{{tabular}}{{l{'r' * (columns - 1)}}}"
    yield r"\toprule"
    yield _row(["Method", *map(escaped, heads), "seeds"])
    for order in found.orders:
        yield r"\midrule"
        groups = found.of(order)
        if len(found.orders) > 1:
            yield rf"\multicolumn{{{columns}}}{{l}}{{\emph{{{escaped(order)}}}}} \\"
        best = {key: _best(groups, key) for key in MEASURES}
        for group in groups:
            cells = [_measure(group, key, best[key]) for key in MEASURES]
            yield _row([escaped(group.marked), *cells, str(len(group.seeds))])
    if found.ranks:
        yield r"\midrule"
        yield rf"\multicolumn{{{columns}}}{{l}}{{\emph{{mean rank by AA over {len(found.orders)} orders}}}} \\"
        for each in found.ranks:
            yield _row([escaped(each.label), place(each.mean), *[""] * (columns - 2)])
    yield r"\bottomrule"
    yield r"\end{tabular}"


def _best(groups: Sequence[Group], key: str) -> str:
    """The best mean of a column as it is printed; empty where there is nothing to be better than."""
    known = [value.mean for group in groups if (value := group.measures[key]) is not None]
    if len(known) < 2:
        return ""
    return number(max(known) if key in HIGHER else min(known), ALL[key][1])


def _measure(group: Group, key: str, best: str) -> str:
    value, digits = group.measures[key], ALL[key][1]
    if value is None:
        return "--"
    mean = number(value.mean, digits)
    mean = rf"\mathbf{{{mean}}}" if mean == best else mean
    return f"${mean}$" if value.std is None else rf"${mean} \pm {value.std:.{digits}f}$"


def _pairs(found: Comparison) -> Iterator[str]:
    head = ["Pair", r"$\Delta$ AA", "n", "$t$ $p$", "Holm", "flip $p$", "rows", "row $p$", "Holm"]
    yield rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
    yield r"\toprule"
    yield _row(head)
    for order in found.orders:
        pairs = text.pairs_of(found, order)
        if not pairs:
            continue
        yield r"\midrule"
        if len(found.orders) > 1:
            yield rf"\multicolumn{{{len(head)}}}{{l}}{{\emph{{{escaped(order)}}}}} \\"
        yield from (_row(_cells(pair)) for pair in pairs)
    yield r"\bottomrule"
    yield r"\end{tabular}"


def _cells(pair: Pair) -> list[str]:
    first, second = pair.only
    rows = f"{first}:{second}" if pair.by_seed else "-"
    difference = signed(pair.difference)
    tests = (pair.t, pair.t_holm, pair.flip)
    numbers = [*map(chance, tests), rows, chance(pair.rows), chance(pair.rows_holm)]
    name = escaped(f"{pair.first} – {pair.second}")
    return [name, "--" if difference == "-" else f"${difference}$", str(len(pair.seeds)), *map(_number, numbers)]


def _number(cell: str) -> str:
    return "--" if cell == "-" else f"${cell}$" if cell.startswith("<") else cell


def _row(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} " + r"\\"
