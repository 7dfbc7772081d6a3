"""Are two answers equal?  Decided part by part; a false "equal" is worse than a false "not equal".

:func:`equal` is symmetric and reflexive.  In order: identical; words, where neither side has a digit, an
operator or LaTeX (only there may punctuation, case, accents and articles go); choices; structures (sets,
lists, intervals and their unions, matrices, equations, inequalities), whose parts are compared in turn;
numbers with units, exactly; formulas, by value (:mod:`system.rollout.rewards.formula`).  What is none of
these (a date, a version, a time of day) is equal only when it is written alike.  ``docs/limits.md`` says
what cannot be decided.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from system.rollout.rewards.formula import close, equal_values, is_formula, proportional
from system.rollout.rewards.notation import MAX_CHARS, clean, number, split_unit

# an operator, LaTeX, a sign, a product's minus (ad-bc), a call (ln(x)), a factorial (n!), a negation (!A);
# but not the hyphen of "New-York", the apostrophe of "boys'", the brackets of "boy(s)", the mark of "Yahoo!"
_OPERATOR = re.compile(
    r"[\\*/_#@%{}\[\]]|(?<![^\W\d_])-|-(?![^\W\d_])"
    r"|\b[^\W\d_]{1,3}-[^\W\d_]{1,2}\b|\b[^\W\d_]{1,2}-[^\W\d_]{3}\b|\b[^\W\d_](?:'(?!\w)|!)|[^\W\d_]\((?!\W?e?s\))|![^\W\d_]"
)
_ARTICLE = re.compile(
    r"(?:^(?:the|an|a(?!\s+(?:minor|major|flat|sharp)\b))|\b(?:the|an))\s+(?=\w{2})", re.IGNORECASE
)
_NUMERALS = {
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12",
}  # fmt: skip
_CHOICE = re.compile(r"\(?([A-J])(?:[).:]|\))?")
_CHOSEN = re.compile(r"(?:\(([A-J])\)|([A-J])(?:[):]|\.(?! [a-z]| \w\.))) .*")  # not E. coli, J. K. Rowling
_MATRIX = re.compile(r"\\begin ?\{([pbB]?matrix)\}(.*)\\end ?\{\1\}")
_LABEL = re.compile(
    r"[A-Za-z](?:_\w|_\{\w{1,4}\})?(?:\([A-Za-z](?:, ?[A-Za-z])*\))?|\\(?:alpha|beta|theta|lambda|mu|phi)"
)
_RELATION = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\in(?![A-Za-z])|[=<>]")
_UNION = re.compile(r"\\cup(?![A-Za-z])|(?<![A-Za-z\\])or(?![A-Za-z])")
_AND = r"(?:[,;] ?)?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
_COMMA = re.compile(rf"{_AND}|[,;]")
_THOUSANDS = re.compile(rf"{_AND}|;|(?<!\d),|,(?!\d{{3}}(?!\d))")  # 12,345 is one number
_INEQUALITY = re.compile(r"[<>]|\\[lg]e(?![A-Za-z])")
_BRACKETED = re.compile(r"(\\?\{(?=.*\}$)|[(\[](?!.*\}$))(.*?)(\\?\}|[)\]])")
MAX_FORMULAS = 250  # characters of an answer with formulas: to parse one takes up to 0.1 s
MAX_DEPTH = 6
MAX_PARTS = 40


@dataclass(frozen=True)
class _Part:
    """What an answer is.  ``kind``: "value" (``text``, ``unit``), "=" (two parts), "union", "matrix", "list",
    "set", or an opening and a closing bracket.  ``label``: x of "x = …" and of "x < 5".
    """

    kind: str
    parts: tuple[_Part, ...] = ()
    text: str = ""
    unit: str = ""
    label: str = ""


def equal(answer: str, gold: str) -> bool:
    """Are these two answers the same?"""
    if answer == gold:
        return True
    if max(len(answer), len(gold)) > MAX_CHARS:
        return False
    a, b = clean(answer), clean(gold)
    if _canonical(a) == _canonical(b):
        return True
    if not is_strict(a) and not is_strict(b):
        return _choices(a, b) or (bool(words(a)) and words(a) == words(b) and _cases_agree(a, b))
    if _choices(a, b) or _ratio(a, b) or _ratio(b, a):
        return True
    x, y = (_alone(_read(_NUMERALS.get(text.lower(), text))) for text in (a, b))
    return x is not None and y is not None and _same(x, y)


def is_mathematical(text: str) -> bool:
    """A number, a formula or a structure of them, rather than words or a quantity."""
    text = clean(text) if len(text) <= MAX_CHARS else ""
    part = _read(text)
    if part is None or _CHOICE.fullmatch(text) or part.unit.isalpha():
        return False
    return part.kind != "value" or len(part.text) > 1 or part.text.isdigit()


def parse_number(text: str) -> Fraction | None:
    """The value of an integer, decimal, percentage, mixed number or plain fraction, ASCII or LaTeX; None for
    anything else.
    """
    if len(text) > MAX_CHARS:
        return None
    body, unit = split_unit(clean(text))
    value = number(body) if unit in ("", "%", "$", "°") else None
    return value / 100 if value is not None and unit == "%" else value


def is_strict(text: str) -> bool:
    """Has it digits, operators or LaTeX, so that no mark in it may be dropped?"""
    return _OPERATOR.search(text) is not None or any(unicodedata.category(c)[0] in "NS" for c in text)


def _canonical(text: str) -> str:
    """Without spaces that do not separate, without case in words of four letters and more."""
    if is_strict(text):  # but "1, 234" is not 1,234
        text = re.sub(r"(?<=[^\w,;:.]) | (?=[^\w.])|(?<=[,;:.]) (?!\d)", "", text)
    short = r"|[A-Z]?[a-z]{2,}" if re.fullmatch(r"[\w ,.:;'-]*", text) else ""
    caseless = rf"(?<!\\)\b(?:[^\W\d_]{{4,}}|[AaPp][Mm]{short})\b"
    return re.sub(caseless, lambda word: word[0].casefold(), text)


def words(text: str) -> list[str]:
    """Without case, accents of Latin letters, articles and punctuation (unless there is nothing else)."""
    text = unicodedata.normalize("NFKD", text.replace("&", " and ").casefold())
    text = re.sub(r"(?<=[a-z])[\u0300-\u036f]+", "", text)
    if any(c.isalpha() for c in text):
        text = re.sub(r"[.'\-]", "", text)
        text = "".join(" " if unicodedata.category(c)[0] == "P" else c for c in text)
    return _ARTICLE.sub("", " ".join(text.split())).split()


def _cases_agree(a: str, b: str) -> bool:
    """No word of one or two letters is written in two ways with capitals: CO is not Co, mW not MW."""
    spelt = [_short_words(text) for text in (a, b)]
    return all(spelt[0][word] & spelt[1][word] for word in spelt[0].keys() & spelt[1].keys())


def _short_words(text: str) -> dict[str, set[str]]:
    """Without case -> as written, of those with a capital; none in a text that has nothing else."""
    found = re.findall(r"[^\W\d_]+", text)
    spelt: dict[str, set[str]] = {}
    for word in found if len(found) == 1 or not text.isupper() else ():
        if len(word) <= 2 and word != word.lower():
            spelt.setdefault(word.casefold(), set()).add(word)
    return spelt


def _choices(a: str, b: str) -> bool:
    """(A), "A)" and "A" are one; so is "A. what it says", when the other side is the letter alone."""
    x, y = _CHOICE.fullmatch(a), _CHOICE.fullmatch(b)
    if x and y:
        return x[1] == y[1]
    letter, chosen = (x, _CHOSEN.fullmatch(b)) if x else (y, _CHOSEN.fullmatch(a))
    return letter is not None and chosen is not None and letter[1] in chosen.groups()


def _ratio(a: str, b: str) -> bool:
    """3:4 is the fraction 3/4 of the same terms (but not 6:8, which may be a time)."""
    terms = re.fullmatch(r"(\d+) ?: ?(\d+)", a)
    return terms is not None and b in (f"{terms[1]}/{terms[2]}", rf"\frac{{{terms[1]}}}{{{terms[2]}}}")


@lru_cache(4096)
def _read(text: str, depth: int = 0) -> _Part | None:
    """The structure of a cleaned text; None when it has none that is understood."""
    text = text.strip()
    if not text or depth > MAX_DEPTH or not _balanced(text):
        return None
    if len(text) > MAX_FORMULAS and re.search("[A-Za-z]", text):
        return None
    body, unit = split_unit(text)
    if number(body) is not None:
        return _Part("value", text=body, unit=unit)
    if match := _MATRIX.fullmatch(text):
        rows = [f"[{row.replace('&', ';')}]" for row in re.split(r"\\\\", match[2]) if row.strip()]
        return _all("matrix", rows, depth)
    if _INEQUALITY.search(text) and (len(pieces := _split(text, _UNION)) > 1 or _COMMA.search(text)):
        return _all("union", pieces, depth) if len(pieces) > 1 else None
    if len(pieces := _split(text, _THOUSANDS)) > 1:
        return _list(_all("list", pieces, depth))
    if len(pieces := _split(text, _UNION)) > 1:
        return _all("union", pieces, depth)
    if (match := _BRACKETED.fullmatch(text)) and _balanced(match[2]):
        pieces = _split(match[2], _COMMA)
        if match[1] + match[3] == "()" and len(pieces) == 1:
            return _read(match[2], depth + 1)
        return _all("set" if match[1][-1] == "{" else match[1] + match[3], pieces, depth)
    if _RELATION.search(text):
        return _relation(text, depth)
    if text.count("\\pm") == 1:
        left, _, right = text.partition("\\pm")
        return _all("set", [f"{left}{sign}{right.strip()}".removeprefix("+") for sign in "+-"], depth)
    if not is_formula(body):
        body, unit = text, ""
    known = is_formula(body) or body in ("\\infty", "-\\infty", "+\\infty")
    return _Part("value", text=body.removeprefix("+"), unit=unit) if known else None


def _all(kind: str, texts: Sequence[str], depth: int) -> _Part | None:
    parts = tuple(part for text in texts[: MAX_PARTS + 1] if (part := _read(text, depth + 1)) is not None)
    return _Part(kind, parts) if 0 < len(parts) == len(texts) <= MAX_PARTS else None


def _alone(part: _Part | None) -> _Part | None:
    """5 for {5}."""
    return part.parts[0] if part and part.kind == "set" and len(part.parts) == 1 and not part.label else part


def _list(part: _Part | None) -> _Part | None:
    if part is None or not part.parts[0].label or any(other.label for other in part.parts[1:]):
        return part
    first, *others = part.parts  # n = 1, 2, 3
    return replace(part, parts=(replace(first, label=""), *others), label=first.label)


def _relation(text: str, depth: int) -> _Part | None:
    signs = [match[0] for match in _RELATION.finditer(text)]
    sides = [side.strip() for side in _RELATION.split(text)]
    if signs[0] in (">", "\\ge") or (signs == ["="] and not _LABEL.fullmatch(sides[0])):
        sides.reverse()  # written with < from here on, and with the name on the left
        signs = [{">": "<", "\\ge": "\\le", "=": "="}.get(sign, "?") for sign in reversed(signs)]
    named = _LABEL.fullmatch(sides[0]) is not None
    if signs in (["="], ["\\in"]) and named:
        part = _read(sides[1], depth + 1)
        return replace(part, label=sides[0].replace(" ", "")) if part is not None and not part.label else None
    if signs == ["="]:
        return _all("=", sides, depth)
    if not set(signs) <= {"<", "\\le"}:
        return None
    if len(sides) == 2 and named:  # x < 5
        sides, signs = ["-\\infty", *sides], ["<", *signs]
    elif len(sides) == 2:  # 5 < x
        sides, signs = [*sides, "\\infty"], [*signs, "<"]
    if len(sides) != 3 or not _LABEL.fullmatch(sides[1]):
        return None
    kind = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    part = _all(kind, sides[::2], depth)
    return replace(part, label=sides[1]) if part is not None else None


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """At the separators outside of brackets; [text] when there is none."""
    pieces, begin = list[str](), 0
    for match in separator.finditer(text):
        if _balanced(text[begin : match.start()]):
            pieces.append(text[begin : match.start()])
            begin = match.end()
    return [*pieces, text[begin:]]


def _balanced(text: str) -> bool:
    """Every bracket closes, by a round or a square one for either: [0, 1)."""
    level = 0
    for char in text:
        level += (char in "([{") - (char in ")]}")
        if level < 0:
            return False
    return level == 0


def _same(a: _Part, b: _Part) -> bool:
    if (a.label and b.label and a.label != b.label) or "=" in (a.kind, b.kind):
        x, y = _difference(a), _difference(b)
        return bool(x and y) and proportional(x, y)
    kinds = {a.kind, b.kind}
    if kinds == {"value"}:
        return _same_value(a, b)
    if kinds in ({"set"}, {"set", "list"}, {"union"}):
        return len(a.parts) == len(b.parts) and _cover(a.parts, b.parts) and _cover(b.parts, a.parts)
    x, y = (_ordered(part) if _named(part) else part.parts for part in (a, b))
    if _named(a) and _named(b):
        x, y = (sorted(parts, key=lambda p: p.label) for parts in (x, y))
    # "2, 5" is not (2, 5), which may be an interval; three parts or names leave no doubt
    if len(x) != len(y) or (len(kinds) > 1 and kinds != {"list", "()"}):
        return False
    if len(kinds) > 1 and len(x) < 3 and not (_named(a) or _named(b)):
        return False
    return all(_same(p, q) for p, q in zip(x, y, strict=True))


def _named(part: _Part) -> bool:
    labels = [p.label for p in part.parts]
    return all(labels) and len(set(labels)) == len(labels)


def _ordered(part: _Part) -> Sequence[_Part]:
    """As a point has them: x, y and z by the alphabet, other names as they are written."""
    coordinates = {p.label for p in part.parts} <= {"x", "y", "z"}
    return sorted(part.parts, key=lambda p: p.label) if coordinates else part.parts


def _cover(a: Sequence[_Part], b: Sequence[_Part]) -> bool:
    return all(any(_same(x, y) for y in b) for x in a)


def _difference(part: _Part) -> str:
    """What an equation says is zero; "" when it is none between two formulas."""
    if part.kind == "value" and part.label and not part.unit:
        return f"{part.label}-({part.text})"
    if part.kind == "=" and all(p.kind == "value" and not p.unit for p in part.parts):
        return f"{part.parts[0].text}-({part.parts[1].text})"
    return ""


def _same_value(a: _Part, b: _Part) -> bool:
    """A missing unit is forgiven, another one is not; 5% is 5 and is 0.05."""
    if a.unit != b.unit and a.unit and b.unit:
        return False
    x, y, rounded = number(a.text), number(b.text), "." in a.text + b.text
    if x is None or y is None:  # a number goes to the parser as an exact fraction
        one, other = sorted((a.text if x is None else str(x), b.text if y is None else str(y)))
        return one == other or equal_values(one, other, rounded)
    p, q = (x / 100 if a.unit == "%" else x), (y / 100 if b.unit == "%" else y)
    return close(x, y, rounded) or (a.unit != b.unit and close(p, q, True))
