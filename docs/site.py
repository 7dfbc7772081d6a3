"""What mkdocs cannot do by itself (``hooks`` of mkdocs.yml): `make docs` alone runs it.

Documents name files of the repository as on GitHub, by a link (``../examples/walk.py``) or in code
(`` `docs/watch.md` ``).  On the site both lead to a page: that of a document, or one made here, in memory,
which shows the file.  And no page may ask another host for anything.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Documents outside docs/ -> their place on the site (README.md there would be its first page)."""
SHOWN = ("examples/*.py", "examples/*.yaml", "configs/**/*.yaml")
"""Files that have a page, ``files/<path>.md``."""
_FENCE = re.compile(r"^(```|~~~)")
_NAMED = re.compile(r"(?<![\[`])`((?:docs|configs|examples)/[\w./-]+|[A-Z]+\.md)`(?!\])")
_LINK = re.compile(r"\]\((?!\w+:|#|/)([^)#\s]+)(#[^)\s]*)?\)")
_NESTED = re.compile(r"^( +)(?=[-*] |\d+\. )")
# Elements that fetch what they name, without a click.
_FETCHES = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
_RELATIONS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "manifest"}
_CSS = re.compile(r"(?:url\(\s*|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)")


def place(name: str) -> str | None:
    """Where the site shows the file ``name`` (a path in the repository); None: nowhere."""
    if name in PAGES:
        return PAGES[name]
    if name.startswith("docs/") and (ROOT / name).is_file():
        return name.removeprefix("docs/")
    return f"files/{name}.md" if any(ROOT / name in ROOT.glob(pattern) for pattern in SHOWN) else None


def linked(text: str, source: str, at: str) -> str:
    """``text`` of the file ``source`` (a path in the repository), which the site shows as ``at``: with links
    to places of the site, and lists within lists by four spaces, as Python-Markdown wants them.
    """

    def relative(to: str) -> str:
        return posixpath.relpath(to, posixpath.dirname(at) or ".")

    def link(match: re.Match[str]) -> str:
        name = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        to = place(name)
        return f"]({relative(to)}{match[2] or ''})" if to else match[0]

    def named(match: re.Match[str]) -> str:
        to = place(match[1])
        return f"[{match[0]}]({relative(to)})" if to and to != at else match[0]

    lines, fenced = [], False
    for line in text.split("\n"):
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            line = _NESTED.sub(r"\1\1", _NAMED.sub(named, _LINK.sub(link, line)))
        lines.append(line)
    return "\n".join(lines)


class _Fetched(HTMLParser):
    """The addresses that a browser fetches for a page, by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag in _FETCHES:
            self.found.append(given.get(_FETCHES[tag], ""))
        if tag == "link" and _RELATIONS & set(given.get("rel", "").split()):
            self.found.append(given.get("href", ""))
        if "mermaid" in given.get("class", "").split():  # for which the theme fetches a library
            self.found.append("https://unpkg.com/mermaid")
        self.found += _CSS.findall(given.get("style", ""))


def foreign(text: str, kind: str) -> list[str]:
    """What a page (``kind`` ``.html``) or a sheet (``.css``) fetches from other hosts."""
    if kind == ".css":
        return _CSS.findall(text)
    page = _Fetched()
    page.feed(text)
    found = page.found + _CSS.findall("".join(re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL)))
    return [address for address in found if re.match(r"(?:https?:)?//", address)]


def _made(files: Any, config: Any) -> Iterator[Any]:
    from mkdocs.structure.files import File

    for name, at in PAGES.items():
        yield File.generated(config, at, content=(ROOT / name).read_text(encoding="utf-8"))
    for path in sorted(path for pattern in SHOWN for path in ROOT.glob(pattern)):
        name, language = path.relative_to(ROOT).as_posix(), path.suffix[1:]
        shown = f"# {name}\n\n````{language}\n{path.read_text(encoding='utf-8')}````\n"
        yield File.generated(config, f"files/{name}.md", content=shown)


def on_files(files: Any, *, config: Any) -> None:
    """Adds the pages that are made here."""
    for file in _made(files, config):
        files.append(file)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links as the site has them."""
    at = page.file.src_uri
    if at.startswith("files/"):
        return markdown
    source = next((name for name, place in PAGES.items() if place == at), f"docs/{at}")
    return linked(markdown, source, at)


def on_post_build(*, config: Any) -> None:
    """Fails the build for what a page would fetch from elsewhere."""
    from mkdocs.exceptions import PluginError

    site = Path(config.site_dir)
    pages = [path for path in sorted(site.rglob("*")) if path.suffix in (".html", ".css")]
    found = [
        f"{path.relative_to(site)} fetches {address}"
        for path in pages
        for address in foreign(path.read_text(encoding="utf-8"), path.suffix)
    ]
    if found:
        raise PluginError("pages load nothing from other hosts: " + "; ".join(found))
