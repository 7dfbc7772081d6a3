"""The catalogue of metrics: what is written is in it, what is in it is written, its document is current."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from observe_trees import evaluated, make_tree, single

from system.config import Config, ConfigError
from system.engine.protocol import SPEED_COUNTERS
from system.engine.router import Routed
from system.evals.record import Answered
from system.evals.result import EvalResult
from system.flow.loop import FinishedStep
from system.observe.catalogue import FIVE, Metric, catalogue, find, markdown, text
from system.observe.recorder import GROWING, QUEUE_DEPTH, Recorder
from system.observe.rundir import RunDir
from system.observe.sinks import RESUMED
from system.rollout.reward import REASONS
from system.tree.record import Kind
from system.tree.stats import TreeStats

ROOT = Path(__file__).parents[2]
SPELLED = [*ROOT.glob("system/learn/*.py"), *ROOT.glob("actors/*.py"), *ROOT.glob("system/agents/*.py")]
SPELLED += [
    *ROOT.glob("system/envs/*.py"),
    *ROOT.glob("system/rollout/**/*.py"),
    *ROOT.glob("system/tools/*.py"),
]
SPELLED += [*ROOT.glob("system/engine/*.py")]
"""Where learner, clients, tools, environments, agents and supervised runs name what they count."""


class Kept:
    """A sink that keeps the keys."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    def write(self, record: dict[str, object]) -> None:
        self.keys |= record.keys()

    def alarm(self, alarm: object) -> None: ...

    def span(self, span: object) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def written(run_dir: RunDir, config: Config) -> set[str]:
    """The keys of a run in which everything happened that the recorder makes keys of."""
    kept = Kept()
    recorder = Recorder(run_dir, config, [kept], clock=Clock())  # type: ignore[list-item]
    trees = [*eventful()]
    recorder.training_began()
    for tree in trees:
        recorder.tree_closed(tree, version_now=4)
    recorder.tree_dropped("stale", 3)
    recorder.idle_total("learner", "no batch", 1.0)
    for name in (QUEUE_DEPTH, GROWING):
        recorder.gauge(name, 1.0)
    recorder.weights_pushed(1.0, [0.5], 100)
    recorder.memory_used(1_000)
    for name in ("prompt_tokens", "cached_tokens", *(f"route/{why}" for why in Routed)):
        recorder.running_total("rollout-0", name, 4.0)
    for name in SPEED_COUNTERS:
        recorder.running_total("engine-0", f"server/{name}", 4.0)
    for name in ("close_wait_s", "judge/answer_s", "judge/answers", "judge/requests", "judge/cache_hits"):
        recorder.running_total("rollout-0", f"reward/{name}", 4.0)
    recorder.running_total("rollout-0", "reward/eval/aime/close_wait_s", 4.0)
    for reason in REASONS:
        recorder.running_total("rollout-0", f"reward/failed/{reason}", 1.0)
        recorder.running_total("rollout-0", f"reward/eval/aime/failed/{reason}", 1.0)
    recorder.train_step(FinishedStep(5, trees, {"loss": 1.0}, [0, 1], {"hard": 0.5}))
    recorder.flush(5)
    recorder.evaluated(5, evaluated(single("a.b", 0)), "during", 3.0, 1.0, lora_kept=0.9)
    several = [
        Answered(name, question, "calc", at, True, 1.0, "stopped", 1, 4, "4")
        for name in ("", "set")
        for question in ("q", "r")
        for at in (0, 1)
    ]
    recorder.evaluated(6, EvalResult.of(several), "after", 3.0, 1.0)
    recorder.restore(recorder.state())
    return kept.keys


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def eventful() -> Iterator[TreeStats]:
    """Trees with all that one can have: a guide, an expert, steps and answers scored, tokens rescored."""
    plain = TreeStats.of(make_tree("q1", (1.0, 0.0, 0.5)))
    yield plain
    yield TreeStats.of(make_tree("q2"))  # a leaf that was not scored
    kind = plain.kind.copy()
    kind[5] = Kind.EXPERT
    yield replace(
        plain,
        guide=2,
        kind=kind,
        rescored=3,
        rescored_gap=1.0,
        step_reward=np.ones(6),
        answer=np.full(6, -1.0),
        reward=np.array([math.nan, 0.0, 0.5], np.float32),  # its first leaf ended well, and has no score
        parts={"arpo/format": np.ones(3, np.float32)},
    )


def spelled(metric: Metric) -> bool:
    """Whether the last fixed word of the key stands as a text in the sources that name what they count."""
    words = [part for part in metric.key.split("/") if not part.startswith("<")]
    word = words[-1].split("<")[0]
    return any(re.search(rf'["/]{re.escape(word)}', source) for source in sources())


def sources() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in SPELLED]


def test_all_that_is_written_is_in_the_catalogue(written: set[str]) -> None:
    assert len(written) > 100
    assert [key for key in written if find(key) is None] == []


def test_all_that_is_in_the_catalogue_is_written(written: set[str]) -> None:
    seen = {found[0].key for key in written if (found := find(key))}
    never = [one.key for one in catalogue().values() if one.key not in seen and not spelled(one)]
    assert not never, never


def test_a_key_that_nobody_knows_is_none() -> None:
    for key in ("novelty", "train/novelty", "rollout/kind/x/novelty", "tools/search", "time/idle_s/learner"):
        assert find(key) is None, key
    assert find(RESUMED)


@pytest.mark.parametrize(
    ("key", "of", "labels"),
    [
        ("train/loss", "train/loss", {}),
        ("reward/arpo/format", "reward/<name>", {"name": "arpo/format"}),
        ("reward/judge/answer_s", "reward/<judge>/answer_s", {"judge": "judge"}),
        ("reward/failed/deadline", "reward/failed/<reason>", {"reason": "deadline"}),
        ("tools/a.b/ok/p95_s", "tools/<tool>/<status>/p95_s", {"tool": "a.b", "status": "ok"}),
        ("eval/which", "eval/which", {}),
        ("eval/a/b/accuracy", "eval/<kind>/<score>", {"kind": "a/b", "score": "accuracy"}),
        (
            *("environment/train/forks_native", "environment/<purpose>/forks_<kind>"),
            {"purpose": "train", "kind": "native"},
        ),
        (
            *("environment/eval/world_lost", "environment/<purpose>/<reason>"),
            {"purpose": "eval", "reason": "world_lost"},
        ),
    ],
)
def test_a_key_is_found_by_its_pattern(key: str, of: str, labels: dict[str, str]) -> None:
    found = find(key)
    assert found is not None
    assert (found[0].key, found[1]) == (of, labels)


def test_every_row_says_what_it_is_and_should_look_like() -> None:
    rows = [*catalogue().values()]
    assert all(one.text and one.looks for one in rows)
    assert {one.unit for one in rows if one.key.endswith("_s") and "_per_" not in one.key} == {"s"}
    assert {one.unit for one in rows if one.key.endswith("_share")} == {"share"}
    assert [name for name, n in Counter(one.prometheus for one in rows if one.numeric).items() if n > 1] == []


def test_the_document_is_current() -> None:
    found = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert found == markdown(), "make it anew: espalier metrics --markdown > docs/metrics.md"
    assert len(FIVE) == 5
    assert FIVE.keys() <= catalogue().keys()
    named = [key for why in FIVE.values() for key in re.findall("`([^`]+)`", why)]
    assert [key for key in named if key not in catalogue()] == []


def test_the_console_tells_one_or_several_and_suggests() -> None:
    assert "espalier_tools_p95_seconds" in text("tools/search/ok/p95_s")
    assert text("train/").count("in Prometheus") == sum(key.startswith("train/") for key in catalogue())
    with pytest.raises(ConfigError, match="train/entropy"):
        text("train/entropi")
