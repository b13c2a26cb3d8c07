"""Python and the packages: which there are, whether they can be imported, and whether their versions go together."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from cl_runner import __version__
from cl_runner.doctor.asking import Answer
from cl_runner.doctor.finding import Finding
from cl_runner.doctor.known import EXTRAS, NEEDED, TORCH, Extra, Package, known_versions, plain

GROUP = "Packages"
AGAIN = 'pip install --force-reinstall --no-deps "{wanted}"'


def modules() -> list[str]:
    """What is imported to try it: all that is needed, and bitsandbytes, which every run imports where there is one."""
    torch, *others = (package.module for package in NEEDED)
    return [torch, *(["bitsandbytes"] if version_of("bitsandbytes") else []), *others]


def on_torch() -> list[str]:
    """Modules that import torch, so that they say nothing of their own where it is broken."""
    extras = [package for extra in EXTRAS for package in extra.packages]
    return [package.module for package in (*NEEDED, *extras) if package.on_torch]


def version_of(name: str) -> str:
    """Of an installed package, by its metadata; empty where there is none."""
    try:
        return metadata.version(name) or "of no version"
    except metadata.PackageNotFoundError:
        return ""


def packages(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    """Python, cl-runner, and every package that a run needs."""
    yield Finding(GROUP, "python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield Finding(GROUP, "cl-runner", "ok", f"{__version__} in {Path(__file__).parents[1]}")
    tested, wanted = known_versions(), _wanted("cl-runner")
    for package in NEEDED:
        yield _needed(package, answers.get(package.module), tested.get(plain(package.name), ""), wanted)


def _needed(package: Package, answer: Answer | None, tested: str, wanted: Mapping[str, Any]) -> Finding:
    name = package.name
    version = version_of(name)
    requirement = wanted.get(plain(name))
    # torch is a matter of the machine's driver, which no single line of pip's knows.
    again = AGAIN.format(wanted=requirement or name) if name != TORCH else "install torch anew (pytorch.org says how)"
    costs = "nothing trains without it"
    if not version and (answer is None or "No module named" in answer.error):
        do = f'pip install "{requirement or name}"' if name != TORCH else again
        return Finding(GROUP, name, "missing", "not installed", costs, do, needed=True)
    if answer is None:
        return Finding(GROUP, name, "ok", f"{version}; not tried, as it needs torch")
    if answer.error:
        said = f"{version or 'there'}, and cannot be imported: {answer.error}"
        return Finding(GROUP, name, "wrong", said, costs, again, needed=True)
    if not version:
        said = f"{answer.found or 'there'}, without metadata: pip does not know it"
        return Finding(GROUP, name, "wrong", said, "whether its version will do is not known", again)
    if requirement is not None and not _fits(requirement, version):
        said = f"{version}, and {requirement} is wanted"
        return Finding(
            GROUP, name, "wrong", said, "runs may fail, or give other numbers", f'pip install "{requirement}"'
        )
    if conflict := next(_conflicts(name), None):
        return Finding(
            GROUP, name, "wrong", f"{version}; {conflict}", "what was not tested together may fail late",
            "pip install the version that is wanted",
        )  # fmt: skip
    beside = "" if not tested or version.partition("+")[0] == tested else f" (tested with {tested})"
    return Finding(GROUP, name, "ok", f"{version}{beside}")


def _conflicts(name: str) -> Iterator[str]:
    """What a package wants of others, and what there is instead."""
    for other, requirement in _wanted(name).items():
        version = version_of(other)
        if not version:
            yield f"wants {requirement}, which is not installed"
        elif not _fits(requirement, version):
            yield f"wants {requirement}, and there is {version}"


def _wanted(name: str) -> dict[str, Any]:
    """A package's requirements (without extras), by plain name; none where it, or what reads them, is not there."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:
        return {}
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return {}
    found = {}
    for line in lines:
        try:
            one = Requirement(line)
        except InvalidRequirement:
            continue
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            one.marker = None
            found[plain(one.name)] = one
    return found


def _fits(requirement: Any, version: str) -> bool:
    return bool(requirement.specifier.contains(version, prereleases=True))


def extras(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    """What runs with some settings alone."""
    for extra in EXTRAS:
        yield _extra(extra, answers)


def _extra(extra: Extra, answers: Mapping[str, Answer]) -> Finding:
    group = "Extras"
    versions = {package.name: version_of(package.name) for package in extra.packages}
    absent = [name for name, version in versions.items() if not version]
    do = f'pip install "cl-runner[{extra.name}]"'
    if absent:
        several = f": {', '.join(absent)}" if len(versions) > 1 else ""
        return Finding(group, extra.name, "missing", f"not installed{several}", extra.costs, do)
    for package in extra.packages:
        if (answer := answers.get(package.module)) and answer.error:
            said = f"{package.name} {versions[package.name]} cannot be imported: {answer.error}"
            return Finding(
                group, extra.name, "wrong", said,
                "where it is installed every run imports it, so that nothing trains",
                f"pip uninstall {package.name}, or {AGAIN.format(wanted=package.name)}", needed=True,
            )  # fmt: skip
    return Finding(group, extra.name, "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))
