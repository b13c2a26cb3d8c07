"""The digits are what they are said to be, and the methods' hooks go round them as a loop by hand would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import digits as script
from benchmarks.classifier import ClassifierStage, examples, learn
from benchmarks.digits import WHITE, Digits, perceptron, problem
from cl_runner.methods import method_class
from tests.breadth import wide


def test_tasks_are_turned_or_shuffled_images() -> None:
    digits = Digits(3)
    plain = (torch.tensor(digits.images).flatten(1) * WHITE / 16).round().long()
    assert len(digits.test) == 500 and len(digits.train) == 1297
    assert not set(digits.test.tolist()) & set(digits.train.tolist())
    assert torch.equal(digits.rotated(0), plain)
    assert torch.equal(digits.rotated(90), plain.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1))
    first, second = digits.permuted(), digits.permuted()
    assert torch.equal(first.sort(1).values, plain.sort(1).values)
    assert not torch.equal(first, second) and not torch.equal(first, plain)
    order = (first[:, :, None] == plain[:, None, :]).all(0).float().argmax(1)  # one for all images
    assert torch.equal(first, plain[:, order])
    assert [torch.equal(task, digits.rotated(10 * k)) for k, task in enumerate(problem("rotated", digits, 3))] == [
        True
    ] * 3


def test_steps_are_those_of_plain_sgd() -> None:
    digits = Digits(0, 40)
    rows = digits.train
    inputs, labels = digits.rotated(0)[rows], digits.labels[rows]
    stage = ClassifierStage(perceptron(1), 0, 0, WHITE)
    found = method_class("seqlora")
    learn(found(found.Config()), stage, examples(inputs, labels, "task"), epochs=2, batch=15, lr=0.1)
    model = perceptron(1)
    for epoch in range(2):
        order = torch.randperm(40, generator=stage.rng(f"order/{epoch}"))
        for some in order.split(15):
            model.zero_grad()
            cross_entropy(model(inputs[some] / WHITE), labels[some]).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
    for ours, plain in zip(stage.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["all", "ave", "gtl"])
def test_ogd_holds_the_scores_of_what_it_has_stored(variant: str) -> None:
    """One small step in the second task moves the first one's scores by far less than SGD's does."""
    digits = Digits(0, 12)
    rows = digits.train
    inputs, labels = digits.rotated(0)[rows], digits.labels[rows]
    later = digits.permuted()[rows]
    moved = {}
    for name, own in (("seqlora", {}), ("ogd", {"variant": variant, "vectors": 200})):
        found = method_class(name)
        method, model = found(found.Config(**own)), perceptron(1)
        learn(method, ClassifierStage(model, 0, 0, WHITE), examples(inputs, labels, "one"), epochs=5, batch=4, lr=0.1)
        before = scores(model, inputs, labels, variant)
        learn(method, ClassifierStage(model, 1, 0, WHITE), examples(later, labels, "two"), epochs=1, batch=12, lr=1e-3)
        moved[name] = float((scores(model, inputs, labels, variant) - before).abs().max())
    assert moved["ogd"] < 0.05 * moved["seqlora"]


@torch.no_grad()
def scores(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor, variant: str) -> torch.Tensor:
    """f of each row, as each variant has it: over the classes that the rows have."""
    logits = model(inputs / WHITE)
    seen = logits[:, labels.unique()]
    return {"all": seen, "ave": seen.mean(1), "gtl": logits.gather(1, labels[:, None])}[variant]


@wide
def test_all_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(script.SETTINGS, "epochs", 1)
    given = ["--seeds", "1", "2", "--tasks", "2", "--angles", "0", "90", "--train", "20", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["digits.py", *given, "--json", str(tmp_path / "found.jsonl")])
    script.main()
    tables = json.loads((tmp_path / "found.jsonl").read_text())["tables"]
    assert [row["method"] for table in tables.values() for row in table] == [*script.METHODS] * 3
    assert "| ogd-gtl |" in capsys.readouterr().out
    assert (tmp_path / "digits-rotation.svg").stat().st_size < 100_000
