"""Gold answers in the forms they come in: what a right answer would say, as texts.

``… #### 12`` (GSM8K) and ``\\boxed{12}`` (MATH) name the answer in a longer text; ``["Rome", "Roma"]`` may be
a list, or its text; ``{"target": […]}`` is Search-R1's; 12.0 is what pandas makes of a 12.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from system.rollout.words import last_boxed

_HELD = ("target", "ground_truth", "golden_answers", "answers", "answer", "value", "text", "content")
_QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_PRINTED = re.compile(rf"\[\s*(?:{_QUOTED})(?:[,\s]+(?:{_QUOTED}))*\s*,?\s*\]")  # by Python or by numpy
_DEPTH = 4


def gold_answers(value: Any) -> tuple[str, ...]:
    """The accepted answers in ``value``, without repeats.  Raises ValueError with the reason for none."""
    found = tuple(dict.fromkeys(text for text in _texts(value, 0) if text))
    if not found:
        raise ValueError("empty")
    return found


def is_missing(value: Any) -> bool:
    """Whether a column says nothing: null, pandas' NaN, an empty text or list."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or value in ("", [], {})


def _texts(value: Any, depth: int) -> Iterable[str]:
    if depth > _DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, depth + 1)
    elif isinstance(value, Mapping):
        key = next((key for key in _HELD if not is_missing(value.get(key))), None)
        if key is None:
            raise ValueError(f"expected a text or a number, found an object of {', '.join(map(str, value))}")
        yield from _texts(value[key], depth + 1)
        yield from _texts(value.get("aliases") or [], depth + 1)  # TriviaQA
    elif isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise ValueError(f"expected a text or a number, found {type(value).__name__}")
    elif isinstance(value, str):
        yield from _of_text(value.strip(), depth)
    elif not math.isfinite(value):
        raise ValueError(f"{value} is no answer")
    else:
        whole = not isinstance(value, int) and value == int(value) and abs(value) < 2**53
        yield str(int(value) if whole else value)


def _of_text(text: str, depth: int) -> Iterable[str]:
    if text[:1] == "[" and text[-1:] == "]":
        try:
            items = json.loads(text)
        except (ValueError, RecursionError):
            quoted = re.findall(_QUOTED, text) if _PRINTED.fullmatch(text) else []
            items = [re.sub(r"\\(['\"\\])", r"\1", one[1:-1]) for one in quoted]
        if items and all(isinstance(item, str) for item in items):  # but [1, 2] is an answer
            yield from _texts(items, depth + 1)
            return
    if text[:1] == "{" and text[-1:] == "}":
        try:
            held = json.loads(text)
        except (ValueError, RecursionError):
            held = None
        if isinstance(held, dict) and not is_missing(held.get("target") or held.get("ground_truth")):
            yield from _texts(held, depth + 1)
            return
    if boxed := (last_boxed(text) or "").strip():
        yield boxed
        return
    _, marked, last = text.rpartition("####")
    yield last.strip() if marked and last.strip() and "\n" not in last.strip() else text
