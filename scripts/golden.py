"""Golden numbers: every method, form and option in short runs, as hashes of all that a run commits and logs.

    python scripts/golden.py before.json                 # on the code as it is
    python scripts/golden.py after.json                  # on the code as it is to be
    python scripts/golden.py --compare before.json after.json

Three stages of three steps on the embedded models, synthetic rows; one process, and two. The same machine gives the
same bits, another may not: the files are not kept in the repository. They are written as runs end, and a second start
goes on where the first one ended. About a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ORDER = "name: golden\ntasks: [amazon, agnews, CB]\n"
COMMON = {
    "data.max_train": "24", "data.max_test": "6", "training.epochs": "1", "training.global_batch": "8",
    "training.micro_batch": "4", "training.lr": "5e-3", "output.log_every": "1", "data.max_source": "96",
    "adapter.r": "8",
}  # fmt: skip
SMALL = {
    "replay": "memory_per_task=6", "agem": "memory_per_task=6 memory_batch=4", "gem": "memory_per_task=6",
    "ogd": "vectors=6", "ewc": "fisher_samples=8", "l2p": "pool=4 length=2 top=2", "progprompt": "length=3",
    "lfpt5": "length=6 draws=2 pseudo_tokens=24", "clora": "k=16", "coso": "rank=6 sketch=8 every=1 lr=1e-3",
    "osft": "lr=1e-3", "ewc-lora": "fisher_samples=8", "gorp": "lr=1e-3 every=1",
    "sapt": "pseudo=4 pseudo_tokens=12", "sure": "memory_size=12 memory_batch=4",
    "rkif": "inner_steps=2 outer_steps=1",
    "hard-orth": "reorthogonalise.every=2", "soft-orth": "reorthogonalise.every=2",
}  # fmt: skip
METHODS = [
    "seqlora", "inclora", "pertask", "mtl", "replay", "ewc", "lwf", "agem", "gem", "ogd", "migu", "l2p", "progprompt",
    "lfpt5", "olora", "nlora", "sparse-orth", "grassmann", "clora", "inflora", "shared-basis", "colora", "coso", "osft",
    "sdlora", "pego", "ella", "pslora", "ewc-lora", "jumplora", "oliera", "oa", "slao", "merge", "slora",
    "treelora", "doc", "gorp", "gainlora", "sapt", "sure", "rkif", "hard-orth", "soft-orth", "seqft",
]  # fmt: skip
# Forms and options that have a test of their own: method, and what is set. A word without a dot is the method's.
FORMS = [
    "olora reference=false", "olora on=both lambda2=0.1", "nlora of=reference", "nlora of=factors",
    "grassmann goal=align", "grassmann stiefel=true", "clora subspace=data", "ewc online=0.9", "ogd variant=ave",
    "ogd variant=all", "replay how=class", "gem memory_strength=0", "progprompt mlp=true", "sdlora reference=true",
    "sdlora rank_decay=[8,4,2] decay_every=1", "sdlora reuse=0.5", "coso side=input rotate=true",
    "coso temperature=3 looks=2", "colora rounds=1 routing=soft", "colora fold=mean",
    "colora rounds=[[amazon,agnews],[CB]]", "slao fisher_beta=0.5 fisher_samples=8", "merge how=ties", "merge how=dare",
    "merge how=magmax", "gainlora branch=olora",
    "gainlora gate=linear renormalise=true", "shared-basis form=block", "shared-basis mixing=similarity every=1",
    "shared-basis mixing=fixed sparse=0.01 dictionary=4", "shared-basis support=0.5", "shared-basis pca=2",
    "shared-basis non_negative=true", "pertask train=full", "mtl train=full", "replay train=full", "ewc train=full",
    "migu train=full", "seqft output.keep_stages=1",
    "inclora adapter.r=auto adapter.max_r=6", "olora adapter.r=auto adapter.max_r=6",
    "inclora reorthogonalise.every=2", "olora reorthogonalise.every=2 reorthogonalise.rescale=true",
    "ewc reorthogonalise.every=2 reorthogonalise.how=soft reorthogonalise.on=B",
    "seqlora training.optimizer=muon", "inclora training.optimizer=sgd", "agem training.optimizer=muon",
    "olora training.precision=bf16", "olora training.activation_checkpointing=true", "olora adapter.dropout_past=true",
    "olora training.penalty_at=micro", "olora training.loss_mean=micro", "olora eval.mode=generate",
    "inclora eval.future=true", "inclora data.truncate=tail", "olora options.slow_copy.beta=0.5",
    "ewc options.slow_copy.beta=0.5 options.slow_copy.next=slow", "olora tasks.agnews.method.lambda1=2",
    "inclora adapter.target_modules=[q,v,wo]",
]  # fmt: skip


def runs() -> list[tuple[str, str, int, str]]:
    """(name, model, processes, what is set) of every run: each on tiny-t5, on tiny-llama, and on two processes."""
    given = [f"{method} {SMALL.get(method, '')}".strip() for method in METHODS]
    given += [f"{form} {SMALL.get(form.split()[0], '')}".strip() for form in FORMS]
    found = []
    for model, ranks in (("tiny-t5", 1), ("tiny-llama", 1), ("tiny-t5", 2)):
        for words in given:
            if model == "tiny-llama" and "target_modules" in words:
                words = words.replace("[q,v,wo]", "[q_proj,v_proj,down_proj]")
            found.append((f"{model} x{ranks} {words}", model, ranks, words))
    return found


def arguments(name: str, model: str, words: str) -> list[str]:
    """The command line of a run."""
    method, *settings = words.split()
    sets = dict(COMMON)
    for setting in reversed(settings):  # the form's own stand first, and win
        key, _, value = setting.partition("=")
        section = key.partition(".")[0]
        own = section not in ("adapter", "training", "eval", "data", "output", "tasks", "options")
        sets[f"method.{key}" if own else key] = value
    flags = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    return ["train", "--order", "golden.yaml", "--method", method, "--model", model, "--name", name, *flags]


def facts(run: Path) -> dict[str, Any]:
    """All that a run says, as numbers and hashes: tensors by name, other files as JSON without times and sizes."""
    from safetensors import safe_open

    about: dict[str, Any] = {"matrix": (run / "matrix.csv").read_text().splitlines()}
    keys = ("stage", "step", "loss", "penalty", "penalty_gradient_ratio", "lr", "gradient_norm", "loss_before")
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    about["log"] = [[row.get(key) for key in keys] for row in rows]
    for file in sorted((run / "stages").rglob("*")):
        name = str(file.relative_to(run / "stages"))
        if file.suffix == ".safetensors":
            with safe_open(file, "np") as tensors:
                found = {key: tensors.get_tensor(key).tobytes() for key in tensors.keys()}  # noqa: SIM118
                about[name] = {key: hashlib.sha256(raw).hexdigest()[:16] for key, raw in found.items()}
        elif file.name == "adapter_config.json":
            about[name] = json.loads(file.read_text())
            about[name].pop("base_model_name_or_path")  # of an embedded model: where the package lies
        elif file.name in ("predictions.jsonl", "answers.json"):
            about[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        elif file.name == "metrics.json":
            metrics = json.loads(file.read_text())
            about[name] = {key: metrics.get(key) for key in ("scores", "counts", "training", "tasks")}
        elif file.name == "state.json":
            about[name] = json.loads(file.read_text())
            about[name].pop("megabytes", None)
            for other in ("kept", "earlier"):  # hashes of files: their tensors are compared
                about[name][other] = sorted(about[name].get(other) or {})
    return about


def work(rank: int, ranks: int, folder: Path, todo: list[tuple[str, str, int, str]], port: int) -> None:
    """Train the runs one after the other in this process, one of ``ranks``."""
    from cl_runner.cli import outcome

    os.chdir(folder)
    for number, (name, model, _, words) in enumerate(todo):
        label = hashlib.sha256(name.encode()).hexdigest()[:12]
        if ranks > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port + number),
            )  # fmt: skip
        shutil.rmtree(folder / "runs" / label, ignore_errors=True) if rank == 0 and ranks == 1 else None
        code = outcome(arguments(label, model, words))
        if rank == 0:
            (folder / f"{label}.code").write_text(str(code))


def take(out: Path) -> None:
    """Make all runs that the file does not have yet."""
    have = json.loads(out.read_text()) if out.exists() else {}
    for ranks in (1, 2):
        todo = [run for run in runs() if run[2] == ranks and run[0] not in have]
        for start in range(0, len(todo), 12):
            batch = todo[start : start + 12]
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "golden.yaml").write_text(ORDER)
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "CL_RUNNER_CACHE": f"{folder}/cache"}
                words = [sys.executable, __file__, "--work", json.dumps([ranks, folder, batch])]
                children = [
                    subprocess.Popen([*words, str(rank)], env=environment, stdout=subprocess.DEVNULL,
                                     stderr=subprocess.PIPE if rank == 0 else subprocess.DEVNULL, text=True)
                    for rank in range(ranks)
                ]  # fmt: skip
                said = children[0].communicate()[1]
                for child in children[1:]:
                    child.wait()
                for name, *_ in batch:
                    label = hashlib.sha256(name.encode()).hexdigest()[:12]
                    run = Path(folder) / "runs" / label
                    done = (run / "matrix.csv").exists() and (Path(folder) / f"{label}.code").read_text() == "0"
                    have[name] = facts(run) if done else {"failed": True}
                    print("ok    " if done else "FAILED", name, flush=True)
                    if not done:
                        print("\n".join(line for line in said.splitlines() if "cl-runner:" in line)[-2000:])
            out.write_text(json.dumps(have, indent=1))


def compare(before: Path, after: Path) -> int:
    """Say what differs; how many runs do."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    bad = 0
    for name in sorted({*old, *new}):
        if name not in old or name not in new:
            print(f"{name}: only {'before' if name in old else 'after'}")
            bad += 1
            continue
        different = [key for key in {**old[name], **new[name]} if old[name].get(key) != new[name].get(key)]
        if different:
            bad += 1
            print(f"{name}: {', '.join(different[:8])}{' …' if len(different) > 8 else ''}")
            key = different[0]
            print(f"    {str(old[name].get(key))[:200]}\n    {str(new[name].get(key))[:200]}")
    print(f"{len({*old, *new})} runs, {bad} differ")
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        ranks, folder, todo = json.loads(given.work[0])
        work(int(given.work[1]), ranks, Path(folder), [tuple(run) for run in todo], 21000 + os.getppid() % 20000)
        return 0
    if given.compare:
        return compare(*given.files)
    take(given.files[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
