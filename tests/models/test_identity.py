"""Fingerprints of a base model: what changes them, and what two versions that know of different ones make of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError
from cl_runner.models import identity
from cl_runner.models.identity import differing_model, model_identity
from cl_runner.models.locate import locate
from cl_runner.runs.resume_guard import recorded, refuse_other_settings
from tests.command_line import ORDER, SMALL, call
from tests.nano import nano_t5
from tests.run_folders import RunFolder


def of(folder: Path) -> dict[str, str]:
    return model_identity(locate(ModelConfig(name=str(folder))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(nano_t5(), tmp_path / "base"))


def edit(file: Path, at: int) -> None:
    """Another byte, and no other size."""
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


CHANGES: list[tuple[Callable[[Path], object], list[str]]] = [
    (lambda base: edit(base / "tokenizer.json", -3), ["files", "tokenizer"]),
    (lambda base: edit(base / "config.json", -4), ["files"]),
    (lambda base: edit(base / "model.safetensors", -1), ["weights"]),
    (lambda base: edit(base / "model.safetensors", (base / "model.safetensors").stat().st_size // 2), ["weights"]),
    (lambda base: (base / "chat_template.jinja").write_text("{{ x }}"), ["files", "tokenizer"]),
    (lambda base: (base / "README.md").write_text("more"), []),
]


@pytest.mark.parametrize(("change", "keys"), CHANGES)
def test_what_changes_which(
    folder: Path, change: Callable[[Path], object], keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "HASHED", (folder / "model.safetensors").stat().st_size)
    before = of(folder)
    change(folder)
    assert [line.partition(":")[0] for line in differing_model(before, of(folder))] == keys


def test_weights_of_one_size_are_told_apart_by_samples_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any run of bytes as long as two samples are apart holds a part of one."""
    monkeypatch.setattr(identity, "_SAMPLES", 8)
    monkeypatch.setattr(identity, "_SAMPLE", 16)
    file = tmp_path / "w"
    file.write_bytes(bytes(1000))
    before = identity._sampled(file)
    apart = (1000 - 16) // 7 + 1
    for at in range(0, 1000 - apart, 7):
        raw = bytearray(1000)
        raw[at : at + apart] = b"\1" * apart
        file.write_bytes(raw)
        assert identity._sampled(file) != before, at
    file.write_bytes(b"short")
    assert len(identity._sampled(file)) == 64


def test_what_an_earlier_version_did_not_know_does_not_count() -> None:
    now = {"from": "folder", "files": "a", "weights": "b", "tokenizer": "c"}
    assert not differing_model({"from": "folder", "files": "a"}, now)
    assert differing_model({"from": "folder", "files": "x"}, now) == ["files: x → a"]
    assert differing_model(now, {**now, "quantize": "nf4"}) == ["quantize: None → nf4"]
    assert differing_model({**now, "quantize": "nf4"}, now) == ["quantize: nf4 → None"]
    assert differing_model({"from": "hub", "revision": None}, now) == ["from: hub → folder"]
    hub = {"from": "hub", "revision": None, "commit": "1"}
    assert not differing_model(hub, {"from": "hub", "revision": "1", "commit": "1"}), "the same, by another word"
    assert differing_model(hub, {**hub, "commit": "2"}) == ["commit: 1 → 2"]
    assert differing_model({"from": "hub", "revision": None}, {**hub, "revision": "v2"}) == ["revision: None → v2"]


def test_of_the_hub_the_commit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.file_download.constants, "HF_HUB_CACHE", str(tmp_path))
    hub = locate(ModelConfig(name="org/base"))
    assert model_identity(hub) == {"from": "hub", "revision": None}
    commit = "5" * 40
    snapshot = tmp_path / "models--org--base" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--org--base" / "refs").mkdir()
    (tmp_path / "models--org--base" / "refs" / "main").write_text(commit)
    assert model_identity(hub) == {"from": "hub", "revision": None, "commit": commit}


def test_a_run_does_not_go_on_with_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    """The weights are the same, and so are all settings."""
    (tmp_path / "three.yaml").write_text(ORDER)
    train = ("train", "--order", "three.yaml", "--model", "base", "--preset", "tiny", "--data", "synthetic", *SMALL)
    train += ("--name", "run", "--method", "seqlora", "--set=data.max_train=4")
    assert call(*train, cwd=tmp_path).code == 0
    about = json.loads((tmp_path / "runs/run/run.json").read_text())["identity"]["model"]
    assert set(about) == {"from", "files", "tokenizer"}
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text() + "\n")
    for command in (train, ("eval", "run")):
        ended = call(*command, cwd=tmp_path)
        assert (
            ended.code == 2
            and "the base model" in ended.line
            and f"tokenizer: {about['tokenizer'][:12]}… → " in ended.line
        )


def test_another_commit_is_refused_with_what_takes_the_old_one(tmp_path: Path) -> None:
    """And that setting is no other setting: it is the same base."""
    then = {"from": "hub", "revision": None, "commit": "1" * 40}
    made = RunFolder(tmp_path, "run", sets=["model.name=org/base"])
    about = made.dir.about()
    identity = {**about["identity"], "model": then}
    (made.path / "run.json").write_text(json.dumps({**about, "identity": identity}))
    config = recorded(made.dir)
    with pytest.raises(UserError) as caught:
        refuse_other_settings(made.dir, config, {**identity, "model": {**then, "commit": "2" * 40}})
    said = str(caught.value)
    assert (
        f"the base model org/base is not what the run {made.path} began with (commit: {'1' * 40} → {'2' * 40})" in said
    )
    assert f"; --set model.revision={'1' * 40} takes that one" in said
    pinned = config.model_copy(update={"model": config.model.model_copy(update={"revision": "1" * 40})})
    with pytest.raises(UserError, match="has a broken file"):  # it gets as far as what this folder has not
        refuse_other_settings(made.dir, pinned, {**identity, "model": {**then, "revision": "1" * 40}})
