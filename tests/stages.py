"""Tiny random models in a room of their own, so that a stage trains in a fraction of a second."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from cl_runner.adapters.kind import Opening
from cl_runner.config.schema import RunConfig
from cl_runner.engine.process import Place
from cl_runner.engine.zero import Autocast
from cl_runner.methods.protocol import Method, Source, StagePlan
from cl_runner.models.base import Base, Layout, neutral_generation
from cl_runner.models.batch import Example
from cl_runner.models.model_folder import ModelFolder
from cl_runner.registry import KINDS
from cl_runner.training.loop import train_stage
from cl_runner.training.stage import Room, StageRun
from cl_runner.training.step_log import Trained

Kind = Literal["t5", "llama"]
VOCABULARY, PAD, END, START = 64, 0, 1, 0
LAYOUTS = {
    "t5": Layout(True, PAD, END, (END,), START, VOCABULARY),
    "llama": Layout(False, PAD, END, (END,), None, VOCABULARY),
}


def tiny_model(kind: Kind = "t5", dropout: float = 0.0, seed: int = 0, blocks: int = 1, wide: bool = False) -> Any:
    """A frozen random model; the same weights for the same seed. Of T5 so many blocks each way; of LLaMA always 2.

    wide: what goes into its layers is a multiple of 64 wide, as bitsandbytes wants it of some CPUs.
    """
    width, inner = (64, 128) if wide else (32, 48)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "t5":
            model: Any = T5ForConditionalGeneration(
                T5Config(
                    vocab_size=VOCABULARY,
                    d_model=width,
                    d_kv=width // 4,
                    d_ff=inner,
                    num_heads=4,
                    num_layers=blocks,
                    dropout_rate=dropout,
                    decoder_start_token_id=START,
                    pad_token_id=PAD,
                    eos_token_id=END,
                )
            )
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=width,
                    intermediate_size=inner,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    attention_dropout=dropout,
                    pad_token_id=PAD,
                    eos_token_id=END,
                    bos_token_id=2,
                    max_position_embeddings=64,
                )
            )
        for parameter in model.parameters():
            # Far from 0, so that layers, masks and positions all show in the result.
            parameter.data.normal_(std=0.3)
    model.requires_grad_(False)
    model.eval()
    model.generation_config = neutral_generation(LAYOUTS[kind])
    return model


class Ids:
    """An encoder that decodes ids to their numbers."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def tiny_config(**settings: Any) -> RunConfig:
    """A config with ``section__key=value`` set; rank 2, no dropout, log every step."""
    values: dict[str, dict[str, Any]] = {
        "adapter": {"r": 2, "alpha": 4.0, "dropout": 0.0},
        "training": {"lr": 0.01, "global_batch": 4, "micro_batch": 2, "clip": 0.0},
        "eval": {"max_new_tokens": 4, "batch_tokens": 25},
        "output": {"log_every": 1},
    }
    seed = settings.pop("seed", 42)
    for key, value in settings.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return RunConfig.model_validate({"seed": seed, **values})


def tiny_room(
    method: Method,
    config: RunConfig,
    place: Place,
    kind: Kind = "t5",
    order: Sequence[str] = ("one",),
    dropout: float = 0.0,
    bf16: bool = False,
    base_dtype: torch.dtype = torch.float32,
    blocks: int = 1,
    model: Any = None,
) -> Room:
    """A room with a tiny model, unless one is given, and the adapters of ``config``."""
    if model is None:
        model = tiny_model(kind, dropout, blocks=blocks).to(base_dtype)
    base = Base(model, None, LAYOUTS[kind], "tiny", "random")  # type: ignore[arg-type]
    opening = Opening(model, "tiny", None, base.encoder_decoder, base_again=True, folder=ModelFolder(model))
    adapters = KINDS.get(method.kind(config))(config.adapter).open(opening)
    root = Autocast(adapters.model, place.torch_device, bf16)
    plans = tuple(StagePlan(name, (name,)) for name in order)
    return Room(base, Ids(), adapters, method, place, root, plans)  # type: ignore[arg-type]


def open_stage(room: Room, config: RunConfig, index: int = 0, randomise: bool = True) -> StageRun:
    """A stage, built; B is made random (it would be zero), so that every factor has a gradient."""
    stage = StageRun(room, config, index)
    room.method.build(stage)
    if randomise:
        generator = torch.Generator().manual_seed(index)
        for name, parameter in room.adapters.parameters().items():
            if name.endswith("lora_B"):
                parameter.data.normal_(std=0.3, generator=generator)
    return stage


def some_rows(count: int, seed: int = 0, task: str = "one", weight: float = 1.0) -> Source:
    """Random examples of unequal lengths."""
    dice = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [dice.randrange(3, VOCABULARY) for _ in range(dice.randint(low, high))]

    examples = [Example([*ids(2, 7), END], [*ids(1, 4), END]) for _ in range(count)]
    return Source(examples, [task] * count, weight, [f"train/{row}" for row in range(count)])


def widths(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example, by which a plan forms steps."""
    return [len(example.source) + len(example.target) for example in examples]


@dataclass
class Outcome:
    """What a stage's training left."""

    parameters: dict[str, Tensor]
    rows: list[dict[str, Any]]
    trained: Trained
    stage: StageRun

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows]

    @property
    def norms(self) -> list[float]:
        return [row["gradient_norm"] for row in self.rows]


def train(stage: StageRun, own: Source) -> Outcome:
    """Train a stage; its parameters afterwards, and the rows of its log."""
    rows: list[dict[str, Any]] = []
    trained = train_stage(stage, own, log=rows.append, tick=lambda *_: None)
    values = {name: p.detach().clone() for name, p in stage.adapters.parameters().items()}
    stage.close()
    return Outcome(values, rows, trained, stage)


# The independent computation: the whole global batch in one forward of transformers' own loss, torch's own optimizer.


def naive_loss(model: Any, kind: Kind, examples: Sequence[Example]) -> Tensor:
    """Mean loss per label token of all examples at once, as transformers computes it."""
    if kind == "t5":
        sources, targets = [e.source for e in examples], [e.target for e in examples]
        return model(
            input_ids=_right(sources, PAD), attention_mask=_right([[1] * len(s) for s in sources], 0),
            labels=_right(targets, -100),
        ).loss  # fmt: skip
    both = [e.source + e.target for e in examples]
    labels = [[-100] * len(e.source) + e.target for e in examples]
    return model(
        input_ids=_right(both, PAD), attention_mask=_right([[1] * len(s) for s in both], 0), labels=_right(labels, -100)
    ).loss


def _right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest norm of a difference, as a share of the norm."""
    assert list(ours) == list(theirs)
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-12)) for n in theirs)
