"""Adapters to start runs from, as PEFT makes them; what a committed stage answers, and what plain PEFT does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from cl_runner.commands.given import own_settings
from cl_runner.engine import zero as engine
from cl_runner.engine.process import here
from cl_runner.models.locate import _EMBEDDED_DIR
from cl_runner.runs.folder import RunDir
from cl_runner.training.as_committed import as_committed
from cl_runner.training.plan import Plan

LLAMA = str(_EMBEDDED_DIR / "tiny-llama")
TWO = "name: two\ntasks: [dbpedia, amazon]\n"


def base(folder: str) -> Any:
    """The base by transformers alone."""
    auto = AutoModelForCausalLM if "llama" in folder else AutoModelForSeq2SeqLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return auto.from_pretrained(folder, dtype=torch.float32).eval()


def lora(to: Path, model: str, **config: Any) -> Path:
    """A random LoRA of a base, as PEFT saves it."""
    kind = "CAUSAL_LM" if "llama" in model else "SEQ_2_SEQ_LM"
    targets = ["q_proj", "v_proj"] if "llama" in model else ["q", "v"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(base(model), LoraConfig(**{"target_modules": targets, "task_type": kind, **config}))
        dice = torch.Generator().manual_seed(1)
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(generator=dice, std=0.1)
        made.save_pretrained(str(to))
    return to


def in_peft(model: str, folder: Path) -> Any:
    """A base with an adapter folder, by PEFT alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base(model), str(folder)).eval()


@torch.no_grad()
def logits(model: Any, encoder_decoder: bool) -> Tensor:
    """Of some fixed tokens."""
    ids = torch.tensor([[5, 9, 33, 12, 1], [7, 8, 100, 55, 1]])
    more = {"decoder_input_ids": torch.tensor([[0, 6, 1], [0, 3, 1]])} if encoder_decoder else {}
    found: Tensor = model(input_ids=ids, **more).logits
    return found


def committed(run: Path, index: int) -> Tensor:
    """The logits of a run as a stage (from 0) left it; before the first one: -1."""
    rundir = RunDir(run)
    resolved = own_settings(rundir)
    assert resolved.order is not None
    plan = Plan.make(resolved.config, resolved.order.name, resolved.order.tasks, only=[])
    engine.start(here())
    try:
        with as_committed(plan, rundir, index, here()) as (stage, _):
            model = stage.adapters.model.eval()
            return logits(model, stage.encoder_decoder)
    finally:
        engine.stop()
