"""What does not fit is refused with its size, by the setting and by the machine."""

from __future__ import annotations

import pytest

from cl_runner.errors import UserError
from cl_runner.methods import limits


def test_too_large_for_the_setting_or_for_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory", lambda device: ("this machine", 8 * 10**9))
    limits.refuse_too_large("x: things", 7.9, 10, "take fewer")
    with pytest.raises(
        UserError, match=r"^x: things take 10.1 GB, over method.max_gb 10; take fewer, or set a larger max_gb$"
    ):
        limits.refuse_too_large("x: things", 10.1, 10, "take fewer")
    with pytest.raises(UserError, match=r"^x: things take 9 GB, and this machine has 8 GB of memory; take fewer$"):
        limits.refuse_too_large("x: things", 9, 10, "take fewer")
