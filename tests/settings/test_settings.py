"""Where settings come from, what is refused, and that a resolved config gives itself again."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from cl_runner.config.schema import RunConfig, Section
from cl_runner.errors import UserError, did_you_mean
from cl_runner.methods.protocol import Reorthogonalise
from cl_runner.settings import Resolved, difference, differing_from_presets, dump, resolve, schema, settings_of, show
from cl_runner.settings.layers import SETTABLE
from cl_runner.settings.presets import family, preset_names


class OLoRA(Section):
    reference: bool = True
    lambda1: float = Field(0.5, ge=0)
    lambda2: float = Field(0.0, ge=0)
    on: Literal["A", "B", "both"] = "A"
    reorthogonalise: Reorthogonalise | None = None


class NLoRA(Section):
    reference: bool = False
    lambda1: float = Field(1.0, ge=0)


METHODS: dict[str, type[BaseModel]] = {"olora": OLoRA, "nlora": NLoRA, "seqlora": Section}


def method_schema(name: str) -> type[BaseModel]:
    if name not in METHODS:
        raise UserError(f"there is no method '{name}'{did_you_mean(name, METHODS)}")
    return METHODS[name]


def resolved(**given: Any) -> Resolved:
    return resolve(method_schema=method_schema, **given)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "c.yaml") -> Path:
    Path(name).write_text(text)
    return Path(name)


# --- precedence


def test_nothing_but_an_order_is_tiny() -> None:
    result = resolved(order="order1")
    assert result.config.model.name == "tiny-t5" and result.config.presets == ["tiny"]
    assert result.origin["training.epochs"] == "preset tiny"
    assert result.origin["training.clip"] == "default"
    assert result.origin["order"] == "--order"
    assert result.origin["method.lambda1"] == "preset tiny" and result.origin["method.on"] == "default of olora"
    own = result.config.method.own()
    assert own.pop("lambda1") > 0
    assert own == {"reference": True, "lambda2": 0.0, "on": "A", "reorthogonalise": None}
    assert result.order is not None and result.order.names == ["dbpedia", "amazon", "yahoo", "agnews"]
    assert differing_from_presets(result) == {} and result.notes == []


def test_embedded_models_bring_their_preset_and_others_do_not() -> None:
    assert resolved(flags={"model.name": "tiny-llama"}).config.presets == ["tiny-llama"]
    other = resolved(flags={"model.name": "gpt2"})
    assert other.config.presets == [] and other.config.training == RunConfig().training
    assert resolved(presets=["tiny"]).config.presets == ["tiny"]


def test_each_source_is_stronger_than_the_one_before() -> None:
    """Six sources set six learning rates; taking the strongest away shows the next."""
    write("training: {lr: 2.0}", "one.yaml")
    write("training: {lr: 3.0}", "two.yaml")
    write("tasks: [{task: CB, set: {training.lr: 4.0}}, RTE]", "o.yaml")
    config = write("training: {lr: 5.0}")
    flags: dict[str, Any] = {"training.lr": 6.0}
    sets = ["training.lr=7.0", "training.lr=8.0"]
    presets = ["./one.yaml", "./two.yaml"]

    def lr(**given: Any) -> float:
        return resolved(**given).config.at(1, "CB").training.lr

    assert lr(presets=presets, order="o.yaml", config_file=config, flags=flags, sets=sets) == 8
    assert lr(presets=presets, order="o.yaml", config_file=config, flags=flags, sets=sets[:1]) == 7
    assert lr(presets=presets, order="o.yaml", config_file=config, flags=flags) == 6
    assert lr(presets=presets, order="o.yaml", config_file=config, flags={"training.lr": None}) == 5
    assert lr(presets=presets, order="o.yaml") == 4
    assert resolved(presets=presets, order="o.yaml").config.at(2, "RTE").training.lr == 3
    assert lr(presets=presets) == 3
    assert lr(presets=presets[:1]) == 2
    assert lr(flags={"model.name": "gpt2"}) == 1e-3


def test_one_task_and_one_position() -> None:
    sets = ["tasks.amazon.training.epochs=2", "stages.1.training.lr=1e-3", "stages.2.training.epochs=7"]
    result = resolved(order="order1", sets=sets)
    assert result.config.tasks == {"amazon": {"training.epochs": 2}}
    assert result.config.stages == {1: {"training.lr": 1e-3}, 2: {"training.epochs": 7}}
    assert result.config.at(2, "amazon").training.epochs == 7  # the position is the narrower
    assert result.origin["stages.1.training.lr"] == "--set"
    config = write("tasks: {amazon: {training: {epochs: 3}, data.max_train: 5}}\nstages: {1: {method.lambda1: 0}}")
    result = resolved(order="order1", config_file=config)
    assert result.config.tasks == {"amazon": {"training.epochs": 3, "data.max_train": 5}}
    assert result.config.at(1, "dbpedia").method.own()["lambda1"] == 0
    assert result.origin["tasks.amazon.data.max_train"] == "c.yaml:1"


def test_a_stronger_source_for_all_replaces_a_weaker_one_for_some_and_says_so() -> None:
    write("tasks: [{task: CB, set: {training.epochs: 4}}, RTE]", "o.yaml")
    result = resolved(order="o.yaml", sets=["training.epochs=1"])
    assert result.config.tasks == {} and result.config.at(1, "CB").training.epochs == 1
    assert result.notes == ["training.epochs (--set) replaces tasks.CB.training.epochs (o.yaml:1)"]
    config = write("stages: {1: {training.epochs: 5}}")
    result = resolved(order="o.yaml", config_file=config, sets=["tasks.CB.training.epochs=6"])
    assert result.config.at(1, "CB").training.epochs == 6
    both = ["training.epochs=1", "tasks.CB.training.epochs=2"]  # in one source the narrower one holds
    for sets in (both, both[::-1]):
        assert resolved(order="o.yaml", sets=sets).config.at(1, "CB").training.epochs == 2


def test_another_method_leaves_the_weaker_ones_settings() -> None:
    config = write("method: {name: olora, lambda1: 3, lambda2: 4}")
    result = resolved(order="order1", config_file=config, flags={"method.name": "nlora"})
    assert result.config.method.own() == {"reference": False, "lambda1": 1.0}
    assert "method.lambda1 (c.yaml:1) is of olora and does not go with nlora" in result.notes


def test_presets_of_a_file_and_settings_of_one_method_in_a_preset() -> None:
    write("model: {name: gpt2}\nmethods: {olora: {lambda1: 2}, nlora: {lambda1: 3}}", "p.yaml")
    config = write("presets: [./p.yaml]\norder: order2")
    for method, lambda1 in (("olora", 2), ("nlora", 3)):
        result = resolved(config_file=config, flags={"method.name": method})
        assert result.config.method.own()["lambda1"] == lambda1
        assert result.config.presets == [str(Path("p.yaml").resolve())]
        assert result.order is not None and result.order.name == "order2"
        assert differing_from_presets(result) == {}


def test_text_stays_text() -> None:
    result = resolved(sets=["output.name=007", "model.revision=1234", "eval.future=True", "adapter.target_modules=[q]"])
    assert result.config.output.name == "007" and result.config.model.revision == "1234"
    assert result.config.eval.future is True and result.config.adapter.target_modules == ["q"]


# --- the resolved config


def test_the_resolved_yaml_resolves_to_itself() -> None:
    cases: list[dict[str, Any]] = [
        {"order": "order1"},
        {"presets": ["t5-large"], "order": "order4", "sets": ["tasks.CB.training.epochs=3", "training.lr=1e-5"]},
        {"presets": ["published"], "order": "order6"},
        {"presets": ["published"], "order": "order1", "flags": {"model.name": "my/llama-7b", "method.name": "nlora"}},
        {"presets": ["published"], "order": "order1", "flags": {"model.name": "llama"}, "sets": ["training.lr=1e-5"]},
        {
            "order": "order1",
            "sets": ['output.dir="a: #\\n\\u2028é\\x85\\\\"', "adapter.target_modules=[no, 'null', a b]"],
        },
    ]
    for case in cases:
        first = resolved(**case)
        for text in (show(first), dump(first.config)):
            again = resolved(config_file=write(text, "run.yaml"))
            assert difference(first.config, again.config) == [] and again.config == first.config
            assert differing_from_presets(again) == differing_from_presets(first)


def test_every_value_shows_where_it_came_from() -> None:
    text = show(resolved(order="order1", sets=["stages.2.training.lr=1e-3"]))
    for line in text.splitlines():
        assert line.endswith(":") or re.search(r"  # \S", line), line
    assert re.search(r"^  epochs: \d+ +# preset tiny$", text, re.M)
    assert re.search(r"^    training.lr: 0.001 +# --set$", text, re.M)
    assert re.search(r"^  lambda2: 0.0 +# default of olora$", text, re.M)


def test_an_own_order_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("task_orders").mkdir()
    write("tasks: [CB]", "task_orders/mine.yaml")
    file = write(dump(resolved(order="mine").config), "run.yaml").resolve()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = resolved(config_file=file)
    assert again.order is not None and (again.order.name, again.order.names) == ("mine", ["CB"])
    assert resolved(order="order1").config.order == "order1"


def test_difference() -> None:
    a = resolved(order="order1", sets=["training.lr=1.0"]).config
    b = resolved(order="order1", sets=["seed=3", "tasks.amazon.training.epochs=2"]).config
    assert difference(a, b) == ["seed", "training.lr", "tasks.amazon.training.epochs"]
    assert difference(a, a) == []


def test_what_differs_from_the_presets() -> None:
    def changed(*sets: str, **given: Any) -> dict[str, Any]:
        return differing_from_presets(resolved(**{"order": "order1", "sets": sets, **given}))

    assert changed("output.dir=x", "output.name=y", "output.log_every=3", "seed=5") == {}
    assert changed("training.micro_batch=2", "method.lambda1=3") == {"training.micro_batch": 2, "method.lambda1": 3.0}
    assert changed(flags={"method.name": "nlora"}) == {}
    as_in_the_preset = resolved(order="order1").config.training.epochs
    assert changed(f"training.epochs={as_in_the_preset}") == {}
    assert changed("data.dir=/a") == changed("data.dir=/b") == {"data.source": "folder"}  # no longer synthetic
    assert changed("data.dir=/a", presets=["t5-large"]) == {}
    assert changed("data.source=hub", presets=["t5-large"]) == {"data.source": "hub"}
    write("tasks: [{task: CB, set: {training.epochs: 4}}]", "o.yaml")
    assert changed(order="o.yaml") == {"tasks.CB.training.epochs": 4}


def test_json_schema() -> None:
    made = schema(METHODS)
    assert made["$schema"] == "https://json-schema.org/draft/2020-12/schema" and made["additionalProperties"] is False
    assert made["$defs"]["TrainingConfig"]["additionalProperties"] is False
    assert [entry["title"] for entry in made["properties"]["method"]["anyOf"]] == list(METHODS)
    assert all(entry["additionalProperties"] is False for entry in made["properties"]["method"]["anyOf"])
    task = made["properties"]["tasks"]["additionalProperties"]
    assert "training.epochs" in task["properties"] and task["additionalProperties"] is False
    assert set(SETTABLE) <= set(made["properties"])
    assert "$defs" in schema()


# --- presets


@pytest.mark.parametrize("name", [name for name in preset_names() if name != "published"])
def test_every_preset_resolves(name: str) -> None:
    result = resolved(presets=[name], order="order1")
    assert result.config.presets == [name] and result.origin["model.name"] == f"preset {name}"
    training = result.config.training
    assert training.global_batch % training.micro_batch == 0


def test_the_two_smollm2_differ_in_their_base_alone() -> None:
    hub, folder = (resolved(presets=[name]).config for name in ("smollm2", "smollm2-q4"))
    assert difference(hub, folder) == ["presets", "model.name"]
    assert hub.model.name == "HuggingFaceTB/SmolLM2-135M-Instruct" and hub.data.chat_template
    assert (hub.adapter.r, hub.adapter.target_modules, hub.training.lr) == (8, None, 5e-4)


def test_preset_names() -> None:
    ours = {"tiny", "tiny-llama", "smollm2", "smollm2-q4", "t5-base", "t5-large", "t5-xl", "llama-7b", "published"}
    assert set(preset_names()) >= ours
    assert "kinds" not in preset_names()


def test_family(tmp_path: Path) -> None:
    assert family("google-t5/t5-large") == family("google/flan-t5-xl") == "t5"
    assert family("meta-llama/Llama-2-7b-hf") == "llama" and family("gpt2") is None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"model_type": "llama"}')
    assert family(str(tmp_path / "mine")) == "llama"


T5, LLAMA = "google-t5/t5-large", "meta-llama/Llama-2-7b-hf"
# method, model, order → learning rate, epochs, global and micro-batch, λ1, stage by stage; one value: all the same
PUBLISHED: list[tuple[str, str, str, list[float], list[int], tuple[int, int], list[float]]] = [
    *(("olora", T5, f"order{k}", [1e-3], [1], (64, 8), [0.5]) for k in (1, 2, 3)),
    ("olora", T5, "order6", [1e-3], [1, 1, 2] + 12 * [1], (64, 8), [0] + 8 * [0.5] + 6 * [5]),
    *(("olora", LLAMA, f"order{k}", [1e-3, 1e-4, 1e-4, 1e-4], [1], (64, 1), [0.5]) for k in (1, 2, 3)),
    ("nlora", T5, "order1", [1e-3], [10], (48, 48), [0.4]),
    ("nlora", T5, "order2", [1e-3], [10], (32, 32), [0.4]),
    ("nlora", T5, "order3", [1e-3], [10], (32, 32), [0.4]),
    (
        *("nlora", T5, "order4", [5e-4], [10], (32, 32)),
        # MNLI, CB, WiC, COPA, QQP, BoolQA, RTE, IMDB, yelp, amazon, SST-2, dbpedia, agnews, MultiRC, yahoo
        [0.4, 0.4, 1.2, 0.4, 0.4, 0.4, 1.2, 1.2, 1.2, 0.4, 1.2, 1.2, 0.4, 0.4, 1.2],
    ),
    ("nlora", T5, "order5", [8e-4], [10], (32, 32), [0.55]),
    ("nlora", T5, "order6", [1e-3], [10], (32, 32), [1.8]),
    ("nlora", LLAMA, "order1", [1e-3, 1e-4, 1e-4, 1e-4], [1, 10, 1, 1], (48, 6), [0.46]),
    ("nlora", LLAMA, "order2", [1e-4, 5e-5, 5e-5, 5e-5], [1, 5, 1, 1], (32, 4), [0.38]),
    ("nlora", LLAMA, "order3", [1e-4], [5, 10, 1, 1], (32, 1), [0.4]),
]


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: "-".join(case[:3]).replace("/", "_"))
def test_published(case: tuple[str, str, str, list[float], list[int], tuple[int, int], list[float]]) -> None:
    method, model, order, lrs, epochs, batch, lambdas = case
    result = resolved(presets=["published"], order=order, flags={"method.name": method, "model.name": model})
    assert result.order is not None
    names = result.order.names
    at = [result.config.at(position, name) for position, name in enumerate(names, 1)]
    count = len(names)
    assert [one.training.lr for one in at] == (lrs if len(lrs) > 1 else lrs * count)
    assert [one.training.epochs for one in at] == (epochs if len(epochs) > 1 else epochs * count)
    assert [one.method.own()["lambda1"] for one in at] == (lambdas if len(lambdas) > 1 else lambdas * count)
    for one in at:
        training, adapter, data = one.training, one.adapter, one.data
        assert (training.global_batch, training.micro_batch) == batch
        assert (training.schedule, training.warmup, training.weight_decay, training.clip) == ("constant", 0, 0, 1)
        assert training.loss_mean == "micro" and training.offload_optimizer and one.seed == 42
        assert training.length_window == 1  # the reference shuffles
        assert (adapter.r, adapter.alpha, adapter.dropout) == (8, 32, 0.1)
        assert adapter.target_modules == (["q", "v"] if model == T5 else ["q_proj", "v_proj"])
        assert (data.max_source, data.max_target, one.eval.max_new_tokens) == (512, 50, 50)
        # What the reference code does and the defaults do not; the scripts run under DeepSpeed.
        assert adapter.dropout_past and data.unknown_test == "score" and training.penalty_at == "step"
        assert (data.truncate, data.long_targets) == (("reference", "cut") if model == T5 else ("tail", "refuse"))
        assert (training.precision, one.model.dtype) == (("fp32", "fp32") if model == T5 else ("bf16", "bf16"))
        assert one.method.own()["reference"] is True
    assert any("https://github.com/" in note for note in result.notes)


def test_the_reference_codes_ways_are_no_defaults_and_show_where_they_come_from() -> None:
    keys = {
        "adapter.dropout_past": False, "data.unknown_test": "drop", "data.truncate": "text",
        "data.long_targets": "refuse", "training.penalty_at": "step",
    }  # fmt: skip
    plain = RunConfig()
    assert {key: getattr(getattr(plain, key.split(".")[0]), key.split(".")[1]) for key in keys} == keys
    origin = resolved(presets=["published"], order="order1", flags={"method.name": "nlora"}).origin
    assert {origin[key] for key in keys} == {"preset published"}


def test_published_second_coefficient_of_the_long_order() -> None:
    result = resolved(presets=["published"], order="order6")
    wanted = {"COPA": 0.1, "QQP": 0.1, "RTE": 0.3, "SST-2": 0.1, "yahoo": 0.1, "BoolQA": 0.1, "WiC": 0.3}
    assert result.order is not None
    for position, task in enumerate(result.order.names, 1):
        assert result.config.at(position, task).method.own()["lambda2"] == wanted.get(task, 0)


def test_published_goes_by_the_tasks_not_by_the_orders_name() -> None:
    write("tasks: [dbpedia, amazon, yahoo, agnews]", "mine.yaml")
    assert resolved(presets=["published"], order="mine.yaml").config.training.global_batch == 64
    Path("task_orders").mkdir()
    write("tasks: [dbpedia, agnews]", "task_orders/order1.yaml")
    with pytest.raises(UserError, match="no settings were published for olora on T5 and order1"):
        resolved(presets=["published"], order="order1")


def test_published_is_the_strongest_preset_and_says_for_which_model() -> None:
    for presets in (["t5-base", "published"], ["published", "t5-base"]):
        result = resolved(presets=presets, order="order1")
        assert result.config.training.micro_batch == 8 and result.config.model.name == "google-t5/t5-base"
        assert "the settings were published for google-t5/t5-large, not for google-t5/t5-base" in result.notes[1]
    assert resolved(presets=["published"], order="order1").config.model.name == T5


@pytest.mark.parametrize(
    ("method", "model", "order", "words"),
    [
        (
            "olora",
            None,
            "order4",
            "T5 and order4 (there are for order1, order2, order3, order6); the nearest: ",
        ),
        ("olora", None, "order5", f"--method olora --model {T5} --order order6"),
        ("olora", LLAMA, "order6", f"--method olora --model {LLAMA} --order order"),
        ("nlora", LLAMA, "order4", f"--method nlora --model {LLAMA} --order order"),
        ("seqlora", None, "order1", "no settings were published for seqlora on T5 and order1; the nearest: "),
        (
            "olora",
            "gpt2",
            "order1",
            f"gpt2 and order1; the nearest: --method olora --model {T5} --order order1",
        ),
        ("olora", None, None, "give --order"),
    ],
)
def test_published_refuses_where_nothing_was(method: str, model: str | None, order: str | None, words: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved(presets=["published"], order=order, flags={"method.name": method, "model.name": model})
    assert str(caught.value).startswith("--preset published: ") and words in str(caught.value)


# --- what is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training:\n  epoch: 1", "c.yaml:2:3: training.epoch is not a setting; did you mean 'epochs'?"),
        ("adapter: {rank: auto}", "c.yaml:1:11: adapter.rank is not a setting; did you mean 'r'?"),
        ("training: {learning_rate: 1}", "c.yaml:1:12: training.learning_rate is not a setting; did you mean 'lr'?"),
        ("trainin: {lr: 1}", "c.yaml:1:1: trainin is not a setting; did you mean 'training'?"),
        ("lr: 1", "c.yaml:1:1: lr is not a setting; did you mean 'training.lr'?"),
        ("training.lr: 1", "c.yaml:1:1: training.lr is not a setting; write training: {lr: …}"),
        ("1: 2", "c.yaml:1:1: 1 is not a setting"),
        ("training: {lr: abc}", "c.yaml:1:16: training.lr must be a number"),
        ("training: {lr: [1]}", "c.yaml:1:16: training.lr must be a number"),
        ("training: {lr: true}", "c.yaml:1:16: training.lr must be a number, not true or false"),
        ("training: {lr: 1e400}", "c.yaml:1:16: training.lr must be a finite number"),
        ("training: {lr: 0}", "c.yaml:1:16: training.lr must be more than 0"),
        ("training: {epochs: 1.5}", "c.yaml:1:20: training.epochs must be a whole number"),
        ("training: {epochs: -1}", "c.yaml:1:20: training.epochs must be at least 0"),
        ("training: {epochs: }", "c.yaml:1:19: training.epochs must be a whole number"),
        (
            "training: {schedule: linar}",
            "training.schedule must be one of constant, linear, cosine; did you mean",
        ),
        ("adapter: {dropout: 1}", "adapter.dropout must be less than 1"),
        ("adapter: {target_modules: q}", "adapter.target_modules must be a list"),
        ("adapter: {target_modules: [q, 1]}", "adapter.target_modules.1 must be text"),
        ("eval: {future: maybe}", "c.yaml:1:16: eval.future must be true or false"),
        ("model: {name: [x]}", "c.yaml:1:15: model.name must be text"),
        ("seed: x", "c.yaml:1:7: seed must be a whole number"),
        ("seed: 2147483648", "seed must be less than"),
        ("training: 5", "c.yaml:1:11: training must be a mapping"),
        ("method: olora", "c.yaml:1:9: method must be a mapping of settings, such as {name: olora}"),
        ("method: {name: olra}", "c.yaml:1:16: there is no method 'olra'; did you mean 'olora'?"),
        ("method: {lamda1: 1}", "c.yaml:1:10: method.lamda1 is not a setting of olora; did you mean 'lambda1'?"),
        ("method: {name: seqlora, lambda1: 1}", "method.lambda1 is not a setting of seqlora; it has none"),
        ("method: {lambda1: -1}", "c.yaml:1:19: method.lambda1 must be at least 0"),
        ("method: {on: C}", "method.on must be one of A, B, both"),
        ("order: ordr1", "c.yaml:1:8: no order 'ordr1'; did you mean 'order1'?"),
        ("order: [x]", "c.yaml:1:8: order must be text"),
        ("presets: tiny", "c.yaml:1:10: presets must be a list of names"),
        ("presets: [tny]", "no preset 'tny'; did you mean 'tiny'?"),
        ("tasks: 3", "c.yaml:1:8: tasks must be a mapping"),
        ("tasks: {amazon: 3}", "c.yaml:1:17: tasks.amazon must be a mapping"),
        ("tasks: {amazn: {training.lr: 1}}", "c.yaml:1:17: task 'amazn' is not in order1; did you mean 'amazon'?"),
        ("tasks: {CB: {training.lr: 1}}", "task 'CB' is not in order1, which has dbpedia, amazon, yahoo, agnews"),
        (
            "tasks: {amazon: {training.epoch: 1}}",
            "c.yaml:1:18: training.epoch is not a setting; did you mean",
        ),
        ("tasks: {amazon: {training.epochs: x}}", "c.yaml:1:35: tasks.amazon.training.epochs must be a whole number"),
        ("tasks: {amazon: {epochs: 1}}", "c.yaml:1:18: 'epochs' is not a setting of a task; write section.key"),
        (
            "tasks: {amazon: {model.name: x}}",
            "model settings are not set by task; only training, method, options, data",
        ),
        ("tasks: {amazon: {adapter: {r: 4}}}", "adapter settings are not set by task"),
        ("tasks: {amazon: {method.name: nlora}}", "the method is one for the whole order"),
        ("tasks: {amazon: {method.lamda1: 1}}", "method.lamda1 is not a setting of olora; did you mean 'lambda1'?"),
        ("tasks: {amazon: {method.lambda1: x}}", "tasks.amazon.method.lambda1 must be a number"),
        ("stages: {5: {training.lr: 1}}", "stage 5 is not in order1, which has 4 tasks"),
        ("stages: {0: {training.lr: 1}}", "c.yaml:1:10: stages.0: a stage is a position in the order, 1 for the first"),
        ("stages: {one: {training.lr: 1}}", "stages.one: a stage is a position"),
        ("stages: {1: {data.max_train: 1}}", "data settings are not set by stage; only training, method, options"),
        ("training: {lr: 1, lr: 2}", "c.yaml:1:19: 'lr' is here twice"),
        ("training: !!python/object:os.system {}", "c.yaml:1:11: the tag !!python/object:os.system is refused"),
    ],
)
def test_config_files_refused_with_their_place(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved(order=None if text.startswith("order") else "order1", config_file=write(text))
    assert message in str(caught.value)
    assert str(caught.value).startswith("c.yaml:1:") or text.startswith("training:\n")
    assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value)


def test_set_takes_parts_of_any_depth(tmp_path: Path) -> None:
    def found(*sets: str, **more: Any) -> Any:
        return resolved(order="order1", sets=list(sets), **more).config

    dotted = found("method.reorthogonalise.every=2", "method.reorthogonalise.how=soft")
    assert dotted == found("method.reorthogonalise={every: 2, how: soft}")
    whole = {"how": "hard", "every": 7, "on": "A", "rescale": False, "moments": None}
    assert found("method.reorthogonalise.every=7").method.own()["reorthogonalise"] == whole
    (tmp_path / "c.yaml").write_text("method: {name: olora, reorthogonalise: {how: soft, every: 9}}\n")
    over = found("method.reorthogonalise.every=2", config_file=tmp_path / "c.yaml")
    assert over.method.own()["reorthogonalise"] == {**whole, "how": "soft", "every": 2}, "the file's other parts stay"
    last = found("method.reorthogonalise.every=2", "method.reorthogonalise={how: soft}")
    assert last.method.own()["reorthogonalise"] == {**whole, "how": "soft", "every": 100}, "the last one wins, whole"
    task = found("method.reorthogonalise.every=2", "tasks.yahoo.method.reorthogonalise.on=B",
                 "tasks.yahoo.method.reorthogonalise.every=3")  # fmt: skip
    assert task.tasks["yahoo"] == {"method.reorthogonalise": {**whole, "on": "B", "every": 3}}
    assert task.at(3, "yahoo").method.own()["reorthogonalise"]["every"] == 3
    assert task.method.own()["reorthogonalise"]["every"] == 2
    stage = found("stages.2.method.reorthogonalise.every=4")
    assert stage.at(2, "amazon").method.own()["reorthogonalise"] == {**whole, "every": 4}
    assert found("stages.2.method.reorthogonalise=null").at(2, "amazon").method.own()["reorthogonalise"] is None


def test_parts_of_a_setting_of_one_task_or_position_say_where_they_come_from() -> None:
    config = write("tasks: {amazon: {method.reorthogonalise: {every: 9}}, yahoo: {method.reorthogonalise.every: 8}}")
    sets = ["tasks.dbpedia.method.reorthogonalise.every=3", "stages.2.method.reorthogonalise.on=B"]
    result = resolved(order="order1", config_file=config, sets=sets)
    origins = {key: origin for key, origin in result.origin.items() if key.endswith("method.reorthogonalise")}
    assert origins == {
        "method.reorthogonalise": "default of olora",
        "tasks.amazon.method.reorthogonalise": "c.yaml:1",
        "tasks.yahoo.method.reorthogonalise": "c.yaml:1",
        "tasks.dbpedia.method.reorthogonalise": "--set",
        "stages.2.method.reorthogonalise": "--set",
    }
    [shown] = [line for line in show(result).splitlines() if "every: 3" in line]
    assert shown.endswith("# --set")
    over = resolved(order="order1", config_file=config, sets=["tasks.amazon.method.reorthogonalise.every=4"])
    assert over.origin["tasks.amazon.method.reorthogonalise"] == "--set"
    assert over.config.tasks["amazon"]["method.reorthogonalise"]["every"] == 4


def test_a_whole_setting_of_a_stronger_source_takes_weaker_parts_away() -> None:
    config = write("tasks: {amazon: {method.reorthogonalise.every: 9}}")
    for key, left in (("tasks.amazon.method", {"amazon": {"method.reorthogonalise": None}}), ("method", {})):
        result = resolved(order="order1", config_file=config, sets=[f"{key}.reorthogonalise=null"])
        assert result.config.tasks == left
        assert [note for note in result.notes if "replaces tasks.amazon.method.reorthogonalise.every" in note]


@pytest.mark.parametrize(
    ("key", "name", "setting"),
    [
        ("v1.data.training.epochs", "v1.data", "training.epochs"),
        ("v1.data.data.max_train", "v1.data", "data.max_train"),
        ("v1.data.max_train", "v1", "data.max_train"),  # of v1.data it would be no setting
        ("v1.training.epochs", "v1", "training.epochs"),
        ("v1.method.training.epochs", "v1.method", "training.epochs"),  # of two tasks' the longer name
        ("v1.method.method.lambda1", "v1.method", "method.lambda1"),
        ("v1.method.lambda1", "v1", "method.lambda1"),
        ("a.b.c.training.epochs", "a.b.c", "training.epochs"),
        ("training.training.epochs", "training", "training.epochs"),
    ],
)
def test_names_of_tasks_may_hold_dots_and_sections(key: str, name: str, setting: str) -> None:
    names = ["v1", "v1.data", "v1.method", "a.b.c", "training"]
    own = [f"{{name: {each}, kind: TC, labels: [x, y], source: {{train: t, test: t}}}}" for each in names]
    write(f"name: o\ntasks: [{', '.join(own)}]", "o.yaml")
    assert resolved(order="o.yaml", sets=[f"tasks.{key}=2"]).config.tasks == {name: {setting: 2}}
    assert resolved(sets=["order=o.yaml", f"tasks.{key}=2"]).config.tasks == {name: {setting: 2}}
    with pytest.raises(UserError, match="epoks is not a setting; did you mean 'epochs'"):
        resolved(order="o.yaml", sets=["tasks.v1.data.training.epoks=1"])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("training.lr=abc", "--set training.lr=abc: training.lr must be a number"),
        ("training.lr=", "--set training.lr=: training.lr must be a number"),
        ("training.epoch=1", "--set training.epoch=1: training.epoch is not a setting; did you mean 'epochs'?"),
        ("training=1", "training is a section; write training.key=value"),
        ("training.lr", "--set training.lr: write --set section.key=value"),
        ("=1", "--set =1: write --set section.key=value"),
        ("training.lr.x=1", "training.lr has no parts"),
        ("training..x=1", "training is a section; write training.key=value"),
        ("method.reorthogonalise.evry=5", "method.reorthogonalise.evry is not a setting; did you mean 'every'?"),
        ("method.reorthogonalise.every.x=5", "method.reorthogonalise.every must be a whole number"),
        ("method.reorthogonalise.every=0", "method.reorthogonalise.every must be at least 1"),
        ("method.lambda1.x=5", "method.lambda1 must be a number"),
        ("tasks.amazon.method.reorthogonalise.evry=5", "tasks.amazon.method.reorthogonalise"),
        ("tasks.amazon.training.lr.x=5", "training.lr.x is not a setting"),
        ("seed.x=1", "seed has no parts"),
        ("foo.bar=1", "foo.bar is not a setting; there are presets, order"),
        ("presets=[tiny]", "choose presets with --preset"),
        ("tasks.amazon=1", "write tasks.NAME.section.key=value"),
        ("tasks.amazon.training=1", "write tasks.NAME.section.key=value"),
        ("tasks.amazn.training.lr=1", "task 'amazn' is not in order1; did you mean 'amazon'?"),
        ("tasks.amazon.training.epoch=1", "training.epoch is not a setting; did you mean 'epochs'?"),
        ("tasks.amazon.training.epochs=x", "tasks.amazon.training.epochs must be a whole number"),
        ("tasks.amazon.output.dir=x", "output settings are not set by task"),
        ("tasks.amazon.seed.x=1", "'seed' is not a section"),
        ("stages.9.training.lr=1", "stage 9 is not in order1, which has 4 tasks"),
        ("stages.-1.training.lr=1", "stages.-1: a stage is a position"),
        ("stages.1.training.lr=x", "stages.1.training.lr must be a number"),
        ("stages.99999999999999999999.training.lr=1", "is not in order1"),
        ("method.lamda1=1", "method.lamda1 is not a setting of olora; did you mean 'lambda1'?"),
        ("method.name=olra", "--set method.name=olra: there is no method 'olra'"),
        ("data.dir=!!python/none x", "tag !!python/none is refused"),
        ("training.lr=[1", "broken YAML"),
        ("a\nb=1", r"--set a\nb=1: a\nb is not a setting"),
    ],
)
def test_set_refused_by_name(item: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved(order="order1", sets=[item])
    assert message in str(caught.value) and str(caught.value).startswith("--set ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"order": "ordr1"}, "--order: no order 'ordr1'; did you mean 'order1'?"),
        ({"order": "../x"}, "--order: ../x: no such order file"),
        ({"order": "a\0b"}, r"--order: 'a\x00b' is not the name of a task order"),
        ({"presets": ["t5-lage"]}, "--preset: no preset 't5-lage'; did you mean 't5-large'?"),
        ({"presets": ["../tiny"]}, "--preset: ../tiny: no such preset file"),
        ({"presets": ["tasks/CB"]}, "--preset: tasks/CB: no such preset file"),
        ({"presets": ["kinds"]}, "--preset: no preset 'kinds'"),
        ({"presets": [""]}, "--preset: '' is not the name"),
        ({"flags": {"method.name": "olra"}}, "--method: there is no method 'olra'; did you mean 'olora'?"),
        (
            {"flags": {"method.name": "olra"}, "presets": ["published"], "order": "order1"},
            "--method: there is no method",
        ),
        ({"flags": {"seed": -1}}, "--seed -1: seed must be at least 0"),
        ({"flags": {"data.source": "hug"}}, "--data hug: data.source must be one of auto, folder, hub, synthetic"),
        ({"config_file": Path("none.yaml")}, "none.yaml: no such file"),
    ],
)
def test_flags_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved(**given)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("order: order1", "p.yaml:1:1: a preset does not set order"),
        ("presets: [tiny]", "p.yaml:1:1: a preset does not set presets"),
        ("methods: 3", "p.yaml:1:10: methods must be a mapping"),
        ("methods: {olora: 3}", "p.yaml:1:18: methods.olora must be a mapping"),
        ("methods: {olora: {lamda1: 3}}", "p.yaml:1:19: method.lamda1 is not a setting of olora"),
        ("training: {lr: x}", "p.yaml:1:16: training.lr must be a number"),
    ],
)
def test_presets_refused_with_their_place(text: str, message: str) -> None:
    write(text, "p.yaml")
    with pytest.raises(UserError) as caught:
        resolved(presets=["./p.yaml"])
    assert message in str(caught.value)


def test_an_orders_wrong_value_names_the_orders_file() -> None:
    write("tasks: [{task: CB, set: {training.epochs: x}}]", "o.yaml")
    with pytest.raises(UserError) as caught:
        resolved(order="o.yaml")
    assert str(caught.value) == "o.yaml:1:43: tasks.CB.training.epochs must be a whole number"


def test_a_preset_may_speak_of_tasks_that_the_order_has_not() -> None:
    write("tasks: {CB: {training.lr: 1}, amazon: {training.lr: 2}}\nstages: {9: {training.lr: 3}}", "p.yaml")
    result = resolved(presets=["./p.yaml"], order="order1")
    assert result.config.tasks == {"amazon": {"training.lr": 2.0}} and result.config.stages == {}


def test_without_schemas_method_settings_pass() -> None:
    other = {"model.name": "gpt2"}  # no preset, no method settings but these
    result = resolve(order="order1", flags=other, sets=["method.anything=[1, 2]", "tasks.amazon.method.anything=3"])
    assert result.config.method.own() == {"anything": [1, 2]}
    assert result.config.tasks == {"amazon": {"method.anything": 3}}


def test_settings_of_lists_every_leaf() -> None:
    keys = [".".join(map(str, path)) for path, _ in settings_of(RunConfig())]
    assert "training.lr" in keys and "seed" in keys and len(keys) == len(set(keys))


def test_no_torch() -> None:
    code = "import sys, cl_runner.settings, cl_runner.tasks.new_order; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
