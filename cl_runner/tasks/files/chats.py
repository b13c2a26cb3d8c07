"""Chats: lists of turns, the last of which is the answer and all before it the text.

A turn is ``{role, content}`` (messages) or ``{from, value}`` (ShareGPT). One turn a paragraph: what the system says
first, then the user. Where the assistant has spoken before, every turn says whose it is (``User: …``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cl_runner.tasks.files.values import Fault, kind_of

#: Where a record has its turns, in the order in which they are looked for.
KEYS = ("messages", "conversations", "conversation")

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "chatbot": "assistant",
}  # fmt: skip
_TOOLS = {
    "tool", "function", "function_call", "function_response", "observation", "ipython", "tool_call", "tool_response",
    "tool_calls",
}  # fmt: skip


class Turn(NamedTuple):
    """Who speaks (``system``, ``user``, ``assistant``) and what is said."""

    role: str
    content: str


def key_of(record: Mapping[str, Any]) -> str | None:
    """The field that holds a record's turns, if one does."""
    for key in KEYS:
        turns = _listed(record.get(key))
        if turns and isinstance(turns[0], Mapping) and {"role", "from"} & set(turns[0]):
            return key
    return None


def is_sharegpt(record: Mapping[str, Any], key: str) -> bool:
    """Whether the turns are ``{from, value}``."""
    return "from" in _listed(record[key])[0]


def turns_of(record: Mapping[str, Any], key: str) -> list[Turn]:
    """The turns of a chat; a ``system`` field of the record is the first, unless a turn says it. Raises Fault."""
    listed = _listed(record.get(key))
    if not listed:
        raise Fault(f": '{key}' holds no turns ({kind_of(record.get(key))})")
    if any(record.get(tools) not in (None, "", [], "[]") for tools in ("tools", "functions")):
        raise Fault(": the chat has tools; chats of text alone are read")
    turns = [_turn(key, number, turn) for number, turn in enumerate(listed, 1)]
    system = record.get("system") or record.get("system_prompt")
    if isinstance(system, str) and system.strip() and all(turn.role != "system" for turn in turns):
        turns.insert(0, Turn("system", system))
    return turns


def split(turns: Sequence[Turn]) -> tuple[str, str, bool]:
    """Text, answer, and whether the turn before the answer says anything. Raises Fault where the last is no answer."""
    *before, last = turns
    if last.role != "assistant":
        raise Fault(
            f": the chat ends in a turn of the {last.role}; the assistant's is the answer, and must be the last"
        )
    return laid_out(before), last.content, bool(before) and bool(before[-1].content.strip())


def laid_out(turns: Sequence[Turn]) -> str:
    """Turns as text: one a paragraph, and whose it is where the assistant has spoken."""
    if not any(turn.role == "assistant" for turn in turns):
        return "\n".join(turn.content for turn in turns)
    names = {"system": "", "user": "User: ", "assistant": "Assistant: "}
    return "\n".join(names[turn.role] + turn.content for turn in turns)


def _listed(value: Any) -> list[Any]:
    """A list of turns; of a table's columns (``{from: [...], value: [...]}``) too."""
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, cells, strict=False)) for cells in zip(*value.values(), strict=False)]
    return value if isinstance(value, list) else []


def _turn(key: str, number: int, turn: Any) -> Turn:
    here = f": turn {number} of '{key}'"
    if not isinstance(turn, Mapping):
        raise Fault(f"{here} is {kind_of(turn)}, not an object")
    role = turn.get("role", turn.get("from"))
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if turn.get("tool_calls") or turn.get("function_call") or (isinstance(role, str) and role.lower() in _TOOLS):
        raise Fault(f"{here} is a tool's or calls one; chats of text alone are read")
    if known is None:
        raise Fault(f"{here} is of the role {role!r}; known are {', '.join(_ROLES)}")
    return Turn(known, _content(here, turn.get("content", turn.get("value"))))


def _content(here: str, content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(_part(here, part) for part in content)
    if isinstance(content, str):
        return content
    raise Fault(f"{here}: what it says is {kind_of(content)}, not text")


def _part(here: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
    raise Fault(f"{here} holds a part that is no text ({kind})")
