"""What is imported at less cost: it is absent until it is called, works when it is, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.breadth import wide

needs_scipy = pytest.mark.skipif(find_spec("scipy") is None, reason="scipy is not installed")

START = """
import gc, sys
from cl_runner.imports import light_imports
loaded = sys.modules
"""


def run(program: str) -> None:
    """Run a program in a Python of its own; its assertions are the test's."""
    done = subprocess.run([sys.executable, "-c", START + program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@wide
@needs_scipy
def test_what_transformers_takes_of_scipy_is_loaded_when_it_is_called() -> None:
    run("""
with light_imports():
    import transformers.modeling_utils
    assert not gc.isenabled()
assert gc.isenabled()
assert "transformers.loss.loss_for_object_detection" in loaded and "scipy.optimize" not in loaded
from transformers.loss.loss_for_object_detection import linear_sum_assignment
import numpy
cost = numpy.array([[4, 1, 3], [2, 0, 5], [3, 2, 2]])
rows, columns = linear_sum_assignment(cost_matrix=cost, maximize=False)
assert (rows.tolist(), columns.tolist()) == ([0, 1, 2], [1, 0, 2])
import scipy.optimize
assert loaded["scipy.optimize"] is scipy.optimize and scipy.optimize.minimize
""")


@wide
@needs_scipy
def test_without_it_transformers_loads_scipy_with_every_model() -> None:
    """Where this fails, ``ONE_FUNCTION`` has no use any more."""
    run("""
import transformers.modeling_utils
assert "scipy.optimize" in loaded
""")


@needs_scipy
@pytest.mark.parametrize(
    "more",
    [
        "from scipy.optimize import minimize",
        pytest.param(
            "import scipy.optimize._lsap; from scipy.optimize import linear_sum_assignment as late; late([[1.0]])",
            marks=wide,
        ),
        pytest.param("import scipy.optimize as whole; assert whole.OptimizeResult", marks=wide),
    ],
)
def test_whoever_asks_for_more_of_a_module_has_it(more: str) -> None:
    run(f"""
with light_imports():
    {more}
import scipy.optimize
assert loaded["scipy.optimize"] is scipy.optimize and scipy.optimize.minimize and scipy.optimize.__spec__
assert scipy.optimize.linear_sum_assignment([[1.0]])[0].tolist() == [0]
""")


@needs_scipy
def test_what_is_loaded_already_stays_and_so_does_a_collector_that_is_off() -> None:
    run("""
import scipy.optimize
gc.disable()
try:
    with light_imports():
        assert loaded["scipy.optimize"] is scipy.optimize
        1 / 0
except ZeroDivisionError:
    pass
assert not gc.isenabled() and loaded["scipy.optimize"] is scipy.optimize
""")


def test_nothing_is_left_behind_where_nothing_was_imported() -> None:
    run("""
with light_imports():
    pass
assert "scipy.optimize" not in loaded and gc.isenabled()
""")


def test_rows_are_encoded_without_pandas() -> None:
    run("""
from cl_runner.models.batch import Example
from cl_runner.models.token_cache import Encoded
examples = [Example([3, 4], [5], True), Example([], [6, 7])]
assert list(Encoded.of(examples)) == examples and "pandas" not in loaded
""")


def test_what_is_decorated_inside_is_compiled_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from cl_runner.imports import compiled_when_called

    made: list[dict[str, Any]] = []

    def compile_now(function: Callable[..., int], **options: Any) -> Callable[..., int]:
        made.append(options)
        return lambda *args, **named: 10 * function(*args, **named)

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiled_when_called():
        plain: Any = torch.compile(lambda x: x + 1)
        asked: Any = torch.compile(dynamic=True)(lambda x, y=0: x + y)
    assert torch.compile is compile_now and not made
    assert [plain(1), plain(2), asked(3, y=4)] == [20, 30, 70]
    assert made == [{}, {"dynamic": True}]


needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@needs_bitsandbytes
def test_bitsandbytes_comes_without_the_compiler_and_without_code_of_the_hub(tmp_path: Path) -> None:
    """A package ``kernels`` that is there is not asked, and is as before afterwards."""
    (tmp_path / "kernels.py").write_text("asked = []\nget_kernel = lambda *a, **k: asked.append(a)\n")
    run(f"""
sys.path.insert(0, {str(tmp_path)!r})
with light_imports():
    assert "bitsandbytes" in loaded and "torch._inductor.compile_fx" not in loaded
assert "kernels" not in loaded
import kernels
assert kernels.asked == []
""")


@wide
@needs_bitsandbytes
def test_without_it_bitsandbytes_brings_the_compiler() -> None:
    """Where this fails, nothing is gained any more."""
    run("""
import bitsandbytes
assert "torch._inductor.compile_fx" in loaded
""")
