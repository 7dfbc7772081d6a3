"""The page in a real browser: the demo, light and dark, by mouse and by keyboard, and hostile text.

Screenshots go to ``$ESPALIER_SCREENSHOTS``, if that is set, else to pytest's directory.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import opened
from watch_runs import append, forked_tree, line, made_run, record, timed_tree, varied

from system.observe.rundir import RunDir
from system.tree.record import Tree
from system.tree.store import TreeWriter
from system.watch import mail
from system.watch.server import start

pytestmark = [pytest.mark.browser, pytest.mark.slow]
HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>'


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_demo_from_page_to_page(browser: Any, demo: Path, shots: Path, scheme: str) -> None:
    server, address = await start([demo])
    seen = await opened(browser, address, scheme)
    page = seen.page

    async def shot(name: str) -> None:
        assert await seen.overflow() <= 0, f"{name} is cut off at 1280 px"
        await page.screenshot(path=shots / f"{name}-{scheme}.png")

    await page.wait_for_selector(".chart path.line")
    assert "key=" not in page.url, "the key does not stay in the address"
    assert "It has finished." in await page.inner_text(".state")
    assert await page.locator(".chart").count() == 6
    await shot("run")

    await page.click("nav >> text=Trees")
    await page.wait_for_selector("tbody tr[data-tree]")
    await seen.until("document.querySelector('#matched').textContent.endsWith('of 126 trees')")

    async def matched(field: str, value: str, before: int) -> int:
        """How many trees are listed, once a filter has changed that."""
        await page.fill(field, value)
        await seen.until(f"!document.querySelector('#matched').textContent.startsWith('{before} of')")
        return int((await page.inner_text("#matched")).split()[0])

    wide = await matched("#spread_min", "0.4", 126)
    left = await matched("#forks_min", "2", wide)
    early = await matched("#time_max", "100", left)
    assert 0 < early < left < wide < 126
    assert await matched("#time_max", "", early) == left
    spreads = [float(text) for text in await page.locator("tbody td:nth-child(5)").all_inner_texts()]
    assert min(spreads) >= 0.4
    await page.click("thead >> text=spread")
    await page.wait_for_selector("thead >> text=spread ▼")
    await shot("trees")

    await page.click("tbody tr[data-tree] >> nth=0")
    await page.wait_for_selector("svg.tree")
    lanes = await page.locator("text.leaf").count()
    assert lanes == 8
    await page.click("circle.forked >> nth=0")
    await page.wait_for_selector("#detail .fork")
    assert re.search(r"ΔH [+−]\d.*P\(fork\) \d.*draw \d.*→ \d fork", await page.inner_text("#detail .fork"))
    await page.wait_for_selector("#detail .text pre span")
    await shot("fork")
    await page.click("#compare")
    await page.wait_for_selector(".pair .column >> nth=1")
    await seen.until("document.querySelectorAll('.pair .column:last-child pre span').length > 0")
    columns = await page.locator(".pair .column").all_inner_texts()
    assert columns[0] != columns[1]
    assert await page.locator(".node.faded").count() > 0
    for colour in ("advantage", "version", "latency", "author", "entropy"):
        await page.select_option("#colour", colour)
        assert await page.locator(".legend .swatch").count() >= 2
        await shot(f"tree-{colour}")
    await page.keyboard.press("t")
    await page.wait_for_selector("text=time since the tree's start")
    await page.select_option("#colour", "waits")
    assert await page.locator("g.node rect.k4").count() >= lanes, "each branch awaits tokens"
    assert await page.locator("g.node.tool rect.k2").count() > 0, "calls take time"
    await shot("tree-time")

    await page.click("nav >> text=Timeline")
    await page.wait_for_selector("svg.timeline path.bar[class*=k]")
    assert await page.locator("svg.timeline .phase").count() > 3
    await page.hover("svg.timeline .over >> nth=0")
    await page.wait_for_selector("#told >> text=waits for")
    await shot("timeline")
    await page.click("nav >> text=Evaluation")
    await page.wait_for_selector("main[data-page=evaluation] .chart circle")
    await shot("evaluation")
    await page.click("nav >> text=Compare")
    await page.wait_for_selector("main[data-page=compare] .chart")
    await shot("compare")
    seen.without_complaint(address)
    await server.close()


async def test_by_keyboard_alone(browser: Any, demo: Path) -> None:
    server, address = await start([demo])
    seen = await opened(browser, address)
    page = seen.page
    await page.wait_for_selector(".tiles")
    await page.keyboard.press("2")
    await page.wait_for_selector("tbody tr.chosen")
    first = await page.get_attribute("tr.chosen", "data-tree")
    await page.keyboard.press("j")
    assert await page.get_attribute("tr.chosen", "data-tree") != first
    await page.keyboard.press("Enter")
    await page.wait_for_selector("svg.tree")
    assert await page.evaluate("document.activeElement.matches('svg.tree')"), "keys go to the drawing"
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Enter"):
        await page.keyboard.press(key)
    await page.wait_for_selector("#detail .text pre span")
    await page.keyboard.press("c")
    await page.wait_for_selector(".pair")
    before = await page.get_attribute("svg.tree", "width")
    await page.keyboard.press("+")
    assert int(await page.get_attribute("svg.tree", "width")) > int(before)
    await page.keyboard.press("Escape")
    await page.wait_for_selector("tbody tr.chosen")
    await page.focus("thead >> text=spread")
    await page.keyboard.press("Enter")
    await page.wait_for_selector("thead >> text=spread ▼")
    focused = "document.activeElement.textContent"
    assert await page.evaluate(focused) == "spread ▼", "a new list does not take the focus away"
    seen.without_complaint(address)
    await server.close()


async def test_hostile_text_a_run_that_goes_on_and_a_server_that_ends(browser: Any, tmp_path: Path) -> None:
    run = made_run(tmp_path, [*varied(3), hostile_tree()], name=HOSTILE.replace("/", ""))
    append(run.events_path, line({"time": 1003.0, "note": HOSTILE}))
    server, address = await start([run.root, made_run(tmp_path, varied(2), name="other").root])
    seen = await opened(browser, address)
    page = seen.page
    await page.wait_for_selector(".notes li >> nth=1")
    for number, name in enumerate(("run", "trees", "timeline", "evaluation", "compare"), start=1):
        await page.keyboard.press(str(number))
        await page.wait_for_selector(f"main[data-page={name}] >> nth=0")
    base = address.split("#")[0]
    await page.goto(f"{base}#/tree/0/3")
    await page.wait_for_selector("svg.tree")
    await page.click("g.node.tool >> nth=0", force=True)
    await page.wait_for_selector("pre.arguments")
    assert HOSTILE in await page.inner_text("main")
    assert await page.locator("main img, main script, header img").count() == 0
    await page.goto(f"{base}#/run/0")
    await page.wait_for_selector("text=step 5 of 10")
    append(run.metrics_path, line(record(6)))
    await page.wait_for_selector("text=step 6 of 10")
    seen.without_complaint(address)
    await server.close()
    await page.wait_for_selector("#problem >> text=does not answer")


async def test_a_tree_over_time(browser: Any, tmp_path: Path) -> None:
    """By its recorded seconds; and one of an older version, which has none."""
    server, address = await start([made_run(tmp_path, [timed_tree(), forked_tree()]).root])
    seen = await opened(browser, address)
    page = seen.page
    await page.wait_for_selector(".tiles")
    base = address.split("#")[0]
    await page.goto(f"{base}#/tree/0/0")
    await page.wait_for_selector("svg.tree")
    await page.select_option("#colour", "waits")
    await page.wait_for_selector("text=time since the tree's start")

    async def stretch(node: int, name: str) -> tuple[float, float]:
        """(begin, end) of a node's first bar of that class, in pixels."""
        bar = page.locator(f"g.node[data-node='{node}'] rect.{name} >> nth=0")
        begin, wide = [float(await bar.get_attribute(one)) for one in ("x", "width")]
        return begin, begin + wide

    begin, end = await stretch(1, "k4")  # its first token is awaited from 0 to 0.5 s
    second = 2 * (end - begin)
    tool, held = await stretch(2, "k2"), await stretch(3, "k1")
    assert tool == pytest.approx((begin + 1.1 * second, begin + 1.35 * second), abs=0.1)
    assert held == pytest.approx((begin + 1.5 * second, begin + 1.75 * second), abs=0.1)
    fork = await stretch(4, "k4")
    assert fork[0] == pytest.approx(begin + 2.2 * second, abs=0.1)
    ahead = page.locator("line.ahead >> nth=-1")
    assert float(await ahead.get_attribute("x2")) == pytest.approx(fork[0], abs=0.1), "not begun before"
    await page.click("g.node[data-node='4'] .hit", force=True)
    assert "from +2.2 s to +2.5 s" in await page.inner_text("#detail .facts")
    await page.click("#over")
    await page.wait_for_selector("text=tokens of the branch")
    assert await page.input_value("#colour") == "entropy", "causes of waiting are seen over time alone"
    await page.keyboard.press("t")  # while a button has the focus
    await page.wait_for_selector("text=time since the tree's start")
    await page.focus("#colour")
    await page.keyboard.press("Escape")  # leaves the field, not the page
    await page.keyboard.press("t")
    await page.wait_for_selector("text=tokens of the branch")
    await page.goto(f"{base}#/tree/0/1")
    await page.wait_for_selector("#over[disabled]")
    await page.keyboard.press("t")
    await page.wait_for_selector("text=tokens of the branch")
    seen.without_complaint(address)
    await server.close()


async def test_long_names_and_many_runs_fit_at_1280_px(browser: Any, tmp_path: Path) -> None:
    long = "a" * 200
    tree = replace(timed_tree(), prompt_id=long, task=long)
    runs = [made_run(tmp_path / str(i), [tree], name=f"{i}{long}") for i in range(9)]
    append(runs[0].events_path, line({"time": 1003.0, "note": long * 3}))
    for many in (runs[:1], runs):
        server, address = await start([run.root for run in many])
        seen = await opened(browser, address)
        await seen.page.wait_for_selector(".tiles")
        for place in ("run/0", "trees/0", "tree/0/0", "timeline/0", "evaluation/0", "compare/0"):
            await seen.page.goto(f"{address.split('#')[0]}#/{place}")
            await seen.page.wait_for_selector(f"main[data-page={place.split('/')[0]}]")
            assert await seen.overflow() <= 0, place
        seen.without_complaint(address)
        await server.close()


async def test_a_supervised_run_shows_its_losses(browser: Any, tmp_path: Path) -> None:
    run = made_run(tmp_path, [], steps=0)
    run.sft_path.write_text("{}")
    for step in range(1, 6):
        append(
            run.metrics_path, line({"step": step, "time": 1000.0 + step, "sft/loss": 1 / step, "sft/lr": 0.1})
        )
    server, address = await start([run.root])
    seen = await opened(browser, address)
    await seen.page.wait_for_selector(".chart path.line >> nth=1", state="attached")
    assert await seen.page.locator("figcaption").all_inner_texts() == ["Loss nats per token", "Learning rate"]
    assert "step 5" in await seen.page.inner_text(".state")
    assert await seen.page.locator("progress").count() == 0
    seen.without_complaint(address)
    await server.close()


async def test_without_the_key_the_page_says_what_to_do(browser: Any, demo: Path) -> None:
    server, address = await start([demo])
    seen = await opened(browser, address.split("#")[0])
    await seen.page.wait_for_selector("text=Open the address that espalier watch printed")
    await server.close()


async def test_a_tree_as_a_file_needs_none(browser: Any, demo: Path, tmp_path: Path, shots: Path) -> None:
    out = tmp_path / "tree.html"
    out.write_text(mail.page(RunDir(demo), hostile_tree()), encoding="utf-8")
    seen = await opened(browser, out.as_uri())
    page = seen.page
    await page.wait_for_selector("svg.tree")
    await page.click("circle.forked")
    await page.click("#compare")
    await page.wait_for_selector(".pair .column >> nth=1")
    await seen.until("document.querySelectorAll('.pair pre span').length > 0")
    assert HOSTILE in await page.inner_text("main")
    assert await page.locator("main img").count() == 0
    await page.screenshot(path=shots / "file.png")
    seen.without_complaint(out.as_uri())


async def test_a_tree_of_64_leaves_of_32_thousand_tokens(browser: Any, tmp_path: Path) -> None:
    run = made_run(tmp_path, [])
    with TreeWriter(run.trees) as writer:
        writer.append(wide_tree(64, 32_768))
    server, address = await start([run.root])
    seen = await opened(browser, address)
    page = seen.page
    await page.wait_for_selector(".tiles")
    sizes: list[int] = []
    page.on("response", lambda answer: sizes.append(int(answer.headers.get("content-length", 0))))
    await page.goto(f"{address.split('#')[0]}#/tree/0/0")
    await page.wait_for_selector("svg.tree")
    assert await page.locator("text.leaf").count() == 64
    assert max(sizes) < 400_000, "bins, not tokens"
    await page.click("g.node.model >> nth=3", force=True)
    await page.wait_for_selector("text=more tokens >> nth=0")
    seen.without_complaint(address)
    await server.close()


def hostile_tree() -> Tree:
    tree = forked_tree(HOSTILE)
    call = replace(tree.calls[0], tool=HOSTILE, arguments={"query": HOSTILE})
    return replace(tree, task=HOSTILE, calls=(call,), meta={"question": HOSTILE, "gold": [HOSTILE]})


def wide_tree(leaves: int, tokens: int) -> Tree:
    """A prompt and so many roots of ``tokens`` tokens each."""
    total, rng = 4 + leaves * tokens, np.random.default_rng(0)
    sampled = np.arange(total) >= 4
    return replace(
        forked_tree(),
        tokens=rng.integers(0, 50, total).astype(np.int32),
        logprob=np.where(sampled, -0.5, 0).astype(np.float32),
        entropy=np.where(sampled, rng.exponential(0.3, total), np.nan).astype(np.float32),
        version=np.where(sampled, 3, -1).astype(np.int32),
        start=np.array([0, *(4 + tokens * np.arange(leaves))], np.int32),
        parent=np.array([-1, *[0] * leaves], np.int32),
        kind=np.array([0, *[1] * leaves], np.int8),
        leaf=np.arange(1, leaves + 1, dtype=np.int32),
        reward=(np.arange(leaves) % 2).astype(np.float32),
        correct=(np.arange(leaves) % 2).astype(np.int8),
        outcome=np.zeros(leaves, np.int8),
        origin=np.zeros(leaves, np.int8),
        calls=(),
        forks=(),
        budget=leaves,
    )
