"""The valid inputs that cases begin with, as files in memory: name → bytes. Made once a process."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from cl_runner.atomic import sha256
from cl_runner.runs.folder import seals
from tests.made_runs import COLOURS
from tests.run_folders import RunFolder

Files = dict[str, bytes]

ORDER = b"""name: three
description: made
tasks:
  - dbpedia
  - {task: amazon, set: {training.epochs: 2, training: {lr: 1e-4}}}
  - {task: dbpedia, as: again}
  - name: own
    kind: TC
    labels: [red, "green", 3, 1.0]
    instruction: "Say which. "
    metric: exact
    columns: {text: text, label: label}
    source: {train: train.csv, test: [test.csv], encoding: utf-8, delimiter: ",", quoting: csv}
"""
SETTINGS = b"""order: order.yaml
seed: 7
presets: [tiny]
model: {name: tiny-t5, dtype: fp32, revision: null}
method: {name: olora, lambda1: 0.5}
adapter: {kind: lora, r: 8, alpha: 32, target_modules: [q, v], rank_pattern: {q: 4}}
training: {lr: 1e-3, epochs: 1, global_batch: 8, micro_batch: 4, warmup: 0.1}
eval: {mode: generate, max_new_tokens: 8}
output: {dir: runs, name: mine, log_every: 5}
data: {source: auto, max_train: 10, seed: 3}
tasks: {dbpedia: {training.lr: 1e-2, data: {max_train: 5}}}
stages: {1: {training.epochs: 2}}
"""
ROWS = [
    {"text": "the sky", "label": "red"},
    {"text": 'a "grass", so', "label": "green"},
    {"text": "naïve\nlines", "label": "3"},
]
CSV = b'text,label\nthe sky,red\n"a ""grass"", so",green\n"two\nlines",3\n'


@cache
def run_folder() -> Files:
    """A run of three stages, two finished, with all files that a run may have."""
    with tempfile.TemporaryDirectory() as room:
        run = RunFolder(Path(room), "x", f"tasks: [dbpedia, {COLOURS}, amazon]", ["adapter.r=2", "model.name=tiny-t5"])
        film, red = [("Film", "Film"), ("Plant", "plant."), ("Film", "red")], [("red", "red"), ("green", "Film")]
        about = json.loads((run.path / "run.json").read_text())
        about["identity"] |= {"model": {"from": "embedded", "files": "00"}, "micro_batches": [4, 4, 4]}
        (run.path / "run.json").write_text(json.dumps({**about, "sha256": seals(run.path, about)}))
        trained = {"steps": 3, "loss": 0.5, "update_norm": 1.0}
        more = {"seconds": {"train": 1.5}, "training": trained, "megabytes": {"adapter": 0.5, "method": 0.0}}
        run.commit({"dbpedia": film}, **more, parameters={"trained": 5, "on_disk": {"adapter": {"bytes": 2000}}})
        run.commit({"dbpedia": film[::-1], "colours": red}, **more)
        for index, name in enumerate(("dbpedia", "colours")):
            stage = run.dir.stage_dir(index, name)
            write({f"adapter/{file}": content for file, content in peft_folder().items()}, stage)
            pair = {"stage": name, "rank": 2, "scale": 2.0}
            record = {
                "own": "adapter",
                "pairs": [pair],
                "dense": [],
                "dense_stages": [],
                "live": name,
                "kept": {},
                "earlier": {},
            }
            about = {"stage": name, "method": "olora", "tasks": [name], "start": "base", "state": {}, **record}
            (stage / "state.json").write_text(json.dumps(about))
            seal(stage)
        files = _read(run.path)
    rows = [
        {"stage": "dbpedia", "step": k, "steps": 3, "loss": 1.5 / k, "time": float(k), "memory_mb": 5.0}
        for k in (1, 2, 3)
    ]
    files |= {
        "run.log": b"--- 2026-01-01\nstage 1 of 3 dbpedia: warning: it is hot\nstage 1 of 3 dbpedia: done\n",
        "log.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in rows),
        "status.json": b'{"state": "failed", "message": "out of memory", "pid": 1, "host": "h"}',
        "environment.json": b'{"command": "cl-runner train", "device": "cpu", "processes": 1, "later": []}',
        "matrix.csv": b"stage,dbpedia,colours,amazon\ndbpedia,50.0,,\ncolours,50.0,50.0,\n",
        "metrics.json": b'{"synthetic": false, "average_accuracy": 50.0}',
        "analysis.json": b'{"stages": {}, "layers": {}}',
    }
    return files


@cache
def peft_folder() -> Files:
    """An adapter of two layers."""
    generator = np.random.default_rng(0)
    tensors = {}
    for layer in ("q_proj", "v_proj"):
        name = f"base_model.model.model.layers.0.self_attn.{layer}"
        tensors[f"{name}.lora_A.weight"] = generator.normal(size=(2, 6)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = generator.normal(size=(5, 2)).astype(np.float32)
    config = {
        "peft_type": "LORA", "base_model_name_or_path": "nobody/base", "r": 2, "lora_alpha": 4, "use_rslora": False,
        "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {".*v_proj": 8},
        "bias": "none",
        "task_type": "CAUSAL_LM", "init_lora_weights": True, "modules_to_save": None, "use_dora": False,
        "revision": None,
    }  # fmt: skip
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}


@cache
def model_folder() -> Files:
    """The nano model."""
    from tests.nano import nano_t5

    return _read(Path(nano_t5()))


@cache
def gguf_file() -> bytes:
    """A header with a value of each type, and a tensor."""
    from struct import pack

    def text(words: str) -> bytes:
        return pack("<Q", len(words.encode())) + words.encode()

    values = [
        ("general.architecture", 8, text("llama")), ("llama.block_count", 4, pack("<I", 1)), ("a.float", 6, pack("<f",
        0.5)),
        ("a.bool", 7, b"\1"), ("a.long", 10, pack("<Q", 5)), ("tokenizer.ggml.tokens", 9, pack("<IQ", 8,
        2) + text("a") + text("b")),
        ("tokenizer.ggml.scores", 9, pack("<IQ", 6, 2) + pack("<ff", 1, 2)), ("general.alignment", 4, pack("<I", 32)),
    ]  # fmt: skip
    head = b"GGUF" + pack("<IQQ", 3, 1, len(values))
    head += b"".join(text(key) + pack("<I", kind) + value for key, kind, value in values)
    head += text("token_embd.weight") + pack("<IQQIQ", 2, 4, 2, 0, 0)
    return head + b"\0" * (-len(head) % 32) + np.arange(8, dtype=np.float32).tobytes()


@cache
def parquet_file() -> bytes:
    """Rows as ``datasets`` writes them, with what it says of the columns."""
    import io

    import pyarrow
    from pyarrow.parquet import write_table

    table = pyarrow.table({name: [row[name] for row in ROWS] for name in ("text", "label")})
    stream = io.BytesIO()
    write_table(table, stream)
    return stream.getvalue()


def seal(stage: Path) -> None:
    """A stage with the hashes of what is in it: who makes a folder up can count, too."""
    files = sorted(
        file for file in stage.rglob("*") if file.is_file() and not file.is_symlink() and file.name != "DONE"
    )
    hashes = {str(file.relative_to(stage)): sha256(file) for file in files if file.stat().st_size < 2**20}
    (stage / "DONE").write_text(json.dumps({"sha256": hashes}))


def _read(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write(files: Files, folder: Path) -> None:
    """Files into a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
