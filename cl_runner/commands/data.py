"""``cl-runner data``: what the rows are, before anything is trained on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_runner.commands.request import Request
from cl_runner.errors import UserError, did_you_mean
from cl_runner.report.data_report import data_lines
from cl_runner.settings import Resolved
from cl_runner.terminal.console import print_json

if TYPE_CHECKING:
    from cl_runner.models.chat import ChatTemplate
    from cl_runner.models.vocabulary import Vocabulary


def data_check(request: Request, *, near: float | None, as_json: bool) -> None:
    """``cl-runner data check``. near: the Jaccard similarity from which on two texts are near duplicates."""
    from cl_runner.tasks import check as checking
    from cl_runner.tasks.near_duplicates import LEAST, NEAR

    near = NEAR if near is None else near
    if not LEAST <= near <= 1:
        raise UserError(f"--near {near:g}: a Jaccard similarity from {LEAST:g} to 1")
    resolved, order = request.with_order()
    vocabulary, chat = _vocabulary(resolved)
    found = []
    for position, task in enumerate(order.tasks, 1):
        found += checking.check([task], resolved.config.at(position, task.name).data, vocabulary, chat, near)
    if as_json:
        print_json({"order": order.name, "tasks": found})
    else:
        for line in data_lines(found):
            print(line)
    for report in found:
        if report["problem"]:
            raise UserError(f"task {report['task']}: {report['problem']}")


def data_show(request: Request, task: str, n: int, *, as_json: bool) -> None:
    """``cl-runner data show``."""
    from cl_runner.tasks import check as checking

    resolved, order = request.with_order()
    by_name = {each.name: each for each in order.tasks}
    if task not in by_name:
        raise UserError(f"--task {task}: order {order.name} has no such task{did_you_mean(task, by_name)}")
    position = order.names.index(task) + 1
    chat = _vocabulary(resolved)[1] if resolved.config.data.chat_template else None
    rows = checking.show(by_name[task], resolved.config.at(position, task).data, n, chat)
    synthetic = resolved.config.data.source == "synthetic" and by_name[task].source is None
    if as_json:
        scored = {"metric": by_name[task].metric, "scoring": by_name[task].scoring}
        print_json({"order": order.name, "task": task, **scored, "synthetic": synthetic, "rows": rows})
        return
    mark = " (synthetic)" if synthetic else ""
    for row in rows:
        print(f"--- {row['id']}{mark}\n{row['input']}\n→ {row['target']}")
    rule = f": {by_name[task].comparison.words}" if by_name[task].judged else ""
    print(f"--- metric {by_name[task].metric}{rule}")


def _vocabulary(resolved: Resolved) -> tuple[Vocabulary, ChatTemplate | None]:
    """What the model's tokenizer says of texts, and its chat template where inputs go into it. Raises UserError."""
    from cl_runner.models.base import tokenizer_of
    from cl_runner.models.vocabulary import Vocabulary

    tokenizer, chat = tokenizer_of(resolved.config.model, resolved.config.data.chat_template)
    return Vocabulary(tokenizer), chat
