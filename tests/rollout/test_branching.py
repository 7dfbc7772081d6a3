"""Branching policies: the formulas, by Monte Carlo and by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from rollout_fakes import PROMPT, Segment, make_world

from system.config import BranchingConfig
from system.plugins import POLICIES, PluginError
from system.rollout.branching import (
    MEASURES,
    Arpo,
    ArpoCalibrated,
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
from system.rollout.tree_rollout import TreeRollout
from system.tree.record import Kind
from system.twin.clock import run

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


def test_calibrated_forks_by_depth_compare_results_of_one_depth() -> None:
    """ΔH is higher the deeper: ranks over all depths fork late, ranks within a depth as often everywhere."""
    rng = np.random.default_rng(0)
    for by_depth, deeper in ((False, 0.7), (True, 0.5)):
        policy = calibrated([], by_depth=by_depth)
        chances: dict[int, list[float]] = {1: [], 2: []}
        for delta_h in rng.normal(size=600):
            for depth, seen in chances.items():
                at, value = replace(STATE, calls=depth), float(delta_h) + 3 * depth
                seen.append(policy.decide(Probe(value, 0.0), at, rng).probability)
        assert np.mean(chances[2][100:]) == pytest.approx(deeper, abs=0.04)
        assert np.mean(chances[1][100:]) == pytest.approx(1 - deeper, abs=0.04)


NAN = math.nan


def looked_at(entropies: Sequence[float], logprobs: Sequence[float], *shared: float) -> Probe:
    h = np.array(entropies, np.float32)
    return Probe(float(np.nanmean(h)), 0.5, h, np.array(logprobs, np.float32), shared)


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("delta", 1.5),
        ("entropy", 2.0),
        ("first", 1.0),
        ("surprise", 1.5),
        ("varentropy", ((0.5 - 1.0) ** 2 + (2.5 - 3.0) ** 2) / 2),
        ("siblings", 1 - (0.5 + 0.25) / 2),
    ],
)
def test_measures_of_being_unsure_by_hand(by: str, expected: float) -> None:
    probe = looked_at([1.0, 3.0, NAN], [-0.5, -2.5, -1.5], 0.5, 0.25)
    assert MEASURES[by](probe) == pytest.approx(expected)


def test_varentropy_is_right_in_the_mean() -> None:
    """One draw per token is enough: over many, the mean is the variance of -log p under p."""
    p = np.array([0.6, 0.2, 0.1, 0.05, 0.05])
    h = -(p * np.log(p)).sum()
    variance = (p * (-np.log(p) - h) ** 2).sum()
    drawn = np.log(np.random.default_rng(0).choice(p, p=p, size=200_000))
    probe = looked_at([h] * drawn.size, drawn.tolist())
    assert MEASURES["varentropy"](probe) == pytest.approx(variance, rel=0.02)


UNSURE: dict[str, Any] = {  # a probe that is as unsure as x says, by one measure alone
    "delta": lambda x: Probe(x, 0.0),
    "entropy": lambda x: Probe(x, NAN),
    "first": lambda x: looked_at([x, 1.0 - x], [-1.0, -1.0]),
    "surprise": lambda x: looked_at([NAN, NAN], [-x, -x - 1]),
    "varentropy": lambda x: looked_at([1.0, 2.0], [-1.0 - x, -2.0 + x]),
    "siblings": lambda x: looked_at([NAN, NAN], [-1.0, -1.0], 1 - x, 1 - x),
}


@pytest.mark.parametrize("by", MEASURES)
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_calibrated_forks_follow_the_rank_of_any_measure(by: str) -> None:
    policy = ArpoCalibrated(4, 0.5, 0.4, by=by)
    rng = np.random.default_rng(0)
    seen = [policy.decide(UNSURE[by](x), STATE, rng).probability for x in rng.uniform(0.2, 0.8, 300)]
    assert np.mean(seen) == pytest.approx(0.5, abs=0.05)
    chances = [policy.decide(UNSURE[by](x), STATE, rng).probability for x in (0.1, 0.5, 0.9)]
    assert chances == pytest.approx([0.1, 0.5, 0.9], abs=0.06)
    probe = looked_at([0.25, 0.75, 1.25], [-1.0, -1.0, -1.0], 0.5)
    assert policy.decide(probe, STATE, rng).delta_h == pytest.approx(0.25), "ΔH is what is recorded"


@pytest.mark.parametrize("by", ["entropy", "first", "varentropy"])
def test_measures_that_need_entropies_say_so(by: str) -> None:
    policy = ArpoCalibrated(4, 0.5, 0.4, by=by)
    probe = Probe(NAN, NAN, np.full(2, NAN, np.float32), np.full(2, -1.0, np.float32))
    with pytest.raises(EntropyUnknown, match="branching=arpo-calibrated"):
        policy.decide(probe, STATE, np.random.default_rng(0))


def test_without_siblings_a_fork_has_its_mean_chance_and_nothing_is_learned_from_it() -> None:
    policy = ArpoCalibrated(4, 0.5, 0.4, least=2, by="siblings")
    alone, apart = looked_at([1.0], [-1.0]), looked_at([1.0], [-1.0], 0.0)
    rng = np.random.default_rng(0)
    assert [policy.decide(alone, STATE, rng).probability for _ in range(40)] == [0.5] * 40
    assert [policy.decide(apart, STATE, rng).probability for _ in range(3)] == [0.5, 0.5, 0.5]
    assert policy.decide(looked_at([1.0], [-1.0], 1.0), STATE, rng).probability == pytest.approx(0.1)


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(PluginError, match=r"branching.options.by='mood': choose one of delta, entropy"):
        POLICIES.make("arpo-calibrated", {"by": "mood"}, probe_tokens=4, alpha=0.5, beta=0.2)


class Watching(ArpoCalibrated):
    """Forks whenever it is asked, and writes down what it was told."""

    def decide(self, probe: Probe, state: TreeState, rng: np.random.Generator) -> Decision:
        told.append(probe)
        return Decision(1, 1.0, NAN, probe.delta_h)


told: list[Probe] = []


@pytest.mark.parametrize("by", ["siblings", "delta"])
def test_what_a_policy_is_told_of_a_branch_and_its_siblings(by: str) -> None:
    told.clear()

    def script(text: str, rng: np.random.Generator) -> Segment:
        if "<result>" not in text:
            return Segment("<search> q </search>")
        return Segment(("a b c d", "a x c d", "y b c d")[rng.integers(3)], entropy=[0.5, 1.0, 1.5, 2.0, 9.0])

    world = make_world(script, policy=Watching(4, 0.5, 0.2, by=by), leaves=7, roots=1)
    tree = run(TreeRollout(world.context, PROMPT, seed=4).run())
    (result,) = np.flatnonzero(tree.kind == Kind.TOOL) if by == "siblings" else [0]
    for probe in told:
        assert probe.entropies.tolist() == [0.5, 1.0, 1.5, 2.0]
        assert probe.logprobs.tolist() == [-0.5] * 4
        assert probe.entropy == pytest.approx(1.25 / math.log(100))
    if by == "delta":  # a result is decided upon once, by the branch that called
        assert all(probe.shared == () for probe in told)
        assert len(tree.forks) == len({fork.node for fork in tree.forks})
        return
    texts = [world.text(tree.tokens[tree.start[n] :][:4]) for n in np.flatnonzero(tree.parent == result)]
    alike = {("a", "a"): 0.5, ("a", "y"): 0.0, ("y", "a"): 0.0}  # by the first letters of two that differ
    expected = [
        tuple(1.0 if one == other else alike[one[0], other[0]] for other in texts[:number])
        for number, one in enumerate(texts)
    ]
    assert [probe.shared for probe in told] == expected
    assert len(set(texts)) > 1
    assert [fork.node for fork in tree.forks] == [result] * 7
