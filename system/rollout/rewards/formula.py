"""Are two formulas equal?  ``math-verify``'s LaTeX parser reads them, and their values decide.

This runs on a rollout's event loop on what a model wrote, so it must come back at once.
``math_verify.verify`` decides by sympy's ``simplify``, which can take minutes and is stopped only by a signal
in a main thread; its ``parse`` drops signs and units.  So only its parser is used, only on what is cheap by
its look (:func:`is_formula`), and two formulas are equal when they agree at points (the Schwartz-Zippel
test): positive and negative, whole and not, so that ``|x|`` is not ``x``.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from typing import Any

MAX_FORMULA = 100
DIGITS = 120  # of what is not rational; less than 1e-100 is zero there, and 40 digits alike are equal
ENOUGH = 3  # points at which both have a value
_POINTS = [Fraction(p, 1000) for p in (1732, -2236, 5000, 618, -3000, -1414, 4000, 2718)]

_GREEK = "alpha|beta|gamma|theta|lambda|mu|phi|omega"
_FUNCTIONS = "frac|sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp|binom|[lr]floor|[lr]ceil"
_COMMAND = re.compile(rf"\\(?:({_FUNCTIONS})|pi|cdot|times|div|{_GREEK})(?![A-Za-z])")
_SYMBOL = re.compile(rf"[A-Za-z](?:_\w|_\{{\w{{1,4}}\}})?|\\(?:{_GREEK})")
_ALLOWED = re.compile(r"[0-9A-Za-z\\{}()\[\]+\-*/^_.|! ]*")
_EXPONENT = re.compile(r"\^(\{(?:[^{}^]|\{[^{}^]*\})*\}|\([^()^]*\)|\w|\\pi)")
# "3 4", "5 km", "B12", "101_2", "C++", "1.2.3": none is a formula
_NEVER = re.compile(
    r"[\w.] +\d|\d +[A-Za-z]{2}|[A-Za-z]{2,} |[A-Za-z]\d|\d_|[A-Za-z] [A-Za-z]{2}|[A-Za-z]{4}"
    r"|[-+*/^_]\s*$|[-+*/] *[+*/]|^ *[*/^_!]|\.\.|\.\d+\.|[\d ]{31}"
)
_OPERATION = re.compile(r"\\|[\^+*(|!]|\d ?[A-Za-z]|[A-Za-z] ?[-+*/]|[-/] ?[A-Za-z]")  # more than 2020-05-01
_SAME_NAME = re.findall(r"\w+", "exp log sin cos tan cot sec csc asin acos atan factorial binomial floor")
_MPMATH = {name: name for name in _SAME_NAME} | {
    "Pow": "power", "Exp1": "e", "Pi": "pi", "ImaginaryUnit": "j", "Abs": "fabs", "ceiling": "ceil"
}  # fmt: skip
_OPERAND = re.compile(r"\d|\\|[A-Za-z]\W*[A-Za-z(|]|[-|][A-Za-z]|\b[A-Za-z]!")


@lru_cache(4096)
def is_formula(text: str) -> bool:
    """Does this cleaned text read as a formula (or a symbol), rather than as a word, a range, a date or a
    reference; and is it cheap to evaluate?
    """
    if _SYMBOL.fullmatch(text):
        return True
    bare = _COMMAND.sub(r" \\\\ ", text)  # \\ stands for a command
    if len(text) > MAX_FORMULA or not _ALLOWED.fullmatch(text) or re.search(r"\\[A-Za-z{}]", bare):
        return False
    if _NEVER.search(bare) or not _OPERATION.search(bare) or not _OPERAND.search(bare):
        return False
    depths = [text[:i].count("(") - text[:i].count(")") for i in range(len(text))]  # costs the parser 2^depth
    functions = [name for name in _COMMAND.findall(text) if name]
    return max(depths) <= 3 and text.count("|") <= 6 and len(functions) <= 8 and _is_small(text, functions)


def _is_small(text: str, functions: list[str]) -> bool:
    """No number in it can have more than some ten thousand digits."""
    exponents = _EXPONENT.findall(text)
    if len(exponents) != text.count("^") or re.search("!|binom|exp", "".join(exponents)):
        return False  # a tower, or one this module cannot read
    sizes = [math.prod(max(int(n), 1) for n in re.findall(r"\d+", exponent)) for exponent in exponents]
    if max(sizes, default=1) > 2100 or (re.search(r"[)}\]|]\^", text) and math.prod(sizes) > 200):
        return False
    if "exp" in functions and ("^" in text or functions.count("exp") > 1):
        return False
    numbers, factorials = (
        [int(n) for n in re.findall(r"\d+", text)],
        text.count("!") + functions.count("binom"),
    )
    if not factorials:
        return True
    if re.search(r"[)}\]|!] *!", text) or "binom" in functions:  # of more than a number or a letter
        return "^" not in text and factorials == 1 and math.prod(n or 1 for n in numbers) <= 1000
    return max(numbers, default=0) <= 200 and factorials <= 3


@lru_cache(4096)
def equal_values(a: str, b: str, rounded: bool) -> bool:
    """Equality of two cleaned formulas or fractions; False when it cannot be decided."""
    pairs, enough = _values(a, b)
    for v, w in pairs:
        if isinstance(v, Fraction) and isinstance(w, Fraction):
            same = close(v, w, rounded)
        else:
            x, y = _complex(v), _complex(w)
            if x.imag and y.imag and "i" not in a + b and enough > 1:
                enough += 1  # outside of both domains: this point says nothing
                continue
            size = max(abs(x), abs(y))
            same = abs(x - y) <= (min(size, 1) / 10**6 if rounded else size / 10**40)
            same = same and bool(x.imag) == bool(y.imag)  # \ln x is not \ln|x|
        if not same:
            return False
    return len(pairs) >= enough


@lru_cache(4096)
def proportional(a: str, b: str) -> bool:
    """Are these the same but for a constant factor?  So y - (2x + 1) = 0 is 4x - 2y + 2 = 0."""
    pairs = [(_complex(v), _complex(w)) for v, w in _values(a, b)[0]]
    if len(pairs) < ENOUGH or any(v.imag or w.imag or not v or not w for v, w in pairs):
        return False
    return all(abs(v * pairs[0][1] - w * pairs[0][0]) <= abs(v * pairs[0][1]) / 10**40 for v, w in pairs)


def close(a: Fraction, b: Fraction, rounded: bool) -> bool:
    """Equal; or, when one is ``rounded`` and not both are whole, within 1e-6 relatively and absolutely."""
    if a == b or not rounded or (a.denominator == 1 and b.denominator == 1):
        return a == b
    return abs(a - b) <= min(max(abs(a), abs(b)), Fraction(1)) / 10**6


@lru_cache(4096)
def _parse(text: str) -> Any:
    """The sympy expression, or None.  sympy is imported at the first formula only: it takes a second."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import Expr

    if not is_formula(text) and not re.fullmatch(r"-?\d{1,90}(/\d{1,90})?", text):
        return None
    config = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    text = re.sub(r"\^\(([^()]*)\)", r"^{\1}", text)
    try:
        parsed = latex2sympy(text, is_real=True, normalization_config=None, conversion_config=config)
    except Exception:  # the parser raises Exception itself
        return None
    return parsed if isinstance(parsed, Expr) else None


def _values(a: str, b: str) -> tuple[list[tuple[Any, Any]], int]:
    """Their values (Fraction or mpmath's numbers) at points where both have one, and how many must agree."""
    x, y, n = _parse(a), _parse(b), len(_POINTS)
    if x is None or y is None:
        return [], 1
    names = sorted({str(symbol) for symbol in x.free_symbols | y.free_symbols} - {"i"})
    values: list[tuple[Any, Any]] = []
    for k in range(n if names else 1):
        # the i-th symbol walks through the points with a stride of its own, so that no two move together
        point = {
            s: _POINTS[(k * (1, 3, 5, 7)[i % 4] + i) % n] + Fraction(i // 4, 7) for i, s in enumerate(names)
        }
        with suppress(Exception):  # a pole, an overflow, a function that is not known: no value here
            values.append((_value(x, point), _value(y, point)))
    return values, ENOUGH if names else 1


@lru_cache(1)
def _mp() -> Any:
    from mpmath import MPContext

    context = MPContext()
    context.dps = DIGITS
    return context


def _value(x: Any, point: dict[str, Fraction]) -> Any:
    """``x`` at the point: exactly where it is rational (2^{1005} + 1 is not 2^{1005}), by a fixed list of
    functions at a fixed precision elsewhere.  (sympy's evalf raises its precision for ever if it must.)
    """
    if x.is_Symbol:
        return _mp().j if x.name == "i" else point[x.name]
    if x.is_Rational or x.is_Float:
        return Fraction(str(x))
    name, args = type(x).__name__, [_value(part, point) for part in x.args]
    if args and all(isinstance(arg, Fraction) for arg in args):
        if name in ("Add", "Mul"):
            return sum(args) if name == "Add" else math.prod(args)
        if name == "Pow" and args[1].denominator == 1 and abs(args[1]) <= 2100:
            return args[0] ** int(args[1])
        if name in ("factorial", "binomial") and all(n.denominator == 1 and 0 <= n <= 1000 for n in args):
            return Fraction((math.factorial if name == "factorial" else math.comb)(*map(int, args)))
        if name in ("Abs", "floor", "ceiling"):
            return Fraction({"Abs": abs, "floor": math.floor, "ceiling": math.ceil}[name](args[0]))
    mp, args = _mp(), [_real(arg) if isinstance(arg, Fraction) else arg for arg in args]
    if name in ("Add", "Mul"):
        return mp.fsum(args) if name == "Add" else mp.fprod(args)
    function = getattr(mp, _MPMATH[name])
    value = function(*args) if args else +function
    if not mp.isfinite(value):
        raise ArithmeticError(name)
    return value


def _real(value: Fraction) -> Any:
    return _mp().mpf(value.numerator) / value.denominator


def _complex(value: Any) -> Any:
    """As mpmath's complex number, with parts that are zero but for rounding made zero."""
    number = _mp().mpc(_real(value) if isinstance(value, Fraction) else value)
    return _mp().mpc(
        *(0 if abs(part) < _mp().mpf(10) ** -100 else part for part in (number.real, number.imag))
    )
