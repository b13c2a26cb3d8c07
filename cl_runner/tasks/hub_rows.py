"""Rows from the hub: the task's YAML says which fields make its text and which class is which label.

A split is cut to the benchmark's size, balanced by label, by ``data.seed`` and the task's name alone, so every method
and every run sees the same rows. Ids are row numbers of the hub's split.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_runner.errors import UserError, first_line
from cl_runner.offline import cache_alone, nothing_is_fetched
from cl_runner.tasks.files import Found, where
from cl_runner.tasks.files.values import Fault, target
from cl_runner.tasks.quiet_libraries import quiet
from cl_runner.tasks.subsets import shares
from cl_runner.tasks.task import Hub, Row, Split, Task
from cl_runner.tasks.template import Templates, written

if TYPE_CHECKING:
    from datasets import Dataset


def read(task: Task, split: Split, seed: int) -> Found:
    """One split's rows, cut and shuffled; their source is ``hub <id> <config>@<commit>, split <name>``."""
    hub = task.hub
    if hub is None:
        raise UserError(f"task {task.name} is not on the hub; give it files of its own (source: {{train, test}})")
    if split == "dev":
        raise UserError(f"task {task.name}: the hub's data has no dev split here; test is split {hub.splits.test}")
    name = hub.splits.train if split == "train" else hub.splits.test
    size = task.sizes.train if split == "train" else task.sizes.test
    data, commit = load(f"task {task.name}", hub, split, name)
    place = place_of(hub, name, commit)
    templates = Templates(hub.text)
    _check_columns({*templates.names, hub.label}, data.column_names, place)
    labels = _labels(task, hub, data, split, place)
    chosen = cut(labels, size, random.Random(f"{seed}/{task.called}/{split}"))
    heads = 1 if hub.labels is not None and hub.column_names and labels[:1] == [None] else 0
    # Hidden ones, which the header of a CSV file is not.
    found = Found([], place, place, without_gold=labels.count(None) - heads)
    for number, record in zip(chosen, data.select(chosen), strict=True):
        try:
            text, whole = templates.fill(record)
        except ValueError as error:
            raise UserError(f"{where(place, split, number)}: {error}") from error
        found.rows.append(Row(f"{split}/{number}", text, labels[number] or ""))
        # Rows of the benchmark's sets may lack a part, as a question its answer: only one that has none is empty.
        if not whole and not any(written(field, record[field]).strip() for field in templates.names):
            found.incomplete.add(f"{split}/{number}")
    return found


def cut(labels: list[str | None], size: int | None, rng: random.Random) -> list[int]:
    """Positions of at most ``size`` rows in shuffled order, as evenly over the labels as these allow.

    Rows without a gold label (None) are never taken. Free text has as many labels as answers: a plain sample.
    """
    groups: dict[str, list[int]] = {}
    for position, label in enumerate(labels):
        if label is not None:
            groups.setdefault(label, []).append(position)
    for label in sorted(groups):
        rng.shuffle(groups[label])
    sizes = {label: len(group) for label, group in groups.items()}
    total = sum(sizes.values())
    taken: list[int] = []
    for label, share in shares(sizes, total if size is None else min(size, total)).items():
        taken += groups[label][:share]
    rng.shuffle(taken)
    return taken


def _labels(task: Task, hub: Hub, data: Dataset, split: Split, place: str) -> list[str | None]:
    """Each row's label in the task's words; None for a hidden one, and for the header row of a CSV file without one.

    Several labels of a row are one text: ``a, b``.
    """
    from datasets import ClassLabel

    feature = data.features[hub.label]
    inner = getattr(feature, "feature", feature)  # what a list holds
    classes = inner.names if isinstance(inner, ClassLabel) else None
    values = data.data.column(hub.label).to_pylist()
    given = [_parts(value, classes, task) for value in values]
    if hub.labels is not None:
        start = 1 if hub.column_names and given and given[0] and given[0][0] not in hub.labels else 0
        given[:start] = [None] * start
        for number, parts in enumerate(given):
            for part in parts or ():
                if part is not None and part not in hub.labels:
                    raise UserError(
                        f"{place}: row {number + 1}: class '{part}' of '{hub.label}' is not in the task's mapping "
                        f"(hub.labels has {', '.join(hub.labels)}); the data set has changed, or needs another revision"
                    )
        given = [None if parts is None else [part and hub.labels[part] for part in parts] for parts in given]
        if not any(given):
            raise UserError(f"{place}: every label is hidden there; another split has them (hub.splits)")
    labels: list[str | None] = []
    for number, (value, parts) in enumerate(zip(values, given, strict=True)):
        if parts is None or not (task.sets or isinstance(value, list)):
            labels.append(parts[0] if parts else None)
            continue
        try:
            labels.append(target(hub.label, parts, task.sets))
        except Fault as fault:
            raise UserError(f"{where(place, split, number)}{fault}") from fault
    return labels


def _parts(value: Any, classes: list[str] | None, task: Task) -> list[str | None] | None:
    """The labels in a row's field: one, or those of a list or (metric ``labels-f1``) a text; None for a hidden one."""
    if isinstance(value, list):
        return [_label(each, classes) for each in value]
    label = _label(value, classes)
    if label is not None and classes is None and task.sets:
        return [part.strip() for part in label.split(task.columns.separator) if part.strip()]
    return None if label is None else [label]


def _label(value: Any, classes: list[str] | None) -> str | None:
    """A class's name, or a value as text; None for a hidden one."""
    if value is None or value == -1 or (classes and value < 0):
        return None
    return classes[value] if classes else str(value)


def _check_columns(needed: set[str], columns: list[str], place: str) -> None:
    missing = sorted(needed - set(columns))
    if missing:
        raise UserError(f"{place}: no column '{missing[0]}', only {', '.join(columns)}; the data set has changed")


def place_of(hub: Hub, split: str, revision: str | None) -> str:
    config = f" {hub.config}" if hub.config else ""
    return f"hub {hub.id}{config}{'@' + revision[:12] if revision else ''}, split {split}"


OFFLINE = "--data-dir FOLDER (the benchmark's layout) or --data synthetic"  # what else a task's rows come from


def load(what: str, hub: Hub, split: Split, name: str, offline: str = OFFLINE) -> tuple[Dataset, str | None]:
    """A split, by the hub's name, and its commit; from the local cache where the hub cannot be reached.

    Raises UserError, which says ``what`` it is for, and what to do ``offline``.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    place = place_of(hub, name, hub.revision)
    if Path(hub.id).exists():  # datasets would read it in the hub's stead
        raise UserError(f"{place}: ./{hub.id} in the current folder has the same name; run in another folder")
    reached = True
    try:
        reached = _reachable(hub)
        with quiet(), cache_alone(not reached):
            data, commit = _csv_file(hub, split) if hub.files else _repository(hub, name)
    except GatedRepoError as error:
        raise UserError(f"{place}: the data set is gated: accept its terms there, then hf auth login") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{place}: no such revision") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{place}: no such data set, or it is private (hf auth login)") from error
    except Exception as error:  # datasets, pyarrow, httpx and the hub's client: each has errors of its own
        if nothing_is_fetched():
            raise UserError(
                f"{what}: {hub.id} is not in the local cache, and what a run's folder names is not fetched; "
                "--data hub fetches it (cl-runner data check), or --data-dir says where it is"
            ) from error
        if not reached:
            raise UserError(
                f"{what}: no network for {hub.id} ({_endpoint()}), and it is not in the local cache; offline: {offline}"
            ) from error
        raise UserError(f"{place}: cannot be loaded: {first_line(error)}") from error
    if hub.revision and commit != hub.revision and not reached:  # offline, datasets takes the newest it has
        raise UserError(f"{place}: no network, and the local cache has only revision {commit}")
    return data, commit


def _repository(hub: Hub, name: str) -> tuple[Dataset, str | None]:
    """A split of a repository of Parquet files, which describes itself."""
    from datasets import load_dataset

    data = load_dataset(hub.id, hub.config, split=name, revision=hub.revision)
    files = data.cache_files
    commit = Path(files[0]["filename"]).parent.name if files else ""  # the cache's folder is named by it
    return data, commit if re.fullmatch(r"[0-9a-f]{40}", commit) else hub.revision


def _csv_file(hub: Hub, split: Split) -> tuple[Dataset, str | None]:
    """A plain CSV file of a repository, all columns text: labels are mapped by their words, "NA" stays "NA"."""
    from datasets import Features, Value, load_dataset
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(hub.id, (hub.files or {})[split], repo_type="dataset", revision=hub.revision)
    names = hub.column_names
    options = {"names": names, "features": Features(dict.fromkeys(names, Value("string")))} if names else {}
    data = load_dataset("csv", data_files=path, split="train", keep_default_na=False, **options)
    folders = Path(path).parts  # …/snapshots/<commit>/<file>
    return data, folders[folders.index("snapshots") + 1]


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _reachable(hub: Hub) -> bool:
    """Whether the hub answers: one request of 10 seconds at most, where ``datasets`` would try for half a minute.

    A clear no (no such data set or revision, gated) is raised.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().dataset_info(hub.id, revision=hub.revision, timeout=10)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception:  # offline mode, no name, no route, refused, timed out, 5xx: the cache may still have it
        return False
    return True
