"""HTML to text that reads well: headings, lists and tables kept, scripts, styles and navigation left out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from selectolax.lexbor import LexborHTMLParser, LexborNode

MAX_LINKS = 5000  # of one document
MAX_INDENT = 8  # lists within lists
_DROPPED = frozenset(
    [
        "script",
        "style",
        "noscript",
        "template",
        "svg",
        "math",
        "iframe",
        "object",
        "embed",
        "canvas",
        "audio",
        "video",
        "head",
        "nav",
        "footer",
        "aside",
        "button",
        "select",
        "option",
        "datalist",
        "dialog",
        "input",
        "textarea",
    ]
)
_ROLES = frozenset(("navigation", "banner", "contentinfo", "search", "menu", "menubar", "dialog"))
_BLOCKS = frozenset(
    [
        "address",
        "article",
        "blockquote",
        "dd",
        "details",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "form",
        "header",
        "hr",
        "li",
        "main",
        "ol",
        "p",
        "pre",
        "section",
        "summary",
        "table",
        "tbody",
        "thead",
        "tfoot",
        "tr",
        "caption",
        "ul",
        "center",
    ]
)
_PARAGRAPHS = frozenset(["p", "ul", "ol", "table", "pre", "blockquote", "dl", "section", "article", "figure"])
_IN_CELLS = frozenset(("p", "div", "center", "section"))  # that begin no line within a cell
_HEADINGS = {f"h{level}": "#" * level for level in range(1, 7)}
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_SPACE = re.compile(r"[ \t\r\n\f\v\u00a0]+")
LEAST_MAIN = 200  # characters: a <main> of fewer is not taken for the whole content


def html_text(html: str, link: Callable[[str], str | None]) -> tuple[str, str, tuple[str, ...]]:
    """Title, text and links of a page.  ``link``: where a ``href`` leads, None if nobody may go there."""
    parser = LexborHTMLParser(html)
    title_node = parser.css_first("title")
    title = _SPACE.sub(" ", title_node.text(deep=True)).strip() if title_node is not None else ""
    body = parser.body
    if body is None:
        return title, "", ()
    mains = parser.css("main, [role=main]")
    text, links = _walked(mains[0] if len(mains) == 1 else body, link)
    if len(mains) == 1 and len(text) < LEAST_MAIN:
        text, links = _walked(body, link)
    return title, text, links


@dataclass
class _Prose:
    """The text so far.  White space is written when what follows it is known, so that none is doubled."""

    parts: list[str] = field(default_factory=list[str])
    newlines: int = 2  # that the text ends with
    space: bool = False

    def words(self, text: str) -> None:
        words = _SPACE.sub(" ", text)
        if words.startswith(" "):
            self.space = True
        if stripped := words.strip(" "):
            if self.space and self.parts and not self.parts[-1].endswith((" ", "\n")):
                self.parts.append(" ")
            self.parts.append(stripped)
            self.newlines, self.space = 0, words.endswith(" ")

    def exactly(self, text: str) -> None:
        self.parts.append(text)
        self.newlines, self.space = 0, False

    def end_line(self, count: int = 1) -> None:
        if self.newlines < count:
            self.parts.append("\n" * (count - self.newlines))
            self.newlines = count
        self.space = False


def _walked(root: LexborNode, link: Callable[[str], str | None]) -> tuple[str, tuple[str, ...]]:
    """Text and links below ``root``, by a stack: pages may be nested as deep as they like."""
    writer, links = _Prose(), dict[str, int]()
    lists: list[int] = []  # the next number of each open list, -1 for one without numbers
    cells: list[int] = []  # cells so far in each open row
    pre = 0
    todo: list[tuple[LexborNode, str]] = [(root, "open")]
    while todo:
        node, what = todo.pop()
        tag = node.tag or ""
        if what == "open":
            if node is not root and node.next is not None:
                todo.append((node.next, "open"))
            if node.is_text_node:
                text = node.text_content or ""
                writer.exactly(text) if pre and text else writer.words(text)
                continue
            if not node.is_element_node or (node is not root and _dropped(node, tag)):
                continue
            todo.append((node, "close"))
            if node.child is not None:
                todo.append((node.child, "open"))
            if tag in _HEADINGS:
                writer.end_line(2)
                writer.exactly(f"{_HEADINGS[tag]} ")
            elif tag == "br":
                writer.end_line(min(2, writer.newlines + 1))
            elif tag in ("td", "th") and cells:
                writer.exactly(" | " if cells[-1] else "| ")
                cells[-1] += 1
            elif cells and tag in _IN_CELLS:
                writer.space = True
            elif tag in _BLOCKS:
                inside = bool(cells) or bool(lists and tag in ("ul", "ol", "p"))
                writer.end_line(2 if tag in _PARAGRAPHS and not inside else 1)
                if tag in ("ul", "ol"):
                    lists.append(1 if tag == "ol" else -1)
                elif tag == "li":
                    writer.exactly("  " * min(max(0, len(lists) - 1), MAX_INDENT) + _bullet(lists))
                elif tag == "tr":
                    cells.append(0)
                elif tag == "pre":
                    pre += 1
            continue
        if tag == "a":
            _mark(node, writer, links, link)
        elif tag in _HEADINGS:
            writer.end_line(2)
        elif cells and tag in _IN_CELLS:
            writer.space = True
        elif tag in _BLOCKS:
            if tag in ("ul", "ol") and lists:
                lists.pop()
            elif tag == "tr" and cells:
                if cells.pop():
                    writer.exactly(" |")
            elif tag == "pre":
                pre -= 1
            writer.end_line(2 if tag in _PARAGRAPHS and not cells and not lists else 1)
    return "".join(writer.parts).strip(), tuple(links)


def _dropped(node: LexborNode, tag: str) -> bool:
    if tag in _DROPPED:
        return True
    attributes = node.attributes
    return bool(attributes) and (
        "hidden" in attributes
        or attributes.get("aria-hidden") == "true"
        or attributes.get("role") in _ROLES
        or _HIDDEN.search(attributes.get("style") or "") is not None
    )


def _bullet(lists: list[int]) -> str:
    if not lists or lists[-1] < 0:
        return "- "
    lists[-1] += 1
    return f"{lists[-1] - 1}. "


def _mark(node: LexborNode, writer: _Prose, links: dict[str, int], link: Callable[[str], str | None]) -> None:
    """Write the number of the link ``node`` behind its words."""
    href = node.attributes.get("href")
    url = link(href.strip()) if href else None
    if url is None or (url not in links and len(links) >= MAX_LINKS):
        return
    number = links.setdefault(url, len(links) + 1)
    writer.exactly(f" [L{number}]" if not writer.newlines else f"[L{number}]")
