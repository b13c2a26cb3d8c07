"""Delimited text: quotes that are text, rows that a quote would swallow, delimiters, encodings, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_runner.errors import UserError
from cl_runner.tasks import files
from cl_runner.tasks.task import Columns, FileFormat


def read(
    folder: Path, name: str, content: str | bytes, columns: dict[str, Any] | None = None, **how: Any
) -> files.Found:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return files.read([str(path)], "train", Columns(**columns or {}), "task mine, source.train", FileFormat(**how))


def pairs(found: files.Found) -> list[tuple[str, str]]:
    return [(row.text, row.label) for row in found.rows]


# A tab parts the cells: a quote is text, wherever it stands.
GLUE = [
    ('text\tlabel\n"open\ta\nb\tc\nclose"\ta\nd\tc\n', [('"open', "a"), ("b", "c"), ('close"', "a"), ("d", "c")]),
    ('text\tlabel\n"\tx\n"\ty\n', [('"', "x"), ('"', "y")]),
    ('text\tlabel\nsays "yes"\tx\n', [('says "yes"', "x")]),
    ('text\tlabel\n"all of it"\tx\n', [('"all of it"', "x")]),
    ('text\tlabel\na ""b"" c\tx\n', [('a ""b"" c', "x")]),
    ("text\tlabel\r\na 'b\tx\r\nc\ty\r\n", [("a 'b", "x"), ("c", "y")]),
    ('idx\ttext\tlabel\n0\t"one"\t1\n\n1\ttwo"\t0', [('"one"', "1"), ('two"', "0")]),
    ("text\tlabel\na, b; c|d\tx\n", [("a, b; c|d", "x")]),
    ('label\ttext\nx\t5" by 7"\ny\t"\n', [('5" by 7"', "x"), ('"', "y")]),
    ('text\tlabel\n a \t"x"\n', [(" a ", '"x"')]),
    ("\ufefftext\tlabel\nNA\tNone\nnull\tnan\n", [("NA", "None"), ("null", "nan")]),
]


@pytest.mark.parametrize(("content", "rows"), GLUE)
def test_quotes_in_tab_separated_files_are_text(tmp_path: Path, content: str, rows: list[tuple[str, str]]) -> None:
    found = read(tmp_path, "x.tsv", content)
    assert pairs(found) == rows and found.notes == []
    assert pairs(read(tmp_path, "x.data", content, delimiter="tab")) == rows


def test_quoting_is_had_for_the_asking_and_the_want_of_it_is_said(tmp_path: Path) -> None:
    content = 'text\tlabel\nplain\tx\n"say ""hi"""\ty\n'
    plain = read(tmp_path, "x.tsv", content)
    assert pairs(plain) == [("plain", "x"), ('"say ""hi"""', "y")]
    assert plain.notes == ["x.tsv:3: quotes are read as text; if cells stand in quotes here, set source.quoting: csv"]
    assert pairs(read(tmp_path, "x.tsv", content, quoting="csv")) == [("plain", "x"), ('say "hi"', "y")]
    none = read(tmp_path, "x.csv", 'text,label\n"a,x\nb",y\n', quoting="none")
    assert pairs(none) == [('"a', "x"), ('b"', "y")]


# A stray quote in CSV takes rows into a cell. Each line of the cell is like a row.
SWALLOWED = [
    ('text,label\n"open,a\nb,c\nclose",a\nd,c\n', 2),
    ('text,label\nx,a\n"open,a\nclose",a\n', 3),
    ('label,text\na,"open\nc,b\na,close"\n', 2),
    ('id,text,label\n1,"open,a\n2,b,c\n3,close",a\n', 2),
    ('text;label\n"open;a\nb;c\nclose";a\n', 2),
    ('text|label\nd|a\nd|a\n"open|a\nb|c\nb|c\nb|c\nclose"|a\n', 4),
    ('text,label\r\n"open,a\r\nb,c\r\nclose",a\r\n', 2),
    ('text,label\n"open,a\nclose",a\nx,b\n"again,a\nb,c\nclose",a\n', 2),
    ('text,label\n"good, bad",a\n"open,a\nb,c\nclose",a\n', 3),  # quoting that is meant beside a quote that is not
    ('text,label\n"open,a\n\nclose",a\n"b",c\n"x,a\nclose",a\n"y, a\nclose",a\n', 2),
]


@pytest.mark.parametrize(("content", "line"), SWALLOWED)
def test_rows_in_a_quoted_cell_are_refused(tmp_path: Path, content: str, line: int) -> None:
    with pytest.raises(UserError, match=rf"x.csv:{line}: a cell in quotes spans lines.*source.quoting: none.*csv$"):
        read(tmp_path, "x.csv", content)
    asked = read(tmp_path, "x.csv", content, quoting="csv")
    assert f"x.csv:{line}: a cell in quotes spans lines" in asked.notes[-1], "read as asked, and said"


TEXTS = [
    ["two\nlines"], ["a, b\nc, d"], ["one, two, three\nfour"], ["\n"], ["a\n\nb"], ["x,\ny,\nz"], ["a\r\nb, c, d"],
    ["it costs 1,000\nbye", "a, b\nc, d, e", "two\nlines"],  # one of three is like a row by chance
    ["dear all, hello\nbye"], ['he said "no,never"\nand went'], ["a\tb\nc\td"],
]  # fmt: skip


@pytest.mark.parametrize("texts", TEXTS)
def test_texts_of_several_lines_are_read(tmp_path: Path, texts: list[str]) -> None:
    import csv
    import io

    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerows([["text", "label"], *([text, "a"] for text in texts), ["plain", "b"]])
    found = read(tmp_path, "x.csv", stream.getvalue())
    assert [row.text for row in found.rows] == [*texts, "plain"]
    assert len(found.notes) == (len(texts) > 1) and all("1 of 3 such cells" in note for note in found.notes)


DELIMITERS = [
    ("x.csv", "text;label\na, b;x\n", [("a, b", "x")], "';'"),
    ("x.csv", '"text";"label"\n"a; b";"x"\n', [("a; b", "x")], "';'"),
    ("x.csv", "text|label\na,b|x\n", [("a,b", "x")], "'|'"),
    ("x.csv", 'text\tlabel\n"a\tx\n', [('"a', "x")], "a tab"),
    ("x.tsv", "text,label\na,x\n", [("a", "x")], "','"),
    ("x.tsv", "text;label\na;x\n", [("a", "x")], "';'"),
    ("x.csv", '"text, all";label\na;x\n', [("a", "x")], "';'"),
    ("x.csv", "text,label\na;b,x\n", [("a;b", "x")], None),
    ("x.csv.gz", "text;label\na;x\n", [("a", "x")], "';'"),
    ("x.csv", "\ufefftext;label\r\na;x\r\n", [("a", "x")], "';'"),
]


@pytest.mark.parametrize(("name", "content", "rows", "said"), DELIMITERS)
def test_the_header_tells_the_delimiter(
    tmp_path: Path, name: str, content: str, rows: list[tuple[str, str]], said: str | None
) -> None:
    import gzip

    packed = gzip.compress(content.encode()) if name.endswith(".gz") else content
    text = "text, all" if "all" in content else "text"
    found = read(tmp_path, name, packed, {"text": text, "label": "label"})
    assert pairs(found) == rows
    assert found.notes == ([f"{name}: {said} parts the columns, by the header"] if said else [])


def test_a_delimiter_of_ones_own(tmp_path: Path) -> None:
    content = "text~label,or not\na~x\n"
    columns = {"text": "text", "label": "label,or not"}
    assert pairs(read(tmp_path, "x.csv", content, columns, delimiter="~")) == [("a", "x")]
    assert pairs(read(tmp_path, "x.txt", "text label\na x\n", delimiter=" ")) == [("a", "x")]
    with pytest.raises(UserError, match=r"x.txt: rows are read from files that end in .*set source.delimiter"):
        read(tmp_path, "x.txt", "text label\na x\n")
    with pytest.raises(UserError, match=r"x.csv:1: ';' and '\|' may part the columns; set source.delimiter"):
        read(tmp_path, "x.csv", "text;label|more\na;x|y\n")


WORDS = "text,label\nBüro – zu,größer\n"
ENCODED = [
    (
        WORDS.replace("–", "-").encode("latin-1"),
        "latin-1",
        r":2: not UTF-8 text \(byte 0xfc\).*source.encoding: latin-1",
    ),
    (WORDS.encode("cp1252"), "cp1252", r":2: not UTF-8 text \(byte 0xfc\).*source.encoding: cp1252"),
    (WORDS.encode("utf-16"), "utf-16", r":1: not UTF-8 but UTF-16 text; set source.encoding: utf-16"),
    (b"\xfe\xff" + WORDS.encode("utf-16-be"), "utf-16", "set source.encoding: utf-16"),
    (WORDS.encode("utf-16-le"), "utf-16-le", "set source.encoding: utf-16-le"),
    (WORDS.encode("utf-16-be"), "utf-16-be", "set source.encoding: utf-16-be"),
    ("text,label\nplain,x\n".encode("utf-16-le"), "utf-16-le", r"x.csv: UTF-16 text; set source.encoding: utf-16-le"),
    (
        WORDS.encode("utf-32"),
        "utf-32",
        r"x.csv.*not UTF-8 but UTF-32 text; set source.encoding: utf-32, or save the file",
    ),
    (b"\0\0\xfe\xff" + WORDS.encode("utf-32-be"), "utf-32", "UTF-32 text; set source.encoding: utf-32,"),
    (WORDS.encode("utf-32-le"), "utf-32-le", "UTF-32 text; set source.encoding: utf-32-le,"),
    (WORDS.encode("utf-32-be"), "utf-32-be", "UTF-32 text; set source.encoding: utf-32-be,"),
    ("text,label\nplain,x\n".encode("utf-32-le"), "utf-32-le", r"x.csv: UTF-32 text; set source.encoding: utf-32-le,"),
    ("text,label\nprosto,ž\n".encode("cp1250"), "cp1250", "not UTF-8 text"),
    ("text,label\n日本語,良い\n".encode("shift_jis"), "shift_jis", "not UTF-8 text"),
    ("text,label\nслово,да\n".encode("koi8-r"), "koi8-r", "not UTF-8 text"),
    (b"text,label\nhi,caf\xc3", None, r":2: not UTF-8 text"),
]


@pytest.mark.parametrize(("raw", "encoding", "says"), ENCODED)
def test_encodings_are_named_and_taken(tmp_path: Path, raw: bytes, encoding: str | None, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        read(tmp_path, "x.csv", raw)
    assert "\n" not in str(caught.value)
    if encoding:
        ((text, label),) = pairs(read(tmp_path, "x.csv", raw, encoding=encoding))
        assert f"text,label\n{text},{label}\n" == raw.decode(encoding).lstrip("\ufeff")


def test_utf8_needs_no_word_and_another_word_is_refused(tmp_path: Path) -> None:
    for raw in (WORDS.encode(), WORDS.encode("utf-8-sig")):
        assert pairs(read(tmp_path, "x.csv", raw)) == pairs(read(tmp_path, "x.csv", raw, encoding="utf-8"))
    with pytest.raises(UserError, match=r"not ascii text .*source.encoding names another"):
        read(tmp_path, "x.csv", WORDS, encoding="ascii")


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.json"])
@pytest.mark.parametrize("kind", ["utf-32", "utf-32-le", "utf-32-be", "utf-16", "utf-16-le", "utf-16-be"])
def test_wide_text_under_another_name_is_told(tmp_path: Path, name: str, kind: str) -> None:
    """Where the setting is wrong, what the file is stands in the line: utf-16 of a file in UTF-32, for one."""
    content = "text,label\nhi,x\n" if name == "x.csv" else '{"text": "hi", "label": "x"}\n'
    content = content if name != "x.json" else f"[{content}]"
    (tmp_path / name).write_bytes(content.encode(kind))
    with pytest.raises(UserError, match=kind[:6].upper()):
        files.read([str(tmp_path / name)], "train", Columns(), "")
    for wrong in ("utf-16", "utf-32", "latin-1", "utf-8"):
        if kind.startswith(wrong):
            continue
        with pytest.raises(UserError, match=rf"({kind}|source.encoding names another one)") as caught:
            files.read([str(tmp_path / name)], "train", Columns(), "", FileFormat(encoding=wrong))
        assert "\n" not in str(caught.value)
    found = files.read([str(tmp_path / name)], "train", Columns(), "", FileFormat(encoding=kind))
    assert pairs(found) == [("hi", "x")]


REFUSED = [
    ("text,label\na,b\nc\n", r"x.csv:3: row 2 has 1 columns, the header 2"),
    ("text,label\na,b,\n", r"x.csv:2: row 1 has 3 columns, the header 2"),
    (
        'text,label\n"a\nb",c,d\n',
        r"x.csv:3: row 1 has 3 columns, the header 2 \(lines 2 to 3, in quotes.*quoting: none",
    ),
    ("text,label,text\na,b,c\n", r"x.csv:1: a column is there twice: 'text'"),
    (",,label\na,b,c\n", r"x.csv:1: a column is there twice: ''"),
    ("\ntext,label\na,b\n", r"x.csv:1: the first line is empty; it must name the columns"),
    (" , \na,b\n", r"x.csv:1: the first line is empty"),
    ("", r"x.csv: the file is empty"),
    ("good film,1\nbad film,0\n", r"x.csv: row 1 \(train/0\) has 'good film', '1'; say what holds text and answer"),
    ("1,1\n2,0\n", r"x.csv:1: a column is there twice: '1' \(1,1\); the first line must name the columns"),
    ('text,label\na,b\n"c,d\ne,f\n', r"x.csv:3: broken CSV: unexpected end of data.*begins in line 3.*quoting: none"),
    ('text,label\n"a" b,c\n', r"x.csv:2: broken CSV: ',' expected after '\"'.*source.quoting: none"),
    ("text,label\na\0b,c\n", r"x.csv.*NUL"),
]


@pytest.mark.parametrize(("content", "says"), REFUSED)
def test_refused_with_file_line_and_row(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        read(tmp_path, "x.csv", content)
    assert "\n" not in str(caught.value)


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1).filter(str.strip)


@settings(deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), st.sampled_from([",", ";", "|", "\t"]))
def test_what_the_standard_writes_is_read_again(rows: list[tuple[str, str]], delimiter: str) -> None:
    import csv
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.csv"
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, delimiter=delimiter).writerows([("text", "label"), *rows])
        how = FileFormat(quoting="csv", delimiter=delimiter)
        assert pairs(files.read([str(path)], "train", Columns(), "", how)) == rows
        plain = [row for row in rows if not set("\n\t") & set("".join(row))]
        if plain:
            path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in plain), encoding="utf-8")
            assert pairs(files.read([str(path)], "train", Columns(), "", FileFormat(delimiter="\t"))) == plain


def test_the_column_of_numbers_that_pandas_writes_is_no_matter(tmp_path: Path) -> None:
    assert pairs(read(tmp_path, "x.csv", ",text,label\n0,a,b\n")) == [("a", "b")]
    assert pairs(read(tmp_path, "x.csv", ",sentence,label\n0,a,b\n")) == [("a", "b")]
