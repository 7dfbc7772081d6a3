"""Are two mathematical answers equal?  Exact arithmetic for numbers, ``math-verify`` for formulas.

Answers are written by a model, and sympy, on which ``math-verify`` rests, evaluates eagerly:
``9^{9^{9^9}}`` would never return.  Its own time limit rests on signals and works in a main thread only, so
instead only formulas that are cheap by construction reach it: short, no operators that blow up, small
exponents.  The others are equal only when written alike.
"""

from __future__ import annotations

import logging
import math
import re
from fractions import Fraction
from functools import lru_cache

from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off: see above

MAX_CHARS = 80
TOLERANCE = Fraction(1, 10**6)  # between numbers not both whole: so that 0.333333 is 1/3

_DECIMAL = r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:[eE][+-]?\d{1,2})?"
_NUMBER = re.compile(_DECIMAL)
_FRACTION = re.compile(
    rf"([+-]?)\\[dt]?frac(?:\{{({_DECIMAL})\}}\{{({_DECIMAL})\}}|(\d)(\d))"  # \frac{1}{2} or \frac12
)
_NOISE = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[,!;: ]|\\?\$|\s+")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}")
_APART = re.compile(r"\w\s+\d|\d\s+[^\W\d]")  # "3 4", "5 km": words, not one number
_DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}")

_COMMAND = re.compile(r"\\([A-Za-z]+)")
_CHEAP = frozenset(
    re.findall(
        r"\w+",
        "frac dfrac tfrac sqrt pi cdot times div pm infty circ sin cos tan cot sec csc arcsin arccos arctan "
        "log ln exp alpha beta gamma theta lambda mu phi omega leq geq le ge lt gt neq cup cap",
    )
)
_FUNCTIONS = re.compile(r"\\(?:sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp)")
_ALLOWED = re.compile(r"[0-9A-Za-z\\{}()\[\]+\-*/^_=<>.,|%°]*")
_EXPONENT = re.compile(r"(?:\^|\*\*)(\{[^{}^]*\}|\([^()^]*\)|[+-]?\w|\\[A-Za-z]+)")


def is_mathematical(text: str) -> bool:
    """A number or a formula, rather than words."""
    return parse_number(text) is not None or _formula(text) is not None


def equal(answer: str, gold: str) -> bool:
    """Equality of two mathematical answers; False when it cannot be decided cheaply and they are written
    apart.
    """
    a, b = parse_number(answer), parse_number(gold)
    if a is None or b is None:
        return _clean(answer) == _clean(gold) or _equal_formulas(answer, gold)
    if _close(a, b):
        return True
    percent_a, percent_b = _percent(answer), _percent(gold)
    return percent_a != percent_b and _close(a * 100 if percent_a else a, b * 100 if percent_b else b)


@lru_cache(4096)
def parse_number(text: str) -> Fraction | None:
    """The value of an integer, decimal, percentage or plain fraction, ASCII or LaTeX; None for anything
    else.
    """
    if len(text) > MAX_CHARS or _APART.search(text):
        return None
    text = _clean(text)
    scale = Fraction(1)
    if _percent(text):
        text, scale = text.removesuffix("%").removesuffix("\\"), Fraction(1, 100)
    if match := _FRACTION.fullmatch(text):
        sign, a, b, c, d = match.groups()
        numerator, denominator = _decimal(a or c), _decimal(b or d)
        scale = -scale if sign == "-" else scale
    else:
        above, slash, below = text.partition("/")
        numerator, denominator = _decimal(above), _decimal(below) if slash else Fraction(1)
    if numerator is None or not denominator:
        return None
    return scale * numerator / denominator


def _decimal(text: str | None) -> Fraction | None:
    if not text or not _NUMBER.fullmatch(text) or not any(c.isdigit() for c in text):
        return None
    return Fraction(text.replace(",", "").removesuffix("."))


def _clean(text: str) -> str:
    return _NOISE.sub("", _TEXT.sub(r"\1", text)).removesuffix(".")


def _percent(text: str) -> bool:
    return text.rstrip().endswith("%")


def _close(a: Fraction, b: Fraction) -> bool:
    """Equal; or, unless both are whole, within 1e-6 both relatively and absolutely."""
    if a == b:
        return True
    if a.denominator == 1 and b.denominator == 1:
        return False
    return abs(a - b) <= TOLERANCE * min(abs(b), Fraction(1))


def _formula(text: str) -> str | None:
    """``text`` cleaned, when it reads as a formula that is cheap to evaluate; None otherwise."""
    if len(text) > MAX_CHARS or _DATE.fullmatch(text.strip()):
        return None
    text = _clean(text)
    if not _ALLOWED.fullmatch(text) or not set(_COMMAND.findall(text)) <= _CHEAP:
        return None
    letters = re.findall(r"[A-Za-z]+", _COMMAND.sub(" ", text))
    if any(len(run) > 3 for run in letters) or len(set("".join(letters))) > 4:
        return None
    # a number with "-" or "/" alone is a range or a reference as often as a difference
    if not re.search(r"\\[A-Za-z]|[\^+*=(\[<>]|\d[A-Za-z]|[A-Za-z][-/]|[-/][A-Za-z]", text) or not re.search(
        r"\d|\\|[A-Za-z]\W+[A-Za-z]", text
    ):
        return None
    if len(_FUNCTIONS.findall(text)) > 4 or not _small_powers(text, bool(letters)):
        return None
    return text


def _small_powers(text: str, symbolic: bool) -> bool:
    """The product of all numbers in exponents bounds the size of what sympy would expand."""
    exponents = _EXPONENT.findall(text)
    if len(exponents) != text.count("^") + text.count("**"):  # a tower, or one this module cannot read
        return False
    product = math.prod(max(int(number), 1) for part in exponents for number in re.findall(r"\d+", part))
    return product <= (12 if symbolic else 1000)


@lru_cache(4096)
def _equal_formulas(answer: str, gold: str) -> bool:
    a, b = _formula(answer) or _plain(answer), _formula(gold) or _plain(gold)
    if a is None or b is None:
        return False
    left, right = (parse(f"${side}$", parsing_timeout=None) for side in (b, a))
    return bool(left and right) and verify(left, right, timeout_seconds=None)


def _plain(text: str) -> str | None:
    return None if parse_number(text) is None else _clean(text)
