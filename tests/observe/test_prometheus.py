"""What Prometheus and Grafana are told: names and types by the conventions, a dashboard of known metrics."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from view_sessions import free_port

from system.config import Config
from system.config.observe import listen_address
from system.observe.catalogue import catalogue
from system.observe.prometheus_view import PrometheusView
from system.observe.rundir import RunDir
from system.observe.sinks import Alarm

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "configs" / "grafana" / "espalier.json"
HELD = ROOT / ".promtool" / "usr" / "bin" / "promtool"
ABBREVIATED = ("s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d")  # as promtool
WORDS_OF_PROMQL = {"time", "sum", "by", "increase", "rate", "max", "min", "avg", "h", "m", "s"}


@pytest.fixture
def view(run_dir: RunDir, config: Config) -> Iterator[PrometheusView]:
    """One that was told every metric of the catalogue, and an alarm."""
    config.observe.prometheus = str(free_port())
    made = PrometheusView(run_dir, config)
    every = [re.sub(r"<(\w+)>", r"one \1", one.key) for one in catalogue().values() if one.numeric]
    made.write(dict.fromkeys(every, 1.5) | {"step": 7, "time": 1e9, "eval/which": "after", "novelty": 1.0})
    made.alarm(Alarm(7, 1e9, "entropy collapse", True, "its text"))
    yield made
    made.close()


@pytest.fixture
def page(view: PrometheusView) -> str:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(view)  # type: ignore[arg-type]
    return generate_latest(registry).decode()


@pytest.fixture
def promtool() -> str:
    if found := shutil.which("promtool") or (str(HELD) if HELD.is_file() else None):
        return found
    if os.environ.get("ESPALIER_REQUIRE_PROMTOOL"):
        pytest.fail("there is no promtool: make promtool")
    pytest.skip("there is no promtool: make promtool")


def test_every_number_of_the_catalogue_is_there_with_help_and_type(page: str) -> None:
    families = {one.name: one for one in text_string_to_metric_families(page)}
    for metric in catalogue().values():
        if not metric.numeric:
            continue
        family = families[metric.prometheus.removesuffix("_total")]
        assert family.type == ("counter" if metric.count else "gauge"), metric.key
        assert metric.key in family.documentation
        (sample,) = family.samples
        assert sample.name == metric.prometheus
        assert sample.labels == {name: f"one {name}" for name in metric.labels}
        assert sample.value == {"step": 7.0, "time": 1e9}.get(metric.key, 1.5)
    (alarm,) = families["espalier_alarms"].samples
    assert (alarm.labels, alarm.value) == ({"name": "entropy collapse"}, 1)
    assert "novelty" not in page
    assert "its text" not in page


def test_the_names_follow_the_conventions(page: str) -> None:
    for family in text_string_to_metric_families(page):
        for name in (family.name, *(sample.name for sample in family.samples)):
            assert re.fullmatch(r"espalier(_[a-z0-9]+)*", name), name
            assert not set(name.split("_")) & set(ABBREVIATED), name
        assert not family.name.endswith(("_count", "_sum", "_bucket", "_total")), family.name
        assert family.documentation


def test_promtool_finds_nothing(page: str, promtool: str) -> None:
    done = subprocess.run(
        [promtool, "check", "metrics"], input=page, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    wrong = page.replace("espalier_train_seconds", "espalier_train_s")
    done = subprocess.run(
        [promtool, "check", "metrics"], input=wrong, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0, "it finds what is wrong"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("none", None),
        ("0", None),
        ("9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:9464", ("0.0.0.0", 9464)),
        ("login-1:9464", ("login-1", 9464)),
        ("[::1]:9464", ("::1", 9464)),
    ],
)
def test_an_address_is_a_port_or_a_host_and_a_port(text: str, address: tuple[str, int] | None) -> None:
    assert listen_address(text) == address


def queries() -> list[str]:
    """Every query of the dashboard: those of panels, and those of its variables."""
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return found + [one["query"] for one in board["templating"]["list"] if one["type"] == "query"]


def names_and_labels(query: str) -> tuple[set[str], set[str]]:
    """The metrics that a query reads, and the labels that it filters or groups by."""
    labels = set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', query))
    for group in re.findall(r"\bby\s*\(([^)]*)\)", query):
        labels |= {name.strip() for name in group.split(",")}
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\bby\s*\([^)]*\)", " ", query)
    return set(re.findall(r"[a-zA-Z_]\w*", bare)), labels


def known() -> dict[str, set[str]]:
    """Metric -> its labels, those that Prometheus gives among them."""
    given = {"instance", "job"}
    own = {one.prometheus: {*one.labels} | given for one in catalogue().values() if one.numeric}
    return own | {"espalier_alarms_total": {"name"} | given, "espalier_run_info": {"run"} | given}


def test_the_dashboard_reads_metrics_that_there_are() -> None:
    assert len(queries()) > 25
    for query in queries():
        if match := re.fullmatch(r"label_values\((\w+), (\w+)\)", query):
            assert match[2] in known()[match[1]], query
            continue
        names, labels = names_and_labels(query)
        metrics = names - WORDS_OF_PROMQL
        assert metrics, query
        assert metrics <= known().keys(), query
        assert labels <= set.intersection(*(known()[one] for one in metrics)), query


def test_the_legends_of_the_dashboard_name_labels_that_there_are() -> None:
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel["targets"]:
            metrics = names_and_labels(target["expr"])[0] - WORDS_OF_PROMQL
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert shown <= set.union(*(known()[one] for one in metrics)), target


def test_prometheus_can_read_the_queries(promtool: str, tmp_path: Path) -> None:
    """As rules, which promtool parses with Prometheus' own parser."""
    rules: list[dict[str, Any]] = [
        {"record": f"dashboard:{number}", "expr": query.replace("$instance", ".*")}
        for number, query in enumerate(queries())
        if not query.startswith("label_values")
    ]
    file = tmp_path / "rules.yaml"

    def check() -> int:
        file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
        return subprocess.run(
            [promtool, "check", "rules", str(file)], capture_output=True, timeout=120
        ).returncode

    assert check() == 0
    rules[0]["expr"] += ")"
    assert check() != 0, "it finds what is wrong"
