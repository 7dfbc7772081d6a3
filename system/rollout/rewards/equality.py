"""Are two mathematical answers equal?  Exact arithmetic for numbers, ``math-verify``'s parser for formulas.

Answers are written by a model, and this runs on a rollout's event loop, so it must come back whatever it is
given. Two things would not: sympy evaluates eagerly (``9^{9^{9^9}}``), hence only short formulas with small
exponents and no sums, factorials or integrals are parsed at all; and sympy's simplification, by which
``math_verify.verify`` decides, can take minutes even on those (and its time limit needs signals, hence a
main thread).  Formulas are therefore compared by value: equal at random points (the Schwartz-Zippel test) is
equal.  What cannot be parsed here is equal only when it is written alike.
"""

from __future__ import annotations

import logging
import math
import re
from fractions import Fraction
from functools import lru_cache

import sympy
from math_verify import parse

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off: see above

MAX_CHARS = 80
DIGITS = 30  # to which formulas are evaluated
_POINTS = [sympy.Rational(p, q) for p, q in ((618, 1000), (1732, 1000), (2236, 1000))]
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
        "log ln exp alpha beta gamma theta lambda mu phi omega leq geq le ge lt gt neq",
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
    return abs(a - b) <= TOLERANCE * min(max(abs(a), abs(b)), Fraction(1))


def _formula(text: str) -> str | None:
    """``text`` cleaned, when it reads as a formula that is cheap to evaluate; None otherwise."""
    if len(text) > MAX_CHARS or _APART.search(text) or _DATE.fullmatch(text.strip()):
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
    a, b = _parse(answer), _parse(gold)
    if a is None or b is None:
        return False
    if isinstance(a, sympy.Eq) and isinstance(a.lhs, sympy.Symbol) and isinstance(b, sympy.Expr):
        a = a.rhs  # "x = 5" answers "5"
    try:
        return _same(a, b)
    except (ArithmeticError, ValueError, TypeError, RecursionError):  # sympy, on what has no value
        return False


@lru_cache(4096)
def _parse(text: str) -> sympy.Basic | None:
    cheap = _formula(text) or (_clean(text) if parse_number(text) is not None else None)
    if cheap is None:
        return None
    parsed = parse(f"${cheap}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]  # None: no limit
    return parsed[0] if parsed and isinstance(parsed[0], sympy.Basic) else None


def _same(a: sympy.Basic, b: sympy.Basic) -> bool:
    """Equal as expressions; tuples, intervals and equations part by part, sets in any order."""
    if a == b:
        return True
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return _same_value(a, b)
    if type(a) is not type(b) or len(a.args) != len(b.args):
        return False
    if isinstance(a, sympy.FiniteSet):
        return all(any(_same(x, y) for y in b.args) for x in a.args) and all(
            any(_same(x, y) for x in a.args) for y in b.args
        )
    return bool(a.args) and all(_same(x, y) for x, y in zip(a.args, b.args, strict=True))


def _same_value(a: sympy.Expr, b: sympy.Expr) -> bool:
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    for point in _POINTS if symbols else _POINTS[:1]:
        values = [(symbol, point + sympy.Rational(i, 7)) for i, symbol in enumerate(symbols)]
        x, y = a.subs(values).doit().evalf(DIGITS), b.subs(values).doit().evalf(DIGITS)
        for left, right in zip(x.as_real_imag(), y.as_real_imag(), strict=True):
            if not (left.is_finite and right.is_finite and _close(_exact(left), _exact(right))):
                return False
    return True


def _exact(value: sympy.Basic) -> Fraction:
    return Fraction(str(sympy.Rational(value)))
