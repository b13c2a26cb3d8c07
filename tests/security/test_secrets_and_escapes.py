"""What must not get out: secrets into logs and folders, and what data hold into the terminal or a page as a command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cl_runner.runs.folder import RunDir
from cl_runner.terminal.escapes import shown
from cl_runner.terminal.masking import MASK, holds_secret, masked
from cl_runner.terminal.progress import Screen, clean
from tests.command_line import NANO, call, variables
from tests.fuzz.oracle import STEERING
from tests.run_folders import RunFolder

SECRETS = {
    "HF_TOKEN": "hf-secret-of-hub-1",
    "WANDB_API_KEY": "0123456789abcdef0123",
    "AWS_SECRET_ACCESS_KEY": "aws/Secret+9",
}
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m<script>alert(1)</script>\u202e"


def test_no_secret_of_the_environment_is_in_what_a_run_writes(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("name: two\ntasks: [dbpedia]\n")
    token = SECRETS["HF_TOKEN"]
    named = tmp_path / f"order-{token}.yaml"
    named.write_text((tmp_path / "two.yaml").read_text())
    with variables(**SECRETS):
        result = call("train", "--order", "two.yaml", *NANO, "--set", "output.html=true", cwd=tmp_path)
        assert result.code == 0, result.err
        again = call("train", "--order", named.name, *NANO, cwd=tmp_path)
        page = call("report", "--html", "--json", cwd=tmp_path)
    assert again.code == 2 and "looks like a secret" in again.line and token not in again.line
    texts = [result.out, result.err, page.out, page.err]
    texts += [path.read_bytes().decode("utf-8", "replace") for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    for value in SECRETS.values():
        assert not any(value in text for text in texts)


def test_a_command_line_is_kept_without_what_was_passed_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex
    import sys

    from cl_runner.training import environment as recording

    words = ["cl-runner", "train", "--plugin", "https://me:word@host/p.py", "--set", "x.api_key=sesame12"]
    words += ["--config", f"run-{SECRETS['WANDB_API_KEY']}.yaml", "ghp_" + "a" * 30]
    monkeypatch.setattr(sys, "argv", words)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    assert recording.masked(shlex.join(words)) == masked(shlex.join(words))
    told = masked(shlex.join(sys.argv))
    for secret in ("word", "sesame12", SECRETS["WANDB_API_KEY"], "ghp_"):
        assert secret not in told
    assert told.startswith(f"cl-runner train --plugin https://{MASK}@host/p.py --set x.api_key={MASK}")


def test_an_address_with_a_name_alone_holds_no_secret() -> None:
    for plain in ("ssh://git@host/data", "write to https://x@y.org", "https://host/a:b@c"):
        assert masked(plain) == plain and not holds_secret([plain])
    for secret in ("https://me:word@host", "https://:word@host", f"https://{'a' * 40}@host"):
        assert holds_secret([secret]) and masked(secret) == f"https://{MASK}@host"
    assert masked("/here/https:/me:word@host/x") == f"/here/https:/{MASK}@host/x"  # made absolute, as a folder


def test_messages_logs_and_status_are_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    result = call("report", f"no-{SECRETS['HF_TOKEN']}", cwd=tmp_path)
    assert SECRETS["HF_TOKEN"] not in result.err and MASK in result.err
    with Screen(tmp_path / "run.log") as screen:
        screen.line(f"the hub said: {SECRETS['HF_TOKEN']} is wrong")
    assert SECRETS["HF_TOKEN"] not in (tmp_path / "run.log").read_text()
    RunDir(tmp_path).set_status("failed", message=f"401 for {SECRETS['HF_TOKEN']}", pid=1)
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "state": "failed",
        "message": f"401 for {MASK}",
        "pid": 1,
    }


@pytest.mark.parametrize("setting", ["model.name", "data.dir", "output.name", "adapter.target_modules"])
def test_a_setting_that_is_a_secret_is_refused(tmp_path: Path, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "correct-horse")
    result = call("config", "show", "--order", "order1", "--set", f"{setting}=x-correct-horse", cwd=tmp_path)
    assert result.code == 2 and f"{setting} holds what looks like a secret" in result.line
    assert "correct-horse" not in result.line


def test_what_is_no_secret_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    monkeypatch.setenv("MAX_TOKENS", "100000000")
    monkeypatch.setenv("KEY_FILE_TOKEN", "/home/me/token")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    text = "falsefalse 100000000 /home/me/token abc cl-runner train --set training.lr=1e-4 key: value, tokens: 5"
    assert masked(text) == text and not holds_secret([text])


def test_escapes_are_shown_and_mean_the_same_in_json() -> None:
    text = json.dumps({"a": EVIL}, ensure_ascii=False)
    assert not STEERING.search(shown(text)) and json.loads(shown(text)) == {"a": EVIL}
    assert clean(EVIL) == "31m<script>alert(1)</script>"  # of a line of the screen they are taken out
    assert shown("naïve\tÅ\n日本") == "naïve\tÅ\n日本"


def test_answers_that_steer_a_terminal_or_a_page_are_text(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs", "x", sets=["output.html=false"])
    trained = {"training": {"steps": 3, "loss": 0.5, "update_norm": 1.0}}
    run.commit({"dbpedia": [("Film", "Film"), ("Plant", "Plant")]}, **trained)
    run.commit({"dbpedia": [("Film", EVIL), ("Plant", EVIL)], "amazon": [("negative", EVIL)]}, **trained)
    about = json.loads((run.path / "run.json").read_text())
    for key in ("model", "method", "order", "variant", "form"):
        about[key] = f"{about[key]}{EVIL}"
    about["notes"] = [EVIL]
    (run.path / "run.json").write_text(json.dumps(about))
    (run.path / "run.log").write_text(f"warning: {EVIL}\n")
    (run.path / "status.json").write_text(json.dumps({"state": "failed", "message": EVIL}))
    (run.path / "environment.json").write_text(json.dumps({"command": EVIL, "device": EVIL}))
    for command in (
        ("forgotten", "runs/x"), ("forgotten", "runs/x", "--json"), ("report", "runs/x"), ("report", "runs/x",
        "--markdown"),
        ("report", "runs/x", "--json"), ("report", "runs/x", "--csv"), ("watch", "runs/x", "--once"), ("watch",
        "runs/x", "--json"),
        ("compare", "runs/x"), ("compare", "runs/x", "--latex"), ("list", "runs"), ("verify", "runs/x"), ("rescore",
        "runs/x"),
    ):  # fmt: skip
        result = call(*command, cwd=tmp_path)
        assert result.code in (0, 1 if command[0] == "verify" else 0), (command, result.err)
        assert not STEERING.search(result.out + result.err), command
    assert call("report", "runs/x", "--html", cwd=tmp_path).code == 0
    page = (run.path / "report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


@pytest.mark.parametrize("label", [EVIL, "<img src=x onerror=alert(1)>"])
def test_labels_that_steer_are_text(tmp_path: Path, label: str) -> None:
    rows = [{"text": f"a {EVIL}", "label": label}, {"text": "b", "label": "other"}]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    own = {"name": "own", "kind": "TC", "source": {"train": "t.json", "test": "t.json"}, "instruction": EVIL}
    (tmp_path / "o.yaml").write_text(json.dumps({"name": "mine", "tasks": [own]}))
    for command in (("data", "show", "--task", "own"), ("data", "check"), ("train", "--dry-run"), ("config", "show")):
        result = call(*command, "--order", "o.yaml", cwd=tmp_path)
        assert result.code == 0 and not STEERING.search(result.out + result.err), (command, result.err)


def test_a_refusal_shows_what_it_names(tmp_path: Path) -> None:
    for command in (("report", EVIL), ("list", EVIL), (EVIL,), ("train", "--order", EVIL), ("show", "method", EVIL)):
        result = call(*command, cwd=tmp_path)
        assert result.code == 2 and not STEERING.search(result.err) and len(result.err.splitlines()) == 1
    assert re.search(r"\\u001b|\\x1b", call("report", EVIL, cwd=tmp_path).err)
