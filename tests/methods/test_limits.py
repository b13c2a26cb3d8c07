"""What does not fit is refused with its size, by the setting and by the machine."""

from __future__ import annotations

import pytest

from cl_runner.errors import UserError
from cl_runner.methods.shared import limits


def test_too_large_for_the_setting_or_for_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory", lambda device: ("this machine", 8 * 10**9))
    limits.refuse_too_large("x: things", 7.9, 10, "take fewer")
    with pytest.raises(
        UserError, match=r"^x: things take 10.1 GB, over method.max_gb 10; take fewer, or set a larger max_gb$"
    ):
        limits.refuse_too_large("x: things", 10.1, 10, "take fewer")
    with pytest.raises(UserError, match=r"^x: things take 9 GB, and this machine has 8 GB of memory; take fewer$"):
        limits.refuse_too_large("x: things", 9, 10, "take fewer")


def test_sizes_are_three_digits_of_a_known_unit() -> None:
    said = {
        0: "0 MB", 8064: "0.00806 MB", 471_859_200: "472 MB", 999_400_000: "999 MB", 999_600_000: "1 GB",
        6_630_000_000: "6.63 GB", 999_600_000_000: "1000 GB", 1_234_567_000_000: "1235 GB",
    }  # fmt: skip
    assert {of_bytes: limits.size(of_bytes) for of_bytes in said} == said
