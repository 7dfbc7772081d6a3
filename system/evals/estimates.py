"""What samples say of a share, and how surely."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

_Z = 1.959964  # of the normal distribution: 95 % lie within
# Student's t, 0.975 quantile, by degrees of freedom (from 1).
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
         2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
         2.045, 2.042)  # fmt: skip


def interval(share: float, questions: int) -> tuple[float, float]:
    """The 95 % interval of a mean over ``questions`` of values in [0, 1]: E. B. Wilson, Probable
    Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927).

    Exact for one answer a question.  For several it is too wide rather than too narrow: a mean of answers
    varies less from question to question than a single one.  NaN twice without a question.
    """
    if not questions or math.isnan(share):
        return math.nan, math.nan
    scale = 1 + _Z**2 / questions
    middle = (share + _Z**2 / (2 * questions)) / scale
    half = _Z * math.sqrt(share * (1 - share) / questions + _Z**2 / (4 * questions**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def half_width(values: ArrayLike) -> float:
    """Of the 95 % interval of a mean, by Student's t; NaN of fewer than two values.

    Of more than 31, t by the first term of its expansion: 0.2 % off at most.
    """
    x = np.asarray(values, np.float64)
    if x.size < 2:
        return math.nan
    t = _T975[x.size - 2] if x.size - 1 <= len(_T975) else _Z * (1 + (_Z**2 + 1) / (4 * (x.size - 1)))
    return float(t * x.std(ddof=1) / math.sqrt(x.size))


def pass_at(k: int, right: int, samples: int) -> float:
    """The probability that one of ``k`` answers is right, of which ``right`` of ``samples`` were.

    1 - C(n - c, k) / C(n, k), unbiased for answers drawn independently: M. Chen and others, Evaluating Large
    Language Models Trained on Code (arXiv 2107.03374), section 2.1.  Raises ValueError unless
    0 <= right <= samples and 1 <= k <= samples.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(f"{right} right of {samples} samples say nothing of pass@{k}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def looks(samples: int) -> list[int]:
    """The k of pass@k that so many samples are told by: powers of two from 2 on, and all of them."""
    powers = [2**power for power in range(1, samples.bit_length()) if 2**power <= samples]
    return sorted({*powers, samples} - {0, 1})


def majority(answers: Sequence[tuple[str | None, bool]]) -> float:
    """The probability that the most frequent answer is right, drawn among those that are equally frequent.

    ``answers``: text and whether it is right.  Texts vote as equals when they differ by case and white space
    only; an answer without a text votes for nothing.  Equal texts that a judge graded differently count by
    their mean.  0 where nothing was voted for.
    """
    votes: defaultdict[str, list[bool]] = defaultdict(list)
    for text, right in answers:
        if text is not None:
            votes[" ".join(text.casefold().split())].append(right)
    if not votes:
        return 0.0
    most = max(Counter({text: len(each) for text, each in votes.items()}).values())
    leading = [sum(each) / len(each) for each in votes.values() if len(each) == most]
    return sum(leading) / len(leading)
