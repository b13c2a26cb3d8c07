"""A small server on 127.0.0.1 that speaks enough of the hub's protocol to load data sets and models from it.

    with HubServer() as hub:
        hub.add("datasets", "someone/set", {"README.md": b"...", "data/train-00000-of-00001.parquet": b"..."})
        hub.add("models", "someone/model", {"config.json": b"{}"})
        subprocess.run(..., env=hub.environment(tmp_path))

``hub.requests`` lists what was asked (method and path), for tests that count.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.local_server import Handler, LocalServer


class HubServer(LocalServer):
    """Repositories of one commit each, held in memory. ``main`` and the commit itself are their revisions."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.commits: dict[tuple[str, str], str] = {}

    def add(self, kind: str, name: str, files: dict[str, bytes], commit: str | None = None) -> str:
        """Put a repository there (kind: ``models`` or ``datasets``); its commit, made of the content if not given."""
        self.repositories[kind, name] = files
        self.commits[kind, name] = commit or _commit(files)
        return self.commits[kind, name]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a process whose hub this is, with caches of its own under ``home``."""
        ours = (
            "HF_",
            "TRANSFORMERS_",
            "http_proxy",
            "https_proxy",
            "all_proxy",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "ALL_PROXY",
        )
        kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        return kept | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"} | more


def _commit(files: dict[str, bytes]) -> str:
    """A commit that depends on the content, as git's does."""
    digest = hashlib.sha1()
    for path in sorted(files):
        digest.update(path.encode() + b"\0" + files[path] + b"\0")
    return digest.hexdigest()


class _Handler(Handler):
    hub: HubServer

    def _answer(self) -> None:
        url = urlsplit(self.path)
        body = self._body()
        self.hub.requests.append(f"{self.command} {url.path}")
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[0] == "api" and len(parts) >= 4:
            self._api(parts[1], f"{parts[2]}/{parts[3]}", parts[4:], url.query, body)
        elif "resolve" in parts:
            kind = "datasets" if parts[0] == "datasets" else "models"
            owner, name, _, revision, *path = parts[1:] if kind == "datasets" else parts
            self._resolve(kind, f"{owner}/{name}", revision, "/".join(path))
        else:
            self._error(404, "EntryNotFound", "no such page")

    def _api(self, kind: str, name: str, rest: list[str], query: str, body: bytes) -> None:
        files = self.hub.repositories.get((kind, name))
        if files is None:
            return self._error(404, "RepoNotFound", "Repository not found")
        what, revision, *path = [*rest, "", ""][:2] + rest[2:]
        if what == "":
            return self._json(self._info(kind, name))
        if revision not in {"main", self.hub.commits[kind, name]}:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if what == "revision":
            return self._json(self._info(kind, name))
        if what == "tree":
            recursive = parse_qs(query).get("recursive", ["false"])[0].lower() in {"true", "1"}
            return self._json(_tree(files, "/".join(path), recursive))
        if what == "paths-info":
            asked = _paths(self.headers.get("Content-Type", ""), body)
            return self._json([e for e in _tree(files, "", True) if e["path"] in asked])
        return self._error(404, "EntryNotFound", f"nothing at {what}")

    def _info(self, kind: str, name: str) -> dict[str, Any]:
        return {
            "_id": "0", "id": name, "modelId": name, "author": name.split("/")[0], "sha": self.hub.commits[kind, name],
            "private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
            "lastModified": "2024-01-01T00:00:00.000Z", "createdAt": "2024-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in sorted(self.hub.repositories[kind, name])],
        }  # fmt: skip

    def _resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        files = self.hub.repositories.get((kind, name))
        if files is None:
            return self._error(404, "RepoNotFound", "Repository not found")
        commit = self.hub.commits[kind, name]
        if revision not in {"main", commit}:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if path not in files:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        content = files[path]
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range", "")
        if self.command == "GET" and wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin = int(first) if first else max(0, len(content) - int(last))
            end = min(int(last), len(content) - 1) if first and last else len(content) - 1
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
            return self._send(206, content[begin : end + 1], headers)
        return self._send(200, content, headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})


def _tree(files: dict[str, bytes], under: str, recursive: bool) -> list[dict[str, Any]]:
    """Entries below a folder, as the hub lists them."""
    prefix = under + "/" if under else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        inner = path.removeprefix(prefix).split("/")
        for depth in range(1, len(inner)):
            if recursive or depth == 1:
                name = prefix + "/".join(inner[:depth])
                entries[name] = {"type": "directory", "oid": _oid(name.encode()), "size": 0, "path": name}
        if recursive or len(inner) == 1:
            entries[path] = {"type": "file", "oid": _oid(content), "size": len(content), "path": path}
    return list(entries.values())


def _paths(content_type: str, body: bytes) -> list[str]:
    if "json" in content_type:
        asked = json.loads(body)["paths"]
        return [asked] if isinstance(asked, str) else asked
    return parse_qs(body.decode())["paths"]


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
