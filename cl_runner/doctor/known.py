"""The packages that cl-runner uses, what each is for, and the versions that it was tested with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch"


@dataclass(frozen=True)
class Package:
    """A package by its name, the module that is imported, and whether that module imports torch."""

    name: str
    module: str
    on_torch: bool = False


NEEDED = (
    Package(TORCH, "torch"),
    Package("transformers", "transformers", on_torch=True),
    Package("accelerate", "accelerate", on_torch=True),
    Package("peft", "peft", on_torch=True),
    Package("deepspeed", "deepspeed", on_torch=True),
    Package("datasets", "datasets"),
    Package("safetensors", "safetensors"),
    Package("sentencepiece", "sentencepiece"),
    Package("protobuf", "google.protobuf"),
    Package("tiktoken", "tiktoken"),
    Package("scipy", "scipy"),
    Package("datasketch", "datasketch"),
    Package("matplotlib", "matplotlib"),
    Package("jinja2", "jinja2"),
    Package("pydantic", "pydantic"),
    Package("pyyaml", "yaml"),
    Package("filelock", "filelock"),
    Package("psutil", "psutil"),
    Package("rich", "rich"),
    Package("typer", "typer"),
)


@dataclass(frozen=True)
class Extra:
    """What ``pip install "cl-runner[NAME]"`` adds, and what there is not without it."""

    name: str
    packages: tuple[Package, ...]
    costs: str


EXTRAS = (
    Extra(
        "metrics",
        (Package("scikit-learn", "sklearn"), Package("rouge-score", "rouge_score"), Package("sacrebleu", "sacrebleu")),
        "tasks scored by f1, rouge or bleu are refused; exact match needs none of it",
    ),
    Extra("qlora", (Package("bitsandbytes", "bitsandbytes", on_torch=True),), "model.quantize=nf4 is refused"),
    Extra("slurm", (Package("submitit", "submitit"),), "cl-runner sweep --engine slurm is refused"),
    Extra("ray", (Package("ray", "ray"),), "cl-runner sweep --engine ray is refused"),
    Extra("lm-eval", (Package("lm_eval", "lm_eval", on_torch=True),), "cl-runner eval --lm-eval is refused"),
    Extra("gguf", (Package("gguf", "gguf"),), "GGUF files are not read, and scripts/get_smollm2.sh makes no model"),
    *(
        Extra(name, (Package(name, name),), f"output.trackers={name} is refused")
        for name in ("tensorboard", "wandb", "mlflow", "trackio")
    ),
)


def known_versions() -> dict[str, str]:
    """Package → version of ``constraints.txt``, which comes along: in a wheel in the package, else beside it."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package, package.parent):
        try:
            lines = (folder / "constraints.txt").read_text("utf-8").splitlines()
        except OSError:
            continue
        pairs = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
        return {plain(name): version.strip() for name, _, version in pairs}
    return {}


def plain(name: str) -> str:
    """A package's name as all spellings of it are one."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
