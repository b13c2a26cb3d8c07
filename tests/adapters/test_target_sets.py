"""Sets of target layers: what each is in a family, what a folder says of them, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from cl_runner.adapters.kinds.ia3 import IA3
from cl_runner.adapters.target_sets import FAMILIES, chosen_targets, layers_of
from cl_runner.adapters.targets import is_linear, shape_of
from cl_runner.config.schema import TARGET_SETS
from cl_runner.errors import UserError
from tests.adapters.families import adapters_of, base_model, logits, off, random_pair, saved_as
from tests.adapters.test_peft_folder import plain
from tests.command_line import SMALL, call

LLAMA = {
    "qv": {"self_attn.q_proj", "self_attn.v_proj"},
    "attention": {f"self_attn.{name}_proj" for name in "qkvo"},
    "mlp": {f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
NEOX = {
    "qv": {"attention.query_key_value"},
    "attention": {"attention.query_key_value", "attention.dense"},
    "mlp": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
}
T5 = {
    "qv": {f"{part}.{name}" for part in ("SelfAttention", "EncDecAttention") for name in "qv"},
    "attention": {f"{part}.{name}" for part in ("SelfAttention", "EncDecAttention") for name in "qkvo"},
    "mlp": {f"DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")},
}
# The last two parts of the names that each set has.
WANTED: dict[str, dict[str, set[str]]] = {
    "t5": {**T5, "mlp": {"DenseReluDense.wi", "DenseReluDense.wo"}},
    "mt5": T5,
    "umt5": T5,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3"), LLAMA),
    "phi": {
        "qv": LLAMA["qv"],
        "attention": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"},
        "mlp": {"mlp.fc1", "mlp.fc2"},
    },
    "gpt2": {
        "qv": {"attn.c_attn"},
        "attention": {"attn.c_attn", "attn.c_proj"},
        "mlp": {"mlp.c_fc", "mlp.c_proj"},
    },
    "gpt_neox": NEOX,
    "bloom": {name: {ending.replace("attention", "self_attention") for ending in of} for name, of in NEOX.items()},
    "opt": {
        "qv": LLAMA["qv"],
        "attention": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"},
        "mlp": {"0.fc1", "0.fc2", "1.fc1", "1.fc2"},
    },
    # Known by the classes of their modules alone.
    "falcon": {
        "qv": {"self_attention.query_key_value"},
        "attention": {"self_attention.query_key_value", "self_attention.dense"},
        "mlp": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    },
    "gptj": {
        "qv": {"attn.q_proj", "attn.v_proj"},
        "attention": {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"},
        "mlp": {"mlp.fc_in", "mlp.fc_out"},
    },
}


def outline(family: str) -> Any:
    """A model of the family with two blocks, without weights."""
    blocks = {"gpt2": "n_layer", "gptj": "n_layer", "bloom": "n_layer"}.get(family, "num_hidden_layers")
    own: dict[str, Any] = {"num_decoder_layers": 2} if "t5" in family else {}
    own |= {"encoder_layers": 2, "decoder_layers": 2} if "bart" in family else {blocks: 2}
    config = transformers.AutoConfig.for_model(family, **own)
    seq2seq = config.is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


@pytest.mark.parametrize("family", WANTED)
def test_each_set_is_what_the_family_has(family: str) -> None:
    model = outline(family)
    for name, wanted in WANTED[family].items():
        layers = layers_of(model, name)
        assert {layer.split(".", layer.count(".") - 1)[-1] for layer in layers} == wanted, name
        assert all(is_linear(model.get_submodule(layer)) for layer in layers)
    blocks = {layer.rpartition(".")[0] for layer in layers_of(model, "attention")}
    assert len(blocks) == (6 if "t5" in family else 2)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_outputs_are_the_layers_that_write_into_the_stream_of_hidden_states(family: str) -> None:
    """All linear layers whose output is as wide as the model, but the projections that attention begins with."""
    model = outline(family)
    width = model.get_input_embeddings().weight.shape[1]
    inner = ("q", "k", "v", "q_proj", "k_proj", "v_proj")
    wanted = [
        layer
        for layer in layers_of(model, "all-linear")
        if shape_of(model.get_submodule(layer))[0] == width and layer.rpartition(".")[2] not in inner
    ]
    assert layers_of(model, "outputs") == wanted and wanted


def test_of_a_family_that_is_not_known_outputs_are_refused() -> None:
    with pytest.raises(UserError, match="cannot tell which layers of a falcon are 'outputs'; name them"):
        layers_of(outline("falcon"), "outputs")


@pytest.mark.parametrize("family", sorted({*FAMILIES, *WANTED}))
def test_attention_and_mlp_are_together_all_linear_layers_of_the_blocks(family: str) -> None:
    """By the table, or by the classes, on the one side; by the places of all linear layers on the other."""
    model = outline(family)
    qv, attention, mlp, whole = (set(layers_of(model, name)) for name in TARGET_SETS[:4])
    assert qv < attention and attention.isdisjoint(mlp) and attention | mlp == whole
    head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    linear = {name for name, module in model.named_modules() if is_linear(module)}
    assert linear - whole == set(head)


@pytest.mark.parametrize("family", sorted({*FAMILIES, *WANTED}))
def test_the_endings_of_a_set_name_its_layers_and_no_other_module(family: str) -> None:
    model = outline(family)
    for name in TARGET_SETS if family in FAMILIES else TARGET_SETS[:4]:
        endings = chosen_targets(model, [name])
        named = {m for m, _ in model.named_modules() if any(f".{m}".endswith(f".{ending}") for ending in endings)}
        assert named == set(layers_of(model, name))
        assert len(endings) <= 7  # not each layer by its full name


def test_gpt2s_two_projections_are_told_apart_by_their_places() -> None:
    model = outline("gpt2")
    assert chosen_targets(model, ["attention"]) == ["c_attn", "attn.c_proj"]
    assert chosen_targets(model, ["mlp"]) == ["c_fc", "mlp.c_proj"]
    assert chosen_targets(model, ["all-linear"]) == ["c_attn", "c_proj", "c_fc"]
    assert chosen_targets(model, ["attn.c_proj", "mlp"]) == ["attn.c_proj", "c_fc", "mlp.c_proj"]


@pytest.mark.parametrize(
    ("family", "asked"),
    [("gpt2", ["attention"]), ("gpt2", ["mlp"]), ("t5", ["all-linear"]), ("llama", ["mlp", "q_proj"])],
)
def test_the_folder_of_a_set_answers_in_plain_peft(tmp_path: Path, family: str, asked: list[str]) -> None:
    base = base_model(family)
    adapters = adapters_of(copy.deepcopy(base), family, targets=asked)
    for i in range(2):
        adapters.fold(random_pair(adapters, f"s{i}", seed=i))
    saved_as(tmp_path / "a", adapters)
    names = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert not set(names) & set(TARGET_SETS) and names == sorted(chosen_targets(base, asked))
    loaded = plain(copy.deepcopy(base), tmp_path / "a")
    assert off(logits(loaded), logits(adapters.model)) < 1e-5 < off(logits(base), logits(adapters.model))
    there = {
        name.removesuffix(".lora_A.default") for name, _ in loaded.named_modules() if name.endswith("lora_A.default")
    }
    assert {name.removeprefix("base_model.model.") for name in there} == set(adapters.past)


def test_a_tied_head_and_layers_outside_the_blocks_are_in_no_set() -> None:
    model = outline("opt")
    assert "lm_head" not in layers_of(model, "all-linear")
    config = transformers.AutoConfig.for_model("opt", num_hidden_layers=1, hidden_size=60, word_embed_proj_dim=32)
    with torch.device("meta"):
        projected = transformers.AutoModelForCausalLM.from_config(config)
    linear = {name for name, module in projected.named_modules() if is_linear(module)}
    outside = {"lm_head", "model.decoder.project_in", "model.decoder.project_out"}
    assert linear - set(layers_of(projected, "all-linear")) == outside


class SelfAttn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(4, 4) for _ in range(4))


class GatedFeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = Conv1D(8, 4), Conv1D(4, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.inner, self.extra = SelfAttn(), GatedFeedForward(), nn.Linear(4, 4)


class MLPAttentionModel(nn.Module):
    """Of no known family; only the classes inside its blocks say what is what."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(4, 9)
        if tied:
            self.blocks[1].extra.weight = self.blocks[0].extra.weight
            self.blocks[0].mix.key.weight = self.head.weight = nn.Parameter(torch.zeros(4, 4))


def test_an_unknown_family_is_told_by_the_classes_of_its_modules() -> None:
    model = MLPAttentionModel()
    assert chosen_targets(model, ["qv"]) == ["query", "value"]
    assert chosen_targets(model, ["attention"]) == ["query", "key", "value", "mix.out"]
    assert chosen_targets(model, ["mlp"]) == ["up", "inner.out"]
    assert chosen_targets(model, ["all-linear"]) == ["query", "key", "value", "out", "up", "extra"]
    assert chosen_targets(model, ["mlp", "extra", "mlp"]) == ["up", "inner.out", "extra"]


def test_layers_whose_weight_is_another_modules_too_are_not_in_all_linear() -> None:
    found = layers_of(MLPAttentionModel(tied=True), "all-linear")
    assert not {"blocks.0.extra", "blocks.1.extra", "blocks.0.mix.key"} & set(found) and "blocks.1.mix.key" in found


class Nameless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig()
        self.blocks = nn.ModuleList([nn.ModuleDict({"left": nn.Linear(4, 4), "right": nn.Linear(4, 4)})])


@pytest.mark.parametrize("name", ["qv", "attention", "mlp"])
def test_a_set_that_cannot_be_told_is_refused_with_what_there_is(name: str) -> None:
    message = (
        rf"^adapter.target_modules: cannot tell which layers of a model are '{name}'; .* \(there are left, right\)$"
    )
    with pytest.raises(UserError, match=message):
        chosen_targets(Nameless(), [name])
    assert chosen_targets(Nameless(), ["all-linear"]) == ["left", "right"]


def test_layers_without_a_name_of_their_own_are_refused() -> None:
    """An ending names every module that ends so: of ``blocks.0.left`` and ``more.blocks.0.left`` not the one alone."""
    model = Nameless()
    model.more = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"left": nn.Embedding(4, 4)})])})
    with pytest.raises(
        UserError, match=r"^adapter.target_modules: no name is that of blocks.0.left alone; name the la"
    ):
        chosen_targets(model, ["all-linear"])


def test_other_kinds_take_sets_too() -> None:
    """(IA)³ scales what goes into the last layer of a feed-forward block, and what comes out of the others."""
    kind = IA3(IA3.Config(kind="ia3", target_modules=["qv", "mlp"]))
    model = outline("llama")
    assert kind.targets(model) == ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(kind.shapes(model)) == 10
    kind = IA3(IA3.Config(kind="ia3"))
    assert kind.targets(model) == kind.default_targets(model)


# The command.


def test_one_name_is_a_list_of_one(tmp_path: Path) -> None:
    shown = call("config", "show", "--order", "order1", "--set", "adapter.target_modules=attention", cwd=tmp_path)
    assert "target_modules: [attention]" in shown.out


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("attentoin", "adapter.target_modules: the model has no layer 'attentoin'; did you mean 'attention'?"),
        ("[mlp, q_proj]", "adapter.target_modules: the model has no layer 'q_proj' (there are"),
        ("7", "adapter.target_modules must be a list"),
    ],
)
def test_what_the_model_has_not_is_refused_before_it_is_loaded(tmp_path: Path, asked: str, says: str) -> None:
    result = call(
        "train", "--order", "order1", "--method", "seqlora", *SMALL, "--set", f"adapter.target_modules={asked}",
        "--dry-run", cwd=tmp_path,
    )  # fmt: skip
    assert result.code == 2 and says in result.line
