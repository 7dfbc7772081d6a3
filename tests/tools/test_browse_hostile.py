"""The tool ``browse`` among servers, pages and URLs that mean it no good, or are just broken."""

from __future__ import annotations

import asyncio
import os
import socket
import time
import zlib
from collections.abc import AsyncIterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from aiohttp import ThreadedResolver, web
from browsing import Site, bomb, browse, browser, dripping, endless, pdf
from polling import eventually
from sessions import children, command

from system.config.load import load
from system.errors import ConfigError
from system.tools.browse import cache
from system.tools.browse.cache import DocumentCache
from system.tools.browse.document import WebDocument
from system.tools.browse.fetching import Inflated
from system.tools.outcome import ToolStatus
from system.tools.service import ToolService, ToolStartError
from system.urls import Allowed, UrlRefused

HTML, TEXT = {"Content-Type": "text/html"}, {"Content-Type": "text/plain"}


@pytest_asyncio.fixture
async def site() -> AsyncIterator[Site]:
    made = Site()
    server = await made.open()
    yield made
    await server.close()


@pytest_asyncio.fixture
async def tools(site: Site) -> AsyncIterator[ToolService]:
    made = browser([f"{site.url}/"], browse_mb=1.0, retries=1)
    yield made
    await made.close()


# --- which URLs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "https://wiki.example/",
        "https://wiki.example/a/b?c=d",
        "HTTPS://WIKI.example:443/x",
        "http://127.0.0.1:8000/docs",
        "http://127.0.0.1:8000/docs/x",
        "https://en.wild.example/x",
        "https://xn--bcher-kva.example/",
        "https://bücher.example/",
    ],
)
def test_what_is_below_a_base_may_be_opened(url: str) -> None:
    bases = [
        *("https://wiki.example/", "http://127.0.0.1:8000/docs"),
        *("https://*.wild.example/", "https://bücher.example"),
    ]
    assert Allowed(bases).url(url)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://wiki.example/", "not below an allowed"),
        ("https://wiki.example:444/", "not below an allowed"),
        ("https://wiki.example.evil.example/", "not below an allowed"),
        ("https://evil.example/https://wiki.example/", "not below an allowed"),
        ("https://evil.example\\@wiki.example/", "not a URL"),
        ("https://wild.example/", "not below an allowed"),
        ("https://notwild.example/", "not below an allowed"),
        ("http://127.0.0.1:8000/", "not below an allowed"),
        ("http://127.0.0.1:8000/docsecret", "not below an allowed"),
        ("http://127.0.0.1:8000/docs/../secret", "not below an allowed"),
        ("http://127.0.0.1:8000/docs/%2e%2e/secret", "not below an allowed"),
        ("http://127.0.0.1:8000/docs/..%2fsecret", "leaves its own path"),
        ("http://127.0.0.1:8000/docs/%252e%252e/secret", "leaves its own path"),
        ("http://127.0.0.1:8000/docs/..\\secret", "leaves its own path"),
        ("https://user:word@wiki.example/", "user name or a password"),
        ("file:///etc/passwd", "not a web address"),
        ("javascript:alert(1)", "not a web address"),
        ("//wiki.example/", "not a web address"),
        ("wiki.example", "not a web address"),
        ("https:///x", "not a web address"),
        ("https://wiki.example:99999/", "not a URL"),
        ("https://wiki.example/a b", "white space"),
        ("https://wiki.example/\r\nHost: x", "white space"),
        ("https://wiki.example/" + "x" * 2000, "longer than"),
    ],
)
def test_nothing_else_may(url: str, reason: str) -> None:
    bases = ["https://wiki.example/", "http://127.0.0.1:8000/docs", "https://*.wild.example/"]
    with pytest.raises(UrlRefused, match=reason):
        Allowed(bases).url(url)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1"),
        *("[::1]", "[fe80::1]", "[fc00::1]", "[::ffff:10.0.0.1]", "[64:ff9b::a00:1]", "[2002:a00:1::]"),
    ],
)
def test_all_hosts_are_the_public_ones(host: str) -> None:
    with pytest.raises(UrlRefused, match="private address"):
        Allowed(["http://"]).url(f"http://{host}/")


def test_an_address_is_reached_if_it_is_public_or_the_user_named_it() -> None:
    private = ip_address("10.0.0.1")
    assert Allowed(["http://"]).address("wiki.example", ip_address("1.1.1.1"))
    assert not Allowed(["http://wiki.example/"]).address("wiki.example", private)
    assert Allowed(["http://wiki.example/"], ["10.0.0.0/8"]).address("wiki.example", private)
    assert Allowed(["http://10.0.0.1/"]).url("http://10.0.0.1/x")
    assert Allowed(["http://localhost/"]).address("localhost", ip_address("127.0.0.1"))
    assert not Allowed(["http://localhost/"]).address("localhost", private)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ("tools.names=[browse]", r"tools\.browse_allow is empty"),
        (
            "tools.names=[browse] tools.browse_allow=[wiki.example]",
            r"tools\.browse_allow\[0\]='wiki.example'",
        ),
        ("tools.names=[browse] tools.browse_allow=['ftp://x/']", r"begins with http"),
        ("tools.names=[browse] tools.browse_allow=['http://x/?a=b']", r"has no query"),
        ("tools.browse_private=[10.0.0.1/8]", r"tools\.browse_private\[0\]"),
    ],
)
def test_a_base_that_is_none_is_told_before_a_run(settings: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        load("configs/quickstart.yaml", settings.split())


# --- where a server sends it -------------------------------------------------------------------------------


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Names and the addresses that they resolve to."""
    known: dict[str, str] = {}

    async def resolve(self: Any, host: str, port: int = 0, family: int = 0) -> list[dict[str, Any]]:
        entry = {"hostname": host, "host": known[host], "port": port, "proto": 0, "flags": 0}
        return [entry | {"family": socket.AF_INET}]

    monkeypatch.setattr(ThreadedResolver, "resolve", resolve)
    return known


async def test_redirects_are_followed_where_they_may_be(site: Site, tools: ToolService) -> None:
    site.pages["/old"] = (302, {"Location": "/new"}, b"")
    site.pages["/new"] = "<p>moved here"
    site.pages["/round"] = (301, {"Location": "/round"}, b"")
    site.pages["/out"] = (302, {"Location": "http://169.254.169.254/latest/meta-data"}, b"")
    site.pages["/file"] = (302, {"Location": "file:///etc/passwd"}, b"")
    found = await browse(tools, f"{site.url}/old")
    assert "moved here" in found.text
    assert f"{site.url}/new" in found.text
    assert "more than 5 redirects" in (await browse(tools, f"{site.url}/round")).text
    assert site.asked["/round"] == 6
    for path in ("/out", "/file"):
        outcome = await browse(tools, f"{site.url}{path}")
        assert outcome.status is ToolStatus.REJECTED
        assert "leads elsewhere" in outcome.text


async def test_a_redirect_to_this_machine_is_no_way_in(site: Site, names: dict[str, str]) -> None:
    """The page sends to a name that is allowed, and that leads to this machine."""
    port = urlsplit(site.url).port
    names["inside.example"] = "127.0.0.1"
    site.pages["/out"] = (302, {"Location": f"http://inside.example:{port}/"}, b"")
    tools = browser([site.url, f"http://*.example:{port}/"])
    outcome = await browse(tools, f"{site.url}/out")
    await tools.close()
    assert outcome.status is ToolStatus.REJECTED
    assert "private address" in outcome.text
    assert site.asked == {"/out": 1}


async def test_a_name_that_leads_to_a_private_address_is_not_followed(
    site: Site, names: dict[str, str]
) -> None:
    port = urlsplit(site.url).port
    names["wiki.example"] = "127.0.0.1"
    url = f"http://wiki.example:{port}/"
    closed, opened = browser([url]), browser([url], browse_private=["127.0.0.0/8"])
    outcome = await browse(closed, url)
    assert outcome.status is ToolStatus.REJECTED
    assert "private address" in outcome.text
    assert not site.asked
    assert (await browse(opened, url)).status is ToolStatus.OK
    await closed.close()
    await opened.close()


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "127.1", "127.0.0.1."])
async def test_other_spellings_of_this_machine_lead_nowhere(site: Site, host: str) -> None:
    """Also where somebody allowed them: an address that is meant is to be written as one."""
    url = site.url.replace("127.0.0.1", host)
    tools = browser([url], retries=0)
    outcome = await browse(tools, url)
    await tools.close()
    assert outcome.status is not ToolStatus.OK
    assert not site.asked


async def test_nothing_of_ours_is_shown_and_no_cookie_is_kept(site: Site) -> None:
    site.pages["/first"] = (200, {"Set-Cookie": "a=b", **HTML}, b"<p>one")
    tools = browser([site.url], browse_agent="tester (me@example.org)")
    await browse(tools, f"{site.url}/first")
    await browse(tools, f"{site.url}/")
    await tools.close()
    assert [headers["User-Agent"] for headers in site.headers] == ["tester (me@example.org)"] * 2
    assert not any({"Cookie", "Authorization", "Referer"} & headers.keys() for headers in site.headers)


# --- servers in trouble ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "outcome", "asked"),
    [(404, ToolStatus.ERROR, 1), (403, ToolStatus.ERROR, 1), (500, ToolStatus.UNAVAILABLE, 2)],
)
async def test_what_a_server_refuses(
    site: Site, tools: ToolService, status: int, outcome: ToolStatus, asked: int
) -> None:
    site.pages["/no"] = (status, HTML, b"<p>no")
    answer = await browse(tools, f"{site.url}/no")
    assert answer.status is outcome
    assert f"HTTP {status}" in answer.text
    assert site.asked["/no"] == asked


async def test_one_page_s_trouble_is_not_the_tool_s(site: Site) -> None:
    """No circuit opens: other pages are read all the same."""
    site.pages["/no"] = (500, HTML, b"")
    tools = browser([site.url], retries=0)
    for _ in range(8):  # a tool that is unavailable five times in a row is not asked again for a while
        assert (await browse(tools, f"{site.url}/no")).status is ToolStatus.UNAVAILABLE
    assert (await browse(tools, f"{site.url}/")).status is ToolStatus.OK
    await tools.close()


async def test_a_server_that_asks_for_patience_gets_it(site: Site, tools: ToolService) -> None:
    async def later(request: web.Request) -> web.Response:
        if site.asked["/busy"] == 1:
            return web.Response(status=429, headers={"Retry-After": "1"})
        return web.Response(text="now")

    site.pages["/busy"] = later
    site.pages["/closed"] = (503, {"Retry-After": "900"}, b"")
    started = time.monotonic()
    assert "now" in (await browse(tools, f"{site.url}/busy")).text
    assert time.monotonic() - started >= 1
    assert (await browse(tools, f"{site.url}/closed")).status is ToolStatus.UNAVAILABLE
    told = await browse(tools, f"{site.url}/")
    assert "wants to be left alone" in told.text
    assert (site.asked["/closed"], site.asked["/"]) == (1, 0)


async def test_a_dead_host_is_told(tools: ToolService) -> None:
    dead = browser(["http://127.0.0.1:9/"], retries=0)
    outcome = await browse(dead, "http://127.0.0.1:9/")
    await dead.close()
    assert outcome.status is ToolStatus.UNAVAILABLE
    assert "127.0.0.1 cannot be reached (connection refused)" in outcome.text


async def test_one_host_is_asked_at_the_rate_that_is_set(site: Site) -> None:
    site.pages |= {f"/{number}": f"<p>page {number}" for number in range(5)}
    tools = browser([site.url], browse_rate_per_s=10.0)
    began = time.monotonic()
    await asyncio.gather(*(browse(tools, f"{site.url}/{number}") for number in range(5)))
    await tools.close()
    assert len(site.times) == 5
    assert site.times[-1] - began >= 0.4  # four pauses of 0.1 s


async def test_an_endless_page_is_cut_and_a_dripping_one_given_up(site: Site, tools: ToolService) -> None:
    site.pages |= {"/endless": endless, "/drip": dripping}
    cut = await browse(tools, f"{site.url}/endless")
    assert "only its first 1 MB were read" in cut.text
    hasty = browser([site.url], deadline_s=0.5)
    assert (await browse(hasty, f"{site.url}/drip")).status is ToolStatus.TIMEOUT
    await hasty.close()


async def test_what_inflates_is_cut_too(site: Site, tools: ToolService) -> None:
    site.pages["/bomb"] = (200, {**TEXT, "Content-Encoding": "gzip"}, bomb(200))
    site.pages["/broken"] = (200, {**TEXT, "Content-Encoding": "gzip"}, b"no gzip")
    site.pages["/brotli"] = (200, {**TEXT, "Content-Encoding": "br"}, b"x")
    assert "only its first 1 MB were read" in (await browse(tools, f"{site.url}/bomb")).text
    inflated = Inflated("gzip", 1000)
    assert inflated.full(bomb(20))
    assert len(inflated.data) <= 1001
    assert "no usable answer" in (await browse(tools, f"{site.url}/broken")).text
    assert "which was not asked for" in (await browse(tools, f"{site.url}/brotli")).text


async def test_a_large_pdf_is_refused(site: Site, tools: ToolService) -> None:
    kind = {"Content-Type": "application/pdf"}
    site.pages["/large"] = (200, kind, pdf(["One."]) + b" " * 1_100_000)
    assert "larger than 1 MB" in (await browse(tools, f"{site.url}/large")).text


async def test_a_pdf_that_inflates_to_gigabytes_is_given_up(site: Site, tools: ToolService) -> None:
    stream = zlib.compress(zlib.compress(b" " * (1 << 28)))  # twice, as PDF allows: a few hundred bytes
    body = pdf(["MARK"]).replace(b"/Length", b"/Filter [/FlateDecode /FlateDecode] /Length")
    start, end = body.index(b"stream\n") + 7, body.index(b"\nendstream")
    site.pages["/bomb"] = (200, {"Content-Type": "application/pdf"}, body[:start] + stream + body[end:])
    outcome = await browse(tools, f"{site.url}/bomb")
    assert outcome.status in (ToolStatus.ERROR, ToolStatus.TIMEOUT)
    assert (await browse(tools, f"{site.url}/")).status is ToolStatus.OK


def reads(pid: int) -> bool:
    return "system.tools.browse.reading" in command(pid)


async def test_a_page_that_hangs_its_reader_holds_nobody_up(site: Site) -> None:
    """A parser needs minutes for elements nested so deep: its process is ended, and the loop never waits."""
    site.pages["/deep"] = "<div>" * 200_000 + "bottom"
    tools = browser([site.url], deadline_s=3.0, browse_mb=2.0)
    deep = asyncio.ensure_future(browse(tools, f"{site.url}/deep"))
    beats = 0
    while not deep.done():
        await asyncio.sleep(0.02)
        beats += 1
    assert (await deep).status is ToolStatus.TIMEOUT
    assert beats >= 20  # of 150 on a machine that has nothing else to do
    await eventually(lambda: not any(map(reads, children(os.getpid()))), 20, "its reader still runs")
    assert (await browse(tools, f"{site.url}/")).status is ToolStatus.OK
    await tools.close()


# --- what is kept ------------------------------------------------------------------------------------------


async def test_a_page_is_fetched_once_by_all_workers_and_after_a_restart(site: Site, tmp_path: Path) -> None:
    first, second = browser([site.url], tmp_path), browser([site.url], tmp_path)
    before = (await browse(first, f"{site.url}/")).text
    site.pages["/"] = "<p>changed"
    assert (await browse(second, f"{site.url}/")).text == before
    await first.close()
    await second.close()
    resumed = browser([site.url], tmp_path)
    assert (await browse(resumed, f"{site.url}/#top")).text == before
    await resumed.close()
    assert site.asked["/"] == 1
    elsewhere = browser([site.url], tmp_path, browse_cache=str(tmp_path / "other"))
    assert "changed" in (await browse(elsewhere, f"{site.url}/")).text
    await elsewhere.close()


async def test_what_failed_is_not_kept(site: Site, tmp_path: Path) -> None:
    tools = browser([site.url], tmp_path, retries=0)
    assert (await browse(tools, f"{site.url}/later")).status is ToolStatus.ERROR
    site.pages["/later"] = "<p>there now"
    assert "there now" in (await browse(tools, f"{site.url}/later")).text
    await tools.close()


def test_the_first_to_keep_a_page_wins_and_a_damaged_one_is_read_anew(tmp_path: Path) -> None:
    kept = DocumentCache(tmp_path, 1 << 20)
    one, other = WebDocument("u", "t", "one", ("l",)), WebDocument("u", "t", "other")
    assert kept.get("k") is None
    assert kept.put("k", one) == one
    assert kept.put("k", other) == one
    kept.path("k").write_bytes(kept.path("k").read_bytes()[:-4])
    assert kept.get("k") is None
    assert kept.put("k", other) == other == kept.get("k")
    assert len(list(tmp_path.iterdir())) == 1


def test_the_directory_stays_as_small_as_it_is_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LOOK_EVERY", 1)
    kept = DocumentCache(tmp_path, 2000)
    for number in range(40):
        kept.put(str(number), WebDocument("u", "t", str(number)))
        kept.get("0")  # asked for all the time
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2000
    assert kept.get("0") is not None
    assert kept.get("39") is not None
    assert kept.get("1") is None


async def test_a_start_tells_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for allow, directory, fault in (
        ([], None, "tools.browse_allow is empty"),
        (["http://x.example/"], tmp_path / "file", "set tools.browse_cache"),
    ):
        tools = browser(allow, directory)
        with pytest.raises(ToolStartError, match=fault):
            await tools.check()
        await tools.close()
    tools = browser([])
    refused = await browse(tools, "http://x.example/")
    await tools.close()
    assert refused.status is ToolStatus.REJECTED
    assert "allowed: none" in refused.text
