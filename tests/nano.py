"""A model for whole runs in tests: as tiny-t5 and with its tokenizer, but of one block each way, and random.

A step of it is mostly Python's, a third of tiny-t5's. What a run learns is for tests with tiny-t5 to say.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TINY = Path(__file__).parents[1] / "cl_runner" / "models" / "embedded" / "tiny-t5"
WIDTH, INNER, HEADS = 192, 96, 6


def nano_t5() -> str:
    """The folder, named as the model that it stands for; made once for this process and those that it starts."""
    if "CL_RUNNER_TESTS_NANO" not in os.environ:
        room = Path(tempfile.mkdtemp(prefix="cl-runner-nano-"))
        atexit.register(shutil.rmtree, room, ignore_errors=True)
        os.environ["CL_RUNNER_TESTS_NANO"] = str(_write(room / "tiny-t5"))
    return os.environ["CL_RUNNER_TESTS_NANO"]


def _write(folder: Path) -> Path:
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    config = json.loads((TINY / "config.json").read_text())
    config |= {"d_model": WIDTH, "d_ff": INNER, "num_heads": HEADS, "d_kv": WIDTH // HEADS, "dtype": "float32"}
    config |= {"num_layers": 1, "num_decoder_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(config["vocab_size"], config["relative_attention_num_buckets"]), folder / "model.safetensors")
    return folder


def _weights(vocabulary: int, buckets: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}

    def matrix(name: str, *shape: int) -> None:
        found[f"{name}.weight"] = generator.normal(0, WIDTH**-0.5, shape).astype(np.float32)

    def norm(name: str) -> None:
        found[f"{name}.weight"] = np.ones(WIDTH, np.float32)

    matrix("shared", vocabulary, WIDTH)
    for side, parts in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        block = f"{side}.block.0.layer"
        for at, part in enumerate(parts):
            for name in "qkvo":
                matrix(f"{block}.{at}.{part}.{name}", WIDTH, WIDTH)
            norm(f"{block}.{at}.layer_norm")
        matrix(f"{block}.0.SelfAttention.relative_attention_bias", buckets, HEADS)
        matrix(f"{block}.{len(parts)}.DenseReluDense.wi", INNER, WIDTH)
        matrix(f"{block}.{len(parts)}.DenseReluDense.wo", WIDTH, INNER)
        norm(f"{block}.{len(parts)}.layer_norm")
        norm(f"{side}.final_layer_norm")
    return found
