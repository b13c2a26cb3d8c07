"""``cl-runner show``: a method, told from the code itself."""

from __future__ import annotations

from typing import Any

from cl_runner.config.schema import Section
from cl_runner.config.yamlfile import as_yaml
from cl_runner.methods import METHODS
from cl_runner.methods.protocol import Method
from cl_runner.registry import OURS
from cl_runner.terminal.console import print_json
from cl_runner.training.options import make_options


def show_method(name: str, *, as_json: bool) -> None:
    """``cl-runner show METHOD``. Raises UserError for a method there is not."""
    about = about_method(name)
    if as_json:
        print_json(about)
        return
    for key, value in about.items():
        if key not in ("sets", "options", "settings"):
            print(f"{key + ':':<22}{value}")
    for key, value in about.get("sets", {}).items():
        print(f"{'sets:':<22}{key}={as_yaml(value)}, unless it is given")
    print("options:" if about["options"] else "options: none")
    for setting, title in about["options"].items():
        print(f"  {setting}\n      {title}")
    print("settings:" if about["settings"] else "settings: none of its own")
    for key, setting in about["settings"].items():
        print(f"  method.{key} = {as_yaml(setting['default'])}\n      {setting['what']}")


def about_method(name: str) -> dict[str, Any]:
    """All that a method says of itself, by what it is. Raises UserError for a method there is not."""
    method, origin = METHODS.get(name), METHODS.origin(name)
    settings = {
        key: {"default": _plain(field.get_default(call_default_factory=True)), "what": field.description or ""}
        for key, field in method.Config.model_fields.items()
    }
    return {
        "name": method.name,
        **({"from": origin} if origin != OURS else {}),
        "title": method.title,
        "equation": method.equation,
        "paper": f"arXiv {method.paper}" if method.paper[:1].isdigit() else method.paper,
        "trains": method.trains + ("; method.train=full: all weights of the model" if "train" in settings else ""),
        "factors": method.factors,
        "frozen": method.frozen + ("; method.train=full: nothing" if "train" in settings else ""),
        **({"forms": method.forms} if method.forms else {}),
        "carried": method.carried,
        "growth": method.growth,
        "task id at inference": {"yes": "needed", "no": "not needed"}.get(method.task_id, "as the settings have it"),
        **({"about": said} if (said := _said(method)) else {}),
        **({"sets": dict(beside)} if (beside := getattr(method.Config, "elsewhere", {})) else {}),
        **({"first stage": f"does not read {unread}"} if (unread := ", ".join(method.since_second)) else {}),
        "options": dict(told for option in make_options() if (told := option.offered(method))),
        "settings": settings,
    }


def _said(method: type[Method]) -> str:
    """What its class says of it, in one line: what it promises, what is assumed of a paper."""
    return " ".join(str(vars(method).get("__doc__") or "").replace("``", "").split())


def _plain(value: Any) -> Any:
    """A default as JSON has it."""
    return value.model_dump(mode="json") if isinstance(value, Section) else value
