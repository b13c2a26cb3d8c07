"""EWC, LwF, A-GEM and GEM beside avalanche-lib's, on a small classifier: penalties, losses, projected gradients.

Runs where avalanche can be imported, or stands in the folder that CL_RUNNER_PEER names, such as one made by
``pip install --no-deps --target FOLDER avalanche-lib==0.6.0`` and the packages that it misses. Theirs differ by
definition in three places, each made alike where it is compared: EWC's λ has no half, LwF sees only the classes of past
tasks (here all), and GEM adds 1e-3 to the diagonal of G Gᵀ at any scale.
"""

from __future__ import annotations

import copy
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.classifier import ClassifierStage, examples, learn
from cl_runner.maths.vectors import flat
from cl_runner.methods import gem as gem_module
from cl_runner.methods import method_class
from cl_runner.methods.protocol import Method, Source

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

ROWS, CLASSES, SCALE = 20, 3, 10.0


@pytest.fixture(scope="module")
def peer() -> Any:
    """avalanche's plug-ins."""
    if folder := os.environ.get("CL_RUNNER_PEER"):
        sys.path.append(folder)  # at the end: what is installed here goes first
    try:
        from avalanche.training import plugins, regularization
    except Exception as error:  # its own imports may fail in many ways
        pytest.skip(f"avalanche-lib cannot be imported ({type(error).__name__}: {error}); see CL_RUNNER_PEER above")
    return SimpleNamespace(plugins=plugins, lwf=regularization.LearningWithoutForgetting)


def task(number: int) -> Source:
    """Random rows; which class they are turns with the task, so that gradients conflict."""
    dice = torch.Generator().manual_seed(number)
    inputs = torch.randint(0, 11, (ROWS, 6), generator=dice)
    return examples(inputs, (inputs[:, :CLASSES].argmax(1) + number) % CLASSES, f"task{number}")


def tensors(source: Source) -> tuple[Tensor, Tensor]:
    """What their models are given: floats, and classes."""
    return torch.tensor([e.source for e in source.examples]) / SCALE, torch.tensor(
        [e.target[0] for e in source.examples]
    )


def taught(name: str, tasks: int, **own: Any) -> tuple[Method, ClassifierStage, list[nn.Module]]:
    """A method after so many tasks, the stage that follows, and the model as each task left it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    found = method_class(name)
    method, after = found(found.Config(**own)), []
    for index in range(tasks):
        learn(method, ClassifierStage(model, index, 0, SCALE), task(index), epochs=10, batch=5, lr=0.5)
        after.append(copy.deepcopy(model))
    stage = ClassifierStage(model, tasks, 0, SCALE)
    stage.own = task(tasks)
    return method, stage, after


def strategy(model: nn.Module, tasks: int) -> Any:
    """What their plug-ins ask a training strategy for."""
    return SimpleNamespace(
        model=model,
        device="cpu",
        loss=torch.zeros(()),
        clock=SimpleNamespace(train_exp_counter=tasks),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        _criterion=nn.functional.cross_entropy,
    )


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def moved(model: nn.Module) -> None:
    """Somewhere else, so that a penalty has something to say."""
    torch.manual_seed(9)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)


@pytest.mark.parametrize("online", [None, 0.7])
def test_ewc_fisher_and_penalty(peer: Any, online: float | None) -> None:
    method, stage, after = taught("ewc", 3, lambda1=5.0, online=online, fisher_samples=None)
    mode = {"mode": "separate"} if online is None else {"mode": "online", "decay_factor": online}
    theirs = peer.plugins.EWCPlugin(5.0 / 2, **mode)
    total = torch.zeros(())
    for index, model in enumerate(after):
        data = torch.utils.data.TensorDataset(*tensors(task(index)), torch.zeros(ROWS, dtype=torch.long))
        run = strategy(model, index)
        found = theirs.compute_importances(model, run._criterion, run.optimizer, data, "cpu", batch_size=1)
        fisher = torch.cat([value.data.flatten() for value in found.values()])
        total = (1.0 if online is None else online) * total + fisher
        theirs.update_importances(found, index)
        theirs.saved_params[index] = {name: _of(peer, p) for name, p in model.named_parameters()}
    torch.testing.assert_close(method.fisher, total, rtol=1e-4, atol=1e-7)

    moved(stage.model)
    run = strategy(stage.model, 3)
    theirs.before_backward(run)
    ours = method.penalty(stage)
    assert ours is not None and float(ours.detach()) > 0.1
    torch.testing.assert_close(ours, run.loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient(ours, stage.model), gradient(run.loss, stage.model), rtol=1e-3, atol=1e-5)


def _of(peer: Any, parameter: nn.Parameter) -> Any:
    from avalanche.training.utils import ParamData

    return ParamData("saved", parameter.shape, init_tensor=parameter.detach().clone(), device=parameter.device)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_lwf_loss(peer: Any, temperature: float) -> None:
    method, stage, after = taught("lwf", 1, lambda1=3.0, temperature=temperature)
    method.begin_task(stage)
    moved(stage.model)
    theirs = peer.lwf(alpha=3.0, temperature=temperature)
    theirs.prev_model, theirs.prev_classes_by_task = after[0], {0: set(range(CLASSES))}
    inputs, classes = tensors(task(1))
    out = stage.model(inputs)
    distilled = theirs(inputs, out, stage.model)
    wanted = nn.functional.cross_entropy(out, classes) + distilled
    (batch,) = stage.batches()
    ours = method.loss(stage, batch)
    assert float(distilled.detach()) > 0.05
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(gradient(ours, stage.model), gradient(wanted, stage.model), rtol=1e-4, atol=1e-6)


def edited(method: Method, stage: ClassifierStage) -> tuple[Tensor, Tensor]:
    """The next task's gradient, and what the method makes of it."""
    (batch,) = stage.batches()
    own = stage.gradient_of(method.loss(stage, batch))
    changed = method.edit_gradients(stage, own)
    assert changed is not None
    return flat(own, own), flat(changed, own)


def projected(theirs: Any, stage: ClassifierStage, tasks: int) -> Tensor:
    """What their plug-in makes of it, as a strategy calls it."""
    run = strategy(stage.model, tasks)
    theirs.before_training_iteration(run)
    run.optimizer.zero_grad()
    inputs, classes = tensors(task(tasks))
    run._criterion(stage.model(inputs), classes).backward()
    theirs.after_backward(run)
    return torch.cat([p.grad.flatten() for p in stage.model.parameters() if p.grad is not None])


def test_agem_gradient(peer: Any) -> None:
    method, stage, _ = taught("agem", 1, memory_per_task=ROWS, memory_batch=ROWS)
    theirs = peer.plugins.AGEMPlugin(ROWS, ROWS)
    memory = (*tensors(task(0)), torch.zeros(ROWS))
    theirs.buffers, theirs.buffer_dliter = [memory], iter([memory])
    own, ours = edited(method, stage)
    assert float((ours - own).norm()) > 0.01 * float(own.norm())  # there was a conflict
    torch.testing.assert_close(ours, projected(theirs, stage, 1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_gem_gradient(peer: Any, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    method, stage, _ = taught("gem", 3, memory_per_task=ROWS, memory_strength=strength)
    theirs = peer.plugins.GEMPlugin(ROWS, strength)
    for index in range(3):
        theirs.memory_x[index], theirs.memory_y[index] = tensors(task(index))
        theirs.memory_tid[index] = torch.zeros(ROWS)
    wanted = projected(theirs, stage, 3)
    own, ours = edited(method, stage)
    assert float((ours - own).norm()) > 0.1 * float(own.norm())
    torch.testing.assert_close(ours, wanted, rtol=0, atol=0.02 * float(own.norm()))  # but for their ridge
    monkeypatch.setattr(gem_module, "RIDGE", 1e-3 / float(theirs.G.square().sum(1).mean()))
    torch.testing.assert_close(edited(method, stage)[1], wanted, rtol=1e-4, atol=1e-5)
