"""Hub models against a small local server that speaks the hub's protocol, and with no server at all."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch

from cl_runner.config.schema import ModelConfig
from cl_runner.errors import UserError
from cl_runner.models import hub_files
from cl_runner.models.base import load_base
from cl_runner.models.locate import check, locate

COMMIT = "a" * 40
REFUSALS = {
    "nobody/nothing": (401, "RepoNotFound"),
    "big/gated": (403, "GatedRepo"),
    "org/old@v9": (404, "RevisionNotFound"),
}


class Hub:
    """Repositories as dicts of files; ``asked`` is every path requested."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(False)

            def do_GET(self) -> None:
                self.answer(True)

            def log_message(self, *_: object) -> None: ...

            def answer(self, body: bool) -> None:
                path = self.path.split("?")[0]
                hub.asked.append(path)
                parts = path.strip("/").split("/")
                if parts[:2] == ["api", "models"]:
                    name, rest = "/".join(parts[2:4]), parts[4:]
                    if rest[:1] == ["tree"]:
                        self.tree(name)
                    else:
                        self.listing(name, rest[1] if len(rest) > 1 else None)
                else:
                    name, file = "/".join(parts[:2]), "/".join(parts[4:])
                    content = hub.repositories.get(name, {}).get(file)
                    if content is None:
                        self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                    else:
                        tag = hashlib.sha256(content).hexdigest()
                        head = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
                        self.send(200, content if body else b"", head, len(content))

            def listing(self, name: str, revision: str | None) -> None:
                refusal = REFUSALS.get(f"{name}@{revision}") or REFUSALS.get(name)
                if refusal:
                    self.send(refusal[0], b"{}", {"X-Error-Code": refusal[1], "X-Error-Message": "no"})
                    return
                files = [{"rfilename": file} for file in hub.repositories.get(name, {})]
                info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": files, "tags": [], "private": False}
                self.send(200 if files else 404, json.dumps(info).encode(), {"Content-Type": "application/json"})

            def tree(self, name: str) -> None:
                files = [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in hub.repositories[name].items()
                ]
                self.send(200, json.dumps(files).encode(), {"Content-Type": "application/json"})

            def send(self, status: int, body: bytes, head: dict[str, str], length: int | None = None) -> None:
                self.send_response(status)
                for key, value in head.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of hub files, and no word of the network from the environment."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for module in (huggingface_hub.file_download, huggingface_hub._snapshot_download):
        monkeypatch.setattr(module.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    yield hub
    hub.close()


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's address is a port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_chat_template_of_its_own_file_comes_along(server: Hub, saved: Callable[[str], Path]) -> None:
    server.repositories["org/instruct"] = files = files_of(saved("instruct"))
    assert "chat_template.jinja" in files
    base = load_base(ModelConfig(name="org/instruct"), torch.device("cpu"), chat_template=True)
    assert base.chat is not None and base.chat.text == files["chat_template.jinja"].decode()


def test_a_hub_model_is_checked_by_its_list_and_loaded_from_the_cache(
    server: Hub, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repositories["org/gpt"] = files_of(saved("gpt2")) | {
        "pytorch_model.bin": b"big", "model.fp16.safetensors": b"big", "optimizer.bin": b"big", "code.py": b"1/0",
        "onnx/model.onnx": b"big",
    }  # fmt: skip
    located = locate(ModelConfig(name="org/gpt"))
    assert not check(located).encoder_decoder
    assert not any(path.endswith("model.safetensors") for path in server.asked)
    base = load_base(ModelConfig(name="org/gpt"), torch.device("cpu"))
    assert base.name_or_path == base.model.name_or_path == base.model.config._name_or_path == "org/gpt"
    fetched = {path.rsplit("/", 1)[-1] for path in server.asked}
    assert "model.safetensors" in fetched
    assert not fetched & {"pytorch_model.bin", "model.fp16.safetensors", "optimizer.bin", "code.py", "model.onnx"}
    # Now without the hub: the cache serves, at once.
    unreachable(monkeypatch)
    start = time.monotonic()
    assert not check(located).encoder_decoder
    again = load_base(ModelConfig(name="org/gpt"), torch.device("cpu"))
    assert time.monotonic() - start < 5
    assert all(torch.equal(a, b) for a, b in zip(base.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("nobody/nothing", None, "the hub has no model nobody/nothing, or it is private"),
        ("big/gated", None, r"big/gated is gated; ask for access"),
        ("org/old", "v9", r"model\.revision: org/old has no revision 'v9'"),
        ("org/missing", None, "the hub has no model org/missing"),
    ],
)
def test_refusals_of_the_hub(server: Hub, name: str, revision: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check(locate(ModelConfig(name=name, revision=revision)))
    assert "\n" not in str(caught.value)


def test_a_repository_without_weights_or_of_an_encoder(server: Hub, saved: Callable[[str], Path]) -> None:
    files = files_of(saved("gpt2"))
    weights = files.pop("model.safetensors")
    server.repositories["org/none"] = files
    with pytest.raises(UserError, match="org/none: no weights there"):
        check(locate(ModelConfig(name="org/none")))
    bert = json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}).encode()
    server.repositories["org/bert"] = files | {"model.safetensors": weights, "config.json": bert}
    with pytest.raises(UserError, match=r"org/bert .* is encoder-only"):
        check(locate(ModelConfig(name="org/bert")))


def test_who_plans_many_runs_asks_once_a_model(server: Hub, saved: Callable[[str], Path]) -> None:
    """Whatever it answers; each is told the same, and later the hub is asked again."""
    server.repositories["org/gpt"] = files_of(saved("gpt2"))

    def told(name: str) -> str:
        try:
            return str(check(locate(ModelConfig(name=name))))
        except UserError as error:
            return str(error)

    def asked() -> int:
        return sum(path.startswith("/api/models/") for path in server.asked)

    names = ["org/gpt", "org/missing", "big/gated", "org/gpt"]
    alone = [told(name) for name in names]
    assert len(set(alone)) == 3 and asked() == 4
    with hub_files.asked_once():
        assert [told(name) for name in names + names] == alone + alone
        assert asked() == 7
    assert [told(name) for name in names] == alone and asked() == 11


def test_without_network_many_runs_wait_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def no_answer(self: object, name: str, **_: object) -> None:
        tries.append(name)
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_answer)
    with hub_files.asked_once():
        for _ in range(3):
            with pytest.raises(UserError, match=r"org/gpt is not in the local cache"):
                check(locate(ModelConfig(name="org/gpt")))
    assert tries == ["org/gpt"]


def test_no_network_and_nothing_cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable(monkeypatch)
    start = time.monotonic()
    with pytest.raises(
        UserError, match=r"org/gpt is not in the local cache .*`hf download org/gpt --local-dir gpt`"
    ) as e:
        check(locate(ModelConfig(name="org/gpt")))
    assert time.monotonic() - start < 3 and "\n" not in str(e.value)
    with pytest.raises(UserError, match="did you mean 'tiny-t5'"):
        check(locate(ModelConfig(name="tiny-t6")))
    assert not cache.exists()  # nothing left behind


def test_offline_by_wish(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        hub_files.fetch(locate(ModelConfig(name="org/gpt")))
