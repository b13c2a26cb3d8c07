"""What pydantic finds wrong, said in the words of the config; shared by settings and orders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from cl_runner.config.schema import Section
from cl_runner.config.yamlfile import Key, printable
from cl_runner.errors import UserError, did_you_mean

Model = TypeVar("Model", bound=BaseModel)

_WORDS = {
    "missing": "is missing",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a smaller number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "list_type": "must be a list",
    "dict_type": "must be a mapping (key: value)",
    "mapping_type": "must be a mapping (key: value)",
    "model_type": "must be a mapping (key: value)",
    "model_attributes_type": "must be a mapping (key: value)",
    "extra_forbidden": "is not a setting",
}


def explain(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors as the end of a sentence: ``must be a whole number``."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in _WORDS:
        return _WORDS[kind]
    if kind == "literal_error":
        known = [word.strip("' ") for word in context["expected"].replace(" or ", ", ").split(",")]
        given = error.get("input")
        return f"must be one of {', '.join(known)}{did_you_mean(given, known) if isinstance(given, str) else ''}"
    for name, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
        if name in context:
            return f"must be {words} {context[name]:g}"
    if kind == "value_error":
        return printable(str(context.get("error", error["msg"])))
    message = str(error["msg"])
    return printable(message[:1].lower() + message[1:])


def first_fault(kind: type[Model], values: Mapping[str, Any]) -> tuple[Model | None, Key, str]:
    """``(model, (), "")``, or None, the path of the first fault and what is wrong there.

    Pydantic reads true and false as the numbers 1 and 0: here they are refused where a number is wanted.
    """
    try:
        model = kind.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        return None, tuple(fault["loc"]), explain(fault) + _hint(kind, fault)
    path = _truth_as_number(model, values, ())
    return (None, path, "must be a number, not true or false") if path else (model, (), "")


def _hint(kind: type[BaseModel], fault: Mapping[str, Any]) -> str:
    """What the parts of a setting are called, where one is unknown."""
    if fault["type"] != "extra_forbidden":
        return ""
    *above, name = fault["loc"]
    for part in above:
        inner = parts_of(kind, str(part))
        if inner is None:
            return ""
        kind = inner
    return did_you_mean(str(name), kind.model_fields) or f"; there are {', '.join(kind.model_fields)}"


def parts_of(kind: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The class of a setting that has parts of its own, whether or not it may be null too; else None."""
    field = kind.model_fields.get(name)
    kinds = (get_args(field.annotation) or (field.annotation,)) if field else ()
    return next((each for each in kinds if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _truth_as_number(model: BaseModel, values: Mapping[str, Any], above: Key) -> Key:
    for name, value in values.items():
        made = getattr(model, str(name), value)
        if isinstance(value, bool) and isinstance(made, (int, float)) and not isinstance(made, bool):
            return (*above, name)
        if isinstance(value, Mapping) and isinstance(made, BaseModel):
            found = _truth_as_number(made, value, (*above, name))
            if found:
                return found
    return ()


def wants_text(kind: type[BaseModel], name: str) -> bool:
    """Whether the field takes text and no number, so that ``revision: 1234`` is meant as text."""
    field = kind.model_fields.get(name)
    if field is None:
        return False
    kinds = set(get_args(field.annotation)) or {field.annotation}
    return str in kinds and not kinds & {int, float, bool}


def section_of(config: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The class of a section (``training``); None for a plain setting (``seed``) or no setting at all."""
    field = config.model_fields.get(name)
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def flattened(values: Mapping[Any, Any], above: Key = ()) -> Iterator[tuple[str, Key, Any]]:
    """What is set for one task or position: ``{training.lr: 1}`` and ``{training: {lr: 1}}`` are the same."""
    for key, value in values.items():
        path = (*above, key)
        if "." not in str(key) and isinstance(value, Mapping):
            for name, inner in value.items():
                yield f"{key}.{name}", (*path, name), inner
        else:
            yield str(key), path, value


def check_override(config: type[Section], key: str, sections: tuple[str, ...], whose: str) -> str:
    """What is wrong with ``section.name`` as a setting of one task or position; empty if nothing is."""
    section, _, name = key.partition(".")
    if not name:
        return f"'{printable(key)}' is not a setting of a {whose}; write section.key, for example training.epochs"
    if section not in sections:
        if section_of(config, section) is None:
            known = [known for known in config.model_fields if section_of(config, known)]
            return f"'{printable(section)}' is not a section{did_you_mean(section, known)}"
        return f"{section} settings are not set by {whose}; only {', '.join(sections)} settings are"
    if key == "method.name":
        return "the method is one for the whole order"
    if key == "data.chat_template":
        return "the chat template is for the whole order, or not at all"
    kind = section_of(config, section)
    assert kind is not None
    first, _, inner = name.partition(".")
    if section != "method" and (first not in kind.model_fields or (inner and not parts_of(kind, first))):
        return unknown(f"{section}.{name}", name if first in kind.model_fields else first, kind)
    return ""


# What other libraries, and the papers, call a setting of ours.
ALSO_CALLED = {
    "rank": "r", "lora_r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "targets": "target_modules",
    "init_lora_weights": "init", "use_rslora": "rslora", "loraplus_lr_ratio": "lr_ratio_B",
    "learning_rate": "lr", "num_train_epochs": "epochs", "batch_size": "global_batch",
    "lambda": "lambda1", "lamda_1": "lambda1", "lamda_2": "lambda2",
}  # fmt: skip


def unknown(label: str, name: str, kind: type[BaseModel], whose: str = "") -> str:
    """``training.epoch is not a setting; did you mean 'epochs'?``, or else what there is."""
    known = [known for known in kind.model_fields if not (whose and known == "name")]
    other = ALSO_CALLED.get(name)
    hint = f"; did you mean '{other}'?" if other in known else did_you_mean(name, known)
    hint = hint or (f"; there are {', '.join(known)}" if known else "; it has none")
    return f"{printable(label)} is not a setting{f' of {whose}' if whose else ''}{hint}"


def refuse(where: str, message: str) -> UserError:
    """The error to raise: the place, a colon, the message."""
    return UserError(f"{where}: {message}")
