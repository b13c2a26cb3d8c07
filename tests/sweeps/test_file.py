"""``SWEEP.yaml``: which runs it is of, against a naive enumeration, and what is refused in it, with its place."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from cl_runner.errors import UserError
from cl_runner.sweeps.cells import Cell, cells
from cl_runner.sweeps.file import Sweep


def swept(folder: Path, text: str) -> list[Cell]:
    file = folder / "trial.yaml"
    file.write_text(text)
    return cells(Sweep(file))


def own(cell: Cell) -> dict[str, Any]:
    """The settings that the file has given."""
    return {key: value for key, value in cell.settings.items() if key not in ("output.dir", "output.reuse")}


def test_every_combination(tmp_path: Path) -> None:
    given = {
        "base": {"presets": ["tiny"], "training": {"epochs": 2}, "data.max_train": 40},
        "list": [{"method": "olora"}, {"method": "nlora", "method.lambda1": 30}],
        "grid": {"order": ["order1", "order2"], "adapter.r,adapter.alpha": [[4, 8], [8, 16]]},
        "seeds": [1, 2, 3],
    }
    found = swept(tmp_path, yaml.safe_dump(given, sort_keys=False))
    always = {"presets": ["tiny"], "training.epochs": 2, "data.max_train": 40}
    naive = []
    for one in ({"method.name": "olora"}, {"method.name": "nlora", "method.lambda1": 30}):
        for order, (r, alpha), seed in product(["order1", "order2"], [(4, 8), (8, 16)], [1, 2, 3]):
            naive.append({**always, **one, "order": order, "adapter.r": r, "adapter.alpha": alpha, "seed": seed})
    assert [own(cell) for cell in found] == naive
    assert found[0].label == "order1 olora adapter.r=4 adapter.alpha=8 seed 1"
    assert found[0].words == [
        "--order", "order1", "--preset", "tiny", "--method", "olora", "--seed", "1", "--output-dir", "runs/trial",
        "--set", "output.reuse=true", "--set", "training.epochs=2", "--set", "data.max_train=40",
        "--set", "adapter.r=4", "--set", "adapter.alpha=8",
    ]  # fmt: skip


def test_conditions_change_drop_and_skip(tmp_path: Path) -> None:
    found = swept(
        tmp_path,
        """
base: {order: order1}
grid: {method: [inclora, olora, ewc], method.lambda1: [0.1, 0.5]}
seeds: [1, 2]
when:
  - if: {method: inclora}
    drop: [method.lambda1]
  - if: {method: ewc, method.lambda1: 0.1}
    skip: true
  - if: {method: [olora, ewc], seed: 2}
    set: {training.epochs: 3}
""",
    )
    told = [
        (cell.settings["method.name"], cell.settings.get("method.lambda1"), cell.settings["seed"]) for cell in found
    ]
    assert told == [
        ("inclora", None, 1), ("inclora", None, 2), ("olora", 0.1, 1), ("olora", 0.1, 2), ("olora", 0.5, 1),
        ("olora", 0.5, 2), ("ewc", 0.5, 1), ("ewc", 0.5, 2),
    ]  # fmt: skip
    assert [cell.settings.get("training.epochs") for cell in found] == [None, None, None, 3, None, 3, None, 3]


def test_numbers_and_lists_in_conditions(tmp_path: Path) -> None:
    found = swept(
        tmp_path,
        """
base: {order: order1, adapter.target_modules: [q, v], presets: null}
grid: {method.lambda1: [1, 2]}
when:
  - {if: {method.lambda1: 1.0}, set: {training.epochs: 3}}
  - {if: {adapter.target_modules: [q, v]}, set: {seed: 5}}
  - {if: {method.lambda1: 2}, set: {method.lambda1: 1, training.epochs: 3}}
""",
    )
    assert [(cell.settings["training.epochs"], cell.settings["seed"]) for cell in found] == [(3, 5)], (
        "two come out alike"
    )


def test_its_own_output_and_reuse(tmp_path: Path) -> None:
    (cell,) = swept(tmp_path, "name: other\nbase: {order: order1, output: {dir: here, reuse: false}}\n")
    assert (cell.settings["output.dir"], cell.settings["output.reuse"]) == ("here", False)
    (cell,) = cells(Sweep(tmp_path / "trial.yaml"), "there")
    assert cell.settings["output.dir"] == "there"


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("grids: {}", "1:1", "grids: is not a key of a sweep; did you mean 'grid'?"),
        ("grid: [1]", "1:7", "grid: must be a mapping"),
        ("grid: {order: order1}", "1:15", "grid.order: must be a list"),
        ("grid: {order: []}", "1:15", "grid.order: must not be empty"),
        ("grid: {traning.lr: [1]}", "1:8", "'traning.lr' is not a setting; did you mean 'training'?"),
        ("grid: {training.lrr: [1]}", "1:8", "training.lrr is not a setting; did you mean 'lr'?"),
        ("base: {training: 3}", "1:8", "training must be settings, such as training.KEY"),
        ("base: {training: {lr: 1}, training.lr: 2}", "1:27", "training.lr is set twice"),
        ("grid: {seed: [1]}", "1:8", "seed: say seeds: [1, 2, 3]"),
        ("seeds: 3", "1:8", "must be a list, such as [3] for one seed"),
        ("seeds: [a]", "1:9", "must be a whole number"),
        ("list: []", "1:7", "must not be empty"),
        ("grid: {adapter.r: [1], 'adapter.r,adapter.alpha': [[1, 2]]}", "1:7", "adapter.r stands in it twice"),
        ("grid: {'adapter.r,adapter.alpha': [[1, 2], [3]]}", "1:44", "must be a list of 2 values"),
        ("list: [{adapter.r: 1}]\ngrid: {adapter.r: [1]}", "1:8", "adapter.r is set by grid too"),
        ("when: [{if: {method: olora}, skip: true}]", "1:13", "no run sets method.name"),
        ("base: {method: olora}\nwhen: [{if: {method: olora}}]", "2:8", "wants set or drop"),
        (
            "base: {method: olora}\nwhen: [{if: {method: olora}, skip: true, set: {seed: 1}}]",
            "2:8",
            "wants set or drop",
        ),
        ("base: {method: olora}\nwhen: [{if: {}, skip: true}]", "2:13", "must not be empty"),
        ("base: {method: olora}\nwhen: [{if: {method: olora}, drop: [adapter.r]}]", "2:36", "no run sets adapter.r"),
        ("base: {method: olora}\nwhen: [{if: {method: olora}, skip: true}]", "", "when skips every run"),
        ("base: {method: olora}\nwhen: [{if: {method: n-lora}, skip: true}]", "2:13", "no run has method.name: n-lora"),
        ("base: {order: {name: x}}", "1:15", "order must be a name or a YAML file"),
        ("retries: -1", "1:10", "must be at least 0"),
        ("name: a/b", "1:7", "must be letters, digits"),
        ("base: [", "", "trial.yaml"),
        ("- 1", "1:1", "the top level must be a mapping"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, text: str, place: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        swept(tmp_path, text)
    said = str(error.value)
    assert words in said and "\n" not in said
    if place:
        assert f"trial.yaml:{place}: " in said, said
