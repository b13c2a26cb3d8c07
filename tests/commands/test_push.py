"""``cl-runner push`` against a server that speaks as the hub does: what arrives, what is refused, what nobody sees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests import started
from tests.command_line import NANO, Result, call, finish, start, tree, variables
from tests.upload_server import UploadServer

TOKEN = "hf_" + "a1B2c3D4e5" * 4


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and a folder exported of it."""
    folder = tmp_path_factory.mktemp("push")
    (folder / "two.yaml").write_text(started.TWO)
    train = call("train", "--order", "two.yaml", "--method", "olora", *NANO, "--name", "it", cwd=folder)
    assert train.code == 0, train.err
    assert call("export", "it", "--to", "out", "--license", "mit", "--base", "a/b", cwd=folder).code == 0
    return folder


@pytest.fixture(autouse=True)
def as_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library reads its variables once, as it is imported."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def pushed(hub: UploadServer, cwd: Path, *arguments: str, token: str = TOKEN, **more: Any) -> Result:
    """In this process; ``more``: other values of the library's constants."""
    with pytest.MonkeyPatch.context() as patch, variables(**({"HF_TOKEN": token} if token else {})):
        for name, value in {"ENDPOINT": hub.url, **more}.items():
            patch.setattr(constants, name, value)
        result = call("push", *arguments, cwd=cwd)
    assert TOKEN not in result.out + result.err and "Traceback" not in result.err
    return result


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_arrives_byte_for_byte(room: Path, tmp_path: Path) -> None:
    shutil.copytree(room / "out", tmp_path / "out")
    (tmp_path / "out" / ".git").mkdir()
    (tmp_path / "out" / ".git" / "config").write_text("mine")
    with UploadServer(TOKEN) as hub:
        arguments = ("push", "out", "--repo", "somebody/it", "--private", "--json")
        result = finish(start(*arguments, cwd=tmp_path, env=hub.environment(tmp_path)))
        assert result.code == 0, result.err
        assert hub.files == {"somebody/it": files(room / "out")} and hub.private == {"somebody/it": True}
        assert result.json == {
            "url": f"{hub.url}/somebody/it", "repo": "somebody/it", "files": 3,
            "bytes": sum(map(len, files(room / "out").values())),
        }  # fmt: skip
        # Again, without the name before the slash: the token's own, and the repository that is there.
        (tmp_path / "out" / "README.md").write_text("another card\n")
        again = pushed(hub, tmp_path, "out", "--repo", "it")
        assert again.code == 0, again.err
        assert hub.files["somebody/it"]["README.md"] == b"another card\n"
        assert f"{hub.url}/somebody/it: 3 files" in again.out


def test_a_run_is_exported_on_its_way(room: Path, tmp_path: Path) -> None:
    before = tree(room)
    with UploadServer(TOKEN) as hub:
        more = ("--stage", "1", "--merged", "--license", "mit", "--base", "a/b")
        result = pushed(hub, room, "it", "--repo", "somebody/first", *more)
        assert result.code == 0, result.err
        there = hub.files["somebody/first"]
    assert "a whole model in fp32: stage 1 (dbpedia) of" in result.err
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(there)
    assert b"folder = 'somebody/first'\n" in there["README.md"] and b"license: mit" in there["README.md"]
    assert json.loads(there["config.json"])["model_type"] == "t5"
    assert tree(room) == before


@pytest.mark.parametrize(
    ("arguments", "more", "refusing", "why"),
    [
        ((), {"token": ""}, {}, "push: no token of the hub; `hf auth login`, or set HF_TOKEN"),
        ((), {"token": "hf_" + "z" * 40}, {}, "push: the hub does not know this token (401)"),
        ((), {"HF_HUB_OFFLINE": True}, {}, "push: HF_HUB_OFFLINE is set"),
        (("--repo", "others/it"), {}, {}, "--repo others/it: the hub forbids it (403)"),
        (("--repo", "a/b/c"), {}, {}, "--repo a/b/c: "),
        (("--repo", "-it-"), {}, {}, "--repo -it-: "),
        ((), {}, {"/commit/": (403, "write scope missing")}, "the hub forbids it (403)"),
        ((), {}, {"/commit/": (400, "README.md metadata is broken")}, "refused by the hub (400): README.md metadata"),
        ((), {"ENDPOINT": "http://127.0.0.1:9"}, {}, "push: the hub cannot be reached at http://127.0.0.1:9"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    room: Path, tmp_path: Path, arguments: tuple[str, ...], more: Any, refusing: Any, why: str
) -> None:
    with UploadServer(TOKEN, refusing) as hub:
        given = arguments or ("--repo", "somebody/it")
        result = pushed(hub, room, "out", *given, **more)
        assert not any(hub.files.values())
    assert result.code == 2 and why in result.line, result.err
    assert "hf_z" not in result.err


def test_a_public_repository_does_not_become_private(room: Path, tmp_path: Path) -> None:
    with UploadServer(TOKEN) as hub:
        hub.files["somebody/it"], hub.private["somebody/it"] = {}, False
        result = pushed(hub, room, "out", "--repo", "somebody/it", "--private")
        assert result.code == 2 and "is there already and is public" in result.line
        assert hub.files == {"somebody/it": {}}


def _nothing(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _secret(folder: Path) -> None:
    (folder / "notes.md").write_text(f"my token is {TOKEN}\n")


def _link(folder: Path) -> None:
    (folder / "other").symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_nothing, "it is no adapter and no model"),
        (_secret, "notes.md: holds what looks like a secret, and is not uploaded"),
        (_link, "is a symlink, and none is followed here"),
    ],
)
def test_folders_that_are_not_uploaded(room: Path, tmp_path: Path, spoil: Any, why: str) -> None:
    shutil.copytree(room / "out", tmp_path / "out")
    spoil(tmp_path / "out")
    with UploadServer(TOKEN) as hub:
        result = pushed(hub, tmp_path, "out", "--repo", "somebody/it")
        assert result.code == 2 and why in result.line
        assert hub.requests == []


def test_flags_of_a_run_do_not_go_with_a_folder(room: Path, tmp_path: Path) -> None:
    with UploadServer(TOKEN) as hub:
        result = pushed(hub, room, "out", "--repo", "somebody/it", "--stage", "1")
        assert result.code == 2 and "--stage, --merged and the like go with a run alone" in result.line
        missing = pushed(hub, room, "nope", "--repo", "somebody/it")
        assert missing.code == 2 and "there is no run 'nope'" in missing.line
        assert "--repo: say its name on the hub" in pushed(hub, room, "out").line
        assert hub.requests == []
