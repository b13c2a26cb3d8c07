"""Large libraries, imported at less cost: without what nobody calls here, and without looking for garbage."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

# Modules of which a library takes one function when it is imported, and calls it never here: transformers 5.23 loads
# scipy.optimize, where scipy is installed, with every model, for the matching in the losses of object detectors.
ONE_FUNCTION = {"scipy.optimize": "linear_sum_assignment"}


@contextmanager
def light_imports() -> Iterator[None]:
    """Inside, ``import`` costs less; afterwards everything is as it was.

    A function of ``ONE_FUNCTION`` loads its module when it is called; whoever asks for more of a module inside has all
    of it at once.
    """
    collecting = gc.isenabled()
    gc.disable()  # modules stay: to go through the many objects of those before again and again finds nothing
    absent = []
    for module, function in ONE_FUNCTION.items():
        package, _, name = module.partition(".")
        spec = find_spec(package) if module not in sys.modules else None
        if spec is not None and spec.submodule_search_locations is not None:
            folders = [str(Path(folder, name)) for folder in spec.submodule_search_locations]
            absent.append(_LoadedWhenCalled(module, function, folders))
    sys.modules.update({each.__name__: each for each in absent})
    try:
        _import_bitsandbytes()
        yield
    finally:
        for each in absent:
            each.leave()
        if collecting:
            gc.enable()


def _import_bitsandbytes() -> None:
    """Where it is installed PEFT imports it with every model: without torch's compiler, and with no code of the hub.

    bitsandbytes 0.50 decorates functions with ``torch.compile``; on some processors it asks the package ``kernels``,
    where there is one, for compiled code from the hub, or warns that there is none. Nobody calls either here.
    """
    if "bitsandbytes" in sys.modules or find_spec("bitsandbytes") is None:
        return
    log, before = logging.getLogger("bitsandbytes"), sys.modules.get("kernels")
    level = log.level
    log.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        with compiled_when_called():
            import_module("bitsandbytes")
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """Inside, what ``torch.compile`` decorates is compiled at its first call.

    DeepSpeed 0.19 imports its Muon with every engine; to decorate its functions, which nobody calls here, would import
    torch's whole compiler.
    """
    import torch

    compile_now = torch.compile

    def compile_late(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return partial(compile_late, **options)
        compiled = cache(partial(compile_now, function, **options))
        return wraps(function)(lambda *args, **named: compiled()(*args, **named))

    torch.compile = compile_late  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


class _LoadedWhenCalled(ModuleType):
    """Stands for a module until its one function is called, or anything else of it is asked for."""

    def __init__(self, name: str, function: str, folders: list[str]) -> None:
        super().__init__(name)
        self.__path__ = folders  # where modules within it are found, which need not wait

        def late(*args: Any, **named: Any) -> Any:
            call: Callable[..., Any] = getattr(self.whole(), function)
            return call(*args, **named)

        late.__name__ = function
        setattr(self, function, late)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python asks of any module
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def whole(self) -> ModuleType:
        """The module itself, loaded."""
        self.leave()
        return import_module(self.__name__)

    def leave(self) -> None:
        """Out of the way of the module itself."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
