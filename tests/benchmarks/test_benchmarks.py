"""The small pieces of the benchmarks are right, and every script starts. Nothing here looks at a clock."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, T5Config

from benchmarks import common, flops, shapes
from cl_runner.models.batch import collate_prompts
from cl_runner.models.forward import greedy

SCRIPTS = sorted(
    file.stem
    for file in (common.ROOT / "benchmarks").glob("*.py")
    if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(file.read_text()).body)
)


def test_ways_take_turns() -> None:
    said: list[str] = []

    def way(name: str) -> int:
        said.append(name)
        return len(said)

    found = common.take_turns({name: (lambda name=name: way(name)) for name in "abc"}, 2)
    assert said == ["a", "b", "c", "a", "b", "c"]
    assert found == {"a": [1, 4], "b": [2, 5], "c": [3, 6]}


def test_a_process_is_timed_and_weighed_and_its_failure_told(tmp_path: Path) -> None:
    done = common.run_process(["-c", "block = bytearray(200 << 20); print(len(block))"], tmp_path / "log")
    assert done.peak_mb > 200
    assert (tmp_path / "log").read_text().strip() == str(200 << 20)
    with pytest.raises(RuntimeError, match=r"exit code 3\n.*why"):
        common.run_process(["-c", "import sys; print('why'); sys.exit(3)"], tmp_path / "log")


def test_table_has_every_column_once() -> None:
    assert common.table([{"a": 1, "b": 0.12345}, {"b": None, "c": 1234.5}]).splitlines() == [
        "| a | b | c |",
        "|---|---|---|",
        "| 1 | 0.123 |  |",
        "|  |  | 1234.5 |",
    ]


def counted(model: torch.nn.Module, **inputs: torch.Tensor) -> int:
    """Forward FLOPs of every matrix product, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, use_cache=False)
    return counter.get_total_flops()


def test_flops_of_t5_by_hand() -> None:
    config = T5Config(vocab_size=10, d_model=4, d_kv=3, d_ff=5, num_layers=2, num_decoder_layers=1, num_heads=2)
    found = flops.t5(config, source=7, target=2)
    encoder = 2 * (4 * 4 * 6 + 2 * 4 * 5)  # two layers of q, k, v, o (4 × 6) and two feed-forward matrices (4 × 5)
    decoder = 4 * 4 * 6 + 2 * 4 * 5 + 2 * 4 * 6  # the same once, and q and o of cross-attention
    matrices = encoder * 7 + decoder * 2 + 2 * 4 * 6 * 7 + 4 * 10 * 2  # k and v of cross-attention read the source
    assert found.matrices == 2 * matrices
    assert found.attention == 4 * 6 * (2 * 7 * 7 + 2 * 2 / 2 + 2 * 7)
    assert found.frozen == 2 * found.matrices + 3 * found.attention
    assert found.full == 3 * (found.matrices + found.attention)


def test_flops_agree_with_torch() -> None:
    from transformers import LlamaForCausalLM, T5ForConditionalGeneration

    t5 = T5Config(**shapes.SHAPES["tiny-shape"], decoder_start_token_id=0)
    ids, labels = torch.ones(1, 9, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)
    model = T5ForConditionalGeneration._from_config(t5, attn_implementation="eager")
    whole = counted(model, input_ids=ids, decoder_input_ids=labels)
    ours = flops.t5(t5, 9, 3)
    # torch computes all of the decoder's own scores, of which half are looked at.
    assert whole == ours.matrices + ours.attention + 4 * 64 * 2 * 3 * 3 / 2

    llama = LlamaConfig(**shapes.SHAPES["tiny-llama-shape"])
    model = LlamaForCausalLM._from_config(llama, attn_implementation="eager")
    whole = counted(model, input_ids=ids)
    ours = flops.llama(llama, 9, 9)
    extra = 4 * 64 * 2 * 9 * 9 / 2  # above the diagonal
    rotary = whole - ours.matrices - ours.attention - extra
    assert 0 <= rotary < 0.01 * whole  # the angles are a product too


@pytest.mark.parametrize("shape", ["tiny-shape", "tiny-llama-shape"])
def test_the_rigged_model_answers_as_its_rows_say(shape: str) -> None:
    base = shapes.random_base(shape, "cpu")
    rows = shapes.rows(base, ["agnews"], 20, right=0.5)
    answers = greedy(base.model, collate_prompts(rows, base.layout), base.layout, 50)
    assert all(answer == list(shapes.ANSWER[:-1]) for answer in answers)
    right = sum(answer == row.target[:-1] for answer, row in zip(answers, rows, strict=True))
    assert 0 < right < 20


def test_lengths_come_from_the_folder_where_there_is_one(tmp_path: Path) -> None:
    folder = tmp_path / "TC" / "agnews"
    folder.mkdir(parents=True)
    file = folder / "train.json"
    file.write_text(json.dumps([{"sentence": "one two three", "label": "World"}]))
    [short] = set(shapes.source_lengths("agnews", 5, tmp_path))
    file.write_text(json.dumps([{"sentence": " ".join(["word"] * 13), "label": "World"}]))
    assert set(shapes.source_lengths("agnews", 5, tmp_path)) == {short + 13}  # ten words more
    assert max(shapes.source_lengths("yahoo", 2000, tmp_path)) <= shapes.LONGEST


def test_every_script_is_known() -> None:
    assert {"order", "evaluation", "stages", "penalty", "startup", "compiled", "gpu"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_explains_itself(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process: torch is imported once.
    main = importlib.import_module(f"benchmarks.{script}").main
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: {script}.py" in said
    assert "--json" in said
