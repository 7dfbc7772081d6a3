"""What a web document is once it is read, and how it is shown: by pages, or around what is looked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

MAX_LINKS = 40  # listed below a page
MAX_PASSAGES = 8  # shown of one search
AROUND = 250  # characters before and after what was found
MAX_FIND = 100  # characters of what is looked for
_MARKER = re.compile(r"\[L(\d{1,6})\]")


@dataclass(frozen=True, slots=True)
class WebDocument:
    """The text of an HTML page or a PDF.  A link stands in ``text`` as ``its words [L3]``; ``links[2]`` is
    where it leads.  ``note``: what of it was not read, "" for nothing."""

    url: str  # where it was found, after redirects
    title: str
    text: str
    links: tuple[str, ...] = ()
    note: str = ""


def pages(text: str, size: int) -> list[str]:
    """``text`` in pieces of at most ``size`` characters, which joined are ``text``: cut at the end of a
    paragraph, a line or a word in the piece's last half, if there is one.  At least one piece."""
    pieces: list[str] = []
    start = 0
    while len(text) - start > size:
        end = start + size
        for mark in ("\n\n", "\n", " "):
            if (cut := text.rfind(mark, start + size // 2, end)) >= 0:
                end = cut + len(mark)
                break
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def shown_page(document: WebDocument, number: int, size: int) -> str:
    """Page ``number`` (from 1) as the model reads it.  Raises ValueError for one that is not there."""
    pieces = pages(document.text, size)
    if not 1 <= number <= len(pieces):
        raise ValueError(f"there is no page {number}; the document has {_counted(len(pieces), 'page')}")
    piece = pieces[number - 1]
    head = [document.title, document.url, f"page {number} of {len(pieces)}", document.note]
    return "\n".join(line for line in head if line) + f"\n\n{piece.strip()}" + _listed(piece, document.links)


def shown_passages(document: WebDocument, find: str, first: int, size: int) -> str:
    """The passages around ``find``, white space and case aside, from page ``first`` on: at most
    ``MAX_PASSAGES``, and about as long as a page.  Raises ValueError for a page that is not there."""
    pieces = pages(document.text, size)
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    if not 1 <= first <= len(pieces):
        raise ValueError(f"there is no page {first}; the document has {_counted(len(pieces), 'page')}")
    spans = found(document.text, find, starts[first - 1])
    where = f"{_counted(len(pieces), 'page')}" + (f", from page {first} on" if first > 1 else "")
    head = "\n".join(line for line in (document.title, document.url, document.note) if line)
    if not spans:
        return f"{head}\nno match for {find!r} in {where}"
    passages: list[str] = []
    room = size
    for number, (start, end) in enumerate(windows(spans, len(document.text))):
        page = _page_of(starts, spans_in(spans, start, end)[0])
        room -= end - start
        if number == MAX_PASSAGES or (number and room < 0):
            passages.append(f"further matches from page {page} on")
            break
        passages.append(f"[page {page}] …{document.text[start:end].strip()}…")
    told = "\n\n".join(passages)
    matches = _counted(len(spans), "match", "es")
    return f"{head}\n{matches} for {find!r} in {where}\n\n{told}" + _listed(told, document.links)


def found(text: str, find: str, start: int = 0) -> list[tuple[int, int]]:
    """Where ``find`` stands in ``text`` from ``start`` on: (first character, behind the last)."""
    pattern = re.compile(r"\s+".join(map(re.escape, _lowered(find).split())))
    return [match.span() for match in pattern.finditer(_lowered(text), start)]


def _lowered(text: str) -> str:
    """``text`` in small letters, each where it stood: of all letters, only İ has a small form of two."""
    return text.replace("İ", "I").lower()


def windows(spans: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """``spans`` with ``AROUND`` characters on either side; those that meet are one."""
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        low, high = max(0, start - AROUND), min(length, end + AROUND)
        if merged and low <= merged[-1][1] and high - merged[-1][0] <= 8 * AROUND:
            merged[-1] = (merged[-1][0], high)
        else:
            merged.append((low, high))
    return merged


def spans_in(spans: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """The beginnings of those ``spans`` that lie within ``start`` and ``end``."""
    return [first for first, last in spans if start <= first and last <= end]


def _page_of(starts: Sequence[int], position: int) -> int:
    """The page, from 1, that begins last at or before ``position``."""
    return max(number for number, start in enumerate(starts[:-1], 1) if start <= position)


def _listed(text: str, links: Sequence[str]) -> str:
    """The links whose markers stand in ``text``, one a line."""
    numbers = dict.fromkeys(int(marker) for marker in _MARKER.findall(text))
    there = [number for number in numbers if 1 <= number <= len(links)]
    lines = [f"[L{number}] {links[number - 1]}" for number in there[:MAX_LINKS]]
    if len(there) > MAX_LINKS:
        lines.append(f"({len(there) - MAX_LINKS} more links on this page are not listed)")
    return "\n\nLinks:\n" + "\n".join(lines) if lines else ""


def _counted(count: int, word: str, plural: str = "s") -> str:
    return f"{count} {word}{plural if count != 1 else ''}"
