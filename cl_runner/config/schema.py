"""RunConfig: every setting of a run, in nine sections.

This file says what there is; ``settings/`` says where a value comes from (presets, files, flags) and
``yamlfile.py`` reads YAML with positions. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import inf
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from cl_runner.errors import UserError, did_you_mean
from cl_runner.registry import KINDS, SOURCES, TRACKERS

_EXTRA = re.compile(r"\w[\w.+-]{0,79}")  # what an extra set may be called
LORA = "lora"  # the kind whose settings are AdapterConfig's own
ADAPTER = "model.adapter (--from)"  # in messages
# Names that stand for layers in ``adapter.target_modules``.
TARGET_SETS = ("qv", "attention", "mlp", "all-linear", "outputs")


class Section(BaseModel):
    """A section of the config: unknown keys are refused, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)


class ModelConfig(Section):
    """The base model: frozen unless the method trains it."""

    name: str = Field(
        default="tiny-t5", description="Embedded model (tiny-t5, tiny-llama), folder, GGUF file, or hub id."
    )
    revision: str | None = Field(default=None, description="Commit, branch or tag on the hub.")
    adapter: str | None = Field(
        default=None,
        description="PEFT folder of a LoRA that the run starts from, as if an earlier stage had left it (--from): "
        "where one pair serves all stages it trains on if it is like that, else its update is folded, as a past pair.",
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="Precision of the frozen base: auto is bf16 on a GPU, fp32 on the CPU."
    )
    quantize: Literal["nf4"] | None = Field(
        default=None,
        description="nf4: the base's linear layers in 4 bits (QLoRA), by bitsandbytes; past updates stay beside them.",
    )
    attention: str | None = Field(
        default=None, description="Attention implementation of transformers; default: its own choice."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run code that comes with a hub model. Off unless you say so."
    )


def _kinds(schema: dict[str, Any]) -> None:
    """The JSON Schema of ``adapter.kind``: the names there are as it is made."""
    schema["enum"] = list(KINDS)


Init = Literal["default", "gaussian", "orthogonal", "olora", "pissa", "eva", "corda", "loftq"]


def _files_too(schema: dict[str, Any]) -> None:
    """The JSON Schema of ``eval.extra``: a file's name is a set, and one set is a list of one."""
    each = {"anyOf": [schema.pop("items"), {"type": "string"}]}
    schema["anyOf"] = [{"type": schema.pop("type"), "items": each}, *each["anyOf"]]


def _one_or_many(schema: dict[str, Any]) -> None:
    """The JSON Schema of ``adapter.target_modules``: one name is a list of one."""
    schema["anyOf"].append({"type": "string"})


class AdapterConfig(Section):
    """The parameterisation of the update."""

    unused: ClassVar[frozenset[str]] = frozenset()  # those of these that a kind has no use for: refused, never shown

    kind: str = Field(
        default="lora",
        description="Adapter kind, which may have settings of its own beside these (cl-runner list adapters).",
        json_schema_extra=_kinds,
    )
    r: int | Literal["auto"] = Field(
        default=8,
        description="Rank of each stage's pair; auto: chosen at each stage by the spectrum of its task's gradient.",
    )
    energy: float = Field(
        default=0.9, gt=0, le=1, description="r auto: share of the gradient's squared norm that the rank has to hold."
    )
    max_r: int = Field(default=64, ge=1, description="r auto: largest rank.")
    alpha: float = Field(default=32.0, gt=0, description="The update is scaled by alpha / r.")
    rslora: bool = Field(default=False, description="The update is scaled by alpha / √r instead.")
    init: Init = Field(
        default="default",
        description="How a stage's pair begins. A drawn, B zero: default (Kaiming-uniform), gaussian (N(0, 1/r²)); "
        "both drawn, B A zero: orthogonal. A part of the weight, which gives it up: olora (QR), pissa (its leading "
        "singular directions), corda (of W·C, C the inputs' covariance). eva: A the leading directions of the inputs. "
        "loftq: of what a base in 4 bits (model.quantize) lost.",
    )
    corda: Literal["ipm", "kpm"] | None = Field(
        default=None,
        description="init corda: the largest components (ipm, instruction-previewed) or the smallest (kpm, "
        "knowledge-preserved).",
    )
    init_rows: int = Field(default=256, ge=1, description="init eva, corda: rows of the stage that inputs are read of.")
    lr_ratio_B: float = Field(default=1.0, gt=0, description="LoRA+: learning rate of B over A's, training.lr.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Dropout on the adapter's input while training.")
    dropout_past: bool = Field(
        default=False,
        description="Past pairs read the dropped-out input too while training (reference): their factors stay in "
        "memory, and a step costs more with every stage.",
    )
    target_modules: list[str] | None = Field(
        default=None,
        description="Names (endings) of the linear layers to adapt, sets of them (qv, attention, mlp, all-linear, "
        "outputs), or both; default: query and value of the model, as PEFT has them, or the method's own.",
        json_schema_extra=_one_or_many,
    )
    rank_pattern: dict[str, int] = Field(
        default_factory=dict,
        description="Layers with another rank than r, {name, ending or regular expression: rank}: the first that a "
        "layer's name matches counts, as in PEFT.",
    )
    alpha_pattern: dict[str, float] = Field(
        default_factory=dict, description="Layers with another alpha, likewise; their update is scaled by it / rank."
    )

    @field_validator("r", mode="before")
    @classmethod
    def _rank(cls, value: Any) -> Any:
        if value != "auto" and (type(value) is not int or value < 1):
            raise ValueError("must be a whole number, 1 or more, or auto")
        return value

    @model_serializer(mode="wrap")
    def _used(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the settings that the kind has no use for."""
        return {name: value for name, value in whole(self).items() if name not in self.unused}

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("names no layer; leave it out for the model's query and value")
        return [value] if isinstance(value, str) else value

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _patterns(cls, value: Any, info: ValidationInfo) -> Any:
        ranks = info.field_name == "rank_pattern"
        kinds, what = ((int,), "a whole number, 1 or more") if ranks else ((int, float), "a number over 0")
        for key, number in value.items() if isinstance(value, Mapping) else ():
            if type(number) not in kinds or not 0 < number < inf:
                raise ValueError(f"must be {what}, at '{key}'")
            try:
                re.compile(str(key))
            except re.error as error:
                raise ValueError(f"is no regular expression, at '{key}': {error}") from None
        return value

    @property
    def patterns(self) -> list[str]:
        """The settings that give some layers a rank or an alpha of their own, as far as they are set."""
        return [name for name in ("rank_pattern", "alpha_pattern") if getattr(self, name)]

    @property
    def largest(self) -> int:
        """The rank where no pattern says another, or the largest that may be chosen."""
        return self.max_r if self.r == "auto" else self.r

    @property
    def reads_inputs(self) -> bool:
        """Whether a pair begins from what the target layers read."""
        return self.init in ("eva", "corda")

    @property
    def borrows(self) -> bool:
        """Whether a pair begins with a part of the weight, which the weight is then without."""
        return self.init in ("olora", "pissa", "corda")

    def scale(self, rank: int, alpha: float | None = None) -> float:
        """s of a pair of that rank; ``alpha``: another than the setting."""
        return (self.alpha if alpha is None else alpha) / (rank**0.5 if self.rslora else rank)


def settings_of_kind(kind: str) -> type[AdapterConfig]:
    """The settings of an adapter kind. Raises UserError where there is none of that name."""
    return AdapterConfig if kind == LORA else KINDS.get(kind).Config


class MethodConfig(BaseModel):
    """The method's name; its own settings are the method's config class (``cl-runner show METHOD``)."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    name: str = Field(default="olora", description="Continual-learning method (cl-runner list methods).")

    def own(self) -> dict[str, Any]:
        """The settings beside the name, as given."""
        return dict(self.model_extra or {})


def _sources(schema: dict[str, Any]) -> None:
    """The JSON Schema of ``data.source``: the names there are as it is made."""
    schema["enum"] = ["auto", *SOURCES]


class SlowCopyConfig(Section):
    """A slow exponential copy of what trains."""

    beta: float = Field(
        default=0.99, ge=0, lt=1, description="Memory: after each step slow ← β slow + (1 − β) fast; 0: the fast one."
    )
    answers: bool = Field(default=True, description="After a stage the slow values answer; false: the trained ones.")
    next: Literal["fast", "slow", "both"] = Field(
        default="fast",
        description="Which values are folded, and which the next stage starts from; both: the fast ones, and the slow "
        "copy goes on where it was (where one parameter set serves all stages).",
    )


class OptionsConfig(Section):
    """What any method may have beside itself; null: not."""

    slow_copy: SlowCopyConfig | None = Field(
        default=None, description="A slow exponential copy of what trains: {beta, answers, next: fast, slow or both}."
    )


class DataConfig(Section):
    """Where rows come from and how they become text."""

    source: str = Field(
        default="auto",
        description="folder (dir), hub, synthetic, or another (cl-runner list sources); auto: folder if dir is set, "
        "synthetic for the embedded models.",
        json_schema_extra=_sources,
    )
    dir: str | None = Field(default=None, description="Benchmark folder <kind>/<name>/{train,dev,test,labels}.json.")
    seed: int = Field(default=42, ge=0, description="Seed of synthetic rows and of the cut of hub data.")
    max_train: int | None = Field(default=None, ge=1, description="Use only the first so many train rows of each task.")
    max_test: int | None = Field(default=None, ge=1, description="Use only the first so many test rows of each task.")
    balanced: bool = Field(
        default=False, description="max_train and max_test take the first rows of each label, as evenly as can be."
    )
    unknown_labels: Literal["refuse", "drop"] = Field(
        default="refuse", description="Train rows whose label is outside the task's set."
    )
    unknown_test: Literal["drop", "score"] = Field(
        default="drop",
        description="Test rows whose label is outside the task's set: left out, or scored by that label (reference), "
        "which makes them wrong unless it is the answer.",
    )
    empty_texts: Literal["refuse", "keep"] = Field(
        default="refuse", description="A split more than 1 % of whose texts are empty or lack a part (missing cells)."
    )
    add_task_name: bool = Field(default=True, description="Begin the input with 'Task:<kind>'.")
    add_dataset_name: bool = Field(default=True, description="Begin the input with 'Dataset:<name>'.")
    chat_template: bool = Field(
        default=False,
        description="The input is what the user says in the model's own chat template, and the label the model's turn.",
    )
    truncate: Literal["text", "tail", "head", "reference"] = Field(
        default="text",
        description="Too long an input loses the end of its text (text), the end of the whole (tail), or the beginning "
        "of the whole (head); reference: the end of the whole, read back as text and tokenised again, as the reference "
        "code of encoder-decoder models has it.",
    )
    max_source: int = Field(default=512, ge=8, description="Longest input in tokens.")
    max_target: int = Field(default=50, ge=2, description="Longest target in tokens, the end token included.")
    long_targets: Literal["refuse", "cut"] = Field(
        default="refuse",
        description="Train targets over max_target: refused, or cut (reference). Test targets are always cut, and "
        "scored as texts.",
    )

    @field_validator("source")
    @classmethod
    def _known(cls, value: str) -> str:
        known = ["auto", *SOURCES]
        if value not in known:
            raise ValueError(f"must be one of {', '.join(known)}{did_you_mean(value, known)}")
        return value


class TrainingConfig(Section):
    """One stage's optimisation."""

    epochs: int = Field(default=1, ge=0, le=100_000, description="Passes over the task's rows.")
    lr: float = Field(default=1e-3, gt=0, description="Learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field(default="constant", description="After the warm-up.")
    warmup: float = Field(default=0.0, ge=0, description="Warm-up: steps, or a share of all steps if below 1.")
    optimizer: Literal["adamw", "sgd", "muon"] = Field(
        default="adamw",
        description="Rule of the ordinary parameters; muon: of the matrices among them, and adamw of the others.",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    clip: float = Field(default=1.0, ge=0, description="Whole-gradient norm bound; 0 is off.")
    non_finite: Literal["stop", "skip"] = Field(
        default="stop",
        description="A step whose loss or gradient is NaN or infinite ends the run, its rows named; skip: it is left "
        "out and counted.",
    )
    global_batch: int = Field(
        default=64, ge=1, le=100_000, description="Examples per optimizer step, over all devices."
    )
    micro_batch: int = Field(default=8, ge=1, description="Most examples a device takes at once; accumulation follows.")
    auto_batch: bool = Field(
        default=False,
        description="Where memory does not suffice for a step, it is done again with half the micro-batch, and the "
        "stage goes on so: the same numbers but for rounding. Evaluation batches are halved likewise.",
    )
    length_window: int = Field(
        default=8, ge=1, description="Steps whose rows are dealt among them by length, to pad little; 1: plain shuffle."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="Compute: auto is bf16 on GPU; on CPU fp32, or bf16 where the processor has it (avx512_bf16, AMX) "
        "and is measured to be 1.2 times as fast, decided once a run.",
    )
    loss_mean: Literal["global", "micro"] = Field(
        default="global",
        description="Mean over the label tokens of the global batch, or of each micro-batch (reference).",
    )
    penalty_at: Literal["step", "micro"] = Field(
        default="step",
        description="A method's penalty counts once an optimizer step, or (micro) once for each of its accumulated "
        "micro-batches: the reference code run without DeepSpeed. With it, as published, it counts once.",
    )
    share_prefix: Literal["auto", "off"] = Field(
        default="auto",
        description="Decoder-only models: the beginning that a task's prompts have in common is computed once a "
        "micro-batch. No number changes but by rounding.",
    )
    dropout_by: Literal["row", "micro"] = Field(
        default="row",
        description="What falls is decided by a row's place in the global batch: the same on any number of devices and "
        "with any micro_batch; or (micro) drawn for each micro-batch, as torch does it.",
    )
    activation_checkpointing: bool = Field(
        default=False, description="Compute activations again in the backward instead of keeping them: slower, smaller."
    )
    deepspeed: str | None = Field(default=None, description="DeepSpeed JSON merged over ours; keys we own are refused.")
    zero: Literal[0, 1, 2] = Field(
        default=2,
        description="DeepSpeed's ZeRO: each process holds its part of the optimizer states (1), and of the gradients "
        "(2), or all of both (0). The same numbers but for rounding.",
    )
    offload_optimizer: bool = Field(default=False, description="Keep optimizer states in CPU memory (zero 1 or 2).")

    @field_validator("zero", mode="before")
    @classmethod
    def _not_partitioned(cls, value: Any) -> Any:
        if value in (3, "3"):
            raise ValueError(
                "cannot be 3: it splits the base's weights too, so that no process computes a forward alone; but each "
                "answers its own share of the test rows, and past updates are folded into whole weights. For a base "
                "that does not fit a device take model.quantize"
            )
        return value

    @model_validator(mode="after")
    def _something_to_offload(self) -> TrainingConfig:
        if self.offload_optimizer and self.zero == 0:
            raise ValueError("zero 0 keeps optimizer states where the parameters are; offload_optimizer needs 1 or 2")
        return self

    @model_validator(mode="after")
    def _any_micro_batch(self) -> TrainingConfig:
        for name in ("loss_mean", "penalty_at", "dropout_by") if self.auto_batch else ():
            if getattr(self, name) == "micro":
                raise ValueError(f"auto_batch cannot halve what decides numbers ({name}: micro); leave one of them out")
        return self

    @field_validator("optimizer", mode="before")
    @classmethod
    def _not_paged(cls, value: Any) -> Any:
        if str(value).startswith("paged_"):
            raise ValueError(
                "cannot be paged: bitsandbytes frees no paged memory, and each stage has a new optimizer; "
                "training.offload_optimizer=true keeps an optimizer's states in CPU memory"
            )
        return value


class ExtraConfig(Section):
    """A set of multiple-choice questions that no task trains."""

    name: str | None = Field(default=None, description="What it is called; default: its file's or data set's name.")
    file: str | None = Field(default=None, description="Rows of question, choices, answer, subject: JSON, CSV, …")
    hub: str | None = Field(default=None, description="The same on the hub: the data set's id.")
    config: str | None = Field(default=None, description="Configuration of the hub's data set.")
    split: str = Field(default="test", description="The hub's split.")
    revision: str | None = Field(default=None, description="The hub's commit.")
    by: Literal["letter", "text", "text_norm"] = Field(
        default="letter",
        description="What is asked for: letter (choices are listed, as MMLU does), text (the choice itself), text_norm "
        "(its log-likelihood by character).",
    )
    shots: int = Field(default=0, ge=0, description="Answered questions of dev before each, of its subject.")
    dev: str | None = Field(default=None, description="Where these are: a file, or a split of the hub's.")

    @model_validator(mode="after")
    def _consistent(self) -> ExtraConfig:
        if (self.file is None) == (self.hub is None):
            raise ValueError(
                "names a file or a data set of the hub, and not both: {file: mmlu.jsonl}, {hub: cais/mmlu}"
            )
        given = [name for name in ("config", "split", "revision") if name in self.model_fields_set]
        if self.file is not None and given:
            raise ValueError(f"{given[0]} is of a hub's data set, and this is a file")
        if (self.shots > 0) != (self.dev is not None):
            raise ValueError("shots are taken from dev: give both, or neither")
        if not _EXTRA.fullmatch(self.called):
            raise ValueError(f"name '{self.called}' must be of letters, digits and - _ . +")
        return self

    @model_serializer(mode="wrap")
    def _given(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is as by default."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        return {name: value for name, value in whole(self).items() if value != defaults[name]}

    @property
    def called(self) -> str:
        """Its name: the given one, or that of its file or data set."""
        return self.name or (self.file or self.hub or "").rstrip("/").rpartition("/")[2].partition(".")[0]


class EvalConfig(Section):
    """Scoring."""

    mode: Literal["verify", "generate", "choose"] = Field(
        default="verify",
        description="verify: decode only the rows that a pass over the gold labels does not prove right; generate: "
        "decode all; same answers. choose: of tasks with a closed set of labels the answer is one of them, whatever "
        "else the model would rather say; other scores.",
    )
    batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of an evaluation batch, padding included (at least a row). Default: 4096 on the CPU, where "
        "more leave its cache; on a GPU 65536, or 16384 of a decoder-only model, whose prompts' keys and values stay.",
    )
    max_new_tokens: int = Field(default=50, ge=1, description="Longest generated answer.")
    future: bool = Field(default=False, description="Also score the untouched base (a0) and tasks not yet seen.")
    extra: list[ExtraConfig] = Field(
        default_factory=list,
        description="Multiple-choice sets (MMLU, …) scored by likelihood before stage 1 and after every stage: a file, "
        "{file or hub, by, shots, dev, …}, or a list of them. Changes no other number.",
        json_schema_extra=_files_too,
    )
    probe_every: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps between probes: within a stage, a few test rows of each task seen are scored and "
        "logged. Changes no number; null: never.",
    )
    probe_rows: int = Field(default=32, ge=1, description="Test rows of each task that a probe asks, always the same.")
    probe_warn: float | None = Field(
        default=None,
        ge=0,
        description="Warn where an old task's probe is by more points under what it was as the task was learned.",
    )
    probe_stop: float | None = Field(default=None, ge=0, description="Stop the run there; the stage is not committed.")

    @field_validator("extra", mode="before")
    @classmethod
    def _one_set(cls, value: Any) -> Any:
        """A file's name alone is a set, and one set a list of one."""
        sets = value if isinstance(value, list) else [] if value is None else [value]
        return [{"file": each} if isinstance(each, str) else each for each in sets]

    @field_validator("extra")
    @classmethod
    def _different(cls, value: list[ExtraConfig]) -> list[ExtraConfig]:
        names = [each.called for each in value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"'{twice[0]}' is there twice; give one of them a name")
        return value


def _trackers(schema: dict[str, Any]) -> None:
    """The JSON Schema of ``output.trackers``: the names there are as it is made; one is a list of one."""
    schema["items"]["enum"] = list(TRACKERS)
    schema["anyOf"] = [{"type": schema.pop("type"), "items": schema.pop("items")}, {"enum": list(TRACKERS)}]


class CheckpointConfig(Section):
    """When what a stage holds between two steps is written, so that it goes on from there. On a signal too."""

    every_steps: int | None = Field(default=None, ge=1, description="After so many optimizer steps; null: by time.")
    every_minutes: float | None = Field(
        default=10.0,
        gt=0,
        description="After so many minutes of a stage, so that shorter ones write none; null: never.",
    )
    keep: int = Field(default=1, ge=1, description="How many of a stage's checkpoints stay, the last ones.")


class OutputConfig(Section):
    """What is written, and where. Nothing here changes a number."""

    dir: str = Field(default="runs", description="Folder of the run folders.")
    name: str | None = Field(default=None, description="Name of the run folder; default: made of the settings.")
    log_every: int = Field(default=10, ge=1, description="Optimizer steps between lines of log.jsonl.")
    checkpoint: CheckpointConfig | None = Field(
        default_factory=CheckpointConfig,
        description="A stage that is stopped goes on in its middle: {every_steps, every_minutes, keep}; null: it "
        "begins anew.",
    )
    html: bool = Field(default=True, description="Write report.html, the run's page, when it ends.")
    trackers: list[str] = Field(
        default_factory=list,
        description="Experiment trackers that are told what is logged and scored (cl-runner list trackers).",
        json_schema_extra=_trackers,
    )
    reuse: bool = Field(
        default=False,
        description="A new run begins with the first stages that it has in common, to the bit, with one in the same "
        "folder, instead of training them again.",
    )
    keep_stages: int | Literal["all"] = Field(
        default="all",
        description="Full fine-tuning: how many of the last stages keep their model (those that answer always do).",
    )

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("keep_stages", mode="before")
    @classmethod
    def _some(cls, value: Any) -> Any:
        if value != "all" and (type(value) is not int or value < 1):
            raise ValueError("must be a whole number, 1 or more, or all")
        return value


class RunConfig(Section):
    """Everything that decides a run."""

    presets: list[str] = Field(
        default_factory=list, description="Presets the settings began with; --preset adds to them."
    )
    order: str | dict[str, Any] | None = Field(
        default=None, description="Name of a task order, its YAML file, or what would stand in that: {name, tasks}."
    )
    plugins: list[str] = Field(
        default_factory=list,
        description="Python files with methods, adapter kinds, options or task sources; --plugin adds to them.",
    )
    seed: int = Field(default=42, ge=0, lt=2**31, description="Seed of initialisation, order of rows and dropout.")
    model: ModelConfig = Field(default_factory=ModelConfig)
    adapter: SerializeAsAny[AdapterConfig] = Field(default_factory=AdapterConfig)
    method: MethodConfig = Field(default_factory=MethodConfig)
    options: OptionsConfig = Field(default_factory=OptionsConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)
    tasks: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Per task: section.key → value, for example MNLI: {training.epochs: 2}."
    )
    stages: dict[int, dict[str, Any]] = Field(
        default_factory=dict, description="Per position (from 1): section.key → value; stronger than tasks."
    )

    @field_validator("adapter", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any) -> Any:
        """The settings of the kind that is named."""
        if not isinstance(value, Mapping) or value.get("kind", LORA) == LORA:
            return value
        try:
            found = settings_of_kind(str(value["kind"]))
        except UserError as error:
            raise ValueError(str(error)) from None
        return found.model_validate(value)

    def at(self, position: int, task: str | None) -> RunConfig:
        """The config of one stage: ours with what is set for its task, then for its position (from 1)."""
        changes = dict(self.tasks.get(task, {})) if task else {}
        changes.update(self.stages.get(position, {}))
        if not changes:
            return self
        values = self.model_dump()
        for key, value in changes.items():
            section, _, name = key.partition(".")
            values[section][name] = value
        return RunConfig.model_validate(values)
