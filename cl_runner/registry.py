"""What there is by name: methods, adapter kinds, options, task sources, trackers; ours, packages', of plugin files.

A name is known without an import: ours stand in the tables at the end, a package's in its metadata (entry points, a
group for each sort), a plugin's are those of the file that was given. A class is imported when it is asked for.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cl_runner.errors import UserError, did_you_mean
from cl_runner.plain_files import LARGEST_JSON, content

if TYPE_CHECKING:
    from cl_runner.adapters.kind import Kind
    from cl_runner.methods.protocol import Method
    from cl_runner.sweeps.engines.protocol import Engine
    from cl_runner.tasks.sources import RowSource
    from cl_runner.trackers.protocol import Tracker
    from cl_runner.training.options.protocol import Option

T = TypeVar("T")
OURS = "cl-runner"
_NAME = re.compile(r"\w[\w.+-]{0,39}")  # it becomes a part of a run folder's name


@dataclass(frozen=True)
class Entry:
    """Where a name leads, ``module:Class``, and whose it is: cl-runner's, a package's, or a plugin file's."""

    target: str
    origin: str


class Registry(Generic[T]):
    """All of one sort. ``base`` is the class that each of them is made of, as ``module:Class``.

    elsewhere: names that people know from other places and ask for → what there is instead, or why not.
    """

    def __init__(
        self, noun: str, group: str, base: str, ours: Mapping[str, str], elsewhere: Mapping[str, str] | None = None
    ) -> None:
        self.noun = noun
        self.elsewhere = dict(elsewhere or {})
        self.group = group
        self.base = base
        self.ours = dict(ours)
        self._of_files: dict[str, Entry] = {}

    def names(self) -> list[str]:
        """Every name: ours, those of packages, those of plugins."""
        return list(self._entries())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def origin(self, name: str) -> str:
        """Whose it is: ``cl-runner``, ``package NAME VERSION`` or ``plugin FILE``; all, where several have the name."""
        return " and ".join(entry.origin for entry in self._named(name))

    def get(self, name: str) -> type[T]:
        """The class of that name.

        Raises:
            UserError: there is none (with the nearest name), or several; it cannot be imported, or is of another sort.
        """
        entry, *others = self._named(name)
        if others:
            both = " and ".join(f"of {each.origin}" for each in (entry, *others))
            raise UserError(f"{self.noun} '{name}' is there twice, {both}; rename one, or leave it out")
        what = f"{self.noun} '{name}' of {entry.origin}: {entry.target}"
        try:
            found = _load(entry.target)
        except (Exception, SystemExit) as error:  # whatever a stranger's module may raise
            if entry.origin == OURS:
                raise
            raise UserError(f"{what} cannot be imported: {_said(error)}") from error
        if not (isinstance(found, type) and issubclass(found, _load(self.base))):
            raise UserError(f"{what} is no subclass of {self.base.replace(':', '.')}")
        if (own := getattr(found, "name", None)) != name or not _NAME.fullmatch(name):
            raise UserError(f"{what} has name = {own!r}; it must be the same, a word of letters, digits and - _ . +")
        return found

    def usable(self) -> Iterator[tuple[str, type[T]]]:
        """Every name with its class; what others offer and cannot be used is passed over (``list`` says why)."""
        for name in self:
            with nullcontext() if name in self.ours else suppress(UserError):
                yield name, self.get(name)

    def take(self, name: str, entry: Entry) -> None:
        """Register a class of a plugin file. Raises UserError where the name is another's already."""
        there = [each for each in self._entries().get(name, []) if each.target != entry.target]
        if there:
            raise UserError(f"{entry.origin}: {self.noun} '{name}' is {there[0].origin}'s already; rename it")
        self._of_files[name] = entry

    def forget(self) -> None:
        """Let go of what plugin files registered."""
        self._of_files.clear()

    def _named(self, name: str) -> list[Entry]:
        entries = self._entries()
        if name not in entries:
            known = f": {self.elsewhere[name]}" if name in self.elsewhere else ""
            hint = known or did_you_mean(name, entries) or f" (there are {', '.join(entries)})"
            raise UserError(f"there is no {self.noun} '{name}'{hint}")
        return entries[name]

    def _entries(self) -> dict[str, list[Entry]]:
        found = {name: [Entry(target, OURS)] for name, target in self.ours.items()}
        for name, entry in (*_installed().get(self.group, ()), *self._of_files.items()):
            found.setdefault(name, []).append(entry)
        return found


@cache
def _installed() -> dict[str, list[tuple[str, Entry]]]:
    """What installed packages offer, by group: read from their metadata, once a process; nothing is imported."""
    from importlib.metadata import entry_points

    points = entry_points()
    found: dict[str, list[tuple[str, Entry]]] = {}
    for registry in REGISTRIES:
        for point in points.select(group=registry.group):
            whose = f"package {point.dist.name} {point.dist.version}" if point.dist else "a package"
            found.setdefault(registry.group, []).append((point.name, Entry(point.value, whose)))
    # Folders list their files in any order.
    return {group: sorted(each, key=lambda pair: (pair[0], pair[1].origin)) for group, each in found.items()}


def _load(target: str) -> Any:
    """The object at ``module:Class``."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _said(error: BaseException, file: str = "") -> str:
    """An error in one line, with the line of ``file`` where it arose."""
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == file else None
    trace = error.__traceback__
    while trace is not None:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == file else line
        trace = trace.tb_next
    text = " ".join(str(error).split())[:300]
    return f"{f'line {line}: ' if line else ''}{type(error).__name__}{f': {text}' if text else ''}"


@dataclass(frozen=True)
class Plugin:
    """A plugin file as it was imported, and the sha256 of its text."""

    file: Path
    sha256: str


_plugins: dict[Path, Plugin] = {}


def load_plugin(given: str) -> Plugin:
    """Import a Python file, once, and register every method, kind, option, source and tracker that is defined in it.

    Raises:
        UserError: there is no such file, it cannot be imported, or it defines nothing that has a name.
    """
    file = Path(given).expanduser().resolve()
    if file in _plugins:
        return _plugins[file]
    if file.suffix != ".py":
        raise UserError(f"{given}: a plugin is a Python file, FILE.py")
    try:
        text = content(file, LARGEST_JSON)
    except OSError as error:
        raise UserError(f"{given}: cannot be read: {error.strerror or error}") from error
    import hashlib

    plugin = Plugin(file, hashlib.sha256(text).hexdigest())
    module = _module(plugin, text)
    own = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    taken = [_take(cls, plugin) for cls in own]
    if not any(taken):
        raise UserError(f"{given}: defines no {', '.join(each.noun for each in REGISTRIES)} with a name")
    _plugins[file] = plugin
    return plugin


def _take(cls: type, plugin: Plugin) -> bool:
    """Register a class of a plugin by its sort, if it is of any and has a name."""
    name = getattr(cls, "name", None)
    for registry in REGISTRIES:
        base, _, sort = registry.base.partition(":")
        # Of a sort whose module nobody has imported there can be no class.
        if isinstance(name, str) and issubclass(cls, getattr(sys.modules.get(base), sort, ())):
            registry.take(name, Entry(f"{cls.__module__}:{cls.__qualname__}", f"plugin {plugin.file}"))
            return True
    return False


def _module(plugin: Plugin, text: bytes) -> ModuleType:
    """The module of a plugin's text, whose name depends on that text alone: the same in every process."""
    name = f"cl_runner_plugin_{re.sub(r'[^0-9a-zA-Z]', '_', plugin.file.stem)}_{plugin.sha256[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(plugin.file)
    sys.modules[name] = module
    try:
        exec(compile(text, str(plugin.file), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{plugin.file}: cannot be imported: {_said(error, str(plugin.file))}") from error
    return module


def plugins() -> list[Plugin]:
    """The plugin files of this command."""
    return list(_plugins.values())


def forget_plugins() -> None:
    """Begin without plugins: they are given to one command."""
    _plugins.clear()
    for registry in REGISTRIES:
        registry.forget()


METHODS: Registry[Method] = Registry(
    "method",
    "cl_runner.methods",
    "cl_runner.methods.protocol:Method",
    {
        "seqft": "cl_runner.methods.seqft:SeqFT",
        "seqlora": "cl_runner.methods.seqlora:SeqLoRA",
        "inclora": "cl_runner.methods.inclora:IncLoRA",
        "pertask": "cl_runner.methods.pertask:PerTask",
        "mtl": "cl_runner.methods.mtl:MultiTask",
        "replay": "cl_runner.methods.replay:Replay",
        "ewc": "cl_runner.methods.ewc:EWC",
        "lwf": "cl_runner.methods.lwf:LwF",
        "agem": "cl_runner.methods.agem:AGEM",
        "gem": "cl_runner.methods.gem:GEM",
        "ogd": "cl_runner.methods.ogd.method:OGD",
        "migu": "cl_runner.methods.migu:MIGU",
        "l2p": "cl_runner.methods.l2p:L2P",
        "progprompt": "cl_runner.methods.progprompt.method:ProgressivePrompts",
        "lfpt5": "cl_runner.methods.lfpt5.method:LFPT5",
        "olora": "cl_runner.methods.olora:OLoRA",
        "nlora": "cl_runner.methods.nlora.method:NLoRA",
        "sparse-orth": "cl_runner.methods.sparse_orth:SparseOrth",
        "grassmann": "cl_runner.methods.grassmann.method:Grassmann",
        "clora": "cl_runner.methods.clora.method:CLoRA",
        "inflora": "cl_runner.methods.inflora:InfLoRA",
        "shared-basis": "cl_runner.methods.shared_basis.method:SharedBasisMethod",
        "colora": "cl_runner.methods.colora.method:CoLoRA",
        "coso": "cl_runner.methods.coso.method:CoSO",
        "osft": "cl_runner.methods.osft.method:OSFT",
        "sdlora": "cl_runner.methods.sdlora.method:SDLoRA",
        "pego": "cl_runner.methods.pego:PEGO",
        "ella": "cl_runner.methods.ella:ELLA",
        "pslora": "cl_runner.methods.pslora:PSLoRA",
        "ewc-lora": "cl_runner.methods.ewc_lora:EWCLoRA",
        "oa": "cl_runner.methods.oa.method:OAAdapter",
        "oliera": "cl_runner.methods.oliera.method:OLieRA",
        "jumplora": "cl_runner.methods.jumplora.method:JumpLoRA",
        "slao": "cl_runner.methods.slao:SLAO",
        "merge": "cl_runner.methods.merge.method:Merge",
        "slora": "cl_runner.methods.slora.method:SLoRA",
        "treelora": "cl_runner.methods.treelora.method:TreeLoRA",
        "doc": "cl_runner.methods.doc.method:DOC",
        "gorp": "cl_runner.methods.gorp.method:GORP",
        "gainlora": "cl_runner.methods.gainlora.method:GainLoRA",
        "sapt": "cl_runner.methods.sapt.method:SAPT",
        "sure": "cl_runner.methods.sure:SuRe",
        "rkif": "cl_runner.methods.rkif:RKIF",
        "hard-orth": "cl_runner.methods.settings_only:HARD_ORTH",
        "soft-orth": "cl_runner.methods.settings_only:SOFT_ORTH",
    },
)

KINDS: Registry[Kind] = Registry(
    "adapter kind",
    "cl_runner.kinds",
    "cl_runner.adapters.kind:Kind",
    {
        "lora": "cl_runner.adapters.kinds.lora:Lora",
        "dora": "cl_runner.adapters.kinds.dora:Dora",
        "vera": "cl_runner.adapters.kinds.vera:Vera",
        "vblora": "cl_runner.adapters.kinds.vblora:VBLoRA",
        "tied-lora": "cl_runner.adapters.kinds.tied_lora:TiedLora",
        "lora-xs": "cl_runner.adapters.kinds.lora_xs:LoraXS",
        "loha": "cl_runner.adapters.kinds.loha:LoHa",
        "lokr": "cl_runner.adapters.kinds.lokr:LoKr",
        "ia3": "cl_runner.adapters.kinds.ia3:IA3",
        "oft": "cl_runner.adapters.kinds.oft:OFT",
        "boft": "cl_runner.adapters.kinds.boft:BOFT",
        "hra": "cl_runner.adapters.kinds.hra:HRA",
        "randlora": "cl_runner.adapters.kinds.randlora:RandLora",
        "fourierft": "cl_runner.adapters.kinds.fourierft:FourierFT",
        "full": "cl_runner.adapters.kinds.full:Full",
        "prompts": "cl_runner.adapters.kinds.prompts:SoftPrompts",
    },
    elsewhere={
        "osf": "it is a method here, --method osft",
        "qlora": "it is LoRA on a base in 4 bits, model.quantize=nf4",
        "adalora": "it prunes singular values by every step's gradient, which is not built; adapter.r=auto chooses "
        "each stage's rank by its task's gradient",
    },
)

# In this order at every hook: the rank decides what there is to train, and how that begins is decided then; factors are
# turned in what a step made of it, and the slow copy follows what is then there; those of others come after.
OPTIONS: Registry[Option] = Registry(
    "option",
    "cl_runner.options",
    "cl_runner.training.options.protocol:Option",
    {
        "auto-rank": "cl_runner.training.options.auto_rank:AutoRank",
        "initialise": "cl_runner.training.options.initialise:Initialisation",
        "reorthogonalise": "cl_runner.training.options.reorthogonalise:Reorthogonalisation",
        "slow-copy": "cl_runner.training.options.slow_copy:SlowCopy",
    },
)

SOURCES: Registry[RowSource] = Registry(
    "task source",
    "cl_runner.sources",
    "cl_runner.tasks.sources:RowSource",
    {
        "folder": "cl_runner.tasks.sources:Folder",
        "hub": "cl_runner.tasks.sources:FromHub",
        "synthetic": "cl_runner.tasks.sources:Synthetic",
        "trace": "cl_runner.tasks.sources:Trace",
    },
)

TRACKERS: Registry[Tracker] = Registry(
    "tracker",
    "cl_runner.trackers",
    "cl_runner.trackers.protocol:Tracker",
    {
        "tensorboard": "cl_runner.trackers.tensorboard:TensorBoard",
        "wandb": "cl_runner.trackers.wandb:WandB",
        "mlflow": "cl_runner.trackers.mlflow:MLflow",
        "trackio": "cl_runner.trackers.trackio:Trackio",
    },
)

ENGINES: Registry[Engine] = Registry(
    "engine",
    "cl_runner.engines",
    "cl_runner.sweeps.engines.protocol:Engine",
    {
        "local": "cl_runner.sweeps.engines.local:Local",
        "slurm": "cl_runner.sweeps.engines.slurm:Slurm",
        "ray": "cl_runner.sweeps.engines.ray:Ray",
    },
)

REGISTRIES: tuple[Registry[Any], ...] = (METHODS, KINDS, OPTIONS, SOURCES, TRACKERS, ENGINES)
