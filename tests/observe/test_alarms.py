"""Alarms: each is raised by what it names, and by nothing that a healthy run does."""

from __future__ import annotations

import pytest

from system.observe.alarms import WINDOW, Alarms

HEALTHY = {
    "train/entropy": 0.5,
    "train/engine_kl": 1e-4,
    "train/grad_norm": 1.0,
    "train/skipped_steps": 0.0,
    "rollout/accuracy": 0.3,
    "rollout/reward": 0.3,
    "rollout/response_tokens": 100.0,
    "rollout/calls_per_leaf": 2.0,
    "rollout/zero_variance_share": 0.4,
    "rollout/outcome/stopped": 0.9,
    "rollout/leaves": 64.0,
    "rollout/trees": 8.0,
    "reward/arpo/format": 0.9,
    "train/loss": 0.1,
}


def raised(change: dict[str, float | None], alarms: Alarms | None = None) -> dict[str, str]:
    """What is said after a healthy beginning and then ten records that differ from it by ``change``; None
    takes a metric away.
    """
    alarms = alarms or Alarms({})
    for _ in range(WINDOW):
        assert not list(alarms.look(HEALTHY))
    later = {key: value for key, value in (HEALTHY | change).items() if value is not None}
    said: dict[str, str] = {}
    for _ in range(WINDOW):
        said |= dict(alarms.look(later))
    return said


@pytest.mark.parametrize(
    ("change", "name", "text"),
    [
        ({"train/entropy": 0.02, "rollout/zero_variance_share": 0.8}, "entropy collapse", "80% of the trees"),
        ({"rollout/response_tokens": 350.0}, "answer length", "350 tokens per branch, 100 at the beginning"),
        ({"rollout/response_tokens": 20.0}, "answer length", "20 tokens per branch"),
        ({"rollout/calls_per_leaf": 0.1}, "tool calls", "gives its tools up"),
        ({"rollout/calls_per_leaf": 9.0}, "tool calls", "9.00 tool calls"),
        ({"rollout/outcome/stopped": 0.4}, "unfinished answers", "40% of the branches"),
        ({"rollout/outcome/stopped": None}, "unfinished answers", "0% of the branches"),
        ({"rollout/reward": 0.6, "rollout/accuracy": 0.1}, "reward without accuracy", "rose by 0.30"),
        ({"train/engine_kl": 0.05}, "engine mismatch", "0.05 nats"),
        ({"train/skipped_steps": 1.0, "train/grad_norm": float("nan")}, "skipped steps", "100% of the last"),
        ({"reward/arpo/format": 0.1}, "format collapse", "is 0.10, 0.90 at the beginning"),
        ({"flow/dropped/stale": 1.0, "flow/dropped/engine lost": 7.0}, "dropped trees", "50% of the last"),
        ({"train/loss": float("nan")}, "loss not finite", "train/loss is nan"),
        ({"train/grad_norm": 50.0}, "gradient spike", "50 times the median"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, float | None], name: str, text: str) -> None:
    said = raised(change)
    assert list(said) == [name]
    assert text in said[name]


@pytest.mark.parametrize(
    "change",
    [
        {},
        # Learned: sure of itself, and right; shorter, with fewer calls; paid for being right.
        {
            "train/entropy": 0.02,
            "rollout/zero_variance_share": 0.9,
            "rollout/accuracy": 0.98,
            "rollout/reward": 0.98,
            "rollout/response_tokens": 60.0,
            "rollout/calls_per_leaf": 1.2,
            "train/grad_norm": 0.1,
        },
        {"rollout/accuracy": None, "rollout/reward": 0.6},
        {"flow/dropped/stale": 1.0, "reward/arpo/format": None},
        {"train/engine_kl": None, "train/grad_norm": float("nan")},
    ],
)
def test_nothing_is_said_of_a_healthy_run(change: dict[str, float | None]) -> None:
    assert raised(change) == {}


def test_a_resumed_run_is_held_against_its_own_beginning() -> None:
    beginning: dict[str, list[float]] = {}
    raised({}, Alarms(beginning))
    resumed = Alarms(beginning)
    short = HEALTHY | {"rollout/response_tokens": 10.0}
    assert [dict(resumed.look(short)) for _ in range(WINDOW)][-1].keys() == {"answer length"}
