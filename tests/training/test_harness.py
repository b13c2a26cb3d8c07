"""A committed stage under lm-evaluation-harness: as its own HFLM on the stage's PEFT folder, and what is written."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cl_runner.commands.given import own_settings
from cl_runner.engine import zero as engine
from cl_runner.engine.process import here
from cl_runner.runs.folder import RunDir
from cl_runner.training.as_committed import as_committed
from cl_runner.training.plan import Plan
from tests.command_line import NANO, call

needs_it = pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm_eval is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # the harness's own

ROWS = [
    {"question": "Which is a colour?", "choices": ["red", "seven", "a long run", "dog"], "answer": 0},
    {"question": "What is 2 + 2?", "choices": ["3", "5", "4", "twenty-two"], "answer": 2},
    {"question": "Which animal barks?", "choices": ["a cat", "a dog", "a fish", "none"], "answer": 1},
]
TASKS = {
    "quiz": """output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]""",
    "say": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]""",
    "draw": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: true, temperature: 0.7}
metric_list: [{metric: exact_match}]""",
    "words": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of both families of models, of which one conditions its rows; tasks of the harness's beside them."""
    cwd = tmp_path_factory.mktemp("harness")
    (cwd / "tasks").mkdir()
    (cwd / "tasks" / "rows.json").write_text(json.dumps(ROWS))
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {cwd / 'tasks' / 'rows.json'}}}}}"
        (cwd / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{data}\ntest_split: test\n{text}\n")
    for name, method, model in (("t5", "seqlora", ""), ("llama", "seqlora", "tiny-llama"), ("routed", "gainlora", "")):
        more = [f"--model={model}"] if model else []
        done = call("train", "--order", "order1-three", "--method", method, "--name", name, *NANO, *more, cwd=cwd)
        assert done.code == 0, done.err
    return cwd


@contextmanager
def opened(folder: Path, run: str, index: int) -> Iterator[Any]:
    """A stage as ``eval`` opens it."""
    rundir = RunDir(folder / "runs" / run)
    resolved = own_settings(rundir)
    assert resolved.order is not None
    place = here()
    engine.start(place)
    try:
        plan = Plan.make(resolved.config, resolved.order.name, resolved.order.tasks, only=[])
        with as_committed(plan, rundir, index, place) as (stage, _):
            yield stage
    finally:
        engine.stop()


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@needs_it
@pytest.mark.parametrize("run", ["t5", "llama"])
def test_as_its_own_model_on_the_stages_folder(folder: Path, run: str) -> None:
    """Likelihoods and greedy answers of HFLM on plain transformers and PEFT, which know nothing of us."""
    from lm_eval.models.huggingface import HFLM
    from peft import PeftModel

    from cl_runner.config.schema import ModelConfig
    from cl_runner.models.base import load_base
    from cl_runner.training.harness_model import HarnessModel

    said = [(f"Question: {row['question']}\nAnswer:", f" {choice}") for row in ROWS for choice in row["choices"]]
    said += [("", "a dog"), ("x " * 3000, " a dog")]  # nothing before it; longer than the model reads
    told = [(row["question"], {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}) for row in ROWS]
    with opened(folder, run, 1) as stage:
        name, device = stage.room.base.name_or_path, stage.device
        ours = HarnessModel(stage)
        likely = ours.loglikelihood(requests("loglikelihood", said[:-1]), disable_tqdm=True)
        texts = ours.generate_until(requests("generate_until", told), disable_tqdm=True)
        longest = ours.loglikelihood(requests("loglikelihood", said[-1:]), disable_tqdm=True)
        whole = run == "llama" and ours.loglikelihood_rolling(requests("loglikelihood_rolling", [("a dog is red",)]))
    base = load_base(ModelConfig(name="tiny-llama" if run == "llama" else name), device)
    adapter = folder / "runs" / run / "stages" / "02-amazon" / "adapter"
    model: Any = PeftModel.from_pretrained(base.model, str(adapter))
    backend: Any = "causal" if run == "llama" else "seq2seq"
    theirs = HFLM(pretrained=model, tokenizer=base.tokenizer, backend=backend, batch_size=2, max_length=ours.max_length)
    expected = theirs.loglikelihood(requests("loglikelihood", said[:-1]), disable_tqdm=True)
    assert [log for log, _ in likely] == pytest.approx([log for log, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in likely] == [greedy for _, greedy in expected]
    assert texts == theirs.generate_until(requests("generate_until", told), disable_tqdm=True)
    cut = theirs.loglikelihood(requests("loglikelihood", said[-1:]), disable_tqdm=True)
    assert longest[0][0] == pytest.approx(cut[0][0], abs=2e-3)
    if whole:
        rolled = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", [("a dog is red",)]), disable_tqdm=True)
        assert whole == pytest.approx(rolled, abs=1e-3)


@needs_it
def test_results_are_written_as_it_writes_them(folder: Path) -> None:
    words = ("--lm-eval", "quiz,say", "--include-path", "tasks")
    done = call("eval", "routed", *words, "--stage", "2", cwd=folder)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[1] == "stage 2 (amazon) by lm-evaluation-harness:"
    [file] = (folder / "runs" / "routed" / "lm-eval" / "02-amazon").glob("results_*.json")
    assert lines[-1] == f"written: runs/routed/lm-eval/02-amazon/{file.name}"
    found = json.loads(file.read_text())
    assert {"results", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "config", "date",
            "lm_eval_version", "transformers_version", "model_name", "model_source"} <= set(found)  # fmt: skip
    assert found["model_name"] == "routed/2" and found["n-samples"]["quiz"] == {"original": 3, "effective": 3}
    acc = found["results"]["quiz"]["acc,none"]
    assert any(line.startswith(f"  quiz acc: {acc:.4f} ± ") for line in lines)
    # The same by our own scoring of the same rows.
    (folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sets = "eval.extra=[{name: text, file: quiz.jsonl, by: text}, {name: norm, file: quiz.jsonl, by: text_norm}]"
    ours = call("eval", "routed", "--stage", "2", "--set", sets, "--json", cwd=folder).json["extra"]
    assert ours["text"]["score"] == pytest.approx(100 * acc)
    assert ours["norm"]["score"] == pytest.approx(100 * found["results"]["quiz"]["acc_norm,none"])
    assert call("verify", "routed", cwd=folder).code == 0


@needs_it
def test_the_base_some_rows_and_json(folder: Path) -> None:
    found = call("eval", "llama", "--stage", "0", "--lm-eval", "quiz,words", "--include-path", "tasks", "--limit", "2",
                 "--json", cwd=folder)  # fmt: skip
    assert found.code == 0, found.err
    assert (found.json["stage"], found.json["name"]) == (0, "base")
    assert (
        found.json["results"]["quiz"]["sample_len"] == 2 and found.json["results"]["words"]["word_perplexity,none"] > 1
    )
    assert "--stage 0: the run" in call("eval", "llama", "--stage", "0", cwd=folder).line
    assert (folder / found.json["file"]).is_file() and "/lm-eval/00-base/" in found.json["file"]


@needs_it
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("quizz", "--include-path", "tasks"), "--lm-eval quizz: lm-evaluation-harness has no such task; did you mean"),
        (("quiz", "--include-path", "nowhere"), "--include-path nowhere: no such folder"),
        (("draw", "--include-path", "tasks"), "this task draws its answers (do_sample, temperature); ours are greedy"),
        (("words", "--include-path", "tasks"), "(perplexity) is of decoder-only models"),
        ((" ,", "--include-path", "tasks"), "--lm-eval ' ,': names nothing"),
    ],
)
def test_what_it_cannot_be_asked(folder: Path, words: tuple[str, ...], said: str) -> None:
    refused = call("eval", "t5", "--lm-eval", *words, cwd=folder)
    assert refused.code == 2 and said in refused.err.splitlines()[-1] and refused.out == ""
    assert not (folder / "runs" / "t5" / "lm-eval").exists()


def test_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("eval", "t5", "--limit", "3", cwd=tmp_path).line == "cl-runner: --limit goes with --lm-eval"
    assert "--include-path goes with --lm-eval" in call("eval", "t5", "--include-path", "x", cwd=tmp_path).line
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = call("eval", "t5", "--lm-eval", "mmlu", cwd=tmp_path)
    assert missing.code == 2
    assert missing.line == "cl-runner: --lm-eval needs the package lm_eval: pip install 'cl-runner[lm-eval]'"
