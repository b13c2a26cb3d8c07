"""What computes here: GPUs and whether torch goes with their driver, cores, bf16; and what processes talk by."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cl_runner.doctor.asking import Answer
from cl_runner.doctor.finding import Finding
from cl_runner.engine.precision import has_bf16
from cl_runner.terminal.console import size

GROUP = "Devices"
SHARED = (
    2**29
)  # bytes of /dev/shm under which NCCL fails with several GPUs; a container has 64 MB unless told otherwise
NO_ANSWER = "not known, as torch cannot be imported"


def devices(answers: Mapping[str, Answer], cpu: Path = Path("/proc/cpuinfo")) -> Iterator[Finding]:
    """GPUs, cores and threads, bf16."""
    seen, driver = answers.get("devices()", Answer()), answers.get("driver()", Answer())
    yield from _gpus(seen, driver.found or {"gpus": 0, "cuda": None, "error": driver.error})
    threads = (seen.found or {}).get("threads")
    yield _threads(cores(), limit(), os.environ.get("OMP_NUM_THREADS"), threads)
    yield _memory()
    if has_bf16(cpu):
        yield Finding(GROUP, "bf16 on the CPU", "ok", "the processor has it: training.precision=auto may choose it")
    else:
        yield Finding(GROUP, "bf16 on the CPU", "ok", "the processor has none: CPU runs compute in fp32")


def _gpus(seen: Answer, driver: Mapping[str, Any]) -> Iterator[Finding]:
    there = bool(driver["gpus"]) or driver["cuda"] is not None
    runs = _dotted(driver["cuda"]) if driver["cuda"] else ""
    if seen.found is None:
        said = f"{driver['gpus']} by their device files; " if driver["gpus"] else ""
        if seen.error:  # torch imports, and dies of looking at the GPUs
            yield Finding(
                GROUP, "GPU", "wrong", f"{said}{seen.error}", "nothing trains", "see what nvidia-smi says", needed=True
            )
        else:
            yield Finding(GROUP, "GPU", "ok", said + NO_ANSWER)
        return
    built, gpus = seen.found["built_for"], seen.found["gpus"]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        yield Finding(GROUP, "GPU", "ok", "left alone, as DS_ACCELERATOR=cpu wants: runs compute on the CPU")
    elif gpus:
        yield from (_gpu(number, gpu, built, runs) for number, gpu in enumerate(gpus))
    elif not there:
        yield Finding(GROUP, "GPU", "ok", "none, and no driver of one: runs compute on the CPU")
    elif hidden is not None and hidden.strip() in ("", "-1"):
        yield Finding(GROUP, "GPU", "ok", f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}: runs compute on the CPU")
    elif not built:
        yield Finding(
            GROUP, "GPU", "wrong", f"there is a driver{runs and f' for CUDA {runs}'}, and torch is a build for CPUs",
            "runs would compute on the CPU", f"install a build of torch for CUDA {runs or '…'} or older (pytorch.org)",
            needed=True,
        )  # fmt: skip
    elif runs and not built.startswith("ROCm") and _major(built) > _major(runs):
        yield Finding(
            GROUP, "GPU", "wrong", f"torch is built for CUDA {built}, and the driver runs CUDA {runs} and older",
            "torch sees no GPU", f"install a build of torch for CUDA {_major(runs)}, or a newer driver", needed=True,
        )  # fmt: skip
    else:
        why = seen.found["warned"] or driver["error"] or "torch says no reason"
        yield Finding(
            GROUP, "GPU", "wrong", f"there is a driver, and torch (CUDA {built}) sees no GPU: {why}",
            "runs would compute on the CPU",
            "see what nvidia-smi says (in a container: --gpus all); CUDA_VISIBLE_DEVICES= says that none is meant",
            needed=True,
        )  # fmt: skip


def _gpu(number: int, gpu: Mapping[str, Any], built: str, runs: str) -> Finding:
    what, name = f"GPU {number}", gpu["name"]
    if gpu["error"]:
        return Finding(
            GROUP, what, "wrong", f"{name} computes nothing: {gpu['error']}", "no run trains on it",
            f"take a build of torch for this GPU (this one is for CUDA {built}), or leave the GPU out "
            "(CUDA_VISIBLE_DEVICES)", needed=True,
        )  # fmt: skip
    driver = f"; torch for CUDA {built}, driver for {runs}" if runs else f"; torch for {built}"
    return Finding(GROUP, what, "ok", f"{name}, {size(gpu['free'])} of {size(gpu['memory'])} free{driver}")


def _threads(cores: int, limit: float | None, asked: str | None, threads: int | None) -> Finding:
    what = "threads"
    some = f"{cores} core{'s' if cores != 1 else ''}" + (f", of which a container may use {limit:g}" if limit else "")
    if asked is not None and not (asked.strip().split(",")[0].isdigit() and int(asked.strip().split(",")[0])):
        return Finding(
            GROUP, what, "wrong", f"OMP_NUM_THREADS={asked} is no number from 1", "torch passes it over",
            f"OMP_NUM_THREADS={cores}, or unset it",
        )  # fmt: skip
    most = min(cores, limit or cores)
    count = threads or (int(asked.split(",")[0]) if asked else cores)
    by = f"OMP_NUM_THREADS={asked}" if asked is not None else "OMP_NUM_THREADS is not set"
    if count > max(1, most):
        return Finding(
            GROUP, what, "wrong", f"{count} threads on {some} ({by})", "they wait for each other: steps take longer",
            f"OMP_NUM_THREADS={max(1, int(most))}",
        )  # fmt: skip
    return Finding(GROUP, what, "ok", f"{count} on {some} ({by})")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """How many cores' time a container may use (cgroup v2, v1); None: all."""
    with suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


def _memory(meminfo: Path = Path("/proc/meminfo")) -> Finding:
    try:
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        total, free = (int(rows[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError):
        return Finding(GROUP, "memory", "ok", "not known")
    return Finding(GROUP, "memory", "ok", f"{size(free)} of {size(total)} free")


def talking(answers: Mapping[str, Answer], shm: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """What processes of one run talk by: gloo on CPUs, NCCL on GPUs, shared memory."""
    group = "Processes"
    seen = answers.get("collectives()", Answer())
    gpus = len(((answers.get("devices()") or Answer()).found or {}).get("gpus", []))
    if seen.found is None and not seen.error:
        yield Finding(group, "gloo, NCCL", "ok", NO_ANSWER)
    else:
        found = seen.found or {"gloo": seen.error, "nccl": ""}
        yield _gloo(group, found["gloo"], alone_needs_it=not gpus)
        yield _nccl(group, found["nccl"], gpus)
    yield _shared(group, shm, gpus)


def _gloo(group: str, error: str, *, alone_needs_it: bool) -> Finding:
    if not error:
        return Finding(group, "gloo", "ok", "brings up a group")
    return Finding(
        group, "gloo", "wrong", error, "processes on CPUs, and one alone, have no group to train in",
        "see that this machine's host name resolves, or name an interface: GLOO_SOCKET_IFNAME=lo",
        needed=alone_needs_it,
    )  # fmt: skip


def _nccl(group: str, version: str, gpus: int) -> Finding:
    if version:
        return Finding(group, "NCCL", "ok", version)
    if not gpus:
        return Finding(group, "NCCL", "ok", "none, and no GPU that would need it")
    return Finding(
        group, "NCCL", "missing", "this build of torch has none", "runs on GPUs have no group to train in",
        "install a build of torch with NCCL (pytorch.org)", needed=True,
    )  # fmt: skip


def _shared(group: str, shm: Path, gpus: int) -> Finding:
    what = "shared memory"
    try:
        total, _, free = shutil.disk_usage(shm)
    except OSError as error:
        said = f"{shm}: {error.strerror or error}"
        if gpus < 2:
            return Finding(group, what, "ok", f"{said}; one process needs none")
        return Finding(group, what, "missing", said, "--gpus over 1 fails", "mount it (in a container: --ipc=host)")
    said = f"{size(free)} of {size(total)} free in {shm}"
    if gpus > 1 and free < SHARED:
        return Finding(
            group, what, "wrong", said, "NCCL may fail with --gpus over 1",
            "in a container: --shm-size=8g or --ipc=host",
        )  # fmt: skip
    return Finding(group, what, "ok", said)


def ops(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    """DeepSpeed's compiled ops, of which cl-runner uses none."""
    group, what = "DeepSpeed", "compiled ops"
    seen = answers.get("ops()", Answer())
    none = "none is needed, and none is ever built"
    if not isinstance(seen.found, dict):
        yield Finding(group, what, "ok", f"{none} ({seen.error or 'DeepSpeed cannot be asked'})")
        return
    could = sorted(name for name, compatible in seen.found.items() if compatible)
    never = sorted(set(seen.found) - set(could))
    if could and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        could, never = [], sorted(seen.found)
        none += "; without a C++ compiler none could be"
    parts = [f"could be built here: {', '.join(could)}" if could else "", f"not: {', '.join(never)}" if never else ""]
    yield Finding(group, what, "ok", "; ".join([none, *filter(None, parts)]))


def _dotted(version: int) -> str:
    """12040 is CUDA 12.4."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _major(version: str) -> int:
    head = version.partition(".")[0]
    return int(head) if head.isdigit() else 0
