"""The Hugging Face hub: whether it answers, whether it may be asked, and whether there is a token."""

from __future__ import annotations

import http.client
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

from cl_runner import __version__
from cl_runner.doctor.finding import Finding
from cl_runner.doctor.places import hub_home
from cl_runner.terminal.masking import masked

GROUP = "Hub"
USUAL = "https://huggingface.co"
SECONDS = 3.0
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
COSTS = "models and rows of the hub cannot be fetched; embedded models, folders and files need none"


def hub(seconds: float = SECONDS) -> Iterator[Finding]:
    """Whether the hub answers (not asked where a variable says offline), and whether there is a token."""
    named = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    offline = [f"{name}={os.environ[name]}" for name in OFFLINE if _on(os.environ.get(name, ""))]
    at = masked(named or USUAL)
    if offline:
        yield Finding(GROUP, "hub", "ok", f"not asked, as {' and '.join(offline)} wants: what is in the cache is used")
    elif why := unreached(named or USUAL, seconds):
        mirror = f"set HF_ENDPOINT to a mirror{' that answers' if named else ''}"
        do = f"{mirror}; without any, HF_HUB_OFFLINE=1 saves waiting"
        yield Finding(GROUP, "hub", "missing", f"{at}: {masked(why)}", COSTS, do)
    else:
        yield Finding(GROUP, "hub", "ok", f"{at} answers{' (HF_ENDPOINT)' if named else ''}")
    has = "there is one" if has_token() else "none: gated and private models are refused, others need none (HF_TOKEN)"
    yield Finding(GROUP, "token", "ok", has)


def unreached(address: str, seconds: float) -> str:
    """Why an address does not answer; empty where it does."""
    said: list[str] = []
    # A name may be looked up for longer than any timeout of a connection's.
    thread = Thread(target=lambda: said.append(_asked(address, seconds)), daemon=True)
    thread.start()
    thread.join(2 * seconds)
    return said[0] if said else f"no answer within {2 * seconds:g} s"


def _asked(address: str, seconds: float) -> str:
    try:
        request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": f"cl-runner/{__version__}"})
        with urllib.request.urlopen(request, timeout=seconds):
            return ""
    except urllib.error.HTTPError as error:
        # It answers: a mirror need have no page of its own. What a proxy or a broken server says is no answer of it.
        return "" if error.code < 500 and error.code != 407 else f"answers {error.code} ({error.reason})"
    except urllib.error.URLError as error:
        reason = error.reason
        if isinstance(reason, socket.gaierror):
            return "its name is not known here (no network?)"
        if isinstance(reason, TimeoutError):
            return f"no answer within {seconds:g} s"
        return str(getattr(reason, "strerror", None) or reason)
    except TimeoutError:
        return f"no answer within {seconds:g} s"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"


def has_token() -> bool:
    """Whether a token is set, or lies where ``hf auth login`` puts it. It is not read out to anybody."""
    if any(os.environ.get(name, "").strip() for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")):
        return True
    named, home = os.environ.get("HF_TOKEN_PATH"), hub_home()
    if not named and home is None:
        return False
    with suppress(OSError):
        return (Path(named) if named else Path(home or ".", "token")).stat().st_size > 0
    return False


def _on(value: str) -> bool:
    return value.strip().upper() in ("1", "ON", "YES", "TRUE")
