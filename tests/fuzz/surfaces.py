"""What is fuzzed, a function each: it makes a case of a folder and a generator of chance."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.fuzz import hostile, inputs
from tests.fuzz.oracle import Case

Make = Callable[[Path, random.Random], Case]


def _changed(raw: bytes, rng: random.Random, is_json: bool) -> bytes:
    """A file's content, as data or as bytes."""
    if is_json and rng.random() < 0.7:
        return hostile.as_json(hostile.mutated(json.loads(raw), rng), rng)
    return hostile.garbled(raw, rng)


def _change_some(folder: Path, names: list[str], rng: random.Random) -> str:
    """Change files of a folder, a few at most; returns which."""
    chosen = rng.sample(names, k=min(len(names), rng.choice([1, 1, 1, 2])))
    for name in chosen:
        path = folder / name
        if rng.random() < 0.12:
            hostile.replaced(path, rng)
        else:
            lines = path.suffix == ".jsonl" and rng.random() < 0.5
            if lines:
                rows = path.read_bytes().splitlines(keepends=True)
                at = rng.randrange(len(rows))
                rows[at] = _changed(rows[at], rng, True) + b"\n"
                path.write_bytes(b"".join(rows))
            else:
                path.write_bytes(_changed(path.read_bytes(), rng, path.suffix == ".json"))
    return ", ".join(chosen)


def _as_data(path: Path, rng: random.Random) -> str:
    """Change what a file of YAML means rather than how it is written."""
    from cl_runner.config.yamlfile import parse

    data = parse(path.read_text(), "").data
    for _ in range(rng.choice([1, 1, 2])):
        data = hostile.mutated(data, rng)
    path.write_bytes(hostile.as_json(data, rng))
    return "its data"


def settings(folder: Path, rng: random.Random) -> Case:
    """A file of settings."""
    inputs.write(
        {"order.yaml": inputs.ORDER, "train.csv": inputs.CSV, "test.csv": inputs.CSV, "my.yaml": inputs.SETTINGS},
        folder,
    )
    about = _change_some(folder, ["my.yaml"], rng) if rng.random() < 0.5 else _as_data(folder / "my.yaml", rng)
    return Case("settings", ("config", "show", "--config", "my.yaml"), about=about)


def sets(folder: Path, rng: random.Random) -> Case:
    """Settings of the command line."""
    keys = ["training.lr", "seed", "model.name", "method.lambda1", "adapter.rank_pattern", "tasks.dbpedia.training.lr",
    "stages.1.training.lr",
            "output.name", "output.dir", "data.dir", "order", "presets", "plugins", "training.deepspeed",
            "output.trackers"]  # fmt: skip
    words = []
    for _ in range(rng.choice([1, 1, 2, 4])):
        key = rng.choice(keys) if rng.random() < 0.8 else hostile.word(rng)
        given = (
            hostile.word(rng)
            if rng.random() < 0.7
            else hostile.as_json(hostile.value(rng), rng).decode("utf-8", "replace")
        )
        words += ["--set", f"{key}={given}"]
    return Case("sets", ("config", "show", "--order", "order1", *words))


def orders(folder: Path, rng: random.Random) -> Case:
    """A file of an order."""
    inputs.write({"order.yaml": inputs.ORDER, "train.csv": inputs.CSV, "test.csv": inputs.CSV}, folder)
    about = _change_some(folder, ["order.yaml"], rng) if rng.random() < 0.5 else _as_data(folder / "order.yaml", rng)
    return Case("orders", ("config", "show", "--order", "order.yaml", "--model", "nobody/none"), about=about)


def benchmark(folder: Path, rng: random.Random) -> Case:
    """The benchmark's folder."""
    rows = [{"sentence": "It is a film.", "label": "Film"}, {"sentence": "A plant grows.", "label": "Plant"}]
    labels = ["Company", "Educational Institution", "Artist", "Athlete", "Office Holder", "Mean of Transportation",
    "Building",
              "Natural Place", "Village", "Animal", "Plant", "Album", "Film", "Written Work"]  # fmt: skip
    raw = json.dumps(rows).encode()
    inputs.write({"data/TC/dbpedia/train.json": raw, "data/TC/dbpedia/test.json": raw,
    "data/TC/dbpedia/labels.json": json.dumps(labels).encode(),
                  "order.yaml": b"tasks: [dbpedia]\n"}, folder)  # fmt: skip
    about = _change_some(folder / "data/TC/dbpedia", ["train.json", "test.json", "labels.json"], rng)
    command = rng.choice([("data", "show", "--task", "dbpedia"), ("train", "--dry-run")])
    return Case("benchmark", (*command, "--order", "order.yaml", "--data-dir", "data"), about=about)


def own_data(folder: Path, rng: random.Random) -> Case:
    """Files of an own task, of all forms, plain and packed."""
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in inputs.ROWS)
    chats = [
        {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]}
        for row in inputs.ROWS
    ]
    forms = {
        "t.csv": inputs.CSV, "t.tsv": inputs.CSV.replace(b",", b"\t"), "t.jsonl": lines,
        "t.json": json.dumps(inputs.ROWS).encode(),
        "t.parquet": inputs.parquet_file(), "c.json": json.dumps(chats).encode(), "t.jsonl.gz": gzip.compress(lines,
        mtime=0),
        "i.json": json.dumps({"Definition": ["Say."], "Instances": [{"input": r["text"],
        "output": [r["label"]]} for r in inputs.ROWS]}).encode(),
    }  # fmt: skip
    name = rng.choice(sorted(forms))
    inputs.write({name: forms[name]}, folder)
    about = _change_some(folder, [name], rng)
    order = {"tasks": [{"name": "own", "kind": "TC", "source": {"train": name, "test": name}, "instruction": "Say. "}]}
    (folder / "order.yaml").write_text(json.dumps(order))
    return Case("own data", ("data", "show", "--order", "order.yaml", "--task", "own"), about=about)


def found_data(folder: Path, rng: random.Random) -> Case:
    """A folder in which an order's data are looked for."""
    names = [
        "a/train.csv",
        "a/test.csv",
        "b-train.jsonl",
        "b-test.jsonl",
        "data/train.json",
        "data/dev.json",
        "readme.md",
    ]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in inputs.ROWS)
    inputs.write(
        {
            f"in/{name}": lines
            if "jsonl" in name
            else json.dumps(inputs.ROWS).encode()
            if "json" in name
            else inputs.CSV
            for name in names
        },
        folder,
    )
    about = _change_some(folder / "in", names, rng)
    return Case("found data", ("new", "order", "made.yaml", "--from", "in"), may_write=("made.yaml",), about=about)


READERS = [
    ("report",), ("report", "--json"), ("report", "--csv"), ("report", "--markdown"), ("compare",), ("compare",
    "--json"), ("compare", "--latex"),
    ("forgotten",), ("forgotten", "--json"), ("rescore", "--metric", "exact"), ("watch", "--once"), ("watch",
    "--json"), ("verify",),
    ("verify", "--json"), ("analyze",), ("eval",), ("report", "--html"),
]  # fmt: skip


WRITTEN = ("runs/x/analysis.json", "runs/x/report.html")


def runs(folder: Path, rng: random.Random) -> Case:
    """A run's folder, read by every command that reads one."""
    files = inputs.run_folder()
    inputs.write({f"runs/x/{name}": content for name, content in files.items()}, folder)
    about = _change_some(folder / "runs/x", sorted(files), rng)
    if rng.random() < 0.6:
        for stage in ("01-dbpedia", "02-colours"):
            done = folder / "runs/x/stages" / stage / "DONE"
            if done.is_file() and not done.is_symlink() and done.stat().st_size < 2**20:
                inputs.seal(done.parent)
    if rng.random() < 0.1:
        return Case("run folders", ("list", "runs"), about=about)
    command, *flags = rng.choice(READERS)
    codes = (0, 1, 2) if command == "verify" else (0, 2)
    return Case("run folders", (command, "runs/x", *flags), codes=codes, may_write=WRITTEN, about=about)


def peft(folder: Path, rng: random.Random) -> Case:
    """A PEFT folder."""
    files = inputs.peft_folder()
    for name in ("one", "two"):
        inputs.write({f"{name}/{file}": content for file, content in files.items()}, folder)
    about = _change_some(folder / "one", sorted(files), rng)
    return Case("PEFT folders", ("analyze", "one", "two", *rng.choice([(), ("--json",), ("--csv",)])), about=about)


def models(folder: Path, rng: random.Random) -> Case:
    """A model's folder."""
    files = inputs.model_folder()
    inputs.write({f"m/{name}": content for name, content in files.items()}, folder)
    about = _change_some(folder / "m", [name for name in sorted(files) if name != "tokenizer.json"], rng)
    if rng.random() < 0.1:
        weights = folder / "m/model.safetensors"
        shutil.rmtree(weights) if weights.is_dir() and not weights.is_symlink() else weights.unlink(missing_ok=True)
        index = {"weight_map": {"a": hostile.word(rng), "b": "../outside/secret.json"}}
        (folder / "m/model.safetensors.index.json").write_bytes(hostile.as_json(index, rng))
        about += ", an index"
    return Case("model folders", function=partial(_checked, folder / "m"), about=about)


def _checked(folder: Path) -> None:
    from cl_runner.config.schema import ModelConfig
    from cl_runner.models.identity import model_identity
    from cl_runner.models.locate import check, locate

    located = locate(ModelConfig(name=str(folder)))
    check(located)
    model_identity(located)


def gguf(folder: Path, rng: random.Random) -> Case:
    """The header of a GGUF file."""
    inputs.write({"x.gguf": inputs.gguf_file()}, folder)
    about = _change_some(folder, ["x.gguf"], rng)
    return Case("GGUF headers", function=partial(_opened, folder / "x.gguf"), about=about)


def _opened(file: Path) -> None:
    from cl_runner.models import gguf as reading

    reading._opened(file)


COMMANDS = ["train", "eval", "rescore", "verify", "report", "compare", "watch", "forgotten", "analyze", "list", "show",
"config", "data", "new",
            "check", "order", "schema", "orders", "tasks", "methods", "adapters", "models", "presets", "runs",
            "sources", "trackers", "method"]  # fmt: skip
FLAGS = ["--order", "--method", "--model", "--preset", "--plugin", "--config", "--data-dir", "--data", "--output-dir",
"--name", "--seed", "--gpus",
         "--set", "--extend", "--restart", "--restart-stage", "--json", "--csv", "--markdown", "--stage", "--tasks",
         "--metric", "--again",
         "--against", "--every", "--once", "--task", "--layers", "--intruders", "--top-k", "--epsilon", "--text",
         "--unseen", "-n", "--from",
         "--from-olora", "--sort", "--state", "--version", "--help", "--local_rank", "--trust-remote-code",
         "--debug-"]  # fmt: skip


def command_line(folder: Path, rng: random.Random) -> Case:
    """Words in any order."""
    words = [rng.choice(COMMANDS)] if rng.random() < 0.95 else []
    for _ in range(rng.randrange(7)):
        chance = rng.random()
        words.append(
            rng.choice(FLAGS)
            if chance < 0.5
            else rng.choice(COMMANDS)
            if chance < 0.6
            else hostile.word(rng).replace("\0", "")
        )
    if "train" in words:
        words.append("--dry-run")  # a case is not to train
    return Case("command line", tuple(words), may_write=("",), about="")


SURFACES: dict[str, Make] = {
    "settings": settings, "sets": sets, "orders": orders, "benchmark": benchmark, "own data": own_data,
    "found data": found_data,
    "run folders": runs, "PEFT folders": peft, "model folders": models, "GGUF headers": gguf,
    "command line": command_line,
}  # fmt: skip
SHARES = {"run folders": 4, "own data": 2}  # of the cases, beside the others' one
