"""Models of the Hugging Face hub: what a repository holds, and a local copy of it. Fails quickly and in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from cl_runner.errors import UserError, did_you_mean
from cl_runner.models import folder_check
from cl_runner.offline import nothing_is_fetched
from cl_runner.plain_files import LARGEST_JSON, content

if TYPE_CHECKING:
    from cl_runner.models.locate import Located

_SECONDS = 10  # longest wait for the hub's first answer
_SMALL = (".json", ".txt", ".model", ".spm", ".tiktoken", ".jinja")
# Weights of the model itself: repositories also hold other precisions, optimizers, originals.
_SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


class Repository:
    """Files of a hub repository as the hub lists them; small ones are downloaded when read."""

    def __init__(self, located: Located, names: Set[str]) -> None:
        self.where = located.name_or_path
        self.located = located
        self._names = names

    def names(self) -> Set[str]:
        return self._names

    def read(self, name: str) -> bytes:
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(self.where, name, revision=self.located.revision, etag_timeout=_SECONDS)
        except Exception as error:
            raise _explained(self.located, error) from error
        return content(Path(path), LARGEST_JSON)

    def size(self, name: str) -> int | None:
        return None

    def start(self, name: str, count: int) -> bytes | None:
        return None


_Answer: TypeAlias = "Set[str] | UserError | None"  # names of files, why not, or that none came
_answers: dict[Located, _Answer] | None = None  # while the hub is asked once a model


@contextmanager
def asked_once() -> Iterator[None]:
    """Of each model the hub is asked what it holds once, whether it answers, refuses or cannot be reached."""
    global _answers
    before, _answers = _answers, {} if _answers is None else _answers
    try:
        yield
    finally:
        _answers = before


def listing(located: Located) -> folder_check.Files:
    """The repository's files: as the hub lists them, or, where it cannot be reached, as the local cache has them.

    Raises UserError: no such repository or revision, no access, or neither network nor cache.
    """
    from huggingface_hub import is_offline_mode

    if not is_offline_mode():
        answers = {} if _answers is None else _answers
        if located not in answers:
            answers[located] = _ask(located)
        answer = answers[located]
        if isinstance(answer, UserError):
            raise answer
        if answer is not None:
            return Repository(located, answer)
    here = cached(located)
    if here is None:
        raise _offline(located)
    return folder_check.Folder(here, located.name_or_path)


def _ask(located: Located) -> _Answer:
    """The names of the files at a repository's top; what the hub says against it; None where it cannot be reached."""
    from huggingface_hub import HfApi

    try:
        # One request without retries, so that a machine without network answers at once.
        info = HfApi().model_info(located.name_or_path, revision=located.revision, timeout=_SECONDS)
    except Exception as error:
        return None if is_unreachable(error) else _explained(located, error)
    return {sibling.rfilename for sibling in info.siblings or [] if "/" not in sibling.rfilename}


def fetch(located: Located) -> Path:
    """A local folder with the model's files (downloaded where needed: safetensors, and no pickles).

    Raises UserError as ``listing`` does.
    """
    files = listing(located)
    if isinstance(files, folder_check.Folder):
        return files.path
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    names = files.names()
    weights = {name for name in names if _SAFETENSORS.fullmatch(name)}
    small = (*_SMALL, ".py") if located.trust_remote_code else _SMALL
    if os.environ.get("RANK", "0") != "0":
        disable_progress_bars()  # one bar will do
    wanted = sorted(weights | {name for name in names if name.endswith(small)})
    try:
        return Path(
            snapshot_download(
                located.name_or_path, revision=located.revision, allow_patterns=wanted, etag_timeout=_SECONDS
            )
        )
    except Exception as error:
        raise _explained(located, error) from error


def cached(located: Located) -> Path | None:
    """The snapshot folder in the local cache. That it is whole is the folder check's to say."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(located.name_or_path, "config.json", revision=located.revision)
    return Path(config).parent if isinstance(config, str) else None


def is_unreachable(error: Exception) -> bool:
    """True where no answer came, or the hub itself is down, as against an answer that says no."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return bool(status >= 500)
    # No connection is an OSError, or an error of the HTTP library, which differs between versions of the hub's.
    kinds = {kind.__module__.split(".")[0].rstrip("2") for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(kinds & {"httpx", "httpcore", "requests", "urllib3"})


def _offline(located: Located) -> UserError:
    name = located.name_or_path
    if nothing_is_fetched():
        return UserError(
            f"model.name: {name} is not in the local cache, and what a run's folder names is not fetched; `hf download "
            f"{name}` fetches it, or --model says where it is"
        )
    return UserError(
        f"model.name: {name} is not in the local cache and the Hugging Face hub cannot be reached"
        + (" (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else "")
        + f"; on a machine with network run `hf download {name} --local-dir {name.split('/')[-1]}`, copy the folder "
        "here and give its path as --model; or use an embedded model: tiny-t5, tiny-llama"
        + did_you_mean(name, ("tiny-t5", "tiny-llama"))
    )


def _explained(located: Located, error: Exception) -> UserError:
    from huggingface_hub import errors

    name = located.name_or_path
    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"model.name: {name} is gated; ask for access at https://huggingface.co/{name}, then `hf auth login` "
            "(or set HF_TOKEN)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"model.revision: {name} has no revision '{located.revision}'")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        return UserError(
            f"model.name: the hub has no model {name}, or it is private (then `hf auth login` or set HF_TOKEN)"
            + did_you_mean(name, ("tiny-t5", "tiny-llama"))
        )
    if is_unreachable(error):
        return _offline(located)
    return UserError(f"model.name: the hub refused {name} ({type(error).__name__}: {' '.join(str(error).split())})")
