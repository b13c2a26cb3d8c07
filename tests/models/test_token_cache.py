"""Token ids kept from one run for the next: the same ids, never somebody else's, and never a failure of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, normalizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from cl_runner import cache
from cl_runner.errors import UserError
from cl_runner.models import chat, encoding, token_cache
from cl_runner.models.base import Layout
from cl_runner.models.batch import Example
from cl_runner.models.chat import ChatTemplate
from cl_runner.models.encoding import Encoder
from cl_runner.models.token_cache import Encoded, Joined, TokenCache, lengths
from cl_runner.tasks.task import Prompt
from tests.breadth import wide
from tests.models.tiny_models import CHATML, byte_tokenizer, t5_tokenizer

T5 = Layout(True, pad_id=1, eos_id=0, end_ids=(0,), decoder_start_id=1, vocab_size=420)
PROMPTS = [Prompt("Option: A, B\n", f"{number} naïve cafés in Zürich " * number, "\nAnswer:") for number in range(7)]
LABELS = ["A", "B", "very negative", "", "A", "Bü", "B"]
EXAMPLES = [Example([5, 6, 0], [7, 0]), Example([8, 0], [9, 9, 0], True), Example([5, 0], [0], False, True)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the ids of these tests are kept; not made yet."""
    monkeypatch.setenv("CL_RUNNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def t5(**options: Any) -> Encoder:
    return Encoder(t5_tokenizer(), T5, **{"max_source": 40, **options})


def encode(encoder: Encoder | None = None, prompts: list[Prompt] = PROMPTS, labels: list[str] = LABELS) -> Encoded:
    encoder = encoder or t5()
    return TokenCache(encoder.tokenizer).encode(encoder, prompts, labels)


class Counting(Encoder):
    """Counts how often it was asked."""

    asked = 0

    def encode_many(self, *arguments: Any) -> list[Example]:
        self.asked += 1
        return super().encode_many(*arguments)


# --- rows in columns


def test_rows_in_columns_are_the_rows() -> None:
    found = Encoded.of(EXAMPLES)
    assert list(found) == [found[0], found[1], found[2]] == EXAMPLES and len(found) == 3
    assert [found[-1], found[np.int64(1)]] == [EXAMPLES[-1], EXAMPLES[1]]  # type: ignore[index]
    assert found[1:] == EXAMPLES[1:] and found[::-2] == EXAMPLES[::-2] and found[5:] == []
    assert [type(value) for value in found[1]] == [list, list, bool, bool, float]
    assert all(type(token) is int for token in found[1].source + found[1].target)
    for row in (3, -4):
        with pytest.raises(IndexError):
            found[row]
    assert list(Encoded.of([])) == [] and len(Encoded.of([])) == 0


def test_joined_rows_are_one_sequence() -> None:
    parts = [Encoded.of(EXAMPLES), [], EXAMPLES[:1], Encoded.of([]), Encoded.of(EXAMPLES[1:])]
    flat = [example for part in parts for example in part]
    joined = Joined(parts)
    assert list(joined) == flat and len(joined) == 6 and joined[-6] == flat[0] and joined[2:5] == flat[2:5]
    assert list(Joined([])) == [] and Joined([Joined(parts), parts[0]])[6:] == EXAMPLES
    with pytest.raises(IndexError):
        joined[6]


def test_lengths() -> None:
    filling = Example([5], [0], weight=0.0)
    for kind in (list, Encoded.of, lambda rows: Joined([Encoded.of(rows[:2]), rows[2:]])):
        sources, targets = lengths(kind(EXAMPLES))  # type: ignore[operator]
        assert sources.tolist() == [3, 2, 2] and targets.tolist() == [2, 3, 1]
    sources, targets = lengths(Joined([Encoded.of(EXAMPLES), [filling]]))
    assert sources.tolist() == [3, 2, 2, 1] and targets.tolist() == [2, 3, 1, 0]
    assert [part.tolist() for part in lengths(Joined([]))] == [[], []]


# --- the cache


def test_the_second_time_nothing_is_encoded(folder: Path) -> None:
    expected = t5().encode_many(PROMPTS, LABELS)
    assert any(example.truncated for example in expected) and not all(example.truncated for example in expected)
    for asked in (1, 0, 0):
        encoder = Counting(t5_tokenizer(), T5, 40)
        assert list(encode(encoder)) == expected
        assert encoder.asked == asked
    assert [file.suffix for file in folder.iterdir()] == [".arrow"]
    assert [list(encode(prompts=[], labels=[])) for _ in range(2)] == [[], []]
    cut = Counting(t5_tokenizer(), T5, 40, max_target=2)
    for asked in (1, 1):
        found = TokenCache(cut.tokenizer).encode(cut, PROMPTS, LABELS, cut_target=True)
        assert list(found) == t5(max_target=2).encode_many(PROMPTS, LABELS, True)
        assert cut.asked == asked and any(example.target_cut for example in found)


def test_bad_rows_are_refused_as_before_and_not_kept(folder: Path) -> None:
    short = t5(max_target=2)
    for _ in range(2):
        with pytest.raises(UserError, match=r"'very negative' .*max_target 2"):
            encode(short)
    bare = Encoder(byte_tokenizer(), replace(T5, encoder_decoder=False), 40)
    with pytest.raises(UserError, match="an input is empty"):
        encode(bare, [Prompt("", "", "")], ["A"])
    with pytest.raises(ValueError):
        encode(labels=LABELS[1:])
    assert not folder.exists()


def changed_tokenizer(change: Callable[[PreTrainedTokenizerFast], object]) -> Encoder:
    tokenizer = t5_tokenizer()
    change(tokenizer)
    return Encoder(tokenizer, T5, 40)


def _lower(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


INGREDIENTS: dict[str, Callable[[], Encoder]] = {
    "max_source": lambda: t5(max_source=41),
    "max_target": lambda: t5(max_target=49),
    "truncate": lambda: t5(truncate="tail"),
    "read back": lambda: t5(truncate="reference"),
    "family": lambda: Encoder(t5_tokenizer(), replace(T5, encoder_decoder=False), 40),
    "end token": lambda: Encoder(t5_tokenizer(), replace(T5, eos_id=1), 40),
    "embeddings": lambda: Encoder(t5_tokenizer(), replace(T5, vocab_size=421), 40),
    "special ids": lambda: Encoder(byte_tokenizer(pad=True), T5, 40),
    "a token more": lambda: changed_tokenizer(lambda t: t.add_tokens([AddedToken("Zürich")])),
    "normaliser": lambda: changed_tokenizer(_lower),
    "chat template": lambda: chat_encoder(CHATML),
    "split_special_tokens": lambda: changed_tokenizer(lambda t: setattr(t, "split_special_tokens", True)),
}


def chat_encoder(template: str) -> Encoder:
    """A template that is not told by the tokenizer's state, nor by what it writes around."""
    tokenizer = t5_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer, T5, 40, chat=ChatTemplate.of(tokenizer, False, "tiny"))


def test_the_fingerprint_changes_with_the_chat_template() -> None:
    def of(template: str) -> str | None:
        encoder = chat_encoder(template)
        return TokenCache(encoder.tokenizer).fingerprint(encoder, PROMPTS, LABELS)

    found = [of(CHATML), of(CHATML.replace("kind", "quick")), of(CHATML.replace("m.content", "m.content | trim"))]
    assert len(set(found)) == 3 and None not in found and of(CHATML) == found[0]


@pytest.mark.parametrize("what", INGREDIENTS)
def test_the_fingerprint_changes_with_the_encoder(what: str) -> None:
    def of(encoder: Encoder) -> str | None:
        return TokenCache(encoder.tokenizer).fingerprint(encoder, PROMPTS, LABELS)

    assert of(t5()) is not None and of(t5()) == of(t5())
    assert of(INGREDIENTS[what]()) not in (None, of(t5()))


def test_the_fingerprint_changes_with_rows_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = t5()
    of = partial(TokenCache(encoder.tokenizer).fingerprint, encoder)
    head, text, tail = PROMPTS[3]
    others = [Prompt(head, text + "!", tail), Prompt(head + text[:1], text[1:], tail), Prompt(head, text, tail + " ")]
    found = {
        of(PROMPTS, LABELS),
        of(PROMPTS, LABELS, True),
        of(PROMPTS[:-1], LABELS[:-1]),
        of(PROMPTS[::-1], LABELS[::-1]),
        of(PROMPTS, ["B", *LABELS[1:]]),
        *(of([*PROMPTS[:3], other, *PROMPTS[4:]], LABELS) for other in others),
    }
    for module in (token_cache.transformers, token_cache.tokenizers):  # transformers may stand in sys.modules twice
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "0.1")
            found.add(TokenCache(encoder.tokenizer).fingerprint(encoder, PROMPTS, LABELS))
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "FORMAT", 0)
        found.add(of(PROMPTS, LABELS))
    with monkeypatch.context() as patch:
        patch.setattr(token_cache.inspect, "getsource", lambda module: "other rules" if module is encoding else None)
        found.add(TokenCache(encoder.tokenizer).fingerprint(encoder, PROMPTS, LABELS))
    with monkeypatch.context() as patch:
        patch.setattr(token_cache.inspect, "getsource", lambda module: "other rules" if module is chat else None)
        found.add(TokenCache(encoder.tokenizer).fingerprint(encoder, PROMPTS, LABELS))
    assert len(found) == 13 and None not in found


class Own(PreTrainedTokenizerFast):
    """A tokenizer with code of its own: its backend does not say what it does."""


def test_what_a_tokenizer_does_not_say_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = replace(T5, pad_id=0, eos_id=1, decoder_start_id=0)
    for tokenizer in (ByT5Tokenizer(), Own(tokenizer_object=t5_tokenizer().backend_tokenizer, eos_token="</s>")):
        encoder = Encoder(tokenizer, layout, 60)
        assert list(encode(encoder)) == encoder.encode_many(PROMPTS, LABELS)

    def nowhere(module: object) -> str:
        raise OSError("no source")

    monkeypatch.setattr(token_cache.inspect, "getsource", nowhere)
    assert list(encode()) == t5().encode_many(PROMPTS, LABELS)
    assert not folder.exists()


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flip(data: bytes) -> bytes:
    """One id changed: a file that Arrow has nothing against."""
    ids = np.array(EXPECTED[2].source, dtype=np.int32).tobytes()
    at = data.index(ids)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


EXPECTED = t5().encode_many(PROMPTS, LABELS)


@pytest.mark.parametrize(
    "damage",
    [_cut, _flip, lambda data: b"", lambda data: bytes(len(data)), lambda data: data[:-1], lambda data: b"no" + data],
    ids=["half", "an id", "empty", "zeros", "one byte", "shifted"],
)
def test_a_broken_file_is_made_anew(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    encode()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(damage(whole))
    assert list(encode()) == EXPECTED
    assert [file] == list(folder.iterdir()) and file.read_bytes() == whole


def test_a_file_under_another_name_is_not_read(folder: Path) -> None:
    encode()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    other = t5(max_source=50)
    encode(other)
    (second,) = set(folder.iterdir()) - {file}
    second.unlink()
    second.write_bytes(whole)
    assert list(encode(other)) == other.encode_many(PROMPTS, LABELS) != EXPECTED


def test_a_mapped_file_may_be_replaced_or_deleted(folder: Path) -> None:
    encode()
    found = encode()
    (file,) = folder.iterdir()
    file.unlink()
    assert list(found) == EXPECTED


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    monkeypatch.setenv("CL_RUNNER_CACHE", str(file))
    assert list(encode()) == EXPECTED
    assert file.read_text() == "no folder"


def test_a_disk_that_is_full_leaves_no_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert list(encode()) == EXPECTED
    assert list(folder.iterdir()) == []


WRITER = """
import sys, time
from tests.models.test_token_cache import EXPECTED, encode
sys.stdin.readline()
for _ in range(20):
    assert list(encode()) == EXPECTED
    for file in __import__("pathlib").Path(sys.argv[1]).glob("*.arrow"):
        file.unlink(missing_ok=True)
"""


@wide
def test_two_processes_write_at_once(folder: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)], env=env, stdin=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert all(file.suffix == ".arrow" for file in folder.iterdir())  # nothing half written is left


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder("tokens") == tmp_path / "cache" / "tokens"
    monkeypatch.setenv("CL_RUNNER_CACHE", "~/mine")
    assert cache.folder("tokens") == tmp_path / "mine" / "tokens"
    monkeypatch.delenv("CL_RUNNER_CACHE")
    assert cache.folder("tokens") == Path("/cache/cl-runner/tokens")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.folder("tokens") == tmp_path / ".cache" / "cl-runner" / "tokens"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache.folder("tokens") is None
    assert list(encode()) == EXPECTED
