"""What a stage holds between two of its steps, taken from its parts and put back: a stage can be entered in its middle.

What decides a number is either here or comes again from the state that the stage before committed, seed, stage and
step: batches, dropout and every generator do.
"""

from __future__ import annotations

from dataclasses import dataclass

from cl_runner.engine.optim import Muon
from cl_runner.engine.zero import Engine
from cl_runner.methods.protocol import State
from cl_runner.training.probe import Probe
from cl_runner.training.stage import StageRun
from cl_runner.training.step_log import Meter


@dataclass
class StepState:
    """What is held after ``step`` optimizer steps, of each part by its name; on the CPU.

    ``engine``, ``muon``, ``frozen`` (parameters of the adapter that do not train) and ``fit`` (the micro-batch that
    memory suffices for) are the same on every rank and for any number of them; what ``method``, ``option.…`` and
    ``meter`` hold is this rank's.
    """

    step: int
    parts: dict[str, State]


def take(stage: StageRun, engine: Engine, muon: Muon, meter: Meter, probe: Probe | None = None) -> StepState:
    """A copy of what the stage's parts hold, between two steps. *Collective*."""
    frozen = {name: p for name, p in stage.adapters.parameters().items() if name not in engine.parameters}
    parts = {
        "engine": State(*engine.state()),
        "muon": State(muon.state()),
        "frozen": State(dict(frozen)),
        "fit": State(json=stage.fit.state()),
        "method": stage.room.method.step_state(),
        "meter": State(json=meter.state()),
        **{f"option.{option.name}": option.step_state() for option in stage.options},
        **({"probe": State(json=probe.state())} if probe else {}),
    }
    return StepState(stage.step, {name: _copied(state) for name, state in parts.items()})


def put_beginning(stage: StageRun, state: StepState) -> None:
    """In the place of what begins a stage: options, method, and what does not train. There is no engine yet."""
    if "fit" in state.parts:  # else nothing has been halved by then
        stage.fit.load_state(state.parts["fit"].json)
    for option in stage.options:
        option.load_step_state(stage, _copied(state.parts[f"option.{option.name}"]))
    stage.room.method.load_step_state(stage, _copied(state.parts["method"]))
    stage.write(state.parts["frozen"].tensors)


def put(
    stage: StageRun, engine: Engine, muon: Muon, meter: Meter, state: StepState, probe: Probe | None = None
) -> None:
    """The rest, into a new engine. *Collective*."""
    stage.step = state.step
    found = state.parts["engine"]
    engine.load_state(found.tensors, found.json)
    muon.load_state({name: value.to(stage.device) for name, value in state.parts["muon"].tensors.items()})
    meter.load_state(state.parts["meter"].json)
    if probe and "probe" in state.parts:  # else it was turned on since
        probe.load_state(state.parts["probe"].json)


def _copied(state: State) -> State:
    """Tensors that nobody else writes to, as a file would give them."""
    return State({name: value.detach().to("cpu", copy=True) for name, value in state.tensors.items()}, dict(state.json))
