"""Tiny random models saved as folders the way transformers saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.models.tiny_models import FAMILIES


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``saved("gpt2")``: the folder of a tiny random model of that family. Do not change it: copy it."""
    root = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            torch.manual_seed(7)
            model, tokenizer = FAMILIES[family]()
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        return path

    return folder
