"""What becomes of the adapter that a run starts from (``model.adapter``): which weights train, and which are folded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cl_runner.adapters.kind import Kind
from cl_runner.config.schema import ADAPTER, LORA, RunConfig
from cl_runner.errors import UserError
from cl_runner.methods.protocol import Method

if TYPE_CHECKING:
    from cl_runner.adapters.given import Given


@dataclass(frozen=True)
class Start:
    """trains: whether its pair trains on, where it is folded else. said: that, in a sentence."""

    trains: bool
    said: str


def starting(given: Given, method: Method, kind: Kind, config: RunConfig, ranks: Mapping[str, int]) -> Start:
    """``ranks``: of the run's pairs, by target."""
    head = f"starts from {given.folder.path.name}, a {given.about}: its"
    folded = f"{head} update is folded into the base and does not train"
    if method.trains_on:
        why = f"adapter.kind is {kind.name}" if kind.name != LORA else ""
        why = why or given.unlike(ranks)
        if not why:
            return Start(True, f"{head} pair trains on as the run's, and nothing is folded")
        return Start(False, f"{folded}, as {why}; what {method.name} trains begins anew beside it")
    if method.past_as == "pairs" and method.reads_past() and not given.dense:
        count = len(given.folder.tasks) or 1
        pairs = "a past pair" if count == 1 else f"{count} past pairs"
        return Start(False, f"{folded}; {method.name} keeps it as {pairs}, and trains a new one at each stage")
    return Start(False, f"{folded}; what {method.name} trains is beside it")


def refuse_starting(config: RunConfig, method: Method, kind: Kind) -> None:
    """Refuse an adapter where nothing stands beside the base. Raises UserError."""
    if config.model.adapter is not None and "update" not in kind.offers:
        raise UserError(
            f"{ADAPTER}: {method.name} trains {kind.title}, beside which no adapter is folded; merge it "
            "into its base (PEFT's merge_and_unload) and give that folder as --model"
        )
