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

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import cl_runner
from tests.command_line import NANO, ORDER, SMALL, STAGES, call, results, tree, variables
from tests.conftest import Finished
from tests.metrics.updates.naive import naive_intruders, naive_moved
from tests.nano import nano_t5

LAYER = "block.0.q"


def adapter(
    folder: Path, seed: int, layers: tuple[str, ...] = (LAYER, "block.0.v"), n: int = 20, m: int = 12, **config: Any
) -> Path:
    """A random PEFT LoRA folder: layers of ``m`` by ``n``, r 3, s 2."""
    dice = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tensors = {}
    for layer in layers:
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(3, n, generator=dice)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(m, 3, generator=dice)
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
    until = next(i for i, line in enumerate(lines) if line.startswith("the tuned weights against the base"))
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in lines[:until] if re.match(r"\d \w", line)}
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


def weights() -> dict[str, Tensor]:
    """W0 of the run's base."""
    folder = Path(cl_runner.__file__).parent / "models/embedded/tiny-t5"
    return {name.removesuffix(".weight"): t.double() for name, t in load_file(folder / "model.safetensors").items()}


def learned(run: Path) -> list[dict[str, Tensor]]:
    """Layer → what the model has over the base after each stage."""
    found: list[dict[str, Tensor]] = []
    for stage in own(run):
        before = found[-1] if found else dict.fromkeys(stage, torch.zeros(()))
        found.append({layer: before[layer] + B @ A for layer, (A, B) in stage.items()})
    return found


def test_against_the_base(run: Path) -> None:
    found = call("analyze", run.name, "--intruders", "--epsilon=0.9", "--top-k=6", "--json", cwd=run.parent.parent).json
    W0, after, stages = weights(), learned(run), own(run)
    against, intruding = found["against_base"], found["intruders"]
    layers = list(found["by_layer"])
    assert against["base"] == intruding["base"] == "tiny-t5" and against["layers"] == len(layers)
    assert (intruding["top_k"], intruding["epsilon"]) == (6, 0.9) and intruding["checked"] == 6 * len(layers)
    counted = 0
    for t, name in enumerate(STAGES):
        moves, counts = [], {"left": 0, "right": 0, "left_alone": 0, "right_alone": 0}
        for layer in layers:
            W = W0[layer].numpy()
            D, alone = after[t][layer].numpy(), (stages[t][layer][1] @ stages[t][layer][0]).numpy()
            moves.append(naive_moved(W, W + D))
            of = against["by_layer"][layer]
            assert (of["delta_magnitude"][t], of["delta_direction"][t]) == pytest.approx(moves[-1], rel=1e-4)
            sides = (*naive_intruders(W, W + D, 6, 0.9), *naive_intruders(W, W + alone, 6, 0.9))
            for side, count in zip(counts, sides, strict=True):
                assert intruding["by_layer"][layer][side][t] == count
                counts[side] += count
        of = against["by_update"][t]
        assert (of["delta_magnitude"], of["delta_direction"]) == pytest.approx(np.mean(moves, axis=0), rel=1e-4)
        assert of["correlation"] == pytest.approx(np.corrcoef(np.array(moves).T)[0, 1], rel=1e-3)
        assert intruding["by_update"][t] == {"name": name, **counts}
        counted += counts["left"]
    assert counted, "some intrude"


def test_what_took_long_is_kept_while_the_stages_are_the_same(run: Path) -> None:
    cwd, file = run.parent.parent, run / "analysis.json"
    layers = r"--layers=decoder.*\.q$"
    asked = call("analyze", run.name, "--intruders", layers, "--json", cwd=cwd).json
    assert asked["intruders"]["pattern"] == layers.partition("=")[2]
    plain = call("analyze", run.name, "--json", cwd=cwd).json
    assert "intruders" not in plain
    assert json.loads(file.read_text()) == plain | {"intruders": asked["intruders"]}
    done = run / "stages/03-agnews/DONE"
    done.write_text(done.read_text() + "\n")
    call("analyze", run.name, cwd=cwd)
    assert "intruders" not in json.loads(file.read_text())
    file.write_text("{")
    assert call("analyze", run.name, cwd=cwd).code == 0 and json.loads(file.read_text())["updates"] == STAGES


def test_of_some_layers_nothing_is_kept_in_the_place_of_all(run: Path) -> None:
    cwd, file = run.parent.parent, run / "analysis.json"
    whole = call("analyze", run.name, "--json", cwd=cwd).json
    asked = call("analyze", run.name, "--intruders", r"--layers=decoder.*\.q$", "--json", cwd=cwd)
    assert asked.json["pattern"] and "analysis.json keeps what it says of all layers" in asked.err
    assert json.loads(file.read_text()) == whole | {"intruders": asked.json["intruders"]}


def test_what_is_of_intruders_alone_is_not_ignored(run: Path) -> None:
    done = call("analyze", run.name, "--top-k", "3", cwd=run.parent.parent)
    assert done.code == 2 and done.line.endswith(
        "--top-k and --epsilon are of intruder dimensions; say --intruders too"
    )


def test_counts_on_a_terminal_and_as_csv(run: Path) -> None:
    cwd = run.parent.parent
    given = ("analyze", run.name, "--intruders", "--epsilon=0.9", r"--layers=decoder.*\.q$")
    with variables(COLUMNS="80"):
        lines = call(*given, cwd=cwd).out.splitlines()
    assert max(map(len, lines)) <= 80
    found = json.loads((run / "analysis.json").read_text())
    at = next(i for i, line in enumerate(lines) if "alone: left" in line)
    for t, of in enumerate(found["intruders"]["by_update"]):
        assert lines[at + 1 + t].split() == [str(t + 1), *map(str, of.values())]
    rows = list(csv.DictReader(io.StringIO(call(*given, "--csv", cwd=cwd).out)))
    for row in rows:
        t = STAGES.index(row["update"])
        assert float(row["intruders_left"]) == found["intruders"]["by_layer"][row["layer"]]["left"][t]
        wanted = found["against_base"]["by_layer"][row["layer"]]["delta_direction"][t]
        assert float(row["delta_direction"]) == pytest.approx(wanted)


def test_a_base_that_is_gone_or_another(run: Path, tmp_path: Path) -> None:
    """All else is told, but for what was asked of the base."""
    cwd, config = run.parent.parent, run / "run.yaml"
    config.write_text(config.read_text().replace("tiny-t5", "some/where"))
    found = call("analyze", run.name, "--json", cwd=cwd).json
    assert "against_base" not in found and found["updates"] == STAGES
    [line] = found["skipped"]
    assert line.startswith("what needs the base (ΔM, ΔD): ") and "some/where" in line
    assert call("analyze", run.name, "--intruders", cwd=cwd).code == 2
    assert "against_base" in call("analyze", run.name, "--model", "tiny-t5", "--json", cwd=cwd).json
    line = call("analyze", run.name, "--model", nano_t5(), cwd=cwd).line
    assert f"the base model {nano_t5()} is not the one of the run (from: embedded → folder, files: " in line


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


def on_nano(folder: Path, seed: int, **config: Any) -> Path:
    """A random PEFT LoRA folder for the nano T5."""
    sizes: dict[str, Any] = {"n": 192, "m": 192, "layers": (f"{ENCODER}.q", f"{ENCODER}.v"), **config}
    return adapter(folder, seed, task_type="SEQ_2_SEQ_LM", target_modules=r"encoder.*\.(q|v)", **sizes)


ENCODER = "encoder.block.0.layer.0.SelfAttention"


def test_adapters_beside_their_base(tmp_path: Path) -> None:
    """Also DoRA's, which changes the lengths of rows beside what its pair does."""
    plain, dora = on_nano(tmp_path / "plain", 0), on_nano(tmp_path / "dora", 1, use_dora=True)
    file = dora / "adapter_model.safetensors"
    W0 = {
        name.removesuffix(".weight"): t.double() for name, t in load_file(Path(nano_t5()) / "model.safetensors").items()
    }
    tensors = load_file(file)
    for name in ("q", "v"):
        tensors[f"base_model.model.{ENCODER}.{name}.lora_magnitude_vector"] = 2 + torch.arange(192.0) / 100
    save_file(tensors, file)
    on_nano(tmp_path / "norms", 2, peft_type="LN_TUNING")
    given = ("analyze", "plain", "dora", "norms", "--model", nano_t5(), "--json")
    found = call(*given, "--intruders", cwd=tmp_path).json
    [line] = found["skipped"]
    assert found["updates"] == ["plain", "dora"]
    assert line == "norms: broken: tensors of its layers are not in its file"
    for layer, of in found["by_layer"].items():
        direction = W0[layer] + delta(dora, layer)
        D = tensors[f"base_model.model.{layer}.lora_magnitude_vector"].double()[:, None] * direction
        D = D / direction.norm(dim=1, keepdim=True) - W0[layer]
        for t, change in enumerate((delta(plain, layer), D)):
            assert of["by_update"][t]["update_norm"] == pytest.approx(float(change.norm()), rel=1e-5)
            W, changed = W0[layer].numpy(), (W0[layer] + change).numpy()
            moves = found["against_base"]["by_layer"][layer]
            assert (moves["delta_magnitude"][t], moves["delta_direction"][t]) == pytest.approx(
                naive_moved(W, changed), rel=1e-5
            )
            counts = found["intruders"]["by_layer"][layer]
            assert (counts["left"][t], counts["right"][t]) == naive_intruders(W, changed, 10, 0.5)
            assert counts["left_alone"] == counts["left"] and counts["right_alone"] == counts["right"]
        assert found["intruders"]["by_layer"][layer]["left"] != [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dora", "norms", "plain"], "nothing is written"
    told = call("analyze", "plain", "dora", "--json", cwd=tmp_path).json
    assert told["skipped"] == ["dora: DoRA: ΔW = m ∘ (W + s·B A) / ‖W + s·B A‖ − W needs the base; say it with --model"]
    assert "against_base" not in told


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
        (("a", "--intruders"), r"--intruders: needs the base of the adapters; say which with --model$"),
        (("a", "--model", "nope/nope"), r"the base nope/nope is not on this machine$"),
        (("a", "--model", "tiny-t5"), r"the base tiny-t5 has no linear layer block.0.q$"),
        (("RUN", "--top-k", "0"), r"--top-k"),
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
