"""How answers are written: one spelling for each sign, exact numbers, units.

Nothing here drops a sign, a bracket or a mark between digits; what has two spellings (``−`` and ``-``,
``\\dfrac`` and ``\\frac``, ``12\\,345`` and ``12345``) is given one.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

MAX_CHARS = 1000  # longer answers are not read: they are equal only when they are identical

_SIGNS = str.maketrans(
    {
        "−": "-", "–": "-", "‐": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ",
        "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "≤": r"\le ", "≥": r"\ge ", "≈": r"\approx ",
        "±": r"\pm ", "∈": r"\in ", "’": "'", "‘": "'", "“": '"', "”": '"', "\u3000": " ", "\u00a0": " ",
    }
)  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?", ""),
        (r"(?<=\d)(?:\\,|\{,\})(?=\d{3}(?!\d))", ","),
        (r"(?<!\\)\\[,!;: ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\\\(|\\\)", ""),
        (r"\\([$%&#])", r"\1"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
        (r"(?:\\sqrt|√)\s*(\d+|[A-Za-z])(?![A-Za-z])", r"\\sqrt{\1}"),
        (r"\\leq(?:slant)?(?![A-Za-z])|<=", r"\\le "),
        (r"\\geq(?:slant)?(?![A-Za-z])|>=", r"\\ge "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\l?dots(?![A-Za-z])|…", "..."),
        (r"\\varnothing(?![A-Za-z])|∅", r"\\emptyset "),
        (r"\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z])", "°"),
        (r"\*\*", "^"),
        (r"\^\s*(-?\d\d+|-\w)", r"^{\1}"),  # 2^10 is meant as 2^{10}
        (r" ?([\^_]) ?", r"\1"),
        (r"([\^_])\{ ?(\w) ?\}(?! ?\d)", r"\1\2"),  # but \log_{2}8
        (r"\s+", " "),
        (r"^([+-]?\d+) (\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
        (r"^ ?(?:\\approx|≈) ?", ""),
    )
]
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|boxed|fbox)\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"
)
_DELIMITER = re.compile(r"(?<!\\)\$")

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_DECIMAL = re.compile(
    rf"([+-]?(?:{_DIGITS}))(?:[eE]([+-]?\d{{1,2}})"
    r"|\s*(?:\\times|\\cdot|\*)\s*10(?:\^\{([+-]?\d{1,2})\}|\^(\d)))?"
)
_MIXED = re.compile(r"([+-]?)(?:(\d+) ?)?\\frac\{([^{}]+)\}\{([^{}]+)\}")  # 4 1/2 is written so by clean

_UNITS = {
    unit: name or unit
    for unit, name in re.findall(
        r"([^\s=]+)(?:=(\S+))?",
        "mm cm m km in ft yd mi mg g kg lb oz s ms min h mL L mph rad $ € £ % ° Hz J kJ kW Pa day week "
        "month year unit ml=mL millimeter=mm centimeter=cm meter=m metre=m kilometer=km kilometre=km "
        "inch=in inche=in foot=ft feet=ft yard=yd mile=mi gram=g kilogram=kg ounce=oz lbs=lb sec=s "
        "second=s minute=min mins=min hr=h hrs=h hour=h liter=L litre=L radian=rad dollar=$ USD=$ euro=€ "
        "percent=% degree=° deg=° ",
    )
}
_WORD = r"(?:[A-Za-z]+|[$€£%°])"
_POWER = r"(?:\^\{?-?\d\}?)?"
_UNIT = re.compile(
    rf"(.*?(?:[^A-Za-z\\ ]|\\pi))( ?)"
    rf"((?:(?:square|cubic) )?{_WORD}{_POWER}(?:(?: ?/ ?| per ){_WORD}{_POWER}){{0,3}})"
)
_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")  # \sin 60° is not the sine of 60


@lru_cache(4096)
def clean(text: str) -> str:
    """``text`` in one spelling: ASCII signs, no ``$…$``, ``\\left``, ``\\text{…}`` or box around it, single
    spaces, no full stop at the end.
    """
    text = unicodedata.normalize("NFC", text.strip()).translate(_SIGNS)
    text = re.sub("[\uff01-\uff5e]", lambda m: unicodedata.normalize("NFKC", m[0]), text)
    text = re.sub(
        "[¼-¾⅐-⅞]", lambda m: unicodedata.normalize("NFKC", f"\\frac{{{m[0]}}}").replace("⁄", "}{"), text
    )
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub(r"[₀-₉]+", lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    if len(_DELIMITER.findall(text)) % 2 == 0:
        text = _DELIMITER.sub("", text)
    for _ in range(4):  # \boxed{\textbf{(B)}}
        text = _WRAPPED.sub(r" \1 ", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip()
    return text[:-1].rstrip() if text.endswith(".") and len(text) > 1 and text[-2] != "." else text


def decimal(text: str) -> Fraction | None:
    """The value of an integer or decimal, with thousands' commas or a power of ten; None for others."""
    match = _DECIMAL.fullmatch(text.strip())
    if match is None:
        return None
    digits, *powers = match.groups()
    power = next((int(p) for p in powers if p), 0)
    return Fraction(digits.replace(",", "").removesuffix(".")) * Fraction(10) ** power


def number(text: str) -> Fraction | None:
    """The value of a cleaned decimal, fraction or mixed number; None for anything else."""
    value = decimal(text)
    if value is not None or len(text) > 80:
        return value if len(text) <= 80 else None
    mixed = _MIXED.fullmatch(text)
    sign, whole, above, below = mixed.groups() if mixed else ("", None, *text.partition("/")[::2])
    parts = [decimal(part) for part in (whole or "0", above, below)]
    if parts[0] is None or parts[1] is None or not parts[2] or (whole and min(parts[1], parts[2]) < 0):
        return None
    return (parts[0] + parts[1] / parts[2]) * (-1 if sign == "-" else 1)


def split_unit(text: str) -> tuple[str, str]:
    """(what is measured, its unit in one spelling, "" for none), of a cleaned text.

    Right of a number a unit may follow at once (5m); right of a formula only after a space, and a single
    letter is a symbol there, not a unit.
    """
    if text[:1] in "$€£" and number(text[1:].strip()) is not None:
        return text[1:].strip(), text[0]
    if text[:2] in ("-$", "-€", "-£") and number(text[2:]) is not None:
        return "-" + text[2:], text[1]
    match = _UNIT.fullmatch(text)
    if match is None or re.fullmatch(r"(?:1\d|20)\d0s", text):  # a decade
        return text, ""
    body, space, written = match.groups()
    unit = _unit(written)
    sure = number(body) is not None or (
        (written in "%°" or (space and len(written) > 1)) and not _ANGLE.search(body)
    )
    return (body.strip(), unit) if unit and sure else (text, "")


def _unit(written: str) -> str:
    """``m/s^2`` for "meters per second^2"; "" when a part is not a known unit."""
    written = re.sub(r"(square|cubic) ([A-Za-z]+)", lambda m: f"{m[2]}^{'23'[m[1] == 'cubic']}", written)
    parts: list[str] = []
    for part in re.split(r" ?/ ?| per ", written):
        name, _, power = part.partition("^")
        parts.append(_UNITS.get(name) or (len(name) > 3 and _UNITS.get(name.removesuffix("s"))) or "")
        if not parts[-1]:
            return ""
        parts[-1] += f"^{power.strip('{}')}" * bool(power)
    return "/".join(parts)
