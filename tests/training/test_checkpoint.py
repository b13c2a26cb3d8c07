"""A stage to its folder and back: resumed at any stage, a run goes on to the bit; what is damaged is refused."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from cl_runner.adapters.kind import Fold
from cl_runner.atomic import append_jsonl, read_json, read_jsonl, write_json
from cl_runner.config.schema import RunConfig, Section
from cl_runner.engine.process import Place
from cl_runner.errors import UserError
from cl_runner.methods import method_class
from cl_runner.methods.protocol import Method, Source, Stage, StagePlan, State
from cl_runner.runs.commit import commit
from cl_runner.runs.folder import RunDir
from cl_runner.tasks.task import Row, Task
from cl_runner.training import evaluation as scoring
from cl_runner.training.checkpoint import restore_stage, save_stage, verify
from cl_runner.training.stage import Room, StageRun, commit_update
from tests.breadth import narrowed
from tests.stages import some_rows, tiny_config, tiny_model, tiny_room

FIFTEEN = [f"task{i}" for i in range(15)]


class Kinds(Method):
    """Folds stage by stage as told; carries a tensor and a number that say how many stages there were."""

    name, title = "kinds", "a method for tests"
    kinds: Sequence[Fold] = ()

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.count = 0

    def fold(self, stage: Stage) -> Fold:
        return self.kinds[stage.index]

    def dense_update(self, stage: Stage) -> dict[str, Tensor]:
        # No pair of small rank makes this.
        return {target: update.clamp(-1e-3, 1e-3) for target, update in stage.adapters.live_update().items()}

    def end_task(self, stage: Stage) -> None:
        self.count += 1

    def state(self) -> State:
        return State({"count": torch.tensor(self.count)}, {"count": self.count})

    def load_state(self, state: State) -> None:
        self.count = state.json["count"]
        assert int(state.tensors["count"]) == self.count


def kinds(*wanted: Fold) -> Method:
    method = Kinds(Section())
    method.kinds = wanted
    return method


def named(name: str, **settings: Any) -> Method:
    found = method_class(name)
    return found(found.Config.model_validate(settings))


Make = Callable[[], Method]


class Order:
    """A method over an order on a tiny T5, each stage two plain gradient steps from where the adapters stand."""

    def __init__(self, make: Make, tasks: Sequence[str], folder: Path, **settings: Any) -> None:
        self.config: RunConfig = tiny_config(adapter__r=settings.pop("r", 2))
        self.room: Room = tiny_room(make(), self.config, Place(), order=tasks, **settings)
        self.room.order = tuple(self.room.method.plan(tasks))
        self.rundir = RunDir(folder)
        self.step = 0.05

    @property
    def adapters(self) -> Any:
        return self.room.adapters

    def learn(self, index: int) -> StageRun:
        """What a run does in a stage up to its commit; every bit of weights and past factors has its say."""
        room = self.room
        stage = StageRun(room, self.config, index)
        if stage.plan.start == "base":
            room.adapters.restore([], room.adapters.kept, None)
        room.method.build(stage)
        own = some_rows(4, seed=index)
        batch = stage.make_batch(own.examples, own.tasks, [0.1] * 4)
        room.adapters.model.train()
        for _ in range(2):
            loss = room.method.loss(stage, batch)
            penalty = room.method.penalty(stage)
            parameters = stage.parameters()
            gradients = torch.autograd.grad(loss if penalty is None else loss + penalty, list(parameters.values()))
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter.data -= self.step * gradient
        room.adapters.model.eval()
        room.adapters.train(False)
        room.method.end_task(stage)
        commit_update(room.method, stage)
        stage.close()
        return stage

    def commit(self, stage: StageRun, more: Callable[[Path], None] = lambda folder: None) -> Path:
        def write(folder: Path) -> None:
            save_stage(folder, stage)
            more(folder)

        return commit(self.rundir, stage.index, stage.plan.name, write)

    def run(self, first: int = 0, last: int | None = None) -> Order:
        for index in range(first, len(self.room.order) if last is None else last):
            self.commit(self.learn(index))
        return self

    def restore(self, index: int) -> Order:
        stage = StageRun(self.room, self.config, index, evaluating=True)
        restore_stage(self.rundir, stage, index)
        stage.close()
        return self

    def bits(self) -> dict[str, Any]:
        """Everything that a later stage may depend on."""
        adapters = self.adapters
        return {
            "weights": {t: past.weight.detach().clone() for t, past in adapters.past.items()},
            "sums": {t: past.sum for t, past in adapters.past.items()},
            "live": adapters.live,
            "shown": {name: p.detach().clone() for name, p in adapters.parameters().items() if adapters.live},
            "folded": list(adapters.folded),
            "dense": list(adapters.dense),
            "kept": dict(adapters.kept),
            "state": self.room.method.state(),
        }

    def logits(self) -> Tensor:
        return answers(self.adapters.model)


def answers(model: Any) -> Tensor:
    ids = torch.randint(3, 64, (3, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, decoder_input_ids=ids[:, :4], use_cache=False).logits.float()
    return found


def plain(folder: Path) -> Any:
    with warnings.catch_warnings():
        # PEFT's own call of a name that transformers deprecates.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return PeftModel.from_pretrained(tiny_model("t5"), folder).eval()


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, through containers and dataclasses."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and same(vars(a), vars(b))
    return bool(a == b)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# Resume.

LONG: dict[str, Make] = {
    "olora": lambda: named("olora"),
    "olora paper": lambda: named("olora", reference=False, on="both", lambda1=0.5),
    "seqlora": lambda: named("seqlora"),
    "pertask": lambda: named("pertask"),
}


@pytest.mark.parametrize("name", narrowed(LONG, ["olora", "seqlora", "pertask"]))
def test_fifteen_stages_go_on_to_the_bit(name: str, tmp_path: Path) -> None:
    """Matrices of 32 × 32: side by side until stage 7, dense from stage 8 on."""
    straight = Order(LONG[name], FIFTEEN, tmp_path / "straight")
    after, answered = [], []
    for index in range(15):
        straight.commit(straight.learn(index))
        after.append(straight.bits())
        answered.append(straight.logits())
    worn = Order(LONG[name], FIFTEEN, straight.rundir.path)  # restored over and over
    for index in (14, 3, 9, 0, 7, 6):
        worn.restore(index)
        assert same(worn.bits(), after[index]) and torch.equal(worn.logits(), answered[index]), index
    for index in (1, 7, 8, 14):
        again = Order(LONG[name], FIFTEEN, straight.rundir.path).restore(index - 1)
        assert same(again.bits(), after[index - 1]) and torch.equal(again.logits(), answered[index - 1]), index
        again.learn(index)
        assert same(again.bits(), after[index]) and torch.equal(again.logits(), answered[index]), index
    states = [read_json(straight.rundir.stage_dir(i, FIFTEEN[i]) / "state.json") for i in range(15)]
    dense = [bool(state["dense"]) for state in states]
    assert dense == ([i >= 7 for i in range(15)] if name.startswith("olora") else [False] * 15)
    for index in (0, 6, 7, 14):
        folder = straight.rundir.stage_dir(index, FIFTEEN[index]) / "adapter"
        assert off(answers(plain(folder)), answered[index]) < 1e-5, index


def test_olora_sees_every_past_factor_of_a_run_that_has_turned_dense(tmp_path: Path) -> None:
    straight = Order(LONG["olora"], FIFTEEN[:10], tmp_path).run()
    seen = Order(LONG["olora"], FIFTEEN[:10], tmp_path).restore(9)
    for group, wanted in zip(seen.adapters.groups(), straight.adapters.groups(), strict=True):
        assert group.past.rank == 20 and torch.equal(group.past.rows("A"), wanted.past.rows("A"))
        first = [pair.A[group.targets[0]] for pair in straight.adapters.folded]
        assert torch.equal(group.past.rows("A")[0], torch.cat(first))


@pytest.mark.parametrize("name", narrowed(["inclora", "olora paper", "olora"], ["inclora", "olora"]))
def test_what_no_stage_reads_is_let_go_of_and_nothing_changes(name: str, tmp_path: Path) -> None:
    """Side by side until rank 14, dense from 16, more past rows than the matrix has from 34 on."""
    make = {**LONG, "inclora": lambda: named("inclora")}[name]
    tasks = [f"t{i}" for i in range(20)]
    keeping, letting = Order(make, tasks, tmp_path / "a"), Order(make, tasks, tmp_path / "b")

    def go(order: Order, index: int) -> dict[str, Any]:
        stage = order.learn(index)
        bits = order.bits()
        order.commit(stage)
        return {**bits, "folded": [(pair.stage, pair.rank, pair.scale) for pair in bits["folded"]]}

    def penalty(order: Order) -> Tensor:
        order.adapters.begin("next", torch.Generator().manual_seed(0))
        found = order.room.method.penalty(SimpleNamespace(factors=order.adapters.groups))  # type: ignore[arg-type]
        order.adapters.show(None)
        return torch.zeros(()) if found is None else found.detach()

    first = {"inclora": 8, "olora paper": 17}.get(name, 99)  # the first stage that lets go
    for index in range(20):
        assert same(go(keeping, index), go(letting, index))
        letting.adapters.let_go(letting.room.method.reads_past())
        assert [pair.held for pair in letting.adapters.folded] == [index + 1 < first] * (index + 1), index
        assert torch.equal(penalty(keeping), penalty(letting))
    again = Order(make, tasks, tmp_path / "b").restore(18)
    again.adapters.let_go(again.room.method.reads_past())
    again.learn(19)
    theirs = {**keeping.bits(), "folded": 0, "live": None, "shown": 0}
    assert same({**again.bits(), "folded": 0, "live": None, "shown": 0}, theirs)
    if first < 99:
        with pytest.raises(RuntimeError, match="reads_past"):
            _ = letting.adapters.groups()[0].past.rows("A")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "wanted",
    [
        ["factors", "dense", "factors", "dense"],
        ["dense", "dense", "keep", "factors"],
        ["factors", "keep", "factors", "keep"],
        ["dense", "keep", "keep", "dense"],
    ],
    ids=lambda wanted: " ".join(wanted),
)
def test_any_sequence_of_folds_goes_on_to_the_bit(wanted: list[Fold], dtype: torch.dtype, tmp_path: Path) -> None:
    def order() -> Order:
        return Order(lambda: kinds(*wanted), list("abcd"), tmp_path / "run", base_dtype=dtype)

    straight = order()
    after = []
    for index in range(4):
        straight.commit(straight.learn(index))
        after.append((straight.bits(), straight.logits()))
    for index in range(4):
        again = order().restore(index)
        bits, answered = after[index]
        assert same(again.bits(), bits) and torch.equal(again.logits(), answered)
        state = read_json(again.rundir.stage_dir(index, "abcd"[index]) / "state.json")
        assert state["dense_stages"] == [
            s for s, how in zip("abcd", wanted[: index + 1], strict=False) if how == "dense"
        ]
        assert bool(state["dense"]) == bool(state["dense_stages"])
        if dtype == torch.float32:
            assert off(answers(plain(again.rundir.stage_dir(index, "abcd"[index]) / "adapter")), answered) < 1e-5
        if index < 3:
            again.learn(index + 1)
            assert same(again.bits(), after[index + 1][0])
    assert straight.room.method.state().json == {"count": 4}


def test_a_lone_live_pair_larger_than_its_matrix_goes_on(tmp_path: Path) -> None:
    def order() -> Order:
        return Order(LONG["seqlora"], ["a", "b"], tmp_path / "run", r=20)

    straight = order().run(last=1)
    after_first = straight.bits()
    straight.run(first=1)
    again = order().restore(0)
    assert same(again.bits(), after_first)
    again.learn(1)
    assert same(again.bits(), straight.bits())
    state = read_json(straight.rundir.stage_dir(1, "b") / "state.json")
    assert (state["dense"], state["own"], state["live"]) == ([], "adapter", "b")


class Rounds(Method):
    """Two rounds over all tasks, each kept beside the ones before, answered by the round that answers best."""

    name, title = "rounds", "a method for tests"

    def plan(self, order: Sequence[str]) -> list[StagePlan]:
        first = StagePlan("round1", tuple(order), start="base")
        return [first, StagePlan("round2", tuple(reversed(order)))]

    def fold(self, stage: Stage) -> Fold:
        return "keep"

    def answering(self, task: str | None) -> str | None:
        return "round1"


def test_rounds_have_names_of_their_own(tmp_path: Path) -> None:
    order = Order(lambda: Rounds(Section()), ["a", "b"], tmp_path).run()
    folder = order.rundir.stage_dir(1, "round2")
    state = read_json(folder / "state.json")
    assert (state["stage"], state["tasks"], state["live"]) == ("round2", ["b", "a"], "round2")
    assert (state["start"], list(state["kept"])) == ("previous", ["round1"])
    assert read_json(folder / "answers.json") == dict.fromkeys("ab", "../01-round1/adapter")
    again = Order(lambda: Rounds(Section()), ["a", "b"], tmp_path).restore(1)
    assert same(again.bits(), order.bits()) and list(again.adapters.kept) == ["round1", "round2"]


# What a stage leaves.


def test_state_json_says_what_the_stage_is(tmp_path: Path) -> None:
    Order(LONG["olora"], FIFTEEN[:8], tmp_path).run()
    folders = [RunDir(tmp_path).stage_dir(i, name) for i, name in enumerate(FIFTEEN[:8])]
    first, last = (read_json(folders[i] / "state.json") for i in (1, 7))
    assert first.items() >= {
        "stage": "task1", "tasks": ["task1"], "start": "previous", "live": None, "kept": {}, "earlier": {},
        "pairs": [{"stage": f"task{i}", "rank": 2, "scale": 2.0} for i in range(2)],
        "dense": [], "dense_stages": [], "own": "adapter", "state": {},
    }.items()  # fmt: skip
    assert last["own"] == "state" and len(last["pairs"]) == 8 and len(last["dense"]) == 6
    size = (folders[7] / "adapter" / "adapter_model.safetensors").stat().st_size
    assert last["megabytes"]["adapter"] == pytest.approx(size / 2**20, abs=1e-3)
    assert last["megabytes"]["method"] > 0 == first["megabytes"]["method"]
    assert not (folders[1] / "state.safetensors").exists() and not (folders[1] / "answers.json").exists()
    # Earlier pairs are named by file and hash, not copied.
    own = load_file(folders[7] / "state.safetensors")
    assert {tensor.shape[0] for name, tensor in own.items() if name.endswith(".A")} == {2}
    for name, where in last["earlier"].items():
        done = read_json(folders[int(name[4:])] / "DONE")["sha256"]
        assert re.fullmatch(rf"\.\./0\d-{name}/adapter/adapter_model\.safetensors", where["file"])
        assert where["sha256"] == done["adapter/adapter_model.safetensors"]
    assert list(last["earlier"]) == FIFTEEN[:7]


def test_pertask_says_which_folder_answers_and_each_of_them_does(tmp_path: Path) -> None:
    tasks = ["a", "b", "c"]
    order = Order(LONG["pertask"], tasks, tmp_path)
    order.step = 4.0  # far enough to change answers
    tests = {}
    for at, name in enumerate(tasks):
        examples = some_rows(4, seed=50 + at).examples
        rows = [Row(f"test/{i}", "text", "label") for i in range(4)]
        tests[name] = scoring.TestSet(Task(name=name, kind="TC", labels=["label"], instruction="?"), rows, examples)
    for index in range(3):
        stage = order.learn(index)
        scored = scoring.evaluate(stage, {name: tests[name] for name in tasks[: index + 1]})
        rows = [row for one in scored for row in one.predictions]
        order.commit(stage, lambda folder, rows=rows: append_jsonl(folder / "predictions.jsonl", rows))  # type: ignore[misc]
        folder = order.rundir.stage_dir(index, tasks[index])
        where = {name: f"../{i + 1:02d}-{name}/adapter" for i, name in enumerate(tasks[:index])}
        if index == 0:
            assert not (folder / "answers.json").exists()  # the stage's own folder answers all there is
            continue
        assert read_json(folder / "answers.json") == {**where, tasks[index]: "adapter"}
    said = read_jsonl(folder / "predictions.jsonl")
    assert len(said) == 12
    differ = 0
    for name, relative in read_json(folder / "answers.json").items():
        assert (folder / relative / "adapter_config.json").is_file()
        model, other = plain(folder / relative), tiny_model("t5")
        outputs = [row["output"] for row in said if row["task"] == name]
        sources = [example.source for example in tests[name].examples]
        assert outputs == [by_hand(model, source) for source in sources]
        differ += outputs != [by_hand(other, source) for source in sources]
    assert differ == 3  # the base alone would have answered something else


def by_hand(model: Any, source: list[int]) -> str:
    out = model.generate(input_ids=torch.tensor([source]), max_new_tokens=4, do_sample=False)[0, 1:].tolist()
    return " ".join(map(str, out[: out.index(1)] if 1 in out else out))


class Carries(Method):
    """Carries what it is given."""

    name, title = "carries", "a method for tests"
    given = State()
    loaded: State | None = None

    def state(self) -> State:
        return self.given

    def load_state(self, state: State) -> None:
        self.loaded = state


def test_method_state_comes_back_with_dtype_shape_and_every_bit(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = {
        "fp32": torch.randn(3, 2), "fp64": torch.randn(2, dtype=torch.float64), "bf16": torch.randn(5).bfloat16(),
        "fp16": torch.randn(5).half(), "int64": torch.tensor([2**62, -1]), "int8": torch.tensor([-128, 127]).char(),
        "uint8": torch.tensor([0, 255]).byte(), "bool": torch.tensor([True, False]), "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 7), "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "transposed": whole.T, "a view": whole[1:], "another of the same memory": whole[:2], "whole": whole,
        "with a graph": torch.ones(2, requires_grad=True) * 3, "method.own.x.A": torch.ones(1),
        "own.x.A": torch.ones(2),
    }  # fmt: skip
    values = {"text": "ä\n", "numbers": [0, -1, 2**60, 0.1, 1e-300], "nested": {"none": None, "yes": True}, "empty": []}
    method = Carries(Section())
    method.given = State(tensors, values)
    Order(lambda: method, ["a"], tmp_path / "run").run()
    other = Carries(Section())
    Order(lambda: other, ["a"], tmp_path / "run").restore(0)
    assert other.loaded is not None and other.loaded.json == values
    assert other.loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        back = other.loaded.tensors[name]
        assert (back.dtype, back.shape, back.device.type) == (tensor.dtype, tensor.shape, "cpu"), name
        flat = [t.detach().contiguous().view(-1) for t in (back, tensor)]
        raw = [t.view(torch.uint8) if t.numel() else t for t in flat]
        assert torch.equal(*raw), name


def test_a_method_that_carries_nothing_loads_an_empty_state(tmp_path: Path) -> None:
    Order(lambda: Carries(Section()), ["a"], tmp_path).run()
    other = Carries(Section())
    Order(lambda: other, ["a"], tmp_path).restore(0)
    assert other.loaded == State({}, {})


# Damage.


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished run of a method, for each test a copy of its own."""
    made: dict[str, Path] = {}

    def copy(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("runs") / "run"
            Order(LONG[name], FIFTEEN[:9], made[name]).run()
        target = tmp_path_factory.mktemp("copies") / "run"
        return shutil.copytree(made[name], target)

    return copy


def stage_folder(run: Path, number: int) -> Path:
    return run / "stages" / f"{number:02d}-task{number - 1}"


def refusal(run: Path, name: str, index: int = 8) -> str:
    with pytest.raises(UserError) as refused:
        Order(LONG[name], FIFTEEN[:9], run).restore(index)
    message = str(refused.value)
    assert "\n" not in message
    return message


def change(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def commit_again(folder: Path) -> None:
    """What a new commit of the same stage would leave: DONE fits the files."""
    from cl_runner.atomic import sha256

    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "DONE"]
    write_json(folder / "DONE", {"sha256": {str(f.relative_to(folder)): sha256(f) for f in files}})


@pytest.mark.parametrize("file", ["state.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"])
@pytest.mark.parametrize("how", ["missing", "not what was committed"])
def test_a_damaged_stage_is_refused_and_the_file_named(runs: Callable[[str], Path], file: str, how: str) -> None:
    run = runs("olora")
    folder = stage_folder(run, 3)
    verify(folder)
    (folder / file).unlink() if how == "missing" else change(folder / file)
    wanted = f"{folder} is damaged: {file} is {how}"
    with pytest.raises(UserError, match=re.escape(wanted)):
        verify(folder)
    assert refusal(run, "olora", 2) == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "DONE: No such file or directory"),
        ("{", "DONE: broken JSON"),
        ("[]", "DONE: must be a JSON object"),
        ("{}", "is damaged: DONE holds no hashes"),
        ('{"sha256": []}', "is damaged: DONE holds no hashes"),
    ],
)
def test_a_damaged_seal_is_refused(runs: Callable[[str], Path], content: str | None, message: str) -> None:
    run = runs("olora")
    done = stage_folder(run, 3) / "DONE"
    done.unlink() if content is None else done.write_text(content)
    assert message in refusal(run, "olora", 2)


@pytest.mark.parametrize("name", ["olora", "pertask"])
def test_damage_to_an_earlier_stage_that_this_one_reads_is_refused(runs: Callable[[str], Path], name: str) -> None:
    """olora's ninth stage is dense: its past factors stand with the stages before it. pertask's answer with it."""
    run = runs(name)
    folder = stage_folder(run, 4)
    change(folder / "adapter" / "adapter_model.safetensors")
    wanted = f"{folder} is damaged: adapter/adapter_model.safetensors is not what was committed"
    assert refusal(run, name) == wanted


@pytest.mark.parametrize("name", ["olora", "pertask"])
def test_an_earlier_stage_that_was_trained_anew_is_refused(runs: Callable[[str], Path], name: str) -> None:
    run = runs(name)
    folder = stage_folder(run, 4)
    change(folder / "adapter" / "adapter_model.safetensors")
    commit_again(folder)
    verify(folder)
    assert refusal(run, name) == f"{folder} is not the stage that 09-task8 was committed with"


def test_an_own_pair_in_an_earlier_state_is_seen_to_as_well(runs: Callable[[str], Path]) -> None:
    run = runs("olora")
    folder = stage_folder(run, 8)
    state = read_json(folder / "state.json")
    assert state["own"] == "state"
    where = read_json(stage_folder(run, 9) / "state.json")["earlier"]["task7"]["file"]
    assert where == "../08-task7/state.safetensors"
    change(folder / "state.safetensors")
    commit_again(folder)
    assert refusal(run, "olora") == f"{folder} is not the stage that 09-task8 was committed with"


def test_damage_to_a_stage_that_is_not_read_does_not_matter(runs: Callable[[str], Path]) -> None:
    """Side by side, a stage holds all it needs; so does one live pair."""
    run = runs("olora")
    shutil.rmtree(stage_folder(run, 2))
    Order(LONG["olora"], FIFTEEN[:9], run).restore(5)
    run = runs("seqlora")
    shutil.rmtree(stage_folder(run, 2))
    Order(LONG["seqlora"], FIFTEEN[:9], run).restore(8)


def test_nothing_is_changed_by_reading(runs: Callable[[str], Path]) -> None:
    run = runs("olora")
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in run.rglob("*") if file.is_file()}
    Order(LONG["olora"], FIFTEEN[:9], run).restore(8)
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in run.rglob("*") if file.is_file()} == before


def test_two_commits_of_the_same_stage_are_the_same_files(tmp_path: Path) -> None:
    seals = []
    for name in ("one", "two"):
        Order(LONG["olora"], FIFTEEN[:9], tmp_path / name).run()
        seals.append([json.loads((stage_folder(tmp_path / name, n) / "DONE").read_text()) for n in range(1, 10)])
    assert seals[0] == seals[1]


def test_rows_of_a_source_are_what_the_steps_above_take() -> None:
    """A test of the tests: two stages do not train on the same rows, or order could not show."""
    first, second = some_rows(4, seed=0), some_rows(4, seed=1)
    assert isinstance(first, Source) and first.examples != second.examples
