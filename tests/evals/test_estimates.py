"""pass@k against counting, maj@k against voting by hand, intervals against their equation."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from system.evals.estimates import half_width, interval, looks, majority, pass_at


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(
    answers: list[bool], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(answers)))
    subsets = list(itertools.combinations(answers, k))
    share = sum(any(one) for one in subsets) / len(subsets)
    assert pass_at(k, sum(answers), len(answers)) == pytest.approx(share)


def test_what_says_nothing_of_pass_at_k_is_refused() -> None:
    for k, right, samples in ((0, 1, 2), (3, 1, 2), (1, 3, 2), (1, -1, 2)):
        with pytest.raises(ValueError, match="say nothing of pass@"):
            pass_at(k, right, samples)


def test_the_looks_at_so_many_samples() -> None:
    assert [looks(n) for n in (1, 2, 3, 8, 12)] == [[], [2], [2, 3], [2, 4, 8], [2, 4, 8, 12]]


@given(st.integers(1, 5000), st.floats(0, 1))
def test_the_interval_holds_the_shares_that_are_not_refused(questions: int, share: float) -> None:
    """Wilson's bounds solve |share - p| = z·sqrt(p(1-p)/n)."""
    low, high = interval(share, questions)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for bound in (low, high):
        far = 1.959964 * math.sqrt(bound * (1 - bound) / questions)
        assert abs(share - bound) == pytest.approx(far, abs=1e-6) or bound in (0, 1)


def test_no_question_has_no_interval() -> None:
    assert all(math.isnan(one) for pair in (interval(0.5, 0), interval(math.nan, 9)) for one in pair)


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ([("4", True), (" 4 ", True), ("5", False)], 1.0),
        ([("5", False), ("Five", False), ("FIVE", False), ("4", True)], 0.0),
        ([("4", True), ("5", False)], 0.5),  # two lead: drawn
        ([(None, False), (None, False), ("4", True)], 1.0),  # no text, no vote
        ([(None, False)], 0.0),
        ([("4", True), ("4", False)], 0.5),  # a judge that is of two minds
    ],
)
def test_the_most_frequent_answer_counts(answers: list[tuple[str | None, bool]], found: float) -> None:
    assert majority(answers) == found


@pytest.mark.parametrize(
    ("count", "t"), [(2, 12.706), (31, 2.0423), (32, 2.0395), (41, 2.0211), (1000, 1.9623)]
)
def test_the_width_of_a_mean_is_students(count: int, t: float) -> None:
    values = [float(number % 7) for number in range(count)]
    mean = sum(values) / count
    error = math.sqrt(sum((one - mean) ** 2 for one in values) / (count - 1) / count)
    assert half_width(values) == pytest.approx(t * error, rel=2e-3)
    assert math.isnan(half_width(values[:1]))
