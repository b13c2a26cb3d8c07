"""What would steer a terminal, as text to be read: data, names and answers of models may hold anything."""

from __future__ import annotations

import re

# Controls but tab and line feed; and the marks that turn the direction of what follows, so that it reads otherwise than
# it is.
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    r"""``text`` with its controls as the escapes of JSON (``\u001b``): in a string of JSON they mean the same."""
    return text if text.isascii() and text.isprintable() else STEERING.sub(lambda it: f"\\u{ord(it[0]):04x}", text)
