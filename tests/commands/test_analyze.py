"""``cl-runner analyze``: what it prints of a run and of adapters, what it leaves, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.command_line import NANO, ORDER, SMALL, STAGES, call, results, tree, variables
from tests.conftest import Finished

LAYER = "block.0.q"


def adapter(
    folder: Path, seed: int, layers: tuple[str, ...] = (LAYER, "block.0.v"), n: int = 20, **config: Any
) -> Path:
    """A random PEFT LoRA folder: layers of 12 by ``n``, r 3, s 2."""
    dice = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tensors = {}
    for layer in layers:
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(3, n, generator=dice)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(12, 3, generator=dice)
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": "some/base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def delta(folder: Path, layer: str = LAYER) -> Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{layer}.lora_{factor}.weight"].double() for factor in "AB")
    return 2 * B @ A


@pytest.fixture
def run(finished: Finished, tmp_path: Path) -> Path:
    """A finished run of O-LoRA in a folder of its own."""
    shutil.copytree(finished.cwd, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs" / finished.name


def own(run: Path) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Layer → A and s·B (s is 1) of each stage: the last rows of its folder, or beside it where that is one matrix."""
    found = []
    for index, name in enumerate(STAGES, 1):
        folder = run / "stages" / f"{index:02d}-{name}"
        tensors = load_file(folder / "adapter/adapter_model.safetensors")
        prefix, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
        if index == 3:
            tensors, prefix, A, B = load_file(folder / "state.safetensors"), "own.", ".A", ".B"
        layers = [key.removeprefix(prefix).removesuffix(A) for key in tensors if key.endswith(A)]
        of = {layer: (tensors[prefix + layer + A].double(), tensors[prefix + layer + B].double()) for layer in layers}
        found.append({layer: (rows[-32:], columns[:, -32:]) for layer, (rows, columns) in of.items()})
    return found


def test_a_run(run: Path) -> None:
    before = results(run)
    found = call("analyze", run.name, "--json", cwd=run.parent.parent).json
    assert found == json.loads((run / "analysis.json").read_text())
    assert found["run"] == f"runs/{run.name}" and found["updates"] == STAGES
    assert found["skipped"] == found["notes"] == []
    stages = own(run)
    together, each = found["together"], found["by_layer"]
    assert together["layers"] == len(stages[0]) == len(each)
    for t, stage in enumerate(stages):
        updates = {layer: B @ A for layer, (A, B) in stage.items()}
        overlap = {
            layer: sum(float((earlier[layer][0] @ A.T).square().sum()) for earlier in stages[:t])
            for layer, (A, _) in stage.items()
        }
        of = together["by_update"][t]
        assert of["name"] == STAGES[t]
        assert of["update_norm"] == pytest.approx(math.sqrt(sum(float(D.square().sum()) for D in updates.values())))
        nuclear = {layer: float(torch.linalg.matrix_norm(D, "nuc")) for layer, D in updates.items()}
        assert of["nuclear_norm"] == pytest.approx(sum(nuclear.values()), rel=1e-5)
        assert of["orthogonal_overlap"] == pytest.approx(sum(overlap.values()), rel=1e-5)
        for layer, D in updates.items():
            one = each[layer]["by_update"][t]
            assert each[layer]["shape"] == list(D.shape)
            assert one["nuclear_norm"] == pytest.approx(nuclear[layer], rel=1e-5)
            assert one["orthogonal_overlap"] == pytest.approx(overlap[layer], rel=1e-5)
            singular = torch.linalg.svdvals(D)[: len(one["singular_values"])].tolist()
            assert one["singular_values"] == pytest.approx(singular, rel=1e-4, abs=1e-7)
        hoyer = [layer["by_update"][t]["hoyer"] for layer in each.values()]
        assert of["hoyer"] == pytest.approx(sum(hoyer) / len(hoyer))
    cosine = together["between"]["cosine"]
    inner = sum(
        float(((B @ A) * (stages[0][layer][1] @ stages[0][layer][0])).sum()) for layer, (A, B) in stages[2].items()
    )
    norms = [of["update_norm"] for of in together["by_update"]]
    assert cosine[2][0] == cosine[0][2] == pytest.approx(inner / (norms[0] * norms[2]), rel=1e-4, abs=1e-7)
    assert results(run) == before
    again = call("train", "--order", "three.yaml", *SMALL, cwd=run.parent.parent)
    assert again.code == 0 and "analysis.json" in {path.name for path in run.iterdir()}


def test_on_a_terminal(run: Path) -> None:
    """Every line fits 80 columns, and says what ``--json`` does."""
    with variables(COLUMNS="80"):
        text = call("analyze", cwd=run.parent.parent)
    assert text.err.splitlines() == [f"the newest run: runs/{run.name}"]
    lines = text.out.splitlines()
    assert max(map(len, lines)) <= 80
    found = json.loads((run / "analysis.json").read_text())["together"]
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in lines if re.match(r"\d \w", line)}
    at = next(i for i, line in enumerate(lines) if line.startswith("update"))
    for t, (name, of) in enumerate(zip(STAGES, found["by_update"], strict=True)):
        shown = [float(cell) for cell in lines[at + 1 + t].split()[2:]]
        wanted = [of["update_norm"], of["nuclear_norm"], of["effective_rank"], 100 * of["density"][1], of["hoyer"],
                  100 * of["free_share"], of["orthogonal_overlap"]]  # fmt: skip
        assert shown == pytest.approx(wanted, rel=6e-3), name
    last = [float(cell) if cell != "·" else None for cell in rows["3", STAGES[2]]]
    angles = found["between"]["input_angle_mean"][2][:2]
    assert last == [pytest.approx(angles[0], abs=0.06), pytest.approx(angles[1], abs=0.06), None]
    assert f"AWOM of {STAGES[2]} with all before it" in text.out


def test_some_layers_as_csv(run: Path) -> None:
    result = call("analyze", run.name, "--csv", "--layers", r"decoder.*\.q$", cwd=run.parent.parent)
    rows = list(csv.DictReader(io.StringIO(result.out)))
    found = json.loads((run / "analysis.json").read_text())
    assert found["pattern"] == r"decoder.*\.q$"
    layers = list(found["by_layer"])
    assert layers and all(re.search(r"decoder.*\.q$", layer) for layer in layers)
    assert [(row["layer"], row["update"]) for row in rows] == [(layer, name) for layer in layers for name in STAGES]
    for row in rows:
        of = found["by_layer"][row["layer"]]["by_update"][STAGES.index(row["update"])]
        assert float(row["gsr"]) == of["gsr"] and float(row["density_0.001"]) == of["density"][1]
        assert int(row["m"]) == found["by_layer"][row["layer"]]["shape"][0]


def test_what_may_not_be_written_is_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cl_runner.commands.analyze.write_json", refused)
    result = call("analyze", run.name, cwd=run.parent.parent)
    assert result.code == 0 and "update" in result.out
    assert result.err.splitlines() == [f"runs/{run.name}/analysis.json is not written: Permission denied"]


def test_an_unfinished_run_and_one_that_trains_on(tmp_path: Path) -> None:
    (tmp_path / "three.yaml").write_text(ORDER)
    assert call("train", "--order", "three.yaml", "--method", "seqlora", "--name", "it", *NANO, cwd=tmp_path).code == 0
    shutil.rmtree(tmp_path / "runs/it/stages/03-agnews")
    found = call("analyze", "it", "--json", cwd=tmp_path).json
    assert found["updates"] == ["dbpedia", "amazon"]
    assert found["skipped"] == ["1 of 3 stages, not trained yet"]
    [note] = found["notes"]
    assert note.startswith("amazon: trained on; ΔW is what changed")
    shutil.rmtree(tmp_path / "runs/it/stages/01-dbpedia")
    assert call("analyze", "it", cwd=tmp_path).line.endswith("has no finished stage yet")


# Adapters from anywhere.


def test_adapters_in_the_order_given(tmp_path: Path) -> None:
    names = ("b", "a", "c")
    for seed, name in enumerate(names):
        adapter(tmp_path / name, seed)
    before = tree(tmp_path)
    found = call("analyze", *names, "--json", cwd=tmp_path).json
    assert tree(tmp_path) == before, "nothing is written"
    assert found["adapters"] == found["updates"] == list(names)
    norms = [of["update_norm"] for of in found["by_layer"][LAYER]["by_update"]]
    assert norms == pytest.approx([float(delta(tmp_path / name).norm()) for name in names], rel=1e-6)
    last = sum(float((delta(tmp_path / "c").T @ delta(tmp_path / name)).square().sum()) for name in "ba")
    assert found["by_layer"][LAYER]["awom"] == pytest.approx(last, rel=1e-6)
    assert found["skipped"] == found["notes"] == []


def test_what_is_no_adapter_is_a_line_and_the_others_go_on(tmp_path: Path) -> None:
    good = adapter(tmp_path / "good", 0)
    other = adapter(tmp_path / "other/good", 1, base_model_name_or_path="another/base")
    adapter(tmp_path / "dora", 2, use_dora=True)
    (tmp_path / "empty").mkdir()
    (adapter(tmp_path / "cut", 3) / "adapter_model.safetensors").write_bytes(b"1234")
    given = ["good", "nothing", "empty", "dora", "cut", "other/good"]
    with variables(COLUMNS="80"):
        result = call("analyze", *given, cwd=tmp_path)
    assert result.code == 0 and result.err == ""
    assert result.out.splitlines()[0] == "2 adapters, 2 layers"
    assert max(map(len, result.out.splitlines())) <= 80
    found = call("analyze", *given, "--json", cwd=tmp_path).json
    assert found["updates"] == [f"{tmp_path.name}/good", "other/good"], "as many parts as tell them apart"
    assert [line.split(":")[0] for line in found["skipped"]] == [
        "nothing", "empty", "dora", "cut/adapter_model.safetensors",
    ]  # fmt: skip
    [note] = found["notes"]
    assert "different bases" in note and "some/base (" in note and "another/base (other/good)" in note
    assert good.exists() and other.exists()


def test_layers_in_common_are_compared(tmp_path: Path) -> None:
    adapter(tmp_path / "a", 0)
    adapter(tmp_path / "b", 1, layers=(LAYER, "block.0.v", "block.0.k"))
    adapter(tmp_path / "c", 2, layers=(LAYER, "block.0.k"))
    found = call("analyze", "a", "b", "c", "--json", cwd=tmp_path).json
    assert list(found["by_layer"]) == [LAYER]
    assert found["skipped"] == [
        "a: 1 layer (block.0.v) that not all have in this shape",
        "b: 2 layers (block.0.k, block.0.v) that not all have in this shape",
        "c: 1 layer (block.0.k) that not all have in this shape",
    ]
    many = tuple(f"block.{block}.q" for block in (10, 2, 1))
    adapter(tmp_path / "many", 4, layers=many)
    assert list(call("analyze", "many", "--json", cwd=tmp_path).json["by_layer"]) == [*reversed(many)]
    adapter(tmp_path / "wide", 3, n=24)
    line = call("analyze", "a", "wide", cwd=tmp_path).line
    assert line.startswith("cl-runner: no layer is in all of them: a: 2 layers (block.0.q, block.0.v)")


def test_the_same_folder_twice(tmp_path: Path) -> None:
    adapter(tmp_path / "a", 0)
    found = call("analyze", "a", "a", "--json", cwd=tmp_path).json
    assert found["updates"] == ["a #1", "a #2"]
    between = found["together"]["between"]
    assert between["cosine"][0][1] == pytest.approx(1) and between["input_angle_mean"][0][1] < 1e-4


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("nope",), r"there is no run 'nope' in runs$"),
        (("empty",), r"nothing to analyse: empty: is no PEFT adapter, it holds no adapter_config.json$"),
        (("a", "runs/RUN"), r"runs/.* is a run; analyze takes one run, or folders of adapters$"),
        (("RUN", "a"), r" three-\S+ is a run; analyze takes one run, or folders of adapters$"),
        (("a", "--layers", "("), r"--layers '\(': is no regular expression \("),
        (("a", "--layers", "x"), r"--layers 'x': is found in none of the 2 layers \(block.0.q, block.0.v\)$"),
    ],
)
def test_bad_input(run: Path, arguments: tuple[str, ...], why: str) -> None:
    cwd = run.parent.parent
    adapter(cwd / "a", 0)
    (cwd / "empty").mkdir()
    before = tree(cwd)
    result = call("analyze", *(word.replace("RUN", run.name) for word in arguments), cwd=cwd)
    assert result.code == 2 and re.search(why, result.line), result.line
    assert tree(cwd) == before
