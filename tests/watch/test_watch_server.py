"""The server: who gets in, what it forbids the page, hostile text, a run that grows and one that crashed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from watch_runs import append, contents, forked_tree, line, made_run, record, varied

from actors.cli.main import main
from system.errors import EspalierError
from system.observe.lease import NAME
from system.observe.rundir import RunDir
from system.tree.store import TreeWriter
from system.watch import mail, views
from system.watch.server import page_files, start
from system.watch.serving import told

SINKS = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\bFunction\(")
HOSTILE = '</script><img src=x onerror="alert(1)">\x1b[2J\u202e\ud800'


class Page:
    """What the page asks its server."""

    def __init__(self, address: str, session: aiohttp.ClientSession) -> None:
        parts = urlsplit(address)
        self.base, self.session = f"{parts.scheme}://{parts.netloc}", session
        self.key = parts.fragment.removeprefix("key=")

    async def get(self, path: str, *, key: str | None = None, **headers: str) -> tuple[int, Any, Any]:
        """(status, headers, body) with the key, or with another one."""
        shown = self.key if key is None else key
        asked = {"Authorization": f"Bearer {shown}"} if shown else {}
        async with self.session.get(self.base + path, headers=asked | headers) as answer:
            return answer.status, answer.headers, await answer.read()

    async def api(self, path: str) -> Any:
        status, _, body = await self.get(f"/api/{path}")
        assert status == 200, body
        return json.loads(body)

    async def until(self, path: str, holds: Any) -> Any:
        """What ``path`` says once ``holds``; a minute at most."""
        deadline = time.monotonic() + 60
        while not holds(found := await self.api(path)):
            assert time.monotonic() < deadline, found
        return found


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    tree = forked_tree(HOSTILE)
    call = replace(tree.calls[0], tool=HOSTILE, status="<b>\x1b", arguments={"query": HOSTILE})
    hostile = replace(
        tree, task=HOSTILE, calls=(call,), meta={"question": HOSTILE, "seconds": {HOSTILE: 1.0}}
    )
    run = made_run(tmp_path / "runs", [*varied(4), hostile])
    append(run.events_path, line({"time": 1003.0, "note": HOSTILE}))
    append(run.events_path, line({"time": 1004.0, "phase": HOSTILE}))
    return run


@pytest.fixture
async def page(run: RunDir) -> AsyncIterator[Page]:
    server, address = await start([run.root])
    async with aiohttp.ClientSession() as session:
        found = Page(address, session)
        await found.until("runs/0/trees", lambda trees: trees["known"] == 5)
        yield found
    await server.close()


async def test_only_who_shows_the_key_reads_a_run(page: Page) -> None:
    assert (await page.get("/api/runs"))[0] == 200
    for key in ("", "x", page.key[:-1], page.key + "x"):
        for path in ("/api/runs", "/api/runs/0/overview", "/api/runs/0/trees/1/nodes/0", "/nothing"):
            assert (await page.get(path, key=key))[0] == 401, (key, path)
    status, _, body = await page.get("/", key="")
    assert status == 200
    assert b"seen" not in body, "the page itself says nothing of the run"
    assert page.key not in body.decode()
    assert len(page.key) >= 32


async def test_a_foreign_host_is_refused(page: Page) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example"):
        for path in ("/", "/api/runs"):
            assert (await page.get(path, Host=host))[0] == 421, host
    for host in ("localhost:9999", "127.0.0.1:9999"):  # as ssh -L makes them
        assert (await page.get("/api/runs", Host=host))[0] == 200


async def test_the_page_may_load_and_run_nothing_else(page: Page) -> None:
    for path in ("/", "/static/app.js", "/api/runs", "/api/runs/9/overview"):
        _, headers, _ = await page.get(path)
        policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
    for path, file in page_files().items():
        text = file.read_text(encoding="utf-8")
        assert not SINKS.search(text), path
        assert not re.search(r"https?://(?!www\.w3\.org/)", text), f"{path} names another server"
        assert not re.search(r"<script(?! type=\"module\" src)|\son\w+=\"|<style", text), f"{path}: inline"


async def test_files_outside_the_page_are_not_served(page: Page) -> None:
    for path in (
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/static/",
        "/config.yaml",
        "/static/x.js",
    ):
        assert (await page.get(path))[0] in (404, 400), path
        assert (await page.get(path, key=""))[0] in (401, 404, 400), path


async def test_nothing_can_be_sent(page: Page) -> None:
    headers = {"Authorization": f"Bearer {page.key}", "Content-Type": "application/json"}
    async with page.session.post(f"{page.base}/api/runs", headers=headers, json={}) as answer:
        assert answer.status == 405


def strings(value: Any) -> Iterator[str]:
    """All texts of a JSON value, names of fields included."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


async def test_hostile_text_stays_text(page: Page) -> None:
    paths = [
        "overview",
        "trees",
        "trees/4",
        "trees/4/nodes/2",
        "timeline",
        "evaluation",
        "curves?keys=x",
        "settings",
    ]
    for path in paths:
        _, headers, body = await page.get(f"/api/runs/0/{path}")
        assert headers["Content-Type"] == "application/json"
        shown = "".join(strings(json.loads(body)))
        assert not set("\x1b\u202e\ud800") & set(shown), path
    assert "onerror" in (await page.api("runs/0/trees/4"))["prompt"], "it is shown, as text"
    asked = {"": 404, "trees/99": 404, "trees/4/nodes/77": 404, "trees?spread_min=x": 404}
    for path, status in asked.items():
        assert (await page.get(f"/api/runs/0/{path}"))[0] == status, path
    assert (await page.get("/api/runs/7/overview"))[0] == 404


async def test_the_text_of_a_node_comes_in_parts(page: Page) -> None:
    part = await page.api("runs/0/trees/4/nodes/4?first=1&count=2")
    assert (part["pieces"], part["total"]) == (["⟨12⟩", "⟨13⟩"], 5)
    assert json.loads((await page.api("runs/0/trees/0/nodes/2"))["arguments"][0]) == {"query": "who"}
    assert (await page.api("runs/0/trees/4/nodes/4?first=99"))["pieces"] == []


async def test_a_run_that_goes_on_is_followed(page: Page, run: RunDir) -> None:
    assert (await page.api("runs/0/overview"))["step"] == 5
    whole = line(record(6))
    append(run.metrics_path, whole[:40])
    with TreeWriter(run.trees, flush_trees=1) as writer:
        writer.append(forked_tree("late"))
    await page.until("runs/0/trees?text=late", lambda trees: trees["matched"] == 1)
    assert (await page.api("runs/0/overview"))["step"] == 5, "half a line is no record"
    append(run.metrics_path, whole[40:])
    await page.until("runs/0/overview", lambda about: about["step"] == 6)


async def test_a_run_that_cannot_be_read_on_says_so_and_comes_back(page: Page, run: RunDir) -> None:
    """A file server that is gone for a while."""
    away = run.config_path.rename(run.root / "away.yaml")
    append(run.metrics_path, line(record(6)))
    found = await page.until("runs/0/overview", lambda about: about["problems"])
    assert "cannot be read on" in found["problems"][0]
    away.rename(run.config_path)
    # The new line may have been read just before the file was away: so both are waited for.
    await page.until("runs/0/overview", lambda about: about["step"] == 6 and not about["problems"])


async def test_new_settings_are_read(page: Page, run: RunDir) -> None:
    assert (await page.api("runs/0/overview"))["steps"] == 10
    config = run.config()
    config.run.steps = 400
    run.write_config(config)
    await page.until("runs/0/overview", lambda about: about["steps"] == 400)


async def test_all_settings_can_be_compared(page: Page, run: RunDir) -> None:
    config = run.config()
    config.learn.lr, config.observe.project, config.slurm.env = 0.125, "a\u202eb", {"API_KEY": "hunter2"}
    run.write_config(config)
    await page.until("runs/0/settings", lambda found: found["learn.lr"] == "0.125")
    found = await page.api("runs/0/settings")
    assert "hunter2" not in str(found)
    assert found["observe.project"].startswith("a")
    assert "\u202e" not in found["observe.project"]
    assert not {"run.name", "run.dir"} & found.keys()
    assert max(map(len, found.values())) <= views.LONG


async def test_a_crashed_run_is_shown_as_it_was_left(page: Page, run: RunDir) -> None:
    process = await asyncio.create_subprocess_exec("sleep", "600")
    (run.root / NAME).write_text(json.dumps({"host": os.uname().nodename, "pid": process.pid}))
    assert (await page.api("runs/0/overview"))["state"]["state"] == "running"
    process.kill()
    await process.wait()
    append(run.metrics_path, '{"step": 7, "ti')
    before = contents(run.root)
    about = await page.api("runs/0/overview")
    assert (about["state"]["state"], about["step"]) == ("lost", 5)
    assert about["notes"][0]["text"] == "an engine was slow"
    assert len((await page.api("runs/0/trees"))["rows"]) == 5
    assert contents(run.root) == before


async def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    server, address = await start([made_run(tmp_path, [], steps=0).root])
    async with aiohttp.ClientSession() as session:
        page = Page(address, session)
        for path in ("overview", "trees", "timeline", "evaluation", "curves?keys=rollout/reward"):
            await page.api(f"runs/0/{path}")
    await server.close()


async def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    roots = [made_run(tmp_path / place, []).root for place in ("a", "b")]
    server, address = await start(roots)
    async with aiohttp.ClientSession() as session:
        found = [run["name"] for run in await Page(address, session).api("runs")]
    await server.close()
    assert len({root.name for root in roots}) == 1
    assert found == [str(root) for root in roots]


def test_what_is_said_of_the_address() -> None:
    address = "http://127.0.0.1:8420/#key=abc"
    lines = told(address, local=True)
    assert lines[0] == f"open {address}"
    assert "ssh -L 8420:127.0.0.1:8420" in lines[1]
    assert "unencrypted" in told(address, local=False)[1]


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_an_address_that_stands_for_all_is_told_by_the_machines_name(host: str) -> None:
    lines = told(f"http://{host}:8420/#key=abc", local=False)
    assert lines[0] == f"open http://{os.uname().nodename}:8420/#key=abc"
    assert "others" in lines[1]
    assert "ssh -L" in lines[2], "what is better"


async def test_a_server_for_the_network_asks_for_the_key_too(run: RunDir) -> None:
    server, address = await start([run.root], host="0.0.0.0")
    async with aiohttp.ClientSession() as session:
        page = Page(address.replace("0.0.0.0", "127.0.0.1"), session)
        for name in (os.uname().nodename, "192.0.2.1"):
            assert (await page.get("/api/runs", key="", Host=f"{name}:1"))[0] == 401
            assert (await page.get("/api/runs", Host=f"{name}:1"))[0] == 200
        assert (await page.get("/api/runs", Host="evil.example"))[0] == 421
    await server.close()


def test_the_command_serves_until_it_is_ended(run: RunDir, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "actors.cli.main", "watch", str(run.root), "--demo"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("open http://127.0.0.1:")
    assert [path.name for path in tmp_path.glob("espalier-demo-*/*")] == ["demo"]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert not list(tmp_path.glob("espalier-demo-*"))


def test_a_port_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "--demo", "--port", "99999"]) == 2
    assert "99999" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["/nowhere"], ["--demo", "--port", "1"]])
def test_what_cannot_be_served_is_said(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words[-1:] == ["1"] and os.geteuid() == 0:
        words = ["--demo", "--host", "203.0.113.7"]  # root may have any port, but not this address
    assert main(["watch", *words]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_tree_as_one_file(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tree.html"
    assert main(["tree", str(run.root), "--number", "4", "--html", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "opens in any browser" in capsys.readouterr().out
    data = text.split('id="tree">')[1].split("</script>")[0]
    held = json.loads(data)
    assert "onerror" in held["tree"]["prompt"]
    assert "<" not in data, "no text in it can end the element"
    assert held["texts"][4]["pieces"] == [f"⟨{token}⟩" for token in range(11, 16)]
    assert not re.search(r"\b(?:import|export)\b[^\n]*from|https?://(?!www\.w3\.org/)", text)
    assert main(["tree", str(run.root), "--html", str(tmp_path / "none" / "x.html")]) != 0


def test_the_table_of_all_trees_as_one_file(run: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "trees.html"
    assert main(["tree", str(run.root), "--list", "--html", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "uniq/flat" in text
    assert "<img" not in text, "what others wrote is text"
    assert "&lt;img" in text
    assert "default-src 'none'" in text
    assert "<script" not in text


def test_the_modules_of_the_file_share_no_name() -> None:
    """They become one module, where a name stands for one thing."""
    static = {path.name: path for path in page_files().values()}
    top = re.findall(r"^(?:async )?(?:const|function|let) (\w+)", mail.bundle(static), re.MULTILINE)
    assert len(top) > 20
    assert sorted(top) == sorted(set(top))


def test_reading_tells_of_errors_by_our_base(tmp_path: Path) -> None:
    with pytest.raises(EspalierError):
        mail.page(RunDir(tmp_path), forked_tree())
