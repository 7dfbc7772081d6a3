from __future__ import annotations

import numpy as np
import pytest

from system.learn.credit import ESTIMATORS, advantages, is_hard

NAN = float("nan")


def _of(name: str, *groups: list[float]) -> list[list[float]]:
    return [a.tolist() for a in advantages(name, [np.array(g) for g in groups])]


def test_grpo_divides_by_the_unbiased_standard_deviation() -> None:
    (a,) = advantages("grpo", [np.array([1, 0, 0, 1], np.float32)])
    std = np.sqrt(1 / 3)  # Σ(r-½)² / (4-1)
    np.testing.assert_allclose(a, np.array([0.5, -0.5, -0.5, 0.5]) / (std + 1e-6), rtol=1e-6)
    assert a.dtype == np.float32


def test_the_two_arpo_estimators_are_grpo_on_leaves() -> None:
    groups = [[1.1, 0.0, -1.0, 0.4], [0.2, 0.9]]
    assert _of("arpo-soft", *groups) == _of("arpo-hard", *groups) == _of("grpo", *groups)
    assert [name for name in ESTIMATORS if is_hard(name)] == ["arpo-hard"]


def test_rloo_is_each_leaf_against_the_mean_of_the_others() -> None:
    r = np.array([1.0, 0.25, 0.0, -1.0])
    expected = [r[i] - np.delete(r, i).mean() for i in range(4)]
    np.testing.assert_allclose(_of("rloo", r.tolist())[0], expected, rtol=1e-6)


def test_dr_grpo_only_centres() -> None:
    first, second = _of("dr-grpo", [3.0, 1.0], [2.0, 2.0, 5.0])
    assert first == [1.0, -1.0]
    assert second == [-1.0, -1.0, 2.0]


def test_reinforce_plus_plus_whitens_over_the_batch() -> None:
    groups = [[3.0, 1.0], [0.0, 0.0, 6.0], [5.0]]
    pooled = np.array([1.0, -1.0, -2.0, -2.0, 4.0])
    scale = np.sqrt(pooled.var(ddof=1) + 1e-8)
    first, second, alone = _of("reinforce++", *groups)
    np.testing.assert_allclose(first + second, pooled / scale, rtol=1e-6)
    assert alone == [0.0]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_unscored_leaves_get_zero_and_do_not_count(name: str) -> None:
    with_gaps = _of(name, [1.0, NAN, 0.0, NAN], [NAN, NAN], [0.5, 0.25, NAN])
    without = _of(name, [1.0, 0.0], [], [0.5, 0.25])
    assert with_gaps == [[without[0][0], 0.0, without[0][1], 0.0], [0.0, 0.0], [*without[2], 0.0]]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_lone_leaf_and_equal_rewards_say_nothing(name: str) -> None:
    groups = [[0.7], [0.1, 0.1, 0.1], [1.0, 0.0]]
    alone, equal, mixed = _of(name, *groups)
    assert alone == [0.0]
    assert equal == [0.0, 0.0, 0.0]  # exactly, though the mean of three 0.1 is not 0.1 in binary
    assert mixed[0] > 0 > mixed[1]
    assert _of(name, [0.7], [0.1, 0.1]) == [[0.0], [0.0, 0.0]]
    assert advantages(name, []) == []


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_group_sums_to_zero(name: str) -> None:
    rng = np.random.default_rng(0)
    for a in advantages(name, [rng.normal(size=n).astype(np.float32) for n in (2, 5, 16)]):
        assert abs(a.sum()) < 1e-5


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean 'arpo-soft'"):
        advantages("arpo-sof", [])
    with pytest.raises(ValueError, match=r"known: grpo, arpo-soft"):
        is_hard("zzz")


def test_an_infinite_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="infinite"):
        advantages("grpo", [np.array([np.inf, 0.0])])
