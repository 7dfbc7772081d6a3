"""A Prometheus endpoint: the newest value of every metric of the catalogue, under ``/metrics``.

Levels are gauges; what counts events since the last record is summed up into a counter, which starts anew
with each session of a run, as Prometheus expects of a process.  Nothing but numbers, names of metrics and
what stands in their keys (tools, actors, kinds of question) is told: no setting, no text.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from system.config import Config
from system.config.observe import listen_address
from system.observe.catalogue import Metric, catalogue, find
from system.observe.rundir import RunDir
from system.observe.sinks import Alarm, MetricsView, numbers

ALARM = "espalier_alarms_total"


class PrometheusView(MetricsView):
    """Listens at ``observe.prometheus`` from the start of a session to its end."""

    def __init__(self, run_dir: RunDir, config: Config) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._run = run_dir.name
        self._lock = threading.Lock()  # the server's threads read while the run writes
        self._values: dict[str, dict[tuple[str, ...], float]] = {}  # metric -> values of its labels -> value
        self._alarms: dict[str, float] = {}
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)  # type: ignore[arg-type]  # a collector is whatever has ``collect``
        address = listen_address(config.observe.prometheus)
        assert address is not None
        self._server, self._thread = start_http_server(address[1], address[0], registry)

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{_bracketed(str(host))}:{port}/metrics"

    def write(self, record: Mapping[str, Any]) -> None:
        with self._lock:
            for key, value in (*numbers(record), ("step", record["step"]), ("time", record["time"])):
                if (found := find(key)) is None or not found[0].numeric:
                    continue
                metric, labels = found
                held = self._values.setdefault(metric.key, {})
                at = tuple(labels[name] for name in metric.labels)
                held[at] = held.get(at, 0.0) + value if metric.count else value

    def alarm(self, alarm: Alarm) -> None:
        with self._lock:
            self._alarms[alarm.name] = self._alarms.get(alarm.name, 0.0) + 1

    def collect(self) -> Iterable[Any]:
        """Every metric of the catalogue, for prometheus_client; those without a value as a head alone."""
        from prometheus_client.core import CounterMetricFamily, InfoMetricFamily

        info = InfoMetricFamily("espalier_run", "Which run this is.")
        info.add_metric([], {"run": self._run})
        alarms = CounterMetricFamily(
            ALARM, "Alarms of the run so far, by name (docs/observe.md).", labels=["name"]
        )
        with self._lock:
            values = {key: dict(held) for key, held in self._values.items()}
            for name, count in self._alarms.items():
                alarms.add_metric([name], count)
        yield info
        yield alarms
        for metric in catalogue().values():
            if metric.numeric:
                yield _family(metric, values.get(metric.key, {}))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _family(metric: Metric, values: Mapping[tuple[str, ...], float]) -> Any:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    kind = CounterMetricFamily if metric.count else GaugeMetricFamily
    told = f"{metric.text[0].upper()}{metric.text[1:]} ({metric.key})."
    family = kind(metric.prometheus, told, labels=[*metric.labels])
    for labels, value in values.items():
        family.add_metric([*labels], value)
    return family


def unusable(address: tuple[str, int]) -> str:
    """Why nothing can listen at ``address`` on this machine, with the remedy; "" where it can."""
    host, port = address
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            listening.bind(address)
    except (OSError, UnicodeError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        return (
            f"nothing can listen there ({reason}): another run may; choose a free port, an address of this "
            "machine, or observe.prometheus=none"
        )
    return ""


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
