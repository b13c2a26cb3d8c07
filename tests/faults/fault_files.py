"""Files of a run cut, flipped, lost, swapped, linked, or too many: refused in one line, or gone on with to the bit."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import results, tree
from tests.faults.conftest import every, tried
from tests.faults.trial import Trial, logged
from tests.faults.warm import fork

Harm = Callable[[Path, random.Random], None]


def truncated(file: Path, dice: random.Random) -> None:
    os.truncate(file, dice.randrange(file.stat().st_size or 1))


def flipped(file: Path, dice: random.Random) -> None:
    content = bytearray(file.read_bytes() or b"\0")
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def missing(file: Path, dice: random.Random) -> None:
    file.unlink()


def swapped(file: Path, dice: random.Random) -> None:
    """With another file of its folder."""
    others = sorted(other for other in file.parent.iterdir() if other.is_file() and other != file)
    other = dice.choice(others)
    held = file.with_name("held")
    file.rename(held)
    other.rename(file)
    held.rename(other)


def linked(file: Path, dice: random.Random) -> None:
    """To a copy elsewhere, whose content is the same."""
    away = file.parents[1] / f".away-{file.name}"
    file.rename(away)
    file.symlink_to(away)


def beside(file: Path, dice: random.Random) -> None:
    """Another file, that no run writes."""
    file.with_name("extra.bin").write_bytes(b"extra")


HARMS: dict[str, Harm] = {harm.__name__: harm for harm in (truncated, flipped, missing, swapped, linked, beside)}


def files(run: Path) -> list[str]:
    """What a run in its middle consists of."""
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path.name != ".lock")


@pytest.mark.parametrize("how", HARMS)
def test_a_file(cwd: Path, left: Path, how: str) -> None:
    fault = {"beside": "an extra file", "linked": "a file that became a symlink"}.get(how, f"a {how} file")
    with tried(fault) as count:
        places = [name for name in files(left) if ".draft" not in name]
        if how == "beside":
            places = list({str(Path(name).parent): name for name in places}.values())
        for name in every(places, 7):
            dice = random.Random(f"{how} {name}")
            one = Trial(cwd, f"harmed-{how}")
            shutil.rmtree(one.run, ignore_errors=True)
            shutil.copytree(left, one.run, symlinks=True)
            HARMS[how](one.run / name, dice)
            harmed = tree(one.run)
            ended = one.start().result()
            assert ended.code in (0, 2) and "Traceback" not in ended.err, (name, ended.err)
            count()
            if ended.code == 2:
                last = ended.err.splitlines()[-1]
                assert last.startswith(("cl-runner: ", "failed")), (name, ended.err)
                assert {n: d for n, d in tree(one.run).items() if n.startswith("stages/")} == {
                    n: d for n, d in harmed.items() if n.startswith("stages/")
                }, (name, "what is there was touched")
                _put_back(left, one.run)
                one.finish()
                assert not one.differs, (name, one.differs)
            else:
                sound(cwd, one, name, ended.err)


def sound(cwd: Path, one: Trial, name: str, said: str) -> None:
    """It went on: then to the bit, or ``verify`` says what is wrong."""
    checked = fork(("verify", one.name), cwd).result()
    whole = cwd / "runs/whole"
    if name.startswith("stages/"):
        assert checked.code == 1 or results(one.run) == results(whole), (name, said)
        return
    assert results(one.run) == results(whole), (name, said)
    if name.startswith("checkpoint/"):
        assert logged(one.run) == logged(whole), (name, said)


def _put_back(left: Path, run: Path) -> None:
    shutil.rmtree(run)
    shutil.copytree(left, run, symlinks=True)
