"""``cl-runner export``: folders that answer as the run did with nothing of ours, cards whose code runs, refusals."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from cl_runner.models import merged
from cl_runner.runs.card import whence
from tests import started
from tests.breadth import narrowed, wide
from tests.command_line import NANO, SMALL, call, tree
from tests.nano import nano_t5

T5 = nano_t5()
LLAMA = ("--preset", "tiny-llama", "--data", "synthetic", *SMALL)
RUNS = {
    "olora": ("--method", "olora", *NANO),
    "llama": ("--method", "seqlora", *LLAMA),
    "pertask": ("--method", "pertask", *NANO),
    "sapt": ("--method", "sapt", *NANO),
    "l2p": ("--method", "l2p", *NANO),
    "progprompt": ("--method", "progprompt", *NANO),
    "colora": ("--method", "colora", "--set", "method.routing=hard", *NANO),
    "full": ("--method", "seqft", "--set", "output.keep_stages=1", *NANO),
    "dora": ("--method", "seqlora", "--set", "adapter.kind=dora", *NANO),
    "from": ("--method", "olora", "--from", "given", *NANO),
}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    (folder / "two.yaml").write_text(started.TWO)
    started.lora(folder / "given", T5, r=4, lora_alpha=8)
    return folder


@pytest.fixture(scope="module")
def of(room: Path) -> Any:
    """A finished run by its key, trained when it is first asked for."""

    def run(name: str) -> Path:
        if not (room / "runs" / name).exists():
            result = call("train", "--order", "two.yaml", *RUNS[name], "--name", name, cwd=room)
            assert result.code == 0, result.err
        return room / "runs" / name

    return run


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def exported(room: Path, run: Path, to: Path, *more: str) -> Any:
    result = call("export", str(run), "--to", str(to), "--json", *more, cwd=room)
    assert result.code == 0, result.err
    return result.json


def plain(folder: Path) -> Any:
    """A whole model by transformers alone."""
    wide = json.loads((folder / "config.json").read_text()).get("is_encoder_decoder")
    auto = AutoModelForSeq2SeqLM if wide else AutoModelForCausalLM
    return auto.from_pretrained(str(folder)).eval()


def close(ours: torch.Tensor, theirs: torch.Tensor, within: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=within, atol=within)


def code_of(folder: Path) -> str:
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return str(code)


def front(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    return found


# Adapters.


@pytest.mark.parametrize("stage", [1, 2])
def test_an_adapter_is_the_stage_s_own_beside_its_card(room: Path, of: Any, tmp_path: Path, stage: int) -> None:
    run = of("olora")
    before = tree(run)
    found = exported(room, run, tmp_path / "it", "--stage", str(stage))
    assert tree(run) == before, "nothing is written into the run"
    assert found["stage"] == stage and found["what"] == "a PEFT adapter"
    source = run / "stages" / ("01-dbpedia", "02-amazon")[stage - 1] / "adapter"
    names = {file.name for file in (tmp_path / "it").iterdir()}
    assert names == {"README.md", *(file.name for file in source.iterdir())} == set(found["files"])
    for file in source.iterdir():
        assert (tmp_path / "it" / file.name).read_bytes() == file.read_bytes()
    close(started.logits(started.in_peft(T5, tmp_path / "it"), True), started.committed(run, stage - 1))


def test_one_by_task(room: Path, of: Any, tmp_path: Path) -> None:
    run = of("pertask")
    several = call("export", str(run), "--to", str(tmp_path / "no"), cwd=room)
    assert several.code == 2
    assert "each task is answered by a folder of its own; say which with --task: dbpedia, amazon" in several.line
    exported(room, run, tmp_path / "it", "--task", "dbpedia")
    assert (tmp_path / "it" / "adapter_model.safetensors").read_bytes() == (
        run / "stages" / "01-dbpedia" / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert "It answers the task `dbpedia` alone" in (tmp_path / "it" / "README.md").read_text()
    other = call("export", str(run), "--to", str(tmp_path / "no"), "--task", "amzon", cwd=room)
    assert other.code == 2 and "did you mean 'amazon'" in other.line
    exported(room, of("colora"), tmp_path / "expert", "--task", "amazon")
    assert (tmp_path / "expert" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        pytest.param(
            "sapt",
            "it weighs its pairs row by row, and `adapter/` has them by their mean weights; `cl-runner eval`",
            marks=wide,
        ),
        ("l2p", "it puts prompts of its own before every input; `cl-runner eval`"),
    ],
)
def test_where_no_folder_answers_none_is_written(room: Path, of: Any, tmp_path: Path, name: str, why: str) -> None:
    for more in ((), ("--merged",), ("--task", "amazon")):
        result = call("export", str(of(name)), "--to", str(tmp_path / "no"), *more, cwd=room)
        assert result.code == 2 and why in result.line
    assert not (tmp_path / "no").exists()


def test_soft_prompts_are_peft_s(room: Path, of: Any, tmp_path: Path) -> None:
    found = exported(room, of("progprompt"), tmp_path / "it", "--task", "amazon")
    assert found["what"] == "soft prompts for PEFT" and "soft-prompts" in front(tmp_path / "it")["tags"]
    result = call(
        "export", str(of("progprompt")), "--to", str(tmp_path / "no"), "--task", "amazon", "--merged", cwd=room
    )
    assert result.code == 2 and "soft prompts change no weight of the base" in result.line


def test_another_name_of_the_base(room: Path, of: Any, tmp_path: Path) -> None:
    said = call("export", str(of("olora")), "--to", str(tmp_path / "here"), cwd=room)
    assert f"the base is named by where it lies here, {T5}; --base NAME says what the hub calls it" in said.err
    exported(room, of("olora"), tmp_path / "it", "--base", "somebody/tiny-t5")
    assert front(tmp_path / "it")["base_model"] == "somebody/tiny-t5"
    config = json.loads((tmp_path / "it" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/tiny-t5"
    for file in (tmp_path / "it").iterdir():
        assert T5.encode() not in file.read_bytes() and str(room).encode() not in file.read_bytes(), file


# Whole models.


@pytest.mark.parametrize("name", narrowed(["olora", "llama", "dora", "from"], ["olora", "llama"]))
def test_a_merged_model_answers_as_the_run_did(room: Path, of: Any, tmp_path: Path, name: str) -> None:
    run = of(name)
    found = exported(room, run, tmp_path / "it", "--merged", "--stage", "1")
    assert found["what"] == "a whole model in fp32"
    model = plain(tmp_path / "it")
    assert next(model.parameters()).dtype == torch.float32
    close(started.logits(model, name != "llama"), started.committed(run, 0))
    asked = answers_as_shown(room, run, tmp_path / "it", model, name != "llama")
    kept = [json.loads(line) for line in (run / "stages" / "01-dbpedia" / "predictions.jsonl").read_text().splitlines()]
    assert asked == {row["id"]: row["output"] for row in kept}
    assert len(asked) == 4


def answers_as_shown(room: Path, run: Path, folder: Path, model: Any, wide: bool) -> dict[str, str]:
    """The test rows of the first task, asked by transformers alone, as ``data show`` prints them."""
    shown = call("data", "show", "--task", "dbpedia", "-n", "4", "--config", str(run / "run.yaml"), "--json", cwd=room)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    found = {}
    for row in shown.json["rows"]:
        ids = tokenizer(row["input"], return_tensors="pt")
        answer = model.generate(**ids, max_new_tokens=6, do_sample=False)[0]
        answer = answer if wide else answer[ids["input_ids"].shape[1] :]
        found[row["id"]] = tokenizer.decode(answer, skip_special_tokens=True).strip()
    return found


def test_the_files_that_servers_and_converters_read(
    room: Path, of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain names, the tokenizer's own bytes, and several files with an index where one would be too large."""
    monkeypatch.setattr(merged.write, "__defaults__", ("2MB",))
    exported(room, of("olora"), tmp_path / "it", "--merged")
    names = {file.name for file in (tmp_path / "it").iterdir()}
    parts = {name for name in names if re.fullmatch(r"model-0000\d-of-0000\d\.safetensors", name)}
    assert len(parts) >= 2
    index = json.loads((tmp_path / "it" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == parts
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "it" / name).read_bytes() == (Path(T5) / name).read_bytes()
    config = json.loads((tmp_path / "it" / "config.json").read_text())
    assert config["architectures"] == ["T5ForConditionalGeneration"] and T5 not in json.dumps(config)
    close(started.logits(plain(tmp_path / "it"), True), started.committed(of("olora"), 1))


def test_a_shorter_precision_says_what_it_takes(room: Path, of: Any, tmp_path: Path) -> None:
    run = of("olora")
    found = exported(room, run, tmp_path / "it", "--merged", "--dtype", "bf16")
    with safe_open(tmp_path / "it" / "model.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    base = load_file(Path(T5) / "model.safetensors")
    adapter = load_file(run / "stages" / "02-amazon" / "adapter" / "adapter_model.safetensors")
    config = json.loads((run / "stages" / "02-amazon" / "adapter" / "adapter_config.json").read_text())
    lost = whole = 0.0
    for name in [name for name in adapter if ".lora_A." in name]:
        layer = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        B = adapter[name.replace("lora_A", "lora_B")].double()
        update = config["lora_alpha"] / config["r"] * B @ adapter[name].double()
        moved = (base[layer].double() + update).bfloat16().double() - base[layer].bfloat16().double()
        torch.testing.assert_close(
            kept[layer].double(), (base[layer].double() + update).bfloat16().double(), rtol=0.01, atol=0
        )
        lost += float((moved - update).square().sum())
        whole += float(update.square().sum())
    assert f"bf16 rounds {(lost / whole) ** 0.5:.0%} of what was learned away" in found["notes"][0]
    assert exported(room, run, tmp_path / "half", "--merged", "--dtype", "fp16")["what"] == "a whole model in fp16"
    for more, why in ((("--dtype", "int8"), "--dtype int8: must be one of"), (("--dtype", "bf16"), "say --merged")):
        flags = ("--merged",) * ("int8" in more)
        result = call("export", str(run), "--to", str(tmp_path / "no"), *flags, *more, cwd=room)
        assert result.code == 2 and why in result.line


def test_all_weights_are_a_model_already(room: Path, of: Any, tmp_path: Path) -> None:
    run = of("full")
    result = call("export", str(run), "--to", str(tmp_path / "no"), cwd=room)
    assert result.code == 2 and "are whole models (all weights trained)" in result.line and "--merged" in result.line
    exported(room, run, tmp_path / "it", "--merged")
    close(
        started.logits(plain(tmp_path / "it"), True),
        started.logits(plain(run / "stages" / "02-amazon" / "model"), True),
    )
    exported(room, run, tmp_path / "bf16", "--merged", "--dtype", "bf16")
    assert next(plain(tmp_path / "bf16").parameters()).dtype == torch.bfloat16
    gone = call("export", str(run), "--to", str(tmp_path / "no"), "--merged", "--stage", "1", cwd=room)
    assert gone.code == 2 and "this stage's model was removed (output.keep_stages)" in gone.line


# Cards.


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("olora", ()),
        pytest.param("olora", ("--merged",), marks=wide),
        pytest.param("llama", (), marks=wide),
        ("llama", ("--merged",)),
        ("progprompt", ("--task", "amazon")),
    ],
)
def test_the_card_s_code_runs_where_the_folder_lies(
    room: Path, of: Any, tmp_path: Path, name: str, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    exported(room, of(name), tmp_path / "it", *more)
    monkeypatch.chdir(tmp_path / "it")
    scope: dict[str, Any] = {}
    exec(code_of(tmp_path / "it"), scope)
    assert len(capsys.readouterr().out.splitlines()) >= 1
    if name != "progprompt":
        close(started.logits(scope["model"], name != "llama"), started.committed(of(name), 1))
    if name == "llama" and not more:
        assert "import cl_runner" in code_of(tmp_path / "it") and str(room) not in code_of(tmp_path / "it")


def test_what_the_hub_reads_of_a_card(room: Path, of: Any, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    exported(room, of("olora"), tmp_path / "it", "--license", "apache-2.0", "--base", "google/t5")
    assert front(tmp_path / "it") == {
        "license": "apache-2.0",
        "library_name": "peft",
        "base_model": "google/t5",
        "base_model_relation": "adapter",
        "tags": ["continual-learning", "olora", "lora", "cl-runner", "synthetic-data"],
    }
    card = ModelCard.load(tmp_path / "it" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "peft"
    found = exported(room, of("llama"), tmp_path / "other", "--merged")
    assert front(tmp_path / "other") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["continual-learning", "seqlora", "cl-runner", "synthetic-data"],
    }
    assert "README.md names no license; --license apache-2.0, for example, does" in found["notes"]
    assert "- The license: none was named" in (tmp_path / "other" / "README.md").read_text()


def test_a_card_says_what_the_run_says_as_of_its_stage(room: Path, of: Any, tmp_path: Path) -> None:
    run = of("from")
    exported(room, run, tmp_path / "first", "--stage", "1")
    exported(room, run, tmp_path / "last")
    first, last = ((tmp_path / name / "README.md").read_text() for name in ("first", "last"))
    scores = [
        json.loads((run / "stages" / name / "metrics.json").read_text())["scores"]
        for name in ("01-dbpedia", "02-amazon")
    ]
    rows = [
        f"| dbpedia | {scores[0]['dbpedia']:.2f} |  |",
        f"| amazon | {scores[1]['dbpedia']:.2f} | {scores[1]['amazon']:.2f} |",
    ]
    assert rows[0] in first and not any(line.startswith("| amazon |") for line in first.splitlines())
    assert rows[0] in last and rows[1] in last
    for text in (first, last):
        heads = [line for line in text.splitlines() if line.startswith(("| after stage", "| measure"))]
        assert len(heads) == 2 and all("(synthetic)" in head for head in heads)
        assert "**Its data are synthetic: made by grammars" in text
        assert "seed 42" in text and "lambda1: " in text and "arXiv 2310.14152" in text
        assert "it started from the adapter `given`" in text
        assert "torch " in text and "peft " in text
        assert str(room) not in text.replace(T5, "")
    assert "1. dbpedia\n" in first and "2. amazon\n" in last and "2. amazon" not in first


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("folder /home/me/CL_Benchmark", "folder CL_Benchmark"),
        ("file /home/me/rows.jsonl", "file rows.jsonl"),
        ("synthetic (seed 42)", "synthetic (seed 42)"),
        ("hub fancyzhx/dbpedia_14, split train", "hub fancyzhx/dbpedia_14, split train"),
    ],
)
def test_no_place_of_this_machine_is_in_a_card(source: str, told: str) -> None:
    assert whence(source) == told


# What is refused.


def test_targets_that_are_there(room: Path, of: Any, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    (tmp_path / "file").write_text("keep")
    (tmp_path / "empty").mkdir()
    for name, why in (("full", "is there already and is not empty"), ("file", "is there already and is no folder"),
                      ("file/in", "is no folder that can be written to")):  # fmt: skip
        result = call("export", str(of("olora")), "--to", str(tmp_path / name), cwd=room)
        assert result.code == 2 and why in result.line
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "keep"
    exported(room, of("olora"), tmp_path / "empty")
    assert call("export", str(of("olora")), cwd=room).line == "cl-runner: --to: say the folder to write"


def test_stages_and_runs_that_are_not_there(room: Path, of: Any, tmp_path: Path) -> None:
    to = ("--to", str(tmp_path / "no"))
    assert "--stage 3: the run" in call("export", str(of("olora")), *to, "--stage", "3", cwd=room).line
    assert "there is no run 'nope'" in call("export", "nope", *to, cwd=room).line
    unfinished = tmp_path / "unfinished"
    shutil.copytree(of("olora"), unfinished)
    shutil.rmtree(unfinished / "stages" / "01-dbpedia")
    assert "has no finished stage yet" in call("export", str(unfinished), *to, cwd=room).line
    assert not (tmp_path / "no").exists()


def test_what_is_not_what_was_committed(room: Path, of: Any, tmp_path: Path) -> None:
    run = tmp_path / "it"
    shutil.copytree(of("olora"), run)
    file = run / "stages" / "02-amazon" / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    result = call("export", str(run), "--to", str(tmp_path / "no"), cwd=room)
    assert result.code == 2 and "adapter_config.json is not what was committed" in result.line
    mapped = tmp_path / "mapped"
    shutil.copytree(of("pertask"), mapped)
    answers = mapped / "stages" / "02-amazon" / "answers.json"
    answers.write_text('{"dbpedia": "../../../../etc", "amazon": "adapter"}')
    result = call("export", str(mapped), "--to", str(tmp_path / "no"), "--task", "dbpedia", cwd=room)
    assert result.code == 2 and not (tmp_path / "no").exists()


def test_another_base_than_the_run_s(room: Path, of: Any, tmp_path: Path) -> None:
    other = tmp_path / "tiny-t5"
    shutil.copytree(T5, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "dropout_rate": 0.5}))
    more = ("--merged", "--model", str(other))
    result = call("export", str(of("olora")), "--to", str(tmp_path / "no"), *more, cwd=room)
    assert result.code == 2 and "is not the one of the run" in result.line


def test_a_disk_that_is_full_leaves_nothing(
    room: Path, of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    for more in ((), ("--merged",)):
        result = call("export", str(of("olora")), "--to", str(tmp_path / "no"), *more, cwd=room)
        assert result.code == 2 and "cannot be written (No space left on device)" in result.line
    assert list(tmp_path.iterdir()) == []
