"""Branching policies: the formulas, by Monte Carlo and by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from system.config import BranchingConfig
from system.plugins import POLICIES, PluginError
from system.rollout.branching import (
    Arpo,
    ArpoPaper,
    ArpoRelease,
    Decision,
    EntropyUnknown,
    Never,
    Policy,
    Probe,
    Random,
    TreeState,
    decided,
    make_policy,
)

STATE = TreeState(budget=16, started=8, live=8, forks=0, calls=1, call_limit=3)
DRAWS = 20_000


def frequency(policy: Policy, delta_h: float) -> float:
    rng = np.random.default_rng(0)
    return sum(policy.decide(Probe(0.3 + delta_h, 0.3), STATE, rng).forks for _ in range(DRAWS)) / DRAWS


@pytest.mark.parametrize("kind", [partial(Arpo, 4), ArpoRelease])
@pytest.mark.parametrize("alpha", [0.3, 0.5])
@pytest.mark.parametrize("beta", [0.2, 2.0])
@pytest.mark.parametrize("delta_h", [-3.0, -0.5, -0.1, 0.0, 0.1, 0.5, 3.0])
def test_fork_frequency_is_the_clipped_line(kind: Any, alpha: float, beta: float, delta_h: float) -> None:
    p = min(max(alpha + beta * delta_h, 0.0), 1.0)
    tolerance = 4 * math.sqrt(max(p * (1 - p), 1e-9) / DRAWS) + 1e-9
    assert frequency(kind(alpha, beta), delta_h) == pytest.approx(p, abs=tolerance)


@pytest.mark.parametrize("delta_h", [-1.0, 0.0, 1.0])
def test_random_ignores_entropy(delta_h: float) -> None:
    tolerance = 4 * math.sqrt(0.35 * 0.65 / DRAWS)
    assert frequency(Random(4, 0.35), delta_h) == pytest.approx(0.35, abs=tolerance)


def test_paper_is_a_threshold() -> None:
    policy = ArpoPaper(4, 0.5, 0.2, 0.5)
    rng = np.random.default_rng(0)
    state_before = rng.bit_generator.state
    assert [policy.decide(Probe(h, 0.5), STATE, rng).forks for h in (0.4, 0.5, 0.5001, 0.9)] == [0, 0, 1, 1]
    assert rng.bit_generator.state == state_before  # no draw
    strict = ArpoPaper(4, 0.5, 0.2, 0.52)
    assert strict.decide(Probe(0.55, 0.5), STATE, rng).forks == 0
    assert strict.decide(Probe(0.65, 0.5), STATE, rng).forks == 1
    decision = policy.decide(Probe(0.9, 0.5), STATE, rng)
    assert (decision.probability, decision.delta_h) == (1.0, pytest.approx(0.4))
    assert math.isnan(decision.draw)


def test_none_never_forks() -> None:
    assert frequency(Never(4), 3.0) == 0.0
    assert not Never(4).can_fork


def test_the_decision_states_what_it_did() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        decision = Arpo(4, 0.5, 0.2).decide(Probe(0.7, 0.2), STATE, rng)
        assert decision.probability == pytest.approx(0.6)
        assert decision.forks == int(decision.draw < decision.probability)


def test_mean_entropy_over_log_vocabulary() -> None:
    log_v = math.log(50)
    uniform = np.full(8, log_v, np.float32)
    assert Arpo(8, 0.5, 0.2).measure(uniform, log_v) == pytest.approx(1.0)
    assert Arpo(8, 0.5, 0.2).measure(np.array([1.0, 3.0], np.float32), log_v) == pytest.approx(2.0 / log_v)
    assert Arpo(8, 0.5, 0.2).measure(np.array([1.0, np.nan], np.float32), log_v) == pytest.approx(1.0 / log_v)


def test_release_sums_instead_of_averaging() -> None:
    """arpo.md's ln(151,665) = 11.929: twenty tokens of one nat come to 20 / 11.929."""
    entropies = np.ones(20, np.float32)
    assert ArpoRelease(0.5, 0.2).measure(entropies, math.log(151_665)) == pytest.approx(20 / 11.929, rel=1e-4)
    assert ArpoRelease(0.5, 0.2).measure(entropies[:5], math.log(151_665)) == pytest.approx(
        5 / 11.929, rel=1e-4
    )


@pytest.mark.parametrize("name", ["arpo", "arpo-paper", "arpo-release", "arpo-calibrated", "aepo"])
def test_policies_that_need_entropy_say_so(name: str) -> None:
    policy = make_policy(BranchingConfig(name=name))
    unknown = policy.measure(np.full(4, np.nan, np.float32), 1.0)
    assert math.isnan(unknown)
    with pytest.raises(EntropyUnknown, match=f"branching={name}"):
        policy.decide(Probe(unknown, 0.1), STATE, np.random.default_rng(0))


def test_every_configured_name_makes_its_policy() -> None:
    for name in POLICIES.names:
        assert make_policy(BranchingConfig(name=name)).name == name
    assert make_policy(BranchingConfig(name="arpo", probe_tokens=5)).probe_tokens == 5
    assert make_policy(BranchingConfig(name="arpo-release", probe_tokens=5)).probe_tokens == 20
    with pytest.raises(PluginError, match=r"branching.name='oracle': choose one of arpo, arpo-paper"):
        make_policy(BranchingConfig(name="oracle"))
    eager = make_policy(BranchingConfig(name="random", options={"alpha": "0.9", "probe_tokens": 2}))
    assert eager == Random(2, 0.9)


@pytest.mark.parametrize("given", [1, None, Decision(-1, 0.5, 0.1, 0.0), Decision(1.5, 0.5, 0.1, 0.0)])  # pyright: ignore[reportArgumentType]
def test_a_decision_that_is_none_is_refused_by_name(given: Any) -> None:
    with pytest.raises(PluginError, match=r"branching=Never: decide\(\) returned .*: no number of forks"):
        decided(Never(0), given)


@pytest.mark.parametrize(
    ("delta_h", "expected"),
    [
        (0.0, [0.5, 0.473684, 0.444444, 0.333333, 0.0]),
        (1.0, [0.7, 0.673684, 0.644444, 0.533333, 0.2]),
        (-1.0, [0.3, 0.273684, 0.244444, 0.133333, 0.0]),
    ],
)
def test_aepo_forks_less_the_more_results_in_a_row_forked(delta_h: float, expected: list[float]) -> None:
    """Numbers of the released code's formula ("aepo rollouts" in tests/learn/algorithm_vectors.json)."""
    policy = make_policy(BranchingConfig(name="aepo"))
    streaks = [0, 1, 2, 5, 10, 20]
    states = [replace(STATE, streak=streak) for streak in streaks]
    given = [policy.decide(Probe(delta_h, 0.0), state, np.random.default_rng(0)) for state in states]
    assert [one.probability for one in given] == pytest.approx([*expected, 0.0], abs=1e-6)


def calibrated(seen: Sequence[float], **options: Any) -> Policy:
    policy = POLICIES.make("arpo-calibrated", options, probe_tokens=4, alpha=0.5, beta=0.4)
    for delta_h in seen:
        policy.decide(Probe(delta_h, 0.0), STATE, np.random.default_rng(0))
    return policy


def chance(policy: Policy, delta_h: float) -> float:
    return policy.decide(Probe(delta_h, 0.0), STATE, np.random.default_rng(0)).probability


@pytest.mark.parametrize("width", [1e-3, 1.0])
def test_calibrated_forks_follow_the_rank_of_delta_h_whatever_its_width(width: float) -> None:
    """P = α + β·(2u - 1): from 0.1 where the model is surest to 0.9; the mean is α."""
    seen = np.random.default_rng(0).normal(size=400) * width
    policy = calibrated(seen.tolist())
    assert chance(policy, -9.0) == pytest.approx(0.1, abs=1e-9)
    assert chance(policy, 9.0) == pytest.approx(0.9, abs=5e-3)
    assert chance(policy, float(np.median(seen))) == pytest.approx(0.5, abs=0.01)
    fresh = [chance(policy, float(one)) for one in np.random.default_rng(1).normal(size=400) * width]
    assert np.mean(fresh) == pytest.approx(0.5, abs=0.04)
    assert np.mean(np.abs(np.array(fresh) - 0.5) > 0.1) > 0.6  # with Arpo at β = 0.4: none at width 0.001


@pytest.mark.parametrize("options", [{"least": 0}, {"window": 16}])
def test_calibrated_options_that_would_never_tell_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(PluginError, match=r"branching.options: least=\d+ must be 1 or more, and at most"):
        calibrated([], **options)


def test_calibrated_forks_begin_at_alpha_and_forget() -> None:
    policy = calibrated([], least=3, window=4)
    assert [chance(policy, x) for x in (1.0, 2.0, 3.0)] == [0.5, 0.5, 0.5]
    assert chance(policy, 9.0) == pytest.approx(0.9)
    for x in (50.0, 60.0, 70.0, 80.0):
        chance(policy, x)
    assert chance(policy, 10.0) == pytest.approx(0.1), "what was seen before the last four is forgotten"
    assert chance(calibrated([0.0] * 50), 0.0) == 0.5, "equals stand in their middle"
