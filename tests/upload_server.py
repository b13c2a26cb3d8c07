"""The hub that is written to, on 127.0.0.1: repositories made, files told apart, uploaded and committed, as it speaks.

    with UploadServer(token="hf_...") as hub:
        subprocess.run(..., env=hub.environment(home))
        hub.files["somebody/it"]["README.md"]

Small files come in the commit, others by git-lfs as the hub's older protocol has it (``HF_HUB_DISABLE_XET``).
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from tests.command_line import environment
from tests.local_server import Handler, LocalServer

NAME = "somebody"


class UploadServer(LocalServer):
    """One user, ``somebody``; what they uploaded is in ``files``. ``refusing``: path → status and message."""

    def __init__(self, token: str, refusing: dict[str, tuple[int, str]] | None = None) -> None:
        super().__init__(_Handler)
        self.token, self.refusing = token, refusing or {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}  # by sha256

    def environment(self, home: Path, token: str | None = None, **more: str) -> dict[str, str]:
        """The environment of a process whose hub this is; ``token``: another than the right one, empty for none."""
        ours = {key: value for key, value in environment().items() if not key.lower().endswith("_proxy")}
        kept = {key: value for key, value in ours.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        given = self.token if token is None else token
        return kept | {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            **({"HF_TOKEN": given} if given else {}), **more,
        }  # fmt: skip


class _Handler(Handler):
    hub: UploadServer

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.hub.requests.append(f"{self.command} {path}")
        for part, (status, message) in self.hub.refusing.items():
            if part in path:
                return self._error(status, message)
        if path.startswith("/upload/"):
            self.hub.large[path.rsplit("/", 1)[1]] = body
            return self._send(200, b"", {"ETag": '"x"'})
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._error(401, "Invalid username or password.")
        if path == "/api/validate-yaml":
            return self._json({"errors": _faults(json.loads(body)["content"]), "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            return self._model(f"{owner}/{name}", rest, body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        return self._error(404, "no such page")

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked.get("organization") or NAME
        if owner != NAME:
            return self._error(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{asked['name']}"
        there = name in self.hub.files
        if not there:
            self.hub.files[name] = {}
            self.hub.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
        self._json({"url": f"{self.hub.url}/{name}", "name": name}, 409 if there else 200)

    def _model(self, name: str, rest: list[str], body: bytes) -> None:
        if name not in self.hub.files:
            return self._error(404, "Repository not found", "RepoNotFound")
        if rest[:1] == ["preupload"]:
            return self._json({"files": [self._mode(file) for file in json.loads(body)["files"]]})
        if rest[:1] == ["commit"]:
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        siblings = [{"rfilename": path} for path in self.hub.files[name]]
        self._json({"_id": "0", "id": name, "sha": "0" * 40, "private": self.hub.private[name], "siblings": siblings,
                    "tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False})  # fmt: skip

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors") or file["size"] > 10 * 2**20
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/upload/{each['oid']}"}}}
            for each in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        held = dict(self.hub.files[name])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.hub.large[value["oid"]]
                if hashlib.sha256(content).hexdigest() != value["oid"] or len(content) != value["size"]:
                    return self._error(400, "lfs object is not what it is called")
                held[value["path"]] = content
        self.hub.files[name] = held
        url = f"{self.hub.url}/{name}/commit/{'1' * 40}"
        self._json({"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})

    def _json(self, value: Any, status: int = 200, kind: str = "application/json") -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": kind})

    def _error(self, status: int, message: str, code: str = "") -> None:
        headers = {
            "X-Error-Message": message,
            "Content-Type": "application/json",
            **({"X-Error-Code": code} if code else {}),
        }
        self._send(status, json.dumps({"error": message}).encode(), headers)


def _faults(card: str) -> list[dict[str, str]]:
    """What the hub says of a card's first lines, of the little that is known here."""
    try:
        values = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
    except yaml.YAMLError as error:
        return [{"message": f"YAML: {error}"}]
    texts = ("license", "library_name", "pipeline_tag", "base_model_relation")
    wrong = [key for key in texts if not isinstance(values.get(key, ""), str)]
    return [{"message": f'"{key}" must be a string'} for key in wrong]
