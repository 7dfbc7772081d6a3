"""TensorBoard: event files in ``tensorboard/`` of the run directory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar

from system.config import Config
from system.observe.rundir import RunDir
from system.observe.sinks import Alarm, View, numbers


class TensorBoardView(View):
    """Scalars under the keys of ``metrics.jsonl``; ``tensorboard --logdir runs`` shows all runs."""

    rewinds: ClassVar[bool] = True

    def __init__(self, run_dir: RunDir, config: Config) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer: Any = EventFileWriter(str(run_dir.tensorboard))

    def write(self, record: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=key, simple_value=value) for key, value in numbers(record)]
        self._add(record["step"], record.get("time", time.time()), summary=Summary(value=values))
        self._writer.flush()  # whoever looks sees the newest step, and a killed run loses none

    def rewind(self, step: int) -> None:
        """A start of a session at a step says that what is there from this step on counts no more."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._add(step + 1, time.time(), session_log=SessionLog(status=SessionLog.START))

    def alarm(self, alarm: Alarm) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.plugins.text.metadata import create_summary_metadata

        said = TensorProto(dtype=DT_STRING, string_val=[alarm.text.encode()])
        metadata = create_summary_metadata(display_name=f"alarm: {alarm.name}", description="")
        value = Summary.Value(tag=f"alarm/{alarm.name}", tensor=said, metadata=metadata)
        self._add(alarm.step, alarm.time, summary=Summary(value=[value]))

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, wall_time: float, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(step=step, wall_time=wall_time, **what))
