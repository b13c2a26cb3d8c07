"""``cl-runner push``: an exported folder, or what a run's stage left, to the Hugging Face hub."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cl_runner.commands.export import Asked, write_export
from cl_runner.errors import UserError, first_line
from cl_runner.imports import light_imports
from cl_runner.models.hub_files import is_unreachable
from cl_runner.offline import cache_alone
from cl_runner.plain_files import refuse_foreign
from cl_runner.runs import catalog
from cl_runner.runs.folder import RunDir
from cl_runner.terminal.console import print_json, say, size
from cl_runner.terminal.masking import holds_secret, masked

WHAT = ("adapter_config.json", "config.json")  # one of which is in every adapter and model
HIDDEN = (".git/*", ".cache/*", ".*.draft*")
TEXTS = (".md", ".json", ".txt", ".jinja", ".yaml")
LARGEST = 2**22  # bytes of a text that is looked through


@dataclass(frozen=True)
class Pushed:
    """Where it is now."""

    url: str
    repo: str
    files: int
    bytes: int


def push(wanted: str, repo: str, private: bool, asked: Asked, *, root: Path, as_json: bool) -> None:
    """``cl-runner push``. Raises UserError."""
    refuse_name(repo)
    refuse_no_token()
    path = Path(wanted)
    is_folder = os.path.isdir(path) and not RunDir(path).exists()  # noqa: PTH112 - Path's takes no long name
    if is_folder and (_holds(path) or not any(run.name.startswith(wanted) for run in catalog.all_runs(root))):
        if asked != Asked():
            raise UserError(f"{wanted} is no run: --stage, --merged and the like go with a run alone")
        pushed = _upload(path, repo, private)
    else:
        run = catalog.find(root, wanted)
        with tempfile.TemporaryDirectory(prefix="cl-runner-") as room:
            folder = Path(room) / "export"
            with cache_alone():  # what a run's folder names is not fetched
                exported = write_export(run, folder, replace(asked, repo=repo))
            for note in exported.notes:
                say(note)
            say(f"{exported.what}: stage {exported.stage} ({exported.name}) of {exported.run}")
            pushed = _upload(folder, repo, private)
    if as_json:
        print_json(vars(pushed))
    else:
        print(f"{pushed.url}: {pushed.files} files, {size(pushed.bytes)}{', private' if private else ''}")


def refuse_name(repo: str) -> None:
    """Refuse what cannot be the name of a repository. Raises UserError."""
    with light_imports():
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--repo {repo[:100]}: {first_line(error)[:200]}") from None


def refuse_no_token() -> None:
    """Refuse to begin without a token, or where nothing may be reached. Raises UserError."""
    from huggingface_hub import get_token, is_offline_mode

    if is_offline_mode():
        raise UserError("push: HF_HUB_OFFLINE is set, and the hub is not asked; unset it")
    if not get_token():
        raise UserError("push: no token of the hub; `hf auth login`, or set HF_TOKEN to one that may write")


def _upload(folder: Path, repo: str, private: bool) -> Pushed:
    """Make the repository where there is none, and put the folder there in one commit. Raises UserError."""
    files = _files(folder)
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    try:
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        name = made.repo_id
        if private and not api.repo_info(name).private:
            raise UserError(f"--private: {name} is there already and is public; make it private on the hub first")
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="By cl-runner push", ignore_patterns=list(HIDDEN)
        )
    except UserError:
        raise
    except Exception as error:  # the hub's, and those of the library that asks it
        raise _explained(repo, error) from None
    return Pushed(str(made), name, len(files), sum(file.stat().st_size for file in files))


def _files(folder: Path) -> list[Path]:
    """What would be uploaded. Raises UserError where it is neither adapter nor model, or holds a secret or a link."""
    if not _holds(folder):
        raise UserError(f"{folder}: holds neither {' nor '.join(WHAT)}: it is no adapter and no model")
    refuse_foreign(folder, links=False)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not _hidden(file, folder)]
    for file in files:
        if file.suffix in TEXTS and file.stat().st_size <= LARGEST:
            text = file.read_text(encoding="utf-8", errors="replace")
            if file.name not in ("tokenizer.json", "vocab.json") and holds_secret([text]):
                raise UserError(f"{file}: holds what looks like a secret, and is not uploaded: take it out")
    if not (folder / "README.md").is_file():
        say(f"{folder}: has no README.md, which is its card on the hub; cl-runner export writes one")
    return files


def _holds(folder: Path) -> bool:
    """Whether a folder is an adapter, or a model."""
    return any((folder / name).is_file() for name in WHAT)


def _hidden(file: Path, folder: Path) -> bool:
    first = file.relative_to(folder).parts[0]
    return first in (".git", ".cache") or (first.startswith(".") and ".draft" in first)


def _explained(repo: str, error: Exception) -> UserError:
    """What went wrong, in a line without a secret."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    said = masked(_said(error))
    if status == 401:
        return UserError(
            f"push: the hub does not know this token (401); `hf auth login` again, or another HF_TOKEN{said}"
        )
    if status == 403:
        return UserError(
            f"--repo {repo}: the hub forbids it (403): the token may not write there; take one with write access, or a "
            f"name of yours{said}"
        )
    if status == 404 or isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"--repo {repo}: the hub has no such place for this token (404); is the name before the / yours?"
        )
    if status in (400, 409, 422):
        return UserError(f"--repo {repo}: refused by the hub ({status}){said}")
    if status is not None:
        return UserError(f"push: the hub failed ({status}){said}; what was uploaded is not committed: try again later")
    if is_unreachable(error):
        where = masked(constants.ENDPOINT)
        return UserError(f"push: the hub cannot be reached at {where} ({type(error).__name__}); nothing was committed")
    return UserError(f"push: {type(error).__name__}: {masked(first_line(error))[:200]}")


def _said(error: Any) -> str:
    """The hub's own words."""
    words = str(getattr(error, "server_message", "") or "").strip().splitlines()
    return f": {words[0][:200]}" if words else ""
