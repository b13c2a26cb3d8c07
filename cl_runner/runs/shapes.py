"""What the JSON files of a run hold, key by key: a folder may come from anybody, and who reads it may trust this.

A key may be missing (runs of earlier versions lack some) and there may be more. What is there is of its type, and
numbers are finite and of a size that can be computed with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cl_runner.atomic import read_json
from cl_runner.config.yamlfile import printable
from cl_runner.errors import UserError

Count = Annotated[int, Field(ge=0, lt=2**53)]
Whole = Annotated[int, Field(gt=-(2**63), lt=2**63)]
Percent = Annotated[float, Field(ge=-1e6, le=1e6)]
Amount = Annotated[float, Field(ge=0, le=1e15)]  # of seconds, MB, …
Number = Annotated[float, Field(ge=-1e300, le=1e300)]


class Shape(BaseModel):
    """Keys and their types, exactly: no text is taken for a number."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class SplitFacts(Shape):
    """Rows of a task."""

    rows: Count = 0
    dropped: Count = 0
    source: str = ""
    synthetic: bool = False
    fingerprint: str = ""


class ExtraFacts(Shape):
    """An extra set."""

    rows: Count = 0
    by: str = ""
    shots: Count = 0
    source: str = ""
    fingerprint: str = ""


class ExtraScore(Shape):
    """What was scored on one."""

    score: Percent
    rows: Count = 0
    by: str = ""
    shots: Count = 0
    subjects: dict[str, Percent] = {}


class Identity(Shape):
    """What has to be the same where a run goes on."""

    stages: list[Annotated[list[str], Field(min_length=1)]] = []
    definitions: dict[str, Any] = {}
    scoring: dict[str, str] = {}
    data: dict[str, dict[str, SplitFacts]] = {}
    extra: dict[str, ExtraFacts] = {}
    plugins: dict[str, str] = {}
    adapter: str = ""
    revision: Whole = 1
    computes: str = ""


class PlannedStage(Shape):
    """A stage of the plan."""

    name: str = ""
    tasks: list[str] = []
    steps: Count = 0
    test_rows: Count = 0


class About(Shape):
    """``run.json``."""

    folder: str = ""
    order: str = ""
    method: str = ""
    model: str = ""
    seed: Whole = 0
    synthetic: bool = False
    named_task: bool = True
    chosen: bool = False
    form: str = ""
    variant: str = ""
    changed: list[str] = []
    notes: list[str] = []
    tasks: Annotated[list[str], Field(min_length=1)] = ["-"]
    metrics: dict[str, str] = {}
    stages: Annotated[list[PlannedStage], Field(min_length=1)] = [PlannedStage()]
    identity: Identity = Identity()
    sha256: dict[str, str] = {}


class Trained(Shape):
    """How a stage trained."""

    steps: Count = 0
    loss: Number | None = None
    update_norm: Number | None = None


class FileFacts(Shape):
    """A file that a stage left."""

    bytes: Count
    numbers: Count = 0


class Parameters(Shape):
    """How many there were."""

    trained: Count
    on_disk: dict[str, FileFacts]


class TakenFrom(Shape):
    """The run whose stage it is, and its place there, from 1."""

    run: str
    stage: Count = 0


class Metrics(Shape):
    """``metrics.json`` of a stage."""

    stage: str = ""
    tasks: list[str] = []
    scores: dict[str, Percent | None] = {}
    counts: dict[str, Count] = {}
    undefined: dict[str, str] = {}
    extra: dict[str, ExtraScore] = {}
    seconds: dict[str, Amount] = {}
    megabytes: dict[str, Amount] = {}
    parameters: Parameters | None = None
    training: Trained | None = None
    taken_from: TakenFrom | None = None


class Status(Shape):
    """``status.json``."""

    state: str = ""
    message: str = ""
    host: str = ""
    pid: Whole = 0


class Environment(Shape):
    """``environment.json``."""

    command: str = ""
    device: str = ""
    packages: dict[str, str] = {}
    whose: Annotated[dict[str, str], Field(alias="from")] = {}
    later: list[Environment] = []


class PairFacts(Shape):
    """A pair in the sum of a stage's adapters."""

    stage: str
    rank: Annotated[int, Field(ge=0, le=2**20)]
    scale: Number
    ranks: dict[str, Annotated[int, Field(ge=0, le=2**20)]] = {}
    scales: dict[str, Number] = {}
    borrows: bool = False


class ReferenceFacts(Shape):
    """A file of an earlier stage: beside this one's folder, and nowhere else."""

    file: Annotated[str, Field(pattern=r"^\.\./\w[\w.+-]*(/\w[\w.+-]*)+$")]
    sha256: str


class RecordFacts(Shape):
    """What the adapters held."""

    own: Literal["adapter", "state", "terms", "prompts", "model"]
    pairs: list[PairFacts]
    dense: list[str]
    dense_stages: list[str]
    live: str | None
    kept: dict[str, ReferenceFacts]
    earlier: dict[str, ReferenceFacts]


class Left(RecordFacts):
    """``state.json`` of a stage."""

    stage: str
    method: str
    tasks: list[str]
    start: str
    state: dict[str, Any]
    options: dict[str, dict[str, Any]] = {}
    megabytes: dict[str, Amount] = {}
    next: RecordFacts | None = None


def read_shaped(file: Path, shape: type[Shape]) -> dict[str, Any]:
    """The data of a JSON file of a run. Raises UserError where it is missing, broken, or of another shape."""
    values = read_json(file)
    try:
        shape.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        key = printable(".".join(map(str, fault["loc"])))
        raise UserError(f"{file}: {key} is not as a run writes it ({fault['msg']})") from None
    return values


def read_metrics(folder: Path) -> dict[str, Any]:
    """``metrics.json`` of a stage. Raises UserError as ``read_shaped`` does."""
    return read_shaped(folder / "metrics.json", Metrics)
