"""One machine's part of a run on several: ``python -m cl_runner.launch.node``, started there through ssh.

It is told in lines on stdin what to do, and answers in lines on stdout; no word of a run, no variable and no secret
stands on a command line. The end of stdin is the end of the one that started it, and ends the processes here.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, BinaryIO

from cl_runner.engine.process import addresses, free_port
from cl_runner.errors import UserError
from cl_runner.launch.channel import FAILED, Channel

MARK = "cl-runner-node "  # before each line: a login shell may print whatever it likes
LOOK = 0.1  # seconds between two looks at what the processes have said
LAST = 2.0  # seconds that the last of what they have said may take
REACH = 5.0  # seconds that an address of another machine gets to answer


def lines(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """What the other end says, until it ends; lines that are none of ours are passed over."""
    for line in stream:
        text = line.decode("utf-8", "replace")
        if text.startswith(MARK):
            with suppress(ValueError):
                said = json.loads(text.removeprefix(MARK))
                if isinstance(said, dict):
                    yield said


def line(said: Mapping[str, Any]) -> bytes:
    """A line for the other end."""
    return f"{MARK}{json.dumps(said)}\n".encode()


class Node:
    """This machine, as the one that starts the run sees it."""

    def __init__(self, out: BinaryIO) -> None:
        self._out, self._lock = out, threading.Lock()
        self._listener: Listener | None = None
        self._ranks: Any = None
        self._channel = Channel.make()

    def answer(self, what: str, **more: Any) -> None:
        """Say something to the one that started the run."""
        with self._lock, suppress(OSError):
            self._out.write(line({"is": what, **more}))
            self._out.flush()

    def do(self, said: Mapping[str, Any]) -> None:
        """Do what is asked."""
        what = said.get("do")
        if what == "look":
            self._look(said["folder"], said["slots"], said["environment"])
        elif what == "listen":
            self._listener = Listener(said["port"])
            self.answer("listening", port=self._listener.port, addresses=addresses(), word=self._listener.word)
        elif what == "reach":
            found = [address for address in said["addresses"] if answers(address, said["port"], said["word"])]
            self.answer("reached", addresses=found)
        elif what == "begin":
            self._begin(said)
        elif what == "failed":
            self._channel.say(FAILED + said["why"])
        elif what == "stop" and self._ranks is not None:
            self._ranks.stop()
        elif what == "end" and self._ranks is not None:
            self._ranks.end()

    def _look(self, folder: str, slots: int, environment: Mapping[str, str]) -> None:
        """Go into the folder, take the variables, and say what there is."""
        os.environ.update(environment)
        try:
            os.chdir(folder)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; the folder a run is started in must be there too") from None
        from cl_runner.launch.local import devices_of, visible_devices
        from cl_runner.versions import versions

        visible = visible_devices()
        if visible and len(visible) < slots:
            raise UserError(f"slots={slots}: only {len(visible)} GPUs are visible there")
        self.answer("ready", versions=versions(), devices=devices_of(visible, slots), gpu=bool(visible))

    def _begin(self, said: Mapping[str, Any]) -> None:
        """Start this machine's processes, and see to what they say."""
        from cl_runner.launch.local import Ranks

        if self._listener is not None:
            self._listener.close()
        reads, writes = os.pipe()
        self._ranks = Ranks(
            said["world"], said["node"], said["address"], said["port"], said["arguments"], self._channel, writes
        )
        os.close(writes)
        threading.Thread(target=self._hear, args=(reads,), daemon=True).start()

    def _hear(self, output: int) -> None:
        """Hand on the result and the words of the processes, and how they ended."""
        over = threading.Event()
        hands_on = [
            threading.Thread(target=self._hand_on, args=(output,), daemon=True),
            threading.Thread(target=self._watch, args=(over,), daemon=True),
        ]
        for thread in hands_on:
            thread.start()
        code = self._ranks.wait()
        over.set()
        for thread in hands_on:
            thread.join(LAST)  # a tracker's own process may keep the output open
        self.answer("ended", code=code)

    def _hand_on(self, output: int) -> None:
        while part := os.read(output, 2**16):
            self.answer("output", text=part.decode("utf-8", "surrogateescape"))

    def _watch(self, over: threading.Event) -> None:
        told = 0
        while True:
            last = over.wait(LOOK)
            heard = self._channel.heard()
            if heard[told:]:
                self.answer("said", lines=heard[told:])
                told = len(heard)
            if last:
                return

    def close(self) -> None:
        """The one that started the run has gone: end what runs here."""
        if self._ranks is not None:
            self._ranks.end()
            self._ranks.wait()


class Listener:
    """Waits where rank 0 will, so that the others can try to reach it; answers each with a word of its own."""

    def __init__(self, port: int = 0) -> None:
        self.word = os.urandom(8).hex()
        self._socket = socket.create_server(("", port or free_port()))
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        with suppress(OSError):  # it is closed
            while True:
                other, _ = self._socket.accept()
                with other, suppress(OSError):
                    other.sendall(self.word.encode())

    def close(self) -> None:
        """The port is free again."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # which wakes the thread; to close alone leaves the port taken
        self._socket.close()


def answers(address: str, port: int, word: str) -> bool:
    """Whether that very machine answers at an address: every machine may have a bridge of the same number."""
    try:
        with socket.create_connection((address, port), REACH) as other:
            other.settimeout(REACH)
            return other.recv(64).decode("ascii", "replace") == word
    except OSError:
        return False


def main() -> int:
    """Do what stdin says until it ends."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    node = Node(out)
    node.answer("here", host=socket.gethostname())
    try:
        for said in lines(sys.stdin.buffer):
            node.do(said)
    except UserError as error:
        node.answer("refused", why=str(error))
    except Exception as error:
        node.answer("refused", why=f"{type(error).__name__}: {error}")
    node.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
