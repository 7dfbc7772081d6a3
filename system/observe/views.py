"""The views of a run's metrics that there are, which of them a run wants, and what they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from system.config import Config
from system.config.observe import listen_address
from system.observe.prometheus_view import PrometheusView, unusable
from system.observe.rundir import RunDir
from system.observe.sinks import GuardedView, MetricsView, RunFiles, Sink
from system.observe.span_view import SpanView
from system.observe.tensorboard_view import TensorBoardView
from system.observe.trackio_view import TrackioView
from system.observe.wandb_view import WandbView


@dataclass(frozen=True, slots=True)
class ViewKind:
    """A view that a run may have."""

    name: str
    setting: str  # what turns it on
    off: str  # … and off
    package: str  # that it needs, as it is imported
    pip: str  # what pip installs it with
    wanted: Callable[[Config], bool]
    make: Callable[[RunDir, Config], MetricsView]
    aside: bool = False  # it takes seconds to start, and may do so in a thread
    rewinds: bool = False  # it takes back records that come again (MetricsView.rewind), and gets them all


VIEWS = {
    one.name: one
    for one in (
        ViewKind(
            "Weights & Biases",
            "observe.wandb",
            "observe.wandb=disabled",
            "wandb",
            "wandb",
            lambda config: config.observe.wandb != "disabled",
            WandbView,
            aside=True,
        ),
        ViewKind(
            "TensorBoard",
            "observe.tensorboard",
            "observe.tensorboard=false",
            "tensorboard",
            "espalier[tensorboard]",
            lambda config: config.observe.tensorboard,
            TensorBoardView,
            rewinds=True,
        ),
        ViewKind(
            "trackio",
            "observe.trackio",
            "observe.trackio=false",
            "trackio",
            "espalier[trackio]",
            lambda config: config.observe.trackio,
            TrackioView,
        ),
        ViewKind(
            "Prometheus",
            "observe.prometheus",
            "observe.prometheus=none",
            "prometheus_client",
            "prometheus-client",
            lambda config: listen_address(config.observe.prometheus) is not None,
            PrometheusView,
            rewinds=True,
        ),
        ViewKind(
            "OpenTelemetry",
            "observe.otel",
            "observe.otel=none",
            "opentelemetry.exporter.otlp.proto.http",
            "espalier[otel]",
            lambda config: config.observe.otel != "none",
            SpanView,
            rewinds=True,
        ),
    )
}


def sinks(run_dir: RunDir, config: Config) -> list[Sink]:
    """The run's own files, and the views that the configuration asks for.

    A view sees what was sent by earlier sessions before this one writes its first record.
    """
    views = [
        GuardedView(
            one.name,
            one.off,
            partial(one.make, run_dir, config),
            None if one.rewinds else run_dir.metrics_path,
            aside=one.aside,
        )
        for one in VIEWS.values()
        if one.wanted(config)
    ]
    return [RunFiles(run_dir), *views]


def unavailable(config: Config) -> Iterator[str]:
    """Views that are asked for and cannot be had on this machine, with the remedy."""
    for one in VIEWS.values():
        if one.wanted(config) and not _installed(one.package):
            yield f"{one.setting}: {one.name} is not installed: pip install '{one.pip}', or set {one.off}"
    address = listen_address(config.observe.prometheus)
    if address and (why := unusable(address)):
        yield f"observe.prometheus={config.observe.prometheus}: {why}"


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False
