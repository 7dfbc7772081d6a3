"""The tool ``browse`` on pages that this machine serves: what the model reads of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from browsing import Site, browse, browser, pdf
from hypothesis import given
from hypothesis import strategies as st

from system.config.load import load
from system.rollout.chat import planned_syntax
from system.rollout.syntax.base import ParsedCall
from system.rollout.syntax.tags import TagSyntax
from system.tools.browse.document import (
    AROUND,
    WebDocument,
    found,
    pages,
    shown_page,
    shown_passages,
    windows,
)
from system.tools.browse.reading import clean, decoded
from system.tools.outcome import CallContext, ToolStatus
from system.tools.service import ToolService

ROOT = Path(__file__).parents[2]


@pytest_asyncio.fixture
async def site() -> AsyncIterator[Site]:
    made = Site()
    server = await made.open()
    yield made
    await server.close()


@pytest_asyncio.fixture
async def tools(site: Site) -> AsyncIterator[ToolService]:
    made = browser([f"{site.url}/"], browse_page_chars=500)
    yield made
    await made.close()


async def test_a_page_reads_as_text(site: Site, tools: ToolService) -> None:
    outcome = await browse(tools, f"{site.url}/")
    assert (outcome.status, outcome.text) == (
        ToolStatus.OK,
        f"""The Espalier & its[31m tree
{site.url}/
page 1 of 1

# Espalier

An espalier is a tree [L1] trained flat.[1]

- apple
- pear
  1. first
  2. second

Heights
| Kind | Metres |
| fan | 2 |

one
  two

Line
break. outside up

Links:
[L1] {site.url}/tree""",
    )


async def test_pages_and_words_can_be_asked_for_in_the_url_itself(site: Site, tools: ToolService) -> None:
    site.pages["/long"] = "".join(f"<p>paragraph {number} of the long one</p>" for number in range(100))
    second = await browse(tools, f"{site.url}/long", page=2)
    assert "page 2 of " in second.text
    assert "paragraph 0 " not in second.text
    assert (await browse(tools, f"{site.url}/long#page=2")).text == second.text
    passages = await browse(tools, f"{site.url}/long", find="Paragraph  77 of")
    assert "1 match for 'Paragraph  77 of'" in passages.text
    assert "paragraph 77 of" in passages.text
    assert (await browse(tools, f"{site.url}/long#find=Paragraph%20%2077%20of")).text == passages.text
    assert "no match for 'nowhere'" in (await browse(tools, f"{site.url}/long", find="nowhere")).text
    beyond = await browse(tools, f"{site.url}/long", page=99)
    assert beyond.status is ToolStatus.REJECTED
    assert "there is no page 99" in beyond.text
    assert (await browse(tools, f"{site.url}/long", page=0)).status is ToolStatus.REJECTED
    assert (await browse(tools, f"{site.url}/long", find="x" * 101)).status is ToolStatus.REJECTED


async def test_a_main_part_stands_for_the_page_unless_it_is_next_to_nothing(
    site: Site, tools: ToolService
) -> None:
    site.pages["/main"] = f"<div>Around</div><main><p>{'Content. ' * 40}</p></main>"
    site.pages["/empty"] = "<div>Around</div><main></main>"
    assert "Around" not in (await browse(tools, f"{site.url}/main")).text
    assert "Around" in (await browse(tools, f"{site.url}/empty")).text


async def test_a_pdf_is_read_by_its_text(site: Site, tools: ToolService) -> None:
    site.pages["/paper"] = (
        200,
        {"Content-Type": "application/pdf"},
        pdf(["Trees are trained.", "Forks win."]),
    )
    site.pages["/nameless"] = (200, {"Content-Type": "application/octet-stream"}, pdf(["Trees are trained."]))
    site.pages["/damaged"] = (200, {"Content-Type": "application/pdf"}, b"%PDF-1.4 and nothing else")
    whole = await browse(tools, f"{site.url}/paper")
    assert whole.text == f"A paper\n{site.url}/paper\npage 1 of 1\n\nTrees are trained.\n\nForks win."
    assert "Trees are trained." in (await browse(tools, f"{site.url}/nameless")).text
    damaged = await browse(tools, f"{site.url}/damaged")
    assert damaged.status is ToolStatus.ERROR
    assert "the PDF cannot be read" in damaged.text


async def test_of_a_long_pdf_the_first_pages_are_read_and_the_rest_told(site: Site) -> None:
    site.pages["/paper"] = (200, {"Content-Type": "application/pdf"}, pdf(["One.", "Two.", "Three."]))
    tools = browser([site.url], browse_pdf_pages=2)
    text = (await browse(tools, f"{site.url}/paper")).text
    await tools.close()
    assert "only 2 of its 3 pages were read" in text
    assert "Two." in text
    assert "Three." not in text


async def test_what_is_no_text_is_told(site: Site, tools: ToolService) -> None:
    site.pages["/picture"] = (200, {"Content-Type": "image/png"}, b"\x89PNG\x00")
    site.pages["/drawn"] = "<body><script>draw()</script></body>"
    site.pages["/data"] = (200, {"Content-Type": "application/json"}, b'{"a": 1}')
    assert "of type image/png" in (await browse(tools, f"{site.url}/picture")).text
    assert "has no text" in (await browse(tools, f"{site.url}/drawn")).text
    assert '{"a": 1}' in (await browse(tools, f"{site.url}/data")).text


@pytest.mark.parametrize(
    ("data", "charset", "text"),
    [
        ("naïve".encode(), "utf-8", "naïve"),
        ("naïve".encode("latin-1"), "iso-8859-1", "naïve"),
        ("“naïve”".encode("cp1252"), "iso-8859-1", "“naïve”"),  # as browsers read it
        ("naïve".encode("latin-1"), "utf-8", "naïve"),  # a header that is wrong
        ("naïve".encode(), "no-such", "naïve"),
        ("naïve".encode(), "zlib_codec", "naïve"),
        ("樹".encode("shift_jis"), "shift_jis", "樹"),
        ("樹".encode("gb18030"), "gb2312", "樹"),
        ("naïve".encode("utf-16"), "utf-8", "naïve"),
        (b'<meta charset="koi8-r">' + "дерево".encode("koi8-r"), "", '<meta charset="koi8-r">дерево'),
        ("дерево, дерево".encode() + b"\xff", "utf-8", "дерево, дерево\ufffd"),
    ],
)
def test_charsets_are_told_by_header_and_document_or_guessed(data: bytes, charset: str, text: str) -> None:
    assert decoded(data, charset, declared=True) == text


def test_control_characters_do_not_reach_the_model() -> None:
    assert clean("a\x1b[2J\x00b\u202ec\x9bd\r\ne\n\n \n\nf\ud800") == "a[2Jbcd\ne\n\nf?"


@given(st.text(alphabet=" \nab", max_size=400), st.integers(1, 50))
def test_pages_joined_are_the_whole_text(text: str, size: int) -> None:
    pieces = pages(text, size)
    assert "".join(pieces) == text
    assert all(len(piece) <= size for piece in pieces)
    assert all(pieces) or pieces == [""]


@given(
    st.lists(st.sampled_from(["ab", "Ab", "b a", "c", "\n"]), max_size=60),
    st.sampled_from(["a b", "ab", "c"]),
)
def test_what_is_found_stands_there_and_is_shown(words: list[str], find: str) -> None:
    text = " ".join(words)
    spans = found(text, find)
    assert all(" ".join(text[start:end].lower().split()) == find for start, end in spans)
    assert bool(spans) == (find in " ".join(text.lower().split()))
    shown = windows(spans, len(text))
    assert all(any(low <= start and end <= high for low, high in shown) for start, end in spans)
    assert all(high <= len(text) and (high - low) <= 8 * AROUND for low, high in shown)


@given(st.integers(0, 3000), st.integers(500, 900))
def test_a_passage_names_the_page_that_it_is_on(position: int, size: int) -> None:
    text = "word " * (position // 5) + "needle " + "word " * 600
    shown = shown_passages(WebDocument("u", "t", text), "needle", 1, size)
    page = int(shown.split("[page ")[1].split("]")[0])
    assert "needle" in shown_page(WebDocument("u", "t", text), page, size)


async def test_a_tag_holds_a_call(site: Site, tools: ToolService) -> None:
    site.pages["/long"] = "<p>word</p>" * 400
    call = TagSyntax(tools.specs).parse(f"<think> on </think> <browse> {site.url}/long#page=2 </browse>")
    assert isinstance(call, ParsedCall)
    outcome = await tools.call(call.tool, call.arguments, CallContext())
    assert "page 2 of 5" in outcome.text


async def test_links_are_listed_up_to_a_number(site: Site, tools: ToolService) -> None:
    site.pages["/many"] = "".join(f"<a href=/{number}>x</a> " for number in range(45))
    site.pages["/base"] = '<base href="/below/"><a href="one">x</a><a href="one">again</a><a href="">here</a>'
    many = (await browse(tools, f"{site.url}/many")).text
    assert f"[L40] {site.url}/39\n(5 more links on this page are not listed)" in many
    based = (await browse(tools, f"{site.url}/base")).text
    assert based.count(f"{site.url}/below/one") == 1
    assert based.count("[L1]") == 3


def test_the_recipe_of_the_document_runs() -> None:
    recipe = (ROOT / "examples" / "deep_search.yaml").read_text()
    assert f"```yaml\n{recipe[recipe.index('tools:') :]}```" in (ROOT / "docs" / "browse.md").read_text()
    assert [*planned_syntax(load(ROOT / "examples" / "deep_search.yaml")).specs] == [
        "search",
        "browse",
        "python",
    ]


def test_passages_are_no_longer_than_a_page_and_go_on_from_the_next() -> None:
    text = "".join(f"needle {number} " + "word " * 300 for number in range(40))
    document = WebDocument("u", "t", text)
    shown = shown_passages(document, "needle", 1, 2000)
    assert shown.startswith("t\nu\n40 matches for 'needle' in ")
    assert shown.count("needle ") == 4  # the first is of 250 characters, the others of 500
    assert len(shown) < 2200
    page = int(shown.split("further matches from page ")[1].split()[0])
    later = shown_passages(document, "needle", page, 2000)
    assert f"from page {page} on" in later
    assert "needle 0 " not in later
    assert "needle 4 " in later


async def test_calls_at_once_for_one_document_fetch_it_once(site: Site, tools: ToolService) -> None:
    site.pages["/long"] = "<p>word " * 2000
    answers = await asyncio.gather(*(browse(tools, f"{site.url}/long", page=n) for n in range(1, 6)))
    assert all(answer.status is ToolStatus.OK for answer in answers)
    assert len({answer.text for answer in answers}) == 5
    assert site.asked["/long"] == 1
