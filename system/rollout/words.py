"""Word overlap between answers, as question-answering benchmarks measure it, and the ``\\boxed{…}``
convention.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_EXACT = frozenset({"yes", "no", "noanswer"})


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space (SQuAD's answer normalisation)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(answer: str, gold: str) -> float:
    """F1 of the bags of words; yes, no and noanswer count only when they match exactly."""
    return overlap(normalize(answer).split(), normalize(gold).split())


def overlap(said: Sequence[str], meant: Sequence[str]) -> float:
    """F1 of two bags of normalised words; 1 exactly when the bags are equal and not empty."""
    if said != meant and any(len(words) == 1 and words[0] in _EXACT for words in (said, meant)):
        return 0.0
    common = sum((Counter(said) & Counter(meant)).values())
    return 2 * common / (len(said) + len(meant)) if common else 0.0


def answer_span(text: str) -> str | None:
    """What stands between the only ``<answer>`` and its ``</answer>``, in a text with as many ``<think>`` as
    ``</think>``, at least one; None when it is not so.
    """
    thinks = text.count("<think>")
    if thinks == 0 or thinks != text.count("</think>"):
        return None
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    span, closed, _ = text.partition("<answer>")[2].partition("</answer>")
    return span if closed else None


def last_boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{…}``, braces balanced; None when there is none or it never closes."""
    begin = text.rfind("\\boxed{")
    if begin < 0:
        return None
    begin += len("\\boxed{")
    depth = 1
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin:i]
    return None


def final_answer(text: str) -> str:
    """Of what a model wrote outside its thoughts (``<think> … </think>``, of which a chat template may have
    opened the first): what stands between the only ``<answer>`` and its ``</answer>``, else what follows the
    last thought that ended; the last ``\\boxed{…}`` of that, if it has one.  A thought that does not end is
    none of it: an answer in there is a draft.
    """
    first, *others = text.split("<think>")
    spoken = [first.rpartition("</think>")[2]]
    spoken += [one.rpartition("</think>")[2] for one in others if "</think>" in one]
    said = "".join(spoken)
    if said.count("<answer>") == 1 == said.count("</answer>"):
        said = said.partition("<answer>")[2].partition("</answer>")[0]
    else:
        said = spoken[-1]
    boxed = last_boxed(said)
    return (said if boxed is None else boxed).strip()
