"""The page of a training run that goes on: a small quickstart, from its warm start to its end."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import opened

from system.watch.server import start

sys.path.append(str(Path(__file__).resolve().parents[1] / "e2e"))
from cli_runs import Run

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(600)]
WAIT_S = 300.0
STEPS = 5
SMALL = (
    f"run.steps={STEPS}",
    "warmstart.steps=30",
    "warmstart.demos=300",
    "eval.questions=6",
    "rollout.concurrency=8",
    "observe.wandb=disabled",
    "observe.progress_s=1",
)
FREE = 160  # leaves: those of the first evaluation, of more than one batch, and of the trees still growing


@pytest.fixture
def seen_enough(tmp_path: Path) -> Path:
    """The file that lets the run go on beyond its first batches, however slow the browser."""
    return tmp_path / "go-on"


@pytest.fixture
def run(tmp_path: Path, seen_enough: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    held = (
        "reward.name=held_reward:HeldReward",
        f"reward.options={{free: {FREE}, until: {seen_enough}}}",
        f"reward.deadline_s={WAIT_S}",
        f"reward.close_deadline_s={WAIT_S}",
    )
    arguments = ["configs/quickstart.yaml", f"run.dir={tmp_path}", "run.name=live", *SMALL, *held]
    found = Run(tmp_path / "live", arguments)
    yield found
    found.kill()


async def test_a_quickstart_while_it_runs(browser: Any, run: Run, seen_enough: Path, shots: Path) -> None:
    there = run.directory / "config.yaml"
    await asyncio.to_thread(run.wait_for, there.exists, WAIT_S, "a run directory")
    server, address = await start([run.directory])
    seen = await opened(browser, address, patience_s=WAIT_S)
    page = seen.page

    async def shot(name: str) -> None:
        assert await seen.overflow() <= 0, f"{name} is cut off at 1280 px"
        await page.screenshot(path=shots / f"live-{name}.png")

    await page.wait_for_selector(".state.running >> text=It is running")
    await page.evaluate("document.body.dataset.loaded = 'once'")
    await shot("begun")

    await page.click("nav >> text=Trees")
    known = "Number(document.querySelector('#matched').textContent.match(/of ([0-9]+) /)[1])"
    await seen.until(f"document.querySelector('#matched') && {known} > 0", WAIT_S)
    first = await page.evaluate(known)
    await asyncio.to_thread(seen_enough.touch)
    await seen.until(f"{known} > {first}", WAIT_S)
    await page.fill("#forks_min", "1")
    await page.wait_for_selector("tbody tr[data-tree]")
    await shot("trees")
    await page.click("tbody tr[data-tree] >> nth=0")
    await page.click("circle.forked >> nth=0")
    await page.wait_for_selector("#detail .fork >> text=P(fork)")
    await page.click("#compare")
    await page.wait_for_selector(".pair .column >> nth=1")
    await seen.until("document.querySelectorAll('.pair .column:last-child pre span').length > 0")
    left, right = await page.locator(".pair .column").all_inner_texts()
    assert left != right
    await page.select_option("#colour", "waits")
    await page.wait_for_selector(".legend >> text=its first token is awaited")
    assert await page.locator("g.node.model rect.k0").count() > 0, "tokens came, and the tree says when"
    await shot("tree")

    await page.click("nav >> text=Timeline")
    await page.wait_for_selector("svg.timeline .phase text >> text=training")
    await page.wait_for_selector("svg.timeline path.bar")
    await shot("timeline")

    await page.click("nav >> text=Run")
    await page.wait_for_selector(".state.finished >> text=It has finished.")
    assert f"step {STEPS} of {STEPS}" in await page.inner_text(".state")
    assert await page.get_attribute("progress", "value") == str(STEPS)
    assert await page.locator(".chart path.line").count() > 5
    await page.click("nav >> text=Evaluation")
    await page.wait_for_selector("td >> text=after")
    await shot("ended")
    assert await page.evaluate("document.body.dataset.loaded") == "once", "nobody has loaded the page again"
    assert await asyncio.to_thread(run.wait, WAIT_S) == 0, run.output()
    seen.without_complaint(address)
    await server.close()
