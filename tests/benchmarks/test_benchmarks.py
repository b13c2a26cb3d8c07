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

from benchmarks import common, flops, job, plain_peft, reference_style, shapes
from cl_runner.models.batch import IGNORE, collate, collate_prompts
from cl_runner.models.forward import greedy, logits, token_loss

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


JOBS = [
    job.Job(order="order2", train=3, test=4, micro_batch=2),
    job.Job(model="tiny-llama", train=4, test=4, epochs=1, seed=7, micro_batch=4, max_source=200, lr=2e-3),
]


@pytest.mark.parametrize("given", JOBS, ids=["tiny-t5", "tiny-llama"])
def test_a_job_reaches_other_processes_and_the_package_as_it_is(given: job.Job) -> None:
    parser = common.parser(None)
    job.add_arguments(parser)
    assert job.Job.given(parser.parse_args(given.as_arguments())) == given
    config = given.config
    assert config.model.name == (given.model or "tiny-t5") and config.order == given.order
    assert (config.training.global_batch, config.training.micro_batch) == (given.micro_batch,) * 2
    assert (config.data.max_source, config.data.max_train) == (given.max_source, given.train)
    # The preset's, as set, and the published form's own.
    assert (config.training.lr, given.penalty) == ((1.5e-3, 0.1) if given.model is None else (2e-3, 0.5))


@pytest.mark.parametrize("given", JOBS, ids=["tiny-t5", "tiny-llama"])
def test_the_ways_train_on_the_same_loss_and_answer_the_same(given: job.Job) -> None:
    from transformers import DataCollatorForSeq2Seq

    base = given.base()
    rows = given.examples(base, "agnews", "train")
    with torch.no_grad():
        batch = collate(rows, base.layout)
        losses = token_loss(logits(base.model, batch), batch.labels)
        wanted = float((losses * batch.token_weights).sum() / batch.token_weights.sum())

        read, labels = zip(*(job.training_row(base, row) for row in rows), strict=True)
        targets = reference_style.padded(list(labels), IGNORE, base)
        ours = base.model(**reference_style.inputs(list(read), base, None), labels=targets).loss
        assert float(ours) == pytest.approx(wanted, rel=1e-5)

        base.tokenizer.padding_side = "right"
        plain = DataCollatorForSeq2Seq(base.tokenizer, model=base.model)(plain_peft.rows_of(base, rows))
        assert float(base.model(**plain).loss) == pytest.approx(wanted, rel=1e-5)

    answers = greedy(base.model, collate_prompts(rows, base.layout), base.layout, reference_style.MAX_NEW_TOKENS)
    for found in (reference_style.answers(base, rows, None), plain_peft.answers(base.model, base, rows)):
        texts = [[base.tokenizer.decode(ids, skip_special_tokens=True) for ids in each] for each in (found, answers)]
        assert texts[0] == texts[1]
    golds = [row.target for row in rows]
    assert job.exact_match(base, golds, rows) == 100.0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_reference_style_layers_answer_as_peft_does() -> None:
    from peft import LoraConfig, get_peft_model

    given = JOBS[1]
    rows = given.examples(given.base(), "agnews", "train")
    base, same = given.base(), given.base()
    reference_style.with_loras(base.model, given, None)
    adapter = given.config.adapter
    options = {"r": adapter.largest, "lora_alpha": adapter.alpha, "target_modules": ["q_proj", "v_proj"]}
    wrapped = get_peft_model(same.model, LoraConfig(**options, task_type="CAUSAL_LM"))
    named = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name, module in base.model.named_modules():
            if isinstance(module, reference_style.TwoLoras):
                module.new_B.normal_()
                for factor, value in (("A", module.new_A), ("B", module.new_B)):
                    named[f"base_model.model.{name}.lora_{factor}.default.weight"].copy_(value)
        prompts = reference_style.inputs([row.source for row in rows], base, None)
        found = [model.eval()(**prompts).logits for model in (base.model, wrapped)]
        before = given.base().model(**prompts).logits
    assert torch.allclose(*found, atol=1e-4) and not torch.allclose(found[0], before, atol=1e-2)


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
