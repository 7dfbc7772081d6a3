"""Reads one document in a process of its own: hostile bytes come in, JSON goes out, limits hold.

    python -m system.tools.browse.reading < request

A request is a line of JSON (:class:`Request`), then the document's bytes.  The answer is a JSON object:
``title``, ``text``, ``links`` and ``note``, or ``error``, for the model.  The process limits its own memory
and CPU time; whoever starts it ends it at a deadline.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import re
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from yarl import URL

from system.errors import EspalierError
from system.urls import Allowed, UrlRefused

MEMORY_BYTES = 1 << 30
CPU_S = 60
MAX_TEXT = 2_000_000  # characters of a document's text
MAX_TITLE = 300
_HTML = ("text/html", "application/xhtml+xml")
_PLAIN = ("application/json", "application/xml", "application/javascript", "application/x-ndjson")
_META = re.compile(rb"""<meta[^>]{0,300}?charset\s*=\s*["']?\s*([\w.:-]{1,40})""", re.IGNORECASE)
_BASE = re.compile(r"""<base[^>]{0,100}?href\s*=\s*["']?([^"'\s>]+)""", re.IGNORECASE)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ue000-\uf8ff\u202a-\u202e\u2066-\u2069]")
_AS_BROWSERS_DO = {"iso8859-1": "cp1252", "ascii": "cp1252", "gb2312": "gb18030", "gbk": "gb18030"}
_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class Unreadable(EspalierError, ValueError):
    """A document that cannot be made into text; the message is for the model."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be read: where it was found, as which type and charset ("" for none told), how much."""

    url: str
    content_type: str
    charset: str
    cut: bool  # there is more of it than was fetched
    pdf_pages: int
    allow: list[str]  # links elsewhere are not marked
    private: list[str]


def read(request: Request, data: bytes) -> dict[str, Any]:
    """Title, text, links and note of a document.  Raises :class:`Unreadable`."""
    kind = request.content_type
    start = data[:1024].lstrip()
    links: tuple[str, ...] = ()
    title, notes = "", list[str]()
    if request.cut:
        notes.append(f"only its first {len(data) / 1e6:.3g} MB were read")
    if kind == "application/pdf" or start.startswith(b"%PDF-"):
        if request.cut:
            raise Unreadable(
                f"the PDF is larger than {len(data) / 1e6:.3g} MB, which is the most that is read"
            )
        title, text, note = _pdf(data, request.pdf_pages)
        notes += [note] if note else []
    elif kind in _HTML or (not kind and start[:1] == b"<"):
        from system.tools.browse.html import html_text

        html = decoded(data, request.charset, declared=True)
        title, text, links = html_text(html, _follower(html, request))
    elif (
        kind.startswith("text/")
        or kind in _PLAIN
        or kind.endswith(("+json", "+xml"))
        or (not kind and b"\x00" not in start)
    ):
        text = decoded(data, request.charset)
    else:
        raise Unreadable(f"it is of type {kind or 'unknown'}, which cannot be read as text")
    text = clean(text)
    if len(text) > MAX_TEXT:
        text = text[:MAX_TEXT]
        notes.append(f"only the first {MAX_TEXT} characters of its text are shown")
    if not text.strip():
        raise Unreadable("it has no text (a page that is drawn by scripts, or scanned pictures, has none)")
    title = " ".join(clean(title).split())[:MAX_TITLE]
    return {"title": title, "text": text, "links": links, "note": "; ".join(notes)}


def decoded(data: bytes, charset: str, *, declared: bool = False) -> str:
    """``data`` as text: by its byte order mark, else the first that fits of ``charset``, what the document
    itself declares, UTF-8; else whichever of UTF-8 and Windows-1252 it looks like."""
    for mark, name in _BOMS.items():
        if data.startswith(mark):
            return data.decode(name, "replace")
    meta = _META.search(data[:2048]) if declared else None
    for name in (charset, meta.group(1).decode("ascii", "replace") if meta else "", "utf-8"):
        try:
            known = codecs.lookup(name).name if name else ""
            if known:
                return data.decode(_AS_BROWSERS_DO.get(known, known))
        except (LookupError, UnicodeError, ValueError):
            continue  # unknown, no charset of text, or not the one that this is in
    text = data.decode("utf-8", "replace")
    wrong, right = text.count("\ufffd"), sum(char > "\x7f" for char in text)
    return text if right > 2 * wrong else data.decode("cp1252", "replace")


def clean(text: str) -> str:
    """``text`` without control, private and directional characters, and without two empty lines in a row."""
    text = _CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = text.encode("utf-8", "replace").decode()  # lone surrogates
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _follower(html: str, request: Request) -> Callable[[str], str | None]:
    """Where a ``href`` of the page leads; None for what may not be opened, and for places in the page."""
    allowed, here = Allowed(request.allow, request.private), URL(request.url)
    if (match := _BASE.search(html[:20_000])) is not None:
        with contextlib.suppress(ValueError):
            here = here.join(URL(match.group(1)))

    def follow(href: str) -> str | None:
        if href.startswith(("#", "javascript:", "mailto:", "data:", "tel:")):
            return None
        try:
            url = allowed.url(str(here.join(URL(href))))
        except (UrlRefused, ValueError):
            return None
        return None if str(url) == request.url else str(url)

    return follow


def _pdf(data: bytes, most: int) -> tuple[str, str, str]:
    """Title, text and note of a PDF, of its first ``most`` pages."""
    import logging

    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("the PDF is encrypted")
        there = len(reader.pages)
        parts: list[str] = []
        size = 0
        for page in reader.pages[: min(most, there)]:
            parts.append(page.extract_text())
            size += len(parts[-1])
            if size > MAX_TEXT:
                break
        title = (reader.metadata.title if reader.metadata else "") or ""
    except Unreadable:
        raise
    except (
        PyPdfError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        ArithmeticError,
        OSError,
    ) as error:
        raise Unreadable(f"the PDF cannot be read: {type(error).__name__}") from error
    note = f"only {len(parts)} of its {there} pages were read" if len(parts) < there else ""
    return str(title), "\n\n".join(parts), note


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    request = Request(**json.loads(sys.stdin.buffer.readline()))
    try:
        answer = read(request, sys.stdin.buffer.read())
    except Unreadable as error:
        answer = {"error": str(error)}
    except (MemoryError, RecursionError) as error:
        answer = {"error": f"it is too large or too deep to be read ({type(error).__name__})"}
    sys.stdout.buffer.write(json.dumps(answer).encode())
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
