"""``cl-runner analyze`` asks models: gradients of tasks and base drift, against plain transformers and PEFT."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import cl_runner
from cl_runner.runs.folder import RunDir
from cl_runner.runs.resume_guard import recorded
from cl_runner.tasks import benchmark, synthetic
from cl_runner.training import task_gradients
from tests.breadth import narrowed, wide
from tests.command_line import NANO, ORDER, SMALL, STAGES, call, results, variables
from tests.nano import nano_t5

LLAMA = Path(cl_runner.__file__).parent / "models/embedded/tiny-llama"
TEXT = (
    "A river runs through the old town, and on its banks people sell fruit and bread in the morning.\n"
    "In winter it freezes over.\n\n"
    "Nobody knew why the lamp had gone out.\n"
)
FAMILIES = {
    "t5": (*NANO, "--set=adapter.r=8"),
    "llama": ("--model", "tiny-llama", "--preset", "tiny", "--data", "synthetic", *SMALL),
}
METHODS = {"t5": "olora", "llama": "seqlora"}


@pytest.fixture(scope="module", params=narrowed(FAMILIES, ["t5"]))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def trained(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp(family)
    (cwd / "three.yaml").write_text(ORDER)
    (cwd / "text.txt").write_text(TEXT)
    done = call("train", "--order", "three.yaml", "--method", METHODS[family], *FAMILIES[family], "--name=it", cwd=cwd)
    assert done.code == 0, done.err
    return cwd / "runs/it"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained.parents[1], tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs/it"


class Plain:
    """A stage's model (0: the base) as transformers and PEFT have it, fp64."""

    def __init__(self, run: Path, family: str, stage: int) -> None:
        folder = nano_t5() if family == "t5" else str(LLAMA)
        auto: Any = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
        self.wide = family == "t5"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = auto.from_pretrained(folder, dtype=torch.float64)
            if stage:
                adapter = run / "stages" / f"{stage:02d}-{STAGES[stage - 1]}" / "adapter"
                model = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        self.model: Any = model.eval()
        self.model.requires_grad_(False)

    def scores(self, read: Sequence[int], written: Sequence[int]) -> Tensor:
        """Of what comes at each place of ``written``, and behind it (t + 1, V)."""
        if self.wide:
            start = [self.model.config.decoder_start_token_id, *written]
            ids = {"input_ids": torch.tensor([[*read]]), "decoder_input_ids": torch.tensor([start])}
            return self.model(**ids).logits[0]  # type: ignore[no-any-return]
        return self.model(input_ids=torch.tensor([[*read, *written]])).logits[0, len(read) - 1 :]  # type: ignore[no-any-return]

    def loss(self, read: Sequence[int], written: Sequence[int]) -> Tensor:
        """Sum over what is written."""
        return functional.cross_entropy(self.scores(read, written)[:-1], torch.tensor([*written]), reduction="sum")

    def choice(self, read: Sequence[int], labels: Sequence[Sequence[int]]) -> Sequence[int]:
        """Token by token the likeliest that leads to some label."""
        at = 0
        while len(labels) > 1:
            nexts = sorted({label[at] for label in labels})
            if len(nexts) > 1:
                scores = self.scores(read, labels[0][:at])[-1]
                best = nexts[int(scores[nexts].argmax())]
                labels = [label for label in labels if label[at] == best]
            at += 1
        return labels[0]

    def ids(self, text: str, whole: bool = True) -> list[int]:
        """Of a text; ``whole``: with the special tokens of an input."""
        found: list[int] = self.tokenizer(text, add_special_tokens=whole)["input_ids"]
        end = self.tokenizer.eos_token_id
        return found[:-1] if whole and not self.wide and found[-1] == end else found

    def target(self, label: str) -> list[int]:
        return [*self.ids(label, whole=False), self.tokenizer.eos_token_id]


def rows(run: Path, task: str, split: str) -> tuple[list[str], list[str]]:
    """Inputs and labels, as a run of these settings reads them."""
    data = recorded(RunDir(run)).data
    most = data.max_train if split == "train" else data.max_test
    made = synthetic.sample(task, split, None, data.seed)[:most]
    names = {"add_task_name": data.add_task_name, "add_dataset_name": data.add_dataset_name}
    return [str(benchmark.get(task).prompt(row.text, **names)) for row in made], [row.label for row in made]


def test_loss_on_text_and_choices_on_unseen_tasks(run: Path, family: str) -> None:
    before = results(run)
    given = ("analyze", "it", "--text=text.txt", "--unseen=yelp", "--unseen", "SST-2", "--json")
    found = call(*given, cwd=run.parents[1]).json
    drift = found["drift"]
    assert drift == json.loads((run / "analysis.json").read_text())["drift"] and results(run) == before
    assert drift["text"] == "text.txt"
    assert drift["tasks"] == {name: {"rows": 4, "synthetic": True} for name in ("yelp", "SST-2")}
    assert [each["stage"] for each in drift["at"]] == ["base", *STAGES]
    assert not found["skipped"] and "gradients" not in found
    for stage in (0, 3):
        plain, of = Plain(run, family, stage), drift["at"][stage]
        loss, tokens = 0.0, 0
        for text in TEXT.split("\n\n"):
            ids = plain.ids(text.strip(), whole=False)
            begin = [] if plain.wide else plain.ids("a")[: -len(plain.ids("a", whole=False))]
            half = len(ids) // 2 if plain.wide else 0 if begin else 1
            end = [plain.tokenizer.eos_token_id] if plain.wide else []
            loss += float(plain.loss([*begin, *ids[:half], *end], ids[half:]))
            tokens += len(ids) - half
        assert of["loss"] == pytest.approx(loss / tokens, rel=1e-5)
        for task in ("yelp", "SST-2"):
            prompts, golds = rows(run, task, "test")
            labels = {label: plain.target(label) for label in benchmark.get(task).labels or ()}
            right = [
                plain.choice(plain.ids(prompt), list(labels.values())) == labels[gold]
                for prompt, gold in zip(prompts, golds, strict=True)
            ]
            assert of["accuracy"][task] == pytest.approx(100 * sum(right) / len(right))
        assert of["mean_accuracy"] == pytest.approx(np.mean(list(of["accuracy"].values())))
    losses = [each["loss"] for each in drift["at"]]
    assert len(set(losses)) == 4, "every stage moved it"


def test_cosines_of_gradients(run: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = r"--layers=\.(q|q_proj)$"
    whole = call("analyze", "it", "--gradients=4", layers, "--json", cwd=run.parents[1]).json["gradients"]
    assert whole["rows"] == 4 and whole["tasks"] == STAGES and [at["stage"] for at in whole["at"]] == ["base", "agnews"]
    for at, stage in zip(whole["at"], (0, 3), strict=True):
        plain = Plain(run, family, stage)
        names = list(at["by_layer"])
        assert whole["layers"] == len(names) and all(re.search(r"\.(q|q_proj)$", name) for name in names)
        weights = [plain.model.get_submodule(name).weight.requires_grad_() for name in names]
        gradients: list[tuple[Tensor, ...]] = []
        for task in STAGES:
            prompts, golds = (part[::2] for part in rows(run, task, "train"))  # 4 of 8, evenly spread
            targets = [plain.target(gold) for gold in golds]
            losses = [plain.loss(plain.ids(prompt), t) for prompt, t in zip(prompts, targets, strict=True)]
            gradients.append(torch.autograd.grad(sum(losses) / sum(map(len, targets)), weights))
        flat = [torch.cat([part.flatten() for part in each]) for each in gradients]
        assert at["norm"] == pytest.approx([float(each.norm()) for each in flat], rel=1e-5)
        for i in range(3):
            for j in range(3):
                wanted = functional.cosine_similarity(flat[i], flat[j], dim=0)
                assert at["cosine"][i][j] == pytest.approx(float(wanted), rel=1e-5, abs=1e-5)
                for k, name in enumerate(names):
                    one, other = gradients[i][k].flatten(), gradients[j][k].flatten()
                    wanted = functional.cosine_similarity(one, other, dim=0)
                    assert at["by_layer"][name]["cosine"][i][j] == pytest.approx(float(wanted), rel=1e-5, abs=1e-5)
    monkeypatch.setattr(task_gradients, "HELD", 1)  # a layer at a time
    assert call("analyze", "it", "--gradients=4", layers, "--json", cwd=run.parents[1]).json["gradients"] == whole


def gates(held: dict[str, Tensor], e: Tensor) -> list[float]:
    """GainLoRA's, of a prompt's embeddings (tokens, d)."""
    found = []
    for G1, G2, k in zip(*(held[f"method.router.{name}"].double() for name in ("G1", "G2", "k")), strict=True):
        p2 = functional.silu(G2 @ functional.silu(G1 @ e.mean(0)))
        c = 4 * float(k @ p2) / float(k.norm() * p2.norm())
        found.append(abs(2 / (1 + math.exp(-c)) - 1))
    return found


def attention(held: dict[str, Tensor], e: Tensor) -> list[float]:
    """SAPT's, of a prompt's embeddings (tokens, d)."""
    W1, W2, gain, bias, keys = (held[f"method.router.{name}"].double() for name in ("W1", "W2", "gain", "bias", "keys"))
    v = functional.silu(W2 @ (W1 @ e.amax(0)))
    q = (v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt() * gain + bias
    each = [math.exp(float(key @ q) / math.sqrt(len(q))) for key in keys]
    return [one / sum(each) for one in each]


ROUTERS = {"gainlora": gates, "sapt": attention}


@pytest.mark.parametrize("method", [*narrowed(ROUTERS, ["gainlora"])])
@pytest.mark.parametrize("family", [*narrowed(FAMILIES, ["t5"])])
def test_whose_pair_answers_whom(method: str, family: str, tmp_path: Path) -> None:
    """After each stage, against the gates written out prompt by prompt, from what the stage has left."""
    (tmp_path / "three.yaml").write_text(ORDER)
    given = ("--method", method, *FAMILIES[family], "--name=it")
    assert call("train", "--order", "three.yaml", *given, cwd=tmp_path).code == 0
    run = tmp_path / "runs/it"
    before = results(run)
    with variables(COLUMNS="80"):
        lines = call("analyze", "it", "--routes=3", "--layers=q", cwd=tmp_path).out.splitlines()
    kept = json.loads((run / "analysis.json").read_text())
    assert kept["notes"][-1].endswith("ΔW is how that adapter changed, and its angles say nothing of the pairs'")
    found = kept["routes"]
    assert results(run) == before and found["rows"] == 3 and [at["stage"] for at in found["at"]] == STAGES
    plain = Plain(run, family, 0)
    embed = plain.model.get_input_embeddings()
    for t, at in enumerate(found["at"]):
        assert at["parts"] == STAGES[: t + 1] and list(at["weights"]) == STAGES[: t + 1]
        held = load_file(run / "stages" / f"{t + 1:02d}-{STAGES[t]}" / "state.safetensors")
        for task, weights in at["weights"].items():
            prompts = [rows(run, task, "test")[0][place] for place in (0, 1, 2)]  # 3 of 4, evenly spread
            each = [ROUTERS[method](held, embed(torch.tensor(plain.ids(prompt)))) for prompt in prompts]
            assert weights == pytest.approx(list(np.mean(each, 0)), rel=1e-4, abs=1e-6)
    end = next(place for place, line in enumerate(lines) if line.startswith("note: the method weighs"))
    last = [[float(cell) for cell in line.split()[2:]] for line in lines[end - 3 : end]]
    assert last == [pytest.approx(each, abs=6e-3) for each in found["at"][-1]["weights"].values()]


def test_on_a_terminal_and_kept(run: Path) -> None:
    cwd = run.parents[1]
    given = ("--gradients=2", "--text=text.txt", "--unseen=yelp", "--layers=q")
    with variables(COLUMNS="80"):
        lines = call("analyze", "it", *given, cwd=cwd).out.splitlines()
    assert max(map(len, lines)) <= 80
    found = json.loads((run / "analysis.json").read_text())
    last = found["drift"]["at"][-1]
    shown = [float(cell) for cell in next(line for line in reversed(lines) if line.startswith("3 agnews")).split()[2:]]
    assert shown == pytest.approx([last["loss"], last["accuracy"]["yelp"]], rel=5e-3)
    assert "synthetic: yelp" in " ".join(lines)
    call("analyze", "it", cwd=cwd)
    again = json.loads((run / "analysis.json").read_text())
    assert again["drift"] == found["drift"] and again["gradients"] == found["gradients"]


REFUSED = [
    (("it", "--unseen=agnews"), r"--unseen: agnews is a task of this run$"),
    (("it", "--unseen=three.yaml"), r"--unseen: the run learns all tasks of the order three.yaml$"),
    (("it", "--unseen=nothing"), r"nothing"),
    (("it", "--unseen=,"), r"--unseen ',': names nothing"),
    (("it", "--text=none.txt"), r"--text none.txt: No such file or directory$"),
    (("it", "--text=empty.txt"), r"--text empty.txt: holds no text$"),
    (("it", "--text=rows.jsonl"), r"--text rows.jsonl:2: has no 'text'$"),
    (("it", "--text=one.jsonl"), r"--text: no text in it has two tokens$"),
    (("it", "--text=half.jsonl"), r"--text half.jsonl:1: is no JSON$"),
    (("it", "--gradients=0"), r"--gradients"),
    (("it", "--routes=0"), r"--routes"),
    (("it", "--routes=2"), r"--routes: olora does not weigh the parts of its stages by the row$"),
    (("adapters", "--routes=2"), r"--routes: asks the models of a run; of adapters there are none$"),
    (("adapters", "--gradients=2"), r"--gradients: asks the models of a run; of adapters there are none$"),
    (("adapters", "--text=text.txt"), r"--text: asks the models of a run; of adapters there are none$"),
]


@pytest.mark.parametrize("family", ["t5"], indirect=True, scope="module")
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: " ".join(case[0]))
def test_bad_input(trained: Path, case: tuple[tuple[str, ...], str]) -> None:
    cwd = trained.parents[1]
    (cwd / "adapters").mkdir(exist_ok=True)
    (cwd / "empty.txt").write_text(" \n\n")
    (cwd / "rows.jsonl").write_text('{"text": "a"}\n{"txt": 1}\n')
    (cwd / "one.jsonl").write_text('{"text": "a"}\n')
    (cwd / "half.jsonl").write_text("{\n")
    result = call("analyze", *case[0], cwd=cwd)
    assert result.code == 2 and re.search(case[1], result.line), result.line


def test_rows_that_are_not_those_of_the_run_are_refused(run: Path, family: str) -> None:
    about = json.loads((run / "run.json").read_text())
    about["identity"]["data"]["amazon"]["train"]["fingerprint"] = "0" * 64
    (run / "run.json").write_text(json.dumps(about))
    line = call("analyze", "it", "--gradients=2", cwd=run.parents[1]).line
    assert line.endswith("the train data of amazon are not those of the run runs/it")


@pytest.mark.parametrize(
    "settings",
    [
        ("seqft",),
        pytest.param(("sdlora",), marks=wide),
        pytest.param(("pertask",), marks=wide),
        pytest.param(("seqlora", "--set=adapter.kind=dora"), marks=wide),
    ],
    ids=lambda settings: settings[-1],
)
def test_whatever_a_stage_left(settings: tuple[str, ...], tmp_path: Path) -> None:
    """The last stage's model has the loss that its folder has in plain PEFT, or transformers."""
    (tmp_path / "three.yaml").write_text(ORDER)
    (tmp_path / "text.txt").write_text(TEXT)
    done = call("train", "--order", "three.yaml", "--method", *settings, *NANO, "--name=it", cwd=tmp_path)
    assert done.code == 0, done.err
    given = ("analyze", "it", "--text=text.txt", "--unseen=yelp", "--gradients=2", "--layers=q$", "--json")
    found = call(*given, cwd=tmp_path).json
    run = tmp_path / "runs/it"
    plain = Plain(run, "t5", 0 if settings[0] == "seqft" else 3)
    if settings[0] == "seqft":
        plain.model = AutoModelForSeq2SeqLM.from_pretrained(run / "stages/03-agnews/model").double()
    loss, tokens = 0.0, 0
    for text in TEXT.split("\n\n"):
        ids = plain.ids(text.strip(), whole=False)
        half = len(ids) // 2
        loss += float(plain.loss([*ids[:half], plain.tokenizer.eos_token_id], ids[half:]).detach())
        tokens += len(ids) - half
    losses = [at["loss"] for at in found["drift"]["at"]]
    assert losses[-1] == pytest.approx(loss / tokens, rel=1e-4) and losses[-1] != losses[0]
    assert all(norm > 0 for at in found["gradients"]["at"] for norm in at["norm"])


def test_stages_whose_models_are_gone(tmp_path: Path) -> None:
    (tmp_path / "three.yaml").write_text(ORDER)
    (tmp_path / "text.txt").write_text(TEXT)
    keep = ("--method", "seqft", "--set=output.keep_stages=2", "--name=it")
    assert call("train", "--order", "three.yaml", *keep, *NANO, cwd=tmp_path).code == 0
    found = call("analyze", "it", "--text=text.txt", "--json", cwd=tmp_path).json
    assert [at["stage"] for at in found["drift"]["at"]] == ["base", "amazon", "agnews"]
    assert found["skipped"][-1] == "base drift after dbpedia: its model was removed (output.keep_stages)"
