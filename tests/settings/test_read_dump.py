"""What ``dump`` wrote is read back a line at a time, and anything else as YAML is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cl_runner.config.yamlfile import load
from cl_runner.errors import UserError
from cl_runner.methods import method_schema
from cl_runner.settings import dump, read_dump, resolve

CASES: list[dict[str, Any]] = [
    {"order": "order1"},
    {"order": "order4", "sets": ["tasks.CB.training.epochs=3", "stages.2.training.lr=1e-5", "output.name=007"]},
    {"order": "order1", "sets": ['output.dir="a: #\\n\\u2028é\\x85\\\\"', 'adapter.rank_pattern={"q.*": 4, no: 2}']},
    {"order": "order1", "sets": ["options.slow_copy={beta: 0.5}", "adapter.target_modules=[no, 'null', a b]"]},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def test_what_was_dumped_is_read_a_line_at_a_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [dump(resolve(method_schema=method_schema, **case).config) for case in CASES]
    wanted = []
    for text in texts:
        file.write_text(text)
        wanted.append(load(file).data)

    def whole(file: Path) -> None:
        raise AssertionError("read as a whole")

    monkeypatch.setattr(sys.modules["cl_runner.settings.dump"], "load", whole)
    for text, data in zip(texts, wanted, strict=True):
        file.write_text(text)
        assert read_dump(file) == data
    file.write_text(texts[2])
    first, second = read_dump(file), read_dump(file)
    first["adapter"]["rank_pattern"]["more"] = 1
    assert second["adapter"]["rank_pattern"] == {"q.*": 4, "no": 2}, "a line is parsed once, and is nobody's to change"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# a comment\nseed: 1\n",
        "seed: 1 # one\nmodel:\n  name: a # b\n",
        "model:\n    name: a\n",
        "model: {name: a,\n  dtype: fp32}\n",
        'model:\n  name: "a\n    b"\n',
        "model:\n  name: |\n    a: b\n",
        "model:\n  name: a\n    b\n",
        "adapter:\n  target_modules:\n  - q\n  - v\n",
        "model:\nseed: 1\n",
        "model: ~\nadapter: null\nseed: null # no\n",
        "model: &m {name: a}\ndata: *m\n",
        "tasks:\n  a:\n    training.lr: 1\n  b:\nstages:\n  1:\n    training.lr: 2\nseed: 3\n",
        "seed: 1\r\nmodel:\r\n  name: a\r\n",
        "---\nseed: 1\n",
        "model:\n\n  name: a\n\n",
        "? seed\n: 1\n",
    ],
)
def test_what_somebody_wrote_otherwise_is_read_all_the_same(file: Path, text: str) -> None:
    file.write_bytes(text.encode())
    assert read_dump(file) == load(file).data


@pytest.mark.parametrize(
    "text", ["seed: 1\nseed: 2\n", "seed: 1\n  a: 2\n", "seed: null\n  a: 2\n", "model:\n  a: 1\n  a: 2\n", "a: [1\n"]
)
def test_what_is_wrong_is_refused_as_ever(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(UserError) as wanted:
        load(file)
    with pytest.raises(UserError) as found:
        read_dump(file)
    assert str(found.value) == str(wanted.value)
