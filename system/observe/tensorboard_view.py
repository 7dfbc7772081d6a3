"""TensorBoard: event files in ``tensorboard/`` of the run directory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from system.config import Config
from system.observe.rundir import RunDir
from system.observe.sinks import Alarm, MetricsView, numbers


class TensorBoardView(MetricsView):
    """Scalars under the keys of ``metrics.jsonl``; ``tensorboard --logdir runs`` shows all runs."""

    def __init__(self, run_dir: RunDir, config: Config) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # Modules that protoc made, of which no type is known.
        self._event: Any = event_pb2
        self._summary: Any = summary_pb2
        self._tensor: Any = tensor_pb2
        self._types: Any = types_pb2
        self._as_text: Any = create_summary_metadata
        self._writer: Any = EventFileWriter(str(run_dir.tensorboard))

    def write(self, record: Mapping[str, Any]) -> None:
        values = [self._value(tag=key, simple_value=value) for key, value in numbers(record)]
        self._add(record["step"], record["time"], summary=self._summary.Summary(value=values))
        self._writer.flush()  # whoever looks sees the newest step, and a killed run loses none

    def rewind(self, step: int) -> None:
        """A start of a session at a step says that what is there from this step on counts no more."""
        began = self._event.SessionLog(status=self._event.SessionLog.START)
        self._add(step + 1, time.time(), session_log=began)

    def alarm(self, alarm: Alarm) -> None:
        said = self._tensor.TensorProto(dtype=self._types.DT_STRING, string_val=[alarm.text.encode()])
        as_text = self._as_text(display_name=f"alarm: {alarm.name}", description="")
        value = self._value(tag=f"alarm/{alarm.name}", tensor=said, metadata=as_text)
        self._add(alarm.step, alarm.time, summary=self._summary.Summary(value=[value]))

    def close(self) -> None:
        self._writer.close()

    def _value(self, **what: Any) -> Any:
        return self._summary.Summary.Value(**what)

    def _add(self, step: int, wall_time: float, **what: Any) -> None:
        self._writer.add_event(self._event.Event(step=step, wall_time=wall_time, **what))
