"""Spans reach a collector, here a stand-in that speaks OTLP over HTTP."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from view_sessions import free_port

from system.config import Config
from system.observe.rundir import RunDir
from system.observe.span_view import SpanView
from system.observe.spans import PhaseSpan
from system.observe.views import sinks


class Collector(HTTPServer):
    """Keeps what it is sent, unless it is to refuse it."""

    def __init__(self) -> None:
        self.got: list[tuple[str, Any]] = []
        self.refuses = False
        super().__init__(("127.0.0.1", 0), TakeSpans)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class TakeSpans(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.got.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(400 if self.server.refuses else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def collector(config: Config) -> Iterator[Collector]:
    made = Collector()
    config.observe.otel, config.observe.wandb = made.url, "disabled"
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def test_spans_arrive_with_their_times_and_attributes(
    run_dir: RunDir, config: Config, collector: Collector
) -> None:
    config.task.options = {"api_key": "hunter2"}
    view = SpanView(run_dir, config)
    view.span(PhaseSpan("generate", 1e9, 2.5, {"tree.prompt": "q1", "tool.calls": 2, "reward.mean": 0.5}))
    view.span(PhaseSpan("train", 1e9 + 3, 1.0, {"step": 1}))
    call = PhaseSpan("tool", 1e9 + 4.5, 0.5, {"tool.name": "search", "tool.cached": False})
    view.span(PhaseSpan("generate", 1e9 + 4, 2.0, {}, [call]))
    view.close()
    assert {path for path, _ in collector.got} == {"/v1/traces"}
    (resource,) = [one for _, request in collector.got for one in request.resource_spans]
    about = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert (about["service.name"], about["espalier.run"]) == ("espalier", run_dir.name)
    generate, train, other, tool = [span for scope in resource.scope_spans for span in scope.spans]
    assert (generate.name, train.name) == ("generate", "train")
    assert generate.start_time_unix_nano == 10**18
    assert generate.end_time_unix_nano - generate.start_time_unix_nano == 2_500_000_000
    assert (tool.name, tool.start_time_unix_nano) == ("tool", 10**18 + 4_500_000_000)
    assert (tool.parent_span_id, tool.trace_id) == (other.span_id, other.trace_id)
    assert (generate.parent_span_id, train.parent_span_id) == (b"", b"")
    held = {one.key: one.value for one in generate.attributes}
    assert held["tree.prompt"].string_value == "q1"
    assert held["tool.calls"].int_value == 2
    assert held["reward.mean"].double_value == 0.5
    assert b"hunter2" not in b"".join(request.SerializeToString() for _, request in collector.got)


@pytest.mark.parametrize("there", [True, False])
def test_a_collector_that_takes_none_is_told_once(
    there: bool, run_dir: RunDir, config: Config, collector: Collector, capfd: pytest.CaptureFixture[str]
) -> None:
    collector.refuses = True
    if not there:
        config.observe.otel = f"http://127.0.0.1:{free_port()}"
    files, guarded = sinks(run_dir, config)
    for _ in range(3):
        guarded.span(PhaseSpan("train", 1e9, 1.0, {}))
    guarded.close()
    files.close()
    said = capfd.readouterr().err
    assert said.count("WARNING") == 1
    assert "OpenTelemetry did not finish" in said
    assert "observe.otel=none" in said
    assert len(said.splitlines()) == 2
