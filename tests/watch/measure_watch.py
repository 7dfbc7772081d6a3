"""What a page costs over a run of 10,000 trees, in chromium: prints the figures.

    python tests/watch/measure_watch.py [TREES]

First page: from the request of a fresh browser to the drawn curves, and to the first rows of the list.
Filter: from the key to the new rows in the page, after a wait of an animation frame.  Memory: of a server in
a process of its own, after it has read everything and drawn some trees.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
from browser import CHROMIUM, Watched
from playwright.async_api import Page, async_playwright
from watch_runs import append, line, made_run, record

from system.tree.store import TreeWriter, read_trees
from system.watch.demo import unpacked

FILTER = """(value) => new Promise((done, failed) => {
  setTimeout(() => failed(new Error("the list did not change")), 10000);
  const told = document.getElementById("matched"), field = document.getElementById("spread_min");
  const began = performance.now(), before = told.textContent;
  new MutationObserver((_, self) => {
    if (told.textContent === before) return;
    self.disconnect();
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - began)));
  }).observe(told, { childList: true, characterData: true, subtree: true });
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
})"""


def make(root: Path, count: int) -> Path:
    """A run of ``count`` trees: those of the demo, numbered on, with other prompts, times and rewards."""
    with unpacked() as demo:
        trees = list(read_trees(demo / "trees"))
    run = made_run(root, [], steps=0)
    rng = np.random.default_rng(0)
    with TreeWriter(run.trees) as writer:
        for number in range(count):
            tree = trees[number % len(trees)]
            reward = rng.choice([-1.0, 0.0, 1.0], tree.n_leaves).astype(np.float32)
            correct = (reward > 0).astype(np.int8)
            times = {"started_s": 1000.0 + number, "closed_s": 1002.0 + number}
            writer.append(replace(tree, prompt_id=f"p{number}", reward=reward, correct=correct, **times))
    append(run.metrics_path, "".join(line(record(step)) for step in range(1, count // 8)))
    return run.root


async def measure(root: Path) -> None:
    command = [sys.executable, "-m", "actors.cli.main", "watch", str(root)]
    server = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert server.stdout is not None
    address = (await server.stdout.readline()).decode().split()[1]
    began = time.perf_counter()
    memory = psutil.Process(server.pid)
    try:
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = await browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(300_000)
            print(
                f"first page, curves: {await seconds(page, address, '.tiles'):.2f} s, at the server's start"
            )
            first = await seconds(page, address.split("#")[0] + "#/trees/0", "tbody tr[data-tree]")
            print(f"first rows of the list: {first:.2f} s")
            await Watched(page).until("!/still/.test(document.getElementById('matched').textContent)")
            print(f"all trees known: {time.perf_counter() - began:.1f} s after the server's start")
            print(await page.inner_text("#matched"))
            fresh = []
            for _ in range(5):
                await page.goto("about:blank")
                fresh.append(await seconds(page, address, ".tiles"))
            print(f"first page, all read: median {statistics.median(fresh):.2f} s, most {max(fresh):.2f} s")
            await page.goto(address.split("#")[0] + "#/trees/0")
            await page.wait_for_selector("tbody tr[data-tree]")
            times = [await page.evaluate(FILTER, ("0.9", "0.7")[i % 2]) for i in range(20)]
            print(f"a filter: median {statistics.median(times):.0f} ms, most {max(times):.0f} ms")
            for number in range(0, 200, 10):
                await page.goto(address.split("#")[0] + f"#/tree/0/{number}")
                await page.wait_for_selector("svg.tree")
            print(f"memory of the server: {memory.memory_info().rss / 2**20:.0f} MiB")
            await browser.close()
    finally:
        server.terminate()
        await server.wait()


async def seconds(page: Page, address: str, until: str) -> float:
    began = time.perf_counter()
    await page.goto(address)
    await page.wait_for_selector(until)
    return time.perf_counter() - began


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        asyncio.run(measure(make(Path(place), int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)))
