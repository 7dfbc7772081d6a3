"""Spans for an OpenTelemetry collector (OTLP over HTTP): what the run measures anyway, on one time line.

``generate`` is a tree from its start to its close, and in it a ``tool`` for each call and a ``reward`` for
the scoring of each leaf; ``train`` the learner's step, ``publish`` new weights on their way to the engines.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from system.config import Config
from system.errors import EspalierError
from system.observe.rundir import RunDir
from system.observe.sinks import MetricsView
from system.observe.spans import PhaseSpan

EXPORT_S = 5.0  # that a collector may take for a batch of spans
SECOND = 1_000_000_000  # in nanoseconds


class CollectorFailed(EspalierError):
    """The collector did not take spans."""


class SpanView(MetricsView):
    """Sends spans in batches, from a thread of its own."""

    def __init__(self, run_dir: RunDir, config: Config) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

        view = self
        self._failed = False

        class Exporter(OTLPSpanExporter):
            """Remembers a failure, which the library would only log."""

            def export(self, spans: Any) -> SpanExportResult:
                result = super().export(spans)
                view._failed = view._failed or result is not SpanExportResult.SUCCESS
                return result

        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # a failure is told by the guard, once
        self._url = f"{config.observe.otel.rstrip('/')}/v1/traces"
        about = Resource.create({"service.name": "espalier", "espalier.run": run_dir.name})
        self._provider = TracerProvider(resource=about, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(Exporter(endpoint=self._url, timeout=EXPORT_S)))
        self._tracer = self._provider.get_tracer("espalier")

    def write(self, record: Mapping[str, Any]) -> None:
        """Nothing: it shows spans, no metrics."""
        self._check()

    def span(self, span: PhaseSpan) -> None:
        from opentelemetry.trace import set_span_in_context

        self._check()
        made = self._made(span, None)
        inside = set_span_in_context(made)
        for one in span.within:
            self._made(one, inside)

    def _made(self, span: PhaseSpan, inside: Any) -> Any:
        """``inside``: the context of the span that it is within."""
        began = int(span.start * SECOND)
        about = dict(span.attributes)
        made = self._tracer.start_span(span.name, context=inside, start_time=began, attributes=about)
        made.end(end_time=began + int(span.seconds * SECOND))
        return made

    def close(self) -> None:
        deadline = time.monotonic() + 2 * EXPORT_S
        self._provider.force_flush(int(1000 * 2 * EXPORT_S))
        self._provider.shutdown()
        if time.monotonic() > deadline:
            self._failed = True
        self._check()

    def _check(self) -> None:
        if self._failed:
            raise CollectorFailed(f"{self._url} did not take spans: is a collector there?")
