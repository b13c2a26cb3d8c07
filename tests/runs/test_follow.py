"""Files that grow: only what is new is read, half a line waits, another file in the place is noticed."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cl_runner.runs.follow import Lines, Log


def test_lines_come_once_and_half_a_line_waits(tmp_path: Path) -> None:
    file = tmp_path / "a"
    lines = Lines(file)
    assert lines.read() == (False, [])
    file.write_bytes(b"one\ntwo\nthr")
    assert lines.read() == (False, ["one", "two"])
    assert lines.read() == (False, [])
    with file.open("ab") as stream:
        stream.write(b"ee")
        stream.flush()
        assert lines.read() == (False, [])
        stream.write("\nf\u2028\xfc\n".encode())
    assert lines.read() == (False, ["three", "f\u2028\xfc"])


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=6))
def test_however_it_grows_the_lines_are_those_of_the_whole(data: bytes, cuts: list[int]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a")
        file.write_bytes(b"")
        lines, found = Lines(file), []
        for end in [*sorted(cuts), len(data)]:
            file.open("ab").close()
            with file.open("ab") as stream:
                stream.write(data[stream.tell() : max(end, stream.tell())])
            anew, new = lines.read()
            assert not anew
            found += new
    assert found == [line.decode("utf-8", "replace") for line in data.split(b"\n")[:-1]]


def test_what_is_read_is_only_what_is_new(tmp_path: Path) -> None:
    """Bytes before the place are not looked at again: they may be other ones by now."""
    file = tmp_path / "a"
    file.write_bytes(b"one\ntwo\n")
    lines = Lines(file)
    lines.read()
    with file.open("r+b") as stream:
        stream.write(b"ONE\nTWO\nthree\n")
    assert lines.read() == (False, ["three"])


def test_a_file_that_is_cut_replaced_or_gone_begins_anew(tmp_path: Path) -> None:
    file, other = tmp_path / "a", tmp_path / "b"
    file.write_bytes(b"one\ntwo\nhalf")
    lines = Lines(file)
    assert lines.read() == (False, ["one", "two"])
    with file.open("r+b") as stream:
        stream.truncate(4)
    assert lines.read() == (True, ["one"])
    other.write_bytes(b"uno\ndos\ntres\n")
    other.replace(file)
    assert lines.read() == (True, ["uno", "dos", "tres"])
    file.unlink()
    assert lines.read() == (True, [])
    assert lines.read() == (False, [])
    file.write_bytes(b"again\n")
    assert lines.read() == (False, ["again"])


def test_a_line_that_is_no_row_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    row = {"stage": "a", "step": 1, "loss": None}
    other = [b"[1]", b"{", b'{"stage": 1, "step": 2}', b'{"stage": "a", "step": true}', b'{"stage": "a"}', b"\xff"]
    file.write_bytes(b"\n".join([*other, json.dumps(row).encode(), b""]))
    assert Log(file).read() == (False, [row])
