"""The documents as a site: all of them are listed, links lead somewhere, and what they quote is in the code.

`make docs` builds it, which checks every link and anchor; this needs nothing installed for it.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

from system.config import settings
from system.config.hints import OTHER_NAMES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

_spec = importlib.util.spec_from_file_location("docs_site", DOCS / "site.py")
assert _spec
assert _spec.loader
site = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(site)


def test_every_document_is_in_the_navigation_and_all_of_it_is_there() -> None:
    listed = re.findall(
        r"^ +- (?:[^:\n]+: )?([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE
    )
    documents = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(documents | set(site.PAGES.values()))


def test_links_to_the_repository_lead_to_pages_of_the_site() -> None:
    linked = site.linked
    assert linked("see `docs/watch.md`", "docs/faq.md", "faq.md") == "see [`docs/watch.md`](watch.md)"
    assert linked("see `docs/watch.md`", "docs/results/gpu.md", "results/gpu.md").endswith("(../watch.md)")
    assert linked("[it](../examples/walk.py)", "docs/faq.md", "faq.md") == "[it](files/examples/walk.py.md)"
    assert linked("[all](docs/settings.md#flow)", "README.md", "readme.md") == "[all](settings.md#flow)"
    assert linked("[R](../README.md)", "docs/faq.md", "faq.md") == "[R](readme.md)"
    for same in (
        "`docs/none.md`, `docs/faq.md`, `system/plugins.py`, [x](https://example.org/a.md)",
        "[`docs/watch.md`](watch.md)",
        "```\n`docs/watch.md`\n  - a\n```",
        "- a\n  goes on",
    ):
        assert linked(same, "docs/faq.md", "faq.md") == same
    assert linked("- a\n  - b", "docs/faq.md", "faq.md") == "- a\n    - b"


def test_what_a_page_would_fetch_from_elsewhere_is_found() -> None:
    found = {
        '<link href="https://fonts.example/css" rel="stylesheet">': "https://fonts.example/css",
        '<script src="//cdn.example/a.js"></script>': "//cdn.example/a.js",
        "<p style=\"background: url('https://a.example/b.png')\">": "https://a.example/b.png",
        "<style>@import 'https://a.example/c.css';</style>": "https://a.example/c.css",
        '<pre class="mermaid">': "https://unpkg.com/mermaid",
        '<img alt="" src="http://a.example/d.png">': "http://a.example/d.png",
    }
    for page, address in found.items():
        assert site.foreign(page, ".html") == [address], page
    assert site.foreign("a{background:url(//a.example/e.woff)}", ".css") == ["//a.example/e.woff"]
    for page in ('<a href="https://example.org">', '<link rel="icon" href="a.png">', '<script src="a.js">'):
        assert site.foreign(page, ".html") == []


# What tutorials show


@pytest.mark.parametrize("name", ["own-task.md", "own-tool.md", "own-credit.md"])
def test_a_tutorial_shows_what_the_examples_hold(name: str) -> None:
    shown = re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.DOTALL | re.MULTILINE)
    held = [path.read_text() for path in (ROOT / "examples").glob("*.py")]
    assert shown
    for code in shown:
        lines = [line.split("  #")[0].strip() for line in code.splitlines()]
        assert any(_within(lines, text) for text in held), code


def _within(lines: list[str], text: str) -> bool:
    """Whether a text has the lines, apart from blank ones and comments, in their order."""
    rest = iter([line.split("  #")[0].strip() for line in text.splitlines()])
    return all(line in rest for line in lines if line)


# What they quote


@cache
def texts() -> tuple[str, ...]:
    """Every text in the code; where something is filled in, an ellipsis."""
    found: list[str] = []
    for path in sorted(path for part in ("system", "actors") for path in (ROOT / part).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(one.value) if isinstance(one, ast.Constant) else "…" for one in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def said(message: str) -> bool:
    """Whether the code has the message, of which an ellipsis stands for anything."""
    pieces = [re.escape(piece) for piece in message.split("…")]
    pattern = re.compile(".*".join(pieces), re.DOTALL)
    return any(pattern.search(text) for text in texts())


def messages() -> list[str]:
    """Those of the tables whose first column is what is said."""
    tables = re.split(r"\n(?!\|)", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
    tables = [table.lstrip("\n") for table in tables]
    rows = [row for table in tables if table.startswith("| it says") for row in table.splitlines()[2:]]
    quoted = [re.match(r"\| `([^`]+)` \|", row) for row in rows]
    return [match[1] for match in quoted if match]


def test_messages_are_quoted_as_the_code_has_them() -> None:
    assert len(messages()) > 30
    assert [message for message in messages() if not said(message)] == []
    assert not said("… trees succeeded since the last training step")


def test_what_is_printed_in_the_text_of_troubleshooting_is_in_the_code() -> None:
    assert said("a model's name on the hub is not downloaded")
    assert said("the policy is paid for something else than right answers")


# Names of ours beside those of others


def rows() -> list[list[str]]:
    lines = (DOCS / "coming-from.md").read_text(encoding="utf-8").splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]


def test_settings_beside_those_of_others_are_ours() -> None:
    keys = [key for row in rows() for key in re.findall(r"`([^`]+)`", row[0])]
    assert len(keys) > 30
    assert [key for key in keys if key not in settings()] == []
    assert {len(row) for row in rows()} == {7}


def test_the_table_and_the_hints_agree() -> None:
    """A name in the table's columns leads, as an unknown key, to the row that it stands in.  (The engines'
    tensor parallelism is called as the learner's, which a hint takes it for.)
    """
    hints = {name: key for key, names in OTHER_NAMES.items() for name in names.split()}
    for row in rows():
        ours = re.findall(r"`([^`]+)`", row[0])
        if ours == ["engine.tp"]:
            continue
        for cell in row[1:]:
            if not re.fullmatch(r"`[^`]+`", cell):  # a sum, a remark: not one for one
                continue
            name = cell.strip("`").lstrip("-").rpartition(".")[2].replace("-", "_")
            assert hints.get(name, ours[0]) in ours, f"{name}: {hints.get(name)}, not {ours}"
