"""Tries out what may crash or hang: imports, the driver, a GPU, a process group. Runs in a process of its own.

A broken build of torch may end its process without a word, so that ``asking.py`` starts this one and reads, line by
line, what came of each job.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any


def main() -> None:
    """``argv``: the jobs, in their order. A line of JSON each on stdout, which libraries cannot reach."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for job in sys.argv[1:]:
        try:
            done = {"job": job, "found": JOBS[job]() if job in JOBS else imported(job)}
        except (Exception, SystemExit) as error:
            done = {"job": job, "error": said(error)}
        out.write(json.dumps(done) + "\n")
        out.flush()
    os._exit(0)  # to take torch's modules down takes seconds, and a broken one may hang there


_tried: set[str] = set()


def said(error: BaseException) -> str:
    """An error in one line, with its class where that says more."""
    text = " ".join(str(error).split())[:300]
    return text if text and isinstance(error, ImportError | OSError) else f"{type(error).__name__}: {text}"


def imported(module: str) -> str:
    """Import a module as a run does; returns its version, if it says one."""
    from cl_runner.imports import compiled_when_called, light_imports

    if module == "bitsandbytes":
        _tried.add(module)
    # What imports faster imports bitsandbytes too: where that is broken, it is to be said of it alone.
    light = "torch" in sys.modules and ("bitsandbytes" not in _tried or "bitsandbytes" in sys.modules)
    with light_imports() if light else nullcontext():
        if module != "deepspeed":
            return str(getattr(importlib.import_module(module), "__version__", ""))
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda is not None and cuda.is_available() else "cpu")
        os.environ.setdefault("DS_BUILD_OPS", "0")
        with compiled_when_called():
            return str(importlib.import_module(module).__version__)


def driver() -> dict[str, Any]:
    """NVIDIA's driver: the newest CUDA it runs (12040 is 12.4), or why that is not known; GPUs by device files."""
    with os.scandir("/dev") as devices:
        gpus = sum(device.name.startswith("nvidia") and device.name[6:].isdigit() for device in devices)
    try:
        version = ctypes.c_int(0)
        answer = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        return {"gpus": gpus, "cuda": version.value, "error": f"libcuda answers {answer}" if answer else ""}
    except (OSError, AttributeError) as error:
        return {"gpus": gpus, "cuda": None, "error": said(error)}


def devices() -> dict[str, Any]:
    """How torch was built, and what it does on each GPU."""
    import torch

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    return {
        "built_for": torch.version.cuda or (f"ROCm {torch.version.hip}" if torch.version.hip else ""),
        "available": available,
        "warned": " ".join(str(each.message) for each in heard).partition("(Triggered")[0].strip()[:300],
        "gpus": [_gpu(number) for number in range(torch.cuda.device_count())] if available else [],
        "threads": torch.get_num_threads(),
    }


def _gpu(number: int) -> dict[str, Any]:
    import torch

    about: dict[str, Any] = {"name": torch.cuda.get_device_name(number), "error": ""}
    try:
        about["free"], about["memory"] = torch.cuda.mem_get_info(number)
        (torch.ones(8, 8, device=f"cuda:{number}") @ torch.ones(8, 8, device=f"cuda:{number}")).sum().item()
    except (RuntimeError, AssertionError) as error:
        about["error"] = said(error)
    return about


def collectives() -> dict[str, Any]:
    """What processes talk by: NCCL's version, and whether gloo brings up a group (of one, here)."""
    import torch

    distributed: Any = torch.distributed
    if not distributed.is_available():
        return {"nccl": "", "gloo": "torch was built without torch.distributed"}
    nccl = ""
    if distributed.is_nccl_available():
        with suppress(Exception):
            nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    if not distributed.is_gloo_available():
        return {"nccl": nccl, "gloo": "torch was built without gloo"}
    try:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        distributed.all_reduce(torch.ones(1))
    except Exception as error:
        return {"nccl": nccl, "gloo": said(error)}
    return {"nccl": nccl, "gloo": ""}


def ops() -> dict[str, bool]:
    """DeepSpeed's compiled ops: whether each could be built here."""
    builders = importlib.import_module("deepspeed.ops.op_builder.all_ops").ALL_OPS
    # One stands for all that this accelerator has not.
    return {name: _compatible(builders[name]) for name in builders if name != "deepspeed_not_implemented"}


def _compatible(builder: Any) -> bool:
    with suppress(Exception):  # a compiler or a library that is asked, and is not there
        return bool(builder.is_compatible(verbose=False))
    return False


JOBS: dict[str, Callable[[], Any]] = {
    "driver()": driver,
    "devices()": devices,
    "collectives()": collectives,
    "ops()": ops,
}


def order(modules: Sequence[str]) -> list[str]:
    """The jobs: the driver before torch, the GPUs after it, and ops after DeepSpeed."""
    jobs = ["driver()"]
    for module in modules:
        jobs += [module, *{"torch": ("devices()", "collectives()"), "deepspeed": ("ops()",)}.get(module, ())]
    return jobs
