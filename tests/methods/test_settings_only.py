"""A name for a method with settings: other defaults, the same bounds, and no class of its own anywhere."""

from __future__ import annotations

import pytest
from pydantic import Field, ValidationError

from cl_runner.config.schema import Section
from cl_runner.methods import METHODS
from cl_runner.methods.olora import OLoRA
from cl_runner.methods.protocol import Method, Reorthogonalise, overrides
from cl_runner.methods.seqlora import SeqLoRA
from cl_runner.methods.settings_only import named, with_defaults


def test_hooks_and_facts_are_those_of_the_method() -> None:
    for name in ("hard-orth", "soft-orth"):
        found = METHODS.get(name)
        assert found.__mro__[1] is SeqLoRA and (found.carried, found.past_as) == ("A, B", "none")
        assert "build" not in vars(found) and overrides(found(found.Config()), "build")
        assert {key for key in vars(found) if not key.startswith("__")} == {
            "name", "title", "equation", "paper", "Config",
        }  # fmt: skip


def test_a_part_keeps_its_other_defaults_and_can_no_longer_be_null() -> None:
    hard, soft = METHODS.get("hard-orth").Config, METHODS.get("soft-orth").Config
    assert hard().reorthogonalise == Reorthogonalise() and type(hard().reorthogonalise) is Reorthogonalise
    own = soft.model_validate({"reorthogonalise": {"every": 7}}).reorthogonalise
    assert (own.how, own.every, own.on, own.maps_moments) == ("soft", 7, "A", False)
    assert soft.model_validate({"reorthogonalise": {"how": "hard"}}).reorthogonalise.how == "hard"
    for wrong in ({"reorthogonalise": None}, {"reorthogonalise": {"every": 0}}, {"reorthogonalise": {"how": "firm"}}):
        with pytest.raises(ValidationError):
            soft.model_validate(wrong)
    with pytest.raises(ValidationError, match="cannot rescale on: both"):
        soft.model_validate({"reorthogonalise": {"on": "both", "rescale": True}})
    assert SeqLoRA.Config().reorthogonalise is None and Reorthogonalise().how == "hard"


def test_plain_settings_keep_their_bounds() -> None:
    made = named(OLoRA, "strong", {"lambda1": 7.0, "on": "B"}, {"on": "which"}, title="strong")
    assert issubclass(made, Method) and (made.name, made.title, made.paper) == ("strong", "strong", OLoRA.paper)
    assert (made.Config().lambda1, made.Config().on, made.Config().reference) == (7.0, "B", True)
    assert made.Config.model_fields["on"].description == "which"
    assert made.Config.model_fields["lambda1"].description == OLoRA.Config.model_fields["lambda1"].description
    for wrong in ({"lambda1": -1}, {"on": "C"}, {"lambda3": 1}):
        with pytest.raises(ValidationError):
            made.Config.model_validate(wrong)
    assert OLoRA.Config().lambda1 is None and OLoRA.name == "olora"


def test_defaults_that_are_there_already_make_no_class() -> None:
    class Bare(Section):
        x: int = Field(3, ge=0)

    assert with_defaults(Bare, {"x": 3}, {}, "Same") is Bare
    assert with_defaults(Bare, {"x": 4}, {}, "Other").__name__ == "Other"
