"""Folders of the code of O-LoRA and N-LoRA: what they add, their tasks apart, and what is broken or hostile in them."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cl_runner.adapters.lora_folder import LoraFolder
from cl_runner.adapters.task_pairs import apart
from cl_runner.errors import UserError
from tests.adapters import forks
from tests.command_line import call

SHAPES = {"encoder.block.0.layer.0.SelfAttention.q": (6, 5), "encoder.block.0.layer.0.SelfAttention.v": (4, 5)}
ALPHA = 6.0


@pytest.mark.parametrize("newest_apart", [False, True], ids=["saved at a task's end", "save_loranew"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_what_it_adds_and_its_tasks(tmp_path: Path, tasks: int, newest_apart: bool) -> None:
    pairs = forks.random_pairs(SHAPES, tasks, 2)
    folder = LoraFolder(forks.write(tmp_path / "it", pairs, alpha=ALPHA, apart=newest_apart))
    assert folder.tasks == (2,) * tasks and folder.shapes == SHAPES and folder.notes == []
    found = apart(folder, [])
    assert [each.name for each in found] == [f"it:{number}" for number in range(1, tasks + 1)]
    assert [each.from_base for each in found] == [True] + [False] * (tasks - 1)
    for layer in SHAPES:
        whole = folder.of(layer)
        assert whole.rank == 2 * tasks
        torch.testing.assert_close(whole.whole().double(), forks.update(pairs, layer, ALPHA), rtol=1e-5, atol=1e-7)
        for number, each in enumerate(found):
            own, total = (
                forks.update(pairs[number : number + 1], layer, ALPHA),
                forks.update(pairs[: number + 1], layer, ALPHA),
            )
            torch.testing.assert_close(each.of(layer).whole().double(), own, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(each.total(layer).whole().double(), total, rtol=1e-5, atol=1e-7)


def test_as_safetensors_and_of_the_tensors_alone(tmp_path: Path) -> None:
    """Converted, and with a config that another tool has written: the names of the tensors say what it is."""
    pairs = forks.random_pairs(SHAPES, 2, 2)
    folder = forks.write(tmp_path / "it", pairs, alpha=ALPHA, apart=True)
    tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_model.bin").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["r_sum"], config["save_loranew"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = LoraFolder(folder)
    assert found.tasks == (2, 2)
    for layer in SHAPES:
        torch.testing.assert_close(
            found.of(layer).whole().double(), forks.update(pairs, layer, ALPHA), rtol=1e-5, atol=1e-7
        )


def test_rows_that_are_no_whole_number_of_tasks_are_one(tmp_path: Path) -> None:
    """The scale is alpha over the config's r all the same: their layers know no other."""
    pairs = forks.random_pairs(SHAPES, 1, 3)
    found = LoraFolder(forks.write(tmp_path / "it", pairs, alpha=ALPHA, r=2))
    assert found.tasks == (3,) and len(apart(found, [])) == 1
    for layer in SHAPES:
        wanted = forks.update(pairs, layer, ALPHA) * 3 / 2
        torch.testing.assert_close(found.of(layer).whole().double(), wanted, rtol=1e-5, atol=1e-7)


def test_analyze_tells_each_task_once(tmp_path: Path) -> None:
    pairs = forks.random_pairs(SHAPES, 3, 2)
    forks.write(tmp_path / "1-dbpedia" / "adapter", pairs[:1], alpha=ALPHA)
    forks.write(tmp_path / "3-agnews" / "adapter", pairs, alpha=ALPHA)
    found = call("analyze", "1-dbpedia/adapter", "3-agnews/adapter", "--json", cwd=tmp_path).json
    assert found["updates"] == ["1-dbpedia/adapter:1", "3-agnews/adapter:2", "3-agnews/adapter:3"]
    norms = [
        sum(forks.update([of_task], layer, ALPHA).square().sum().item() for layer in SHAPES) ** 0.5 for of_task in pairs
    ]
    assert [each["update_norm"] for each in found["together"]["by_update"]] == pytest.approx(norms, rel=1e-5)
    assert any("the pairs of 3 tasks, oldest first; 1 of them stand above" in note for note in found["notes"])
    alone = call("analyze", "3-agnews/adapter", cwd=tmp_path)
    assert alone.code == 0 and "3 updates" in alone.out and "adapter:3" in alone.out


def _config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


class Evil:
    """What a pickle may do as it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def _evil(folder: Path, tensors: dict[str, Any]) -> None:
    torch.save({**tensors, "x": Evil(folder / "ran")}, folder / "adapter_model.bin")


def _raw(folder: Path, tensors: dict[str, Any]) -> None:
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil(folder / "ran")))


def _cut(folder: Path, tensors: dict[str, Any]) -> None:
    file = folder / "adapter_model.bin"
    file.write_bytes(file.read_bytes()[:-200])


def _pointer(folder: Path, tensors: dict[str, Any]) -> None:
    (folder / "adapter_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def _list(folder: Path, tensors: dict[str, Any]) -> None:
    torch.save(list(tensors.values()), folder / "adapter_model.bin")


def _wide(folder: Path, tensors: dict[str, Any]) -> None:
    first = next(iter(tensors))
    torch.save({**tensors, first: torch.zeros(1).expand(2**20, 2**20)}, folder / "adapter_model.bin")


def _bomb(folder: Path, tensors: dict[str, Any]) -> None:
    with zipfile.ZipFile(folder / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * 2**24)


def _one_alone(folder: Path, tensors: dict[str, Any]) -> None:
    torch.save({k: t for k, t in tensors.items() if "loranew_B" not in k}, folder / "adapter_model.bin")


def _other_sizes(folder: Path, tensors: dict[str, Any]) -> None:
    name = next(k for k in tensors if "loranew_A" in k)
    torch.save({**tensors, name: tensors[name][:, :-1].clone()}, folder / "adapter_model.bin")


def _other_rows(folder: Path, tensors: dict[str, Any]) -> None:
    name = next(k for k in tensors if ".lora_A" in k)
    torch.save({**tensors, name: tensors[name][:1].clone()}, folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_evil, "holds more than tensors, and is not read"),
        (_raw, "is broken"),
        (_cut, "is broken"),
        (_pointer, "is a git-lfs pointer"),
        (_list, "holds something else than tensors by name"),
        (_wide, "holds tensors that are larger than its bytes"),
        (_bomb, "holds more than its size"),
        (_one_alone, "broken"),
        (_other_sizes, r"broken: .*loranew|broken: .* and what is new beside it"),
        (_other_rows, "its layers hold pairs of"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, spoil: Any, why: str) -> None:
    folder = forks.write(tmp_path / "it", forks.random_pairs(SHAPES, 2, 2), alpha=ALPHA, apart=True)
    spoil(folder, torch.load(folder / "adapter_model.bin", weights_only=True))
    with pytest.raises(UserError, match=why) as caught:
        LoraFolder(folder)
    assert "\n" not in str(caught.value) and not (folder / "ran").exists()


def test_before_the_first_task_has_ended(tmp_path: Path) -> None:
    pairs = forks.random_pairs(SHAPES, 1, 2)
    folder = forks.write(tmp_path / "it", pairs, alpha=ALPHA, apart=True)
    tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
    torch.save({name: t for name, t in tensors.items() if "loranew" not in name}, folder / "adapter_model.bin")
    with pytest.raises(UserError, match="holds no pair yet"):
        LoraFolder(folder)


def test_a_pickle_of_anybody_else_is_still_not_read(tmp_path: Path) -> None:
    folder = forks.write(tmp_path / "it", forks.random_pairs(SHAPES, 1, 2), alpha=ALPHA)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["r_sum"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is a pickle, which may run code as it is read"):
        LoraFolder(folder)
