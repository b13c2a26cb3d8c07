"""Every method on every adapter kind, tried: two stages of four steps each, on the embedded models and synthetic rows.

    python scripts/compatibility.py results.jsonl          # a quarter of an hour on one core; goes on where it ended
    python scripts/compatibility.py results.jsonl --table  # the table of docs/adapters.md, from the results

A pair that `cl-runner list compatibility` calls possible has to train, and to score as it committed when evaluated
again; every other one has to be refused before anything is loaded, with the kinds that would do. Under `inclora` every
kind and every initialisation is tried on both models; under `inclora` and `seqlora` every kind is also stopped after
its first stage and gone on with, to the bit, and plain PEFT loads its folders, which have to answer as the run did.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ORDER = "name: two\ntasks: [amazon, agnews]\n"
COMMON = {
    "data.max_train": 32, "data.max_test": 6, "training.epochs": 1, "training.global_batch": 8,
    "training.micro_batch": 8, "data.max_source": 96, "output.log_every": 4,
}  # fmt: skip
# What would take long at its default.
SMALL = {
    "replay": "memory_per_task=6", "agem": "memory_per_task=6 memory_batch=4", "gem": "memory_per_task=6",
    "ogd": "vectors=4", "ewc": "fisher_samples=8", "l2p": "pool=4 length=2 top=2", "progprompt": "length=3",
    "lfpt5": "length=6 draws=2 pseudo_tokens=16", "clora": "k=16", "coso": "rank=6 sketch=8 every=1",
    "hard-orth": "reorthogonalise.every=2", "soft-orth": "reorthogonalise.every=2", "ewc-lora": "fisher_samples=8",
    "gorp": "every=1", "doc": "components=8", "sapt": "pseudo=4 pseudo_tokens=12",
    "sure": "memory_size=12 memory_batch=4", "rkif": "inner_steps=2 outer_steps=1",
}  # fmt: skip
MODELS = ("tiny-t5", "tiny-llama")


@dataclass(frozen=True)
class Trial:
    """A method on a kind; ``more``: settings beside; ``folders``: whether it is also resumed and loaded by PEFT."""

    method: str
    kind: str
    model: str = "tiny-t5"
    more: tuple[str, ...] = ()
    folders: bool = False

    @property
    def label(self) -> str:
        return " ".join((self.method, self.kind, self.model, *self.more, *(["folders"] if self.folders else [])))

    def arguments(self, name: str) -> list[str]:
        """Of ``cl-runner train``."""
        sets = [f"{key}={value}" for key, value in COMMON.items()]
        sets += [f"method.{setting}" for setting in SMALL.get(self.method, "").split()]
        # Full fine-tuning and prompts are what a method's own settings choose.
        sets += ["method.train=full"] if self.kind == "full" and self.method != "seqft" else []
        sets += [f"adapter.kind={self.kind}"] if self.kind not in ("full", "prompts") else []
        flags = [word for setting in (*sets, *self.more) for word in ("--set", setting)]
        preset = {"tiny-t5": "tiny", "tiny-llama": "tiny-llama"}[self.model]
        return ["train", "--order", "two.yaml", "--method", self.method, "--preset", preset, "--name", name, *flags]


def trials() -> Iterator[tuple[Trial, bool]]:
    """All of them, each with whether it is said to be possible."""
    from cl_runner.training.compatibility import compatibility

    for row in compatibility():
        for kind in [key for key in row if key != "method"]:
            if row[kind] == "yes" or kind != "lora":  # the default, which is nobody's wish
                yield Trial(row["method"], kind), row[kind] == "yes"
    for kind in _layer_kinds():
        for method in ("inclora", "seqlora"):
            yield Trial(method, kind, folders=True), True
        yield Trial("inclora", kind, "tiny-llama", folders=True), True
    for init in _inits():
        for model in MODELS:
            yield Trial("inclora", "lora", model, init, folders=True), True


def _layer_kinds() -> list[str]:
    """The kinds that adapt layers."""
    from cl_runner.registry import KINDS

    return [name for name, kind in KINDS.usable() if "update" in kind.offers]


def _inits() -> list[tuple[str, ...]]:
    """The settings of every initialisation of ``lora`` but its default and ``loftq``, which wants a base in 4 bits."""
    from typing import get_args

    from cl_runner.config.schema import Init

    names = [name for name in get_args(Init) if name not in ("default", "corda", "loftq")]
    modes = [("adapter.init=corda", f"adapter.corda={mode}") for mode in ("ipm", "kpm")]
    return [*((f"adapter.init={name}",) for name in names), *modes]


def run(*arguments: str) -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr."""
    from cl_runner.cli import outcome

    kept = os.dup(1), os.dup(2)
    with Path("out").open("w+b") as out, Path("err").open("w+b") as err:
        sys.stdout.flush()
        try:
            for number, file in ((1, out), (2, err)):
                os.dup2(file.fileno(), number)
            code = outcome(list(arguments))
            sys.stdout.flush()
        finally:
            for number, own in zip((1, 2), kept, strict=True):
                os.dup2(own, number)
                os.close(own)
    return code, Path("out").read_text(), Path("err").read_text()


def attempt(trial: Trial, possible: bool) -> str:
    """Empty where all is as it has to be, else what is not. The current folder is the trial's own."""
    Path("two.yaml").write_text(ORDER)
    if not possible:
        return _refused(trial)
    code, _, said = run(*trial.arguments("run"))
    if code:
        return f"exit code {code}: {_last(said)}"
    if wrong := _evaluated():
        return wrong
    return _resumed(trial) or _by_plain_peft(trial) if trial.folders else ""


def _refused(trial: Trial) -> str:
    sets = [f"{key}={value}" for key, value in COMMON.items()] + [f"adapter.kind={trial.kind}"]
    flags = [word for setting in sets for word in ("--set", setting)]
    code, _, said = run(
        "train", "--order", "two.yaml", "--method", trial.method, "--preset", "tiny", *flags, "--dry-run"
    )
    return "" if code == 2 and len(_lines(said)) == 1 else f"not refused in a line: exit code {code}: {_last(said)}"


def _evaluated() -> str:
    """Scored again, every stage, as it committed."""
    for stage, folder in enumerate(_stages("run"), 1):
        code, out, said = run("eval", "run", "--stage", str(stage), "--json")
        if code:
            return f"eval --stage {stage}: exit code {code}: {_last(said)}"
        committed = json.loads((folder / "metrics.json").read_text())["scores"]
        again = json.loads(out)
        if again["scores"] != committed or any(again["differing_rows"].values()):
            return f"eval --stage {stage}: {again['scores']} ({again['differing_rows']}), committed {committed}"
    return ""


def _resumed(trial: Trial) -> str:
    """Stopped after stage 1 and gone on with: the same files, to the bit."""
    shutil.copytree("runs/run", "runs/again")
    shutil.rmtree(_stages("again")[1])
    code, _, said = run(*trial.arguments("again"))
    if code:
        return f"resumed: exit code {code}: {_last(said)}"
    for file in sorted(path for path in _stages("run")[1].rglob("*") if path.suffix in (".safetensors", ".jsonl")):
        other = Path("runs/again", file.relative_to("runs/run"))
        if file.read_bytes() != other.read_bytes():
            return f"resumed: {file.relative_to('runs/run')} differs"
    return ""


def _by_plain_peft(trial: Trial) -> str:
    """Each stage's folder, loaded by PEFT alone onto the base, says what the stage committed, row by row."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from cl_runner import methods
    from cl_runner.models.base import load_base
    from cl_runner.settings import resolve
    from cl_runner.training.plan import Plan
    from cl_runner.training.prepare import Tokens

    resolved = resolve(config_file=Path("runs/run/run.yaml"), method_schema=methods.method_schema)
    assert resolved.order is not None
    plan = Plan.make(resolved.config, resolved.order.name, resolved.order.tasks, only=["amazon", "agnews"])
    base = load_base(resolved.config.model, torch.device("cpu"))
    tests = Tokens.make(plan.data, base, resolved.config.eval.max_new_tokens).test
    kind = AutoModelForSeq2SeqLM if base.encoder_decoder else AutoModelForCausalLM
    for stage in _stages("run"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = kind.from_pretrained(base.name_or_path, dtype=torch.float32)  # as the run computed
            model = PeftModel.from_pretrained(plain, stage / "adapter").eval()
        said = [json.loads(line) for line in (stage / "predictions.jsonl").read_text().splitlines()]
        for task in dict.fromkeys(row["task"] for row in said):
            for row, example in zip([row for row in said if row["task"] == task], tests[task].examples, strict=True):
                ids = torch.tensor([example.source])
                found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=50,
                                       do_sample=False, num_beams=1)[0]  # fmt: skip
                answer = base.tokenizer.decode(found[0 if base.encoder_decoder else len(example.source) :],
                                               skip_special_tokens=True)  # fmt: skip
                if answer.strip() != row["output"].strip():
                    return f"plain PEFT, {stage.name}, {row['id']}: {answer!r}; the run said {row['output']!r}"
    return ""


def _stages(run: str) -> list[Path]:
    return sorted(Path("runs", run, "stages").iterdir())


def _lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("cl-runner: ")]


def _last(said: str) -> str:
    return next(iter(said.strip().splitlines()[::-1]), "nothing was said")[:300]


def take(out: Path) -> int:
    """Try what the file has no line of yet. How many failed, of all."""
    have = {json.loads(line)["trial"] for line in out.read_text().splitlines()} if out.exists() else set()
    for trial, possible in trials():
        if trial.label in have:
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            os.environ["CL_RUNNER_CACHE"] = f"{folder}/cache"
            wrong = attempt(trial, possible)
        seconds = round(time.monotonic() - started, 1)
        line = {"trial": trial.label, **asdict(trial), "possible": possible, "wrong": wrong, "seconds": seconds}
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print("FAILED" if wrong else "trained" if possible else "refused", trial.label, wrong, flush=True)
    found = results(out)
    bad = [line for line in found if line["wrong"]]
    trained = sum(line["possible"] and not line["wrong"] for line in found)
    minutes = sum(line["seconds"] for line in found) / 60
    print(f"{trained} trained, {len(found) - trained - len(bad)} refused, {len(bad)} failed; {minutes:.0f} minutes")
    return len(bad)


def results(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of results."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def table(found: list[dict[str, Any]]) -> str:
    """Methods down, kinds across, as Markdown: what was tried and did as it should."""
    from cl_runner.registry import KINDS

    plain = [line for line in found if not line["more"] and not line["folders"] and line["model"] == "tiny-t5"]
    kinds = [kind for kind in KINDS if any(line["kind"] == kind for line in plain)]
    rows = ["| method | " + " | ".join(f"`{kind}`" for kind in kinds) + " |", "|---|" + ":-:|" * len(kinds)]
    for method in dict.fromkeys(line["method"] for line in plain):
        marks = {line["kind"]: "FAILED" if line["wrong"] else "✓" if line["possible"] else "" for line in plain
                 if line["method"] == method}  # fmt: skip
        rows.append(re.sub(" +", " ", f"| `{method}` | " + " | ".join(marks.get(kind, "") for kind in kinds) + " |"))
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--table", action="store_true", help="print the table of the results, and try nothing")
    given = parser.parse_args()
    if given.table:
        print(table(results(given.results)))
        return 0
    return 1 if take(given.results.absolute()) else 0


if __name__ == "__main__":
    sys.exit(main())
