"""TensorBoard: event files in the run's folder, written without torch or TensorFlow."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

from cl_runner.trackers.protocol import Entry, Tracked, Tracker

FOLDER = "tensorboard"


class TensorBoard(Tracker):
    """Scalars by step; settings as a text. What a stage that is trained again had written is purged."""

    name: ClassVar[str] = "tensorboard"
    title: ClassVar[str] = "TensorBoard event files in RUN/tensorboard (tensorboard --logdir runs)"
    package: ClassVar[str] = "tensorboard"
    extra: ClassVar[str] = "tensorboard"

    def start(self, run: Tracked) -> bool:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.folder = run.folder / FOLDER
        goes_on = run.resumed and any(self.folder.glob("events.*"))
        self.writer = EventFileWriter(str(self.folder))
        now = time.time()
        if goes_on:  # events from this step on are of a stage that was cut, and come again
            log = SessionLog(status=SessionLog.START)
            self.writer.add_event(Event(wall_time=now, step=run.steps + 1, session_log=log))
        else:
            lines = "\n".join(f"    {key}: {value}" for key, value in run.settings.items())  # Markdown's verbatim
            self._text("settings", lines, 0, now)
        self.writer.flush()
        return goes_on

    def where(self) -> str:
        return f"tensorboard --logdir {self.folder}"

    def log(self, entries: Sequence[Entry]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for entry in entries:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in entry.values.items()]
            self.writer.add_event(Event(wall_time=entry.time, step=entry.step, summary=Summary(value=values)))
            self.step = entry.step
        self.writer.flush()

    def end(self, state: str) -> None:
        self._text("state", state, getattr(self, "step", 0), time.time())
        self.writer.close()

    def _text(self, tag: str, text: str, step: int, now: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor: Any = TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor)
        self.writer.add_event(Event(wall_time=now, step=step, summary=Summary(value=[value])))
