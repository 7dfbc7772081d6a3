"""The bash environment under the rollout's sessions: files, checks, forks, equality with replay."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from grown import Tree, forks_equal_replay
from sandboxes import children, running

from system.config import EnvironmentConfig
from system.envs.live import BranchSession
from system.envs.make import make_environment
from system.envs.protocol import Acted, ForkKind, WorldFailed
from system.envs.shell import ShellEnvironment
from system.plugins import PluginError
from system.tools.sandbox.sandbox import Sandbox, SandboxUnavailable
from system.tools.sandbox.sessions import NotForked, SandboxSession
from system.tools.sandbox.settings import Shell
from system.tools.tool import ToolUnavailable

LIMITS = EnvironmentConfig(name="bash")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def usable() -> AsyncIterator[None]:
    async with running(Sandbox(namespaces=True, shell=Shell())):
        yield


pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("usable")]


def grown(extra: dict[str, Any] | None = None, **options: Any) -> Tree:
    return Tree(ShellEnvironment(**options), extra)


async def told(session: BranchSession, command: str) -> tuple[str, str]:
    observation = await session.act([Acted("bash", {"command": command})], "")
    return observation.messages[-1].status, observation.messages[-1].text


async def test_it_is_named_and_checked() -> None:
    made = make_environment(EnvironmentConfig(name="bash", options={"processes": 20}))
    assert isinstance(made, ShellEnvironment)
    assert (made.forks, list(made.tools)) == (ForkKind.NATIVE, ["bash"])
    await made.check()
    await made._sandbox.close()


async def test_without_namespaces_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(self: Sandbox) -> None:
        raise SandboxUnavailable("not here: with namespaces: no")

    monkeypatch.setattr(Sandbox, "start", start)
    with pytest.raises(ToolUnavailable, match="with namespaces: no"):
        await ShellEnvironment().check()


async def test_a_check_that_its_deadline_would_cut_off_is_refused() -> None:
    slow = EnvironmentConfig(name="bash", options={"check_s": 60})
    with pytest.raises(PluginError, match=r"check_s=60: .*set environment\.result_s=62 or more"):
        make_environment(slow)
    assert make_environment(dataclasses.replace(slow, result_s=62.0)) is not None


async def test_a_question_brings_files_and_a_check(tmp_path: Path) -> None:
    (tmp_path / "add").mkdir()
    (tmp_path / "add" / "add.sh").write_text("echo $(($1 - $2))\n")
    extra = {
        "directory": "add",
        "files": {"README": "add.sh adds"},
        "setup": "git init -q; git add -A; git commit -qm first",
        "check": "test $(sh add.sh 2 3) = 5 && sh tests/more.sh",
        "check_files": {"tests/more.sh": "test $(sh add.sh 1 1) = 2\n", "-f/'b\n$(exit)": "'%s\n"},
    }
    async with (tree := grown(extra, directories=str(tmp_path))) as root:
        assert await told(root, "ls; git log --oneline | wc -l") == ("ok", "README\nadd.sh\n1")
        child = root.fork((0, 1), 1)
        assert await told(child, "sed -i s/-/+/ add.sh; git diff --stat | tail -1 | wc -w") == ("ok", "7")
        assert (await child.result() or {})["reward"] == 1.0
        assert (await root.result() or {})["reward"] == 0.0
        assert await told(root, "ls") == ("ok", "README\nadd.sh"), "the check runs in a copy"
        assert tree.service.counts["forks_native"] == 1


async def test_what_a_session_defined_does_not_answer_for_the_check() -> None:
    extra = {"check": "python3 t.py", "check_files": {"t.py": "raise SystemExit(1)\n"}}
    async with grown(extra) as root:
        await told(root, "python3() { true; }; export -f python3; mkdir bin; cp /bin/true bin/python3")
        await told(root, "export PATH=/files/bin:$PATH BASH_ENV=/files/x; trap 'exit 0' EXIT; mkdir t.py")
        assert (await root.result() or {})["reward"] == 0.0


@pytest.mark.parametrize(
    "code",
    [
        "mkdir t; echo exit 0 > t/t.sh; chmod 444 t/t.sh; chmod 555 t",
        "mkdir /tmp/t; echo exit 0 > /tmp/t/t.sh; chmod 444 /tmp/t/t.sh; chmod 555 /tmp/t; ln -s /tmp/t t",
        "for i in 1 2 3; do head -c 3000000 /dev/zero > f$i; done",
        "chmod 0 /files",
    ],
)
async def test_check_files_that_cannot_be_written_pass_nothing(code: str) -> None:
    hidden = "#" + "x" * 9000 + "\nexit 1\n"
    async with grown({"check": "sh t/t.sh", "check_files": {"t/t.sh": hidden}}, disk_mb=4) as root:
        await told(root, code)
        result = await root.result() or {}
        assert result["reward"] == 0.0
        assert "The file of the check t/t.sh could not be written." in result["check"]


async def test_a_session_that_is_closed_to_itself_goes_on() -> None:
    async with (tree := grown({"check": "test -e done"})) as root:
        assert await told(root, "touch done; chmod 0 /files") == ("ok", "")
        assert "Permission denied" in (await told(root, "ls"))[1]
        child = root.fork((0, 1), 2)
        assert await told(child, "chmod 700 /files; ls") == ("ok", "done")
        assert [(await one.result() or {})["reward"] for one in (root, child)] == [0.0, 1.0]
        assert not tree.service.counts["rebuilt"]


async def test_the_check_has_a_home_of_its_own() -> None:
    async with grown({"check": "python3 -c 'raise SystemExit(1)'"}) as root:
        await told(root, "d=$(python3 -m site --user-site); mkdir -p $d; cd $d")
        await told(root, "echo 'import os; os._exit(0)' > usercustomize.py; cd")
        assert (await told(root, "python3 -c 'print(1)'"))[1] == ""
        assert (await root.result() or {})["reward"] == 0.0


async def test_a_full_tree_is_checked_as_any_other() -> None:
    tree = grown({"check": "test $(cat f) = 1; rm f"})
    box = tree.environment._sandbox
    box.limits = dataclasses.replace(box.limits, branches=2)
    async with tree as root:
        await told(root, "echo 1 > f")
        child = root.fork((0, 1), 1)
        assert await told(child, "echo 2 > f") == ("ok", "")
        assert (await root.result() or {})["reward"] == 1.0
        assert await told(root, "cat f") == ("ok", "1"), "the check took its session, not its files"


async def test_files_that_take_long_to_be_copied_do_not_make_the_check_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of `seq 60000 | xargs touch` do."""

    async def fork(_: SandboxSession, within_s: float = 10.0) -> SandboxSession:
        await asyncio.sleep(within_s)
        raise NotForked("its files take too long to be copied")

    async with grown({"check": "sleep 2; test -e done"}) as root:
        await told(root, "touch done")
        monkeypatch.setattr(SandboxSession, "fork", fork)
        assert (await root.result() or {})["reward"] == 1.0


@pytest.mark.parametrize("lost", ["given up", "killed"])
async def test_a_session_that_is_gone_is_built_again_for_its_check(lost: str) -> None:
    async with (
        tree := grown({"check": "test -e done"}, live_sessions=1 if lost == "given up" else 9)
    ) as root:
        child = root.fork((0, 1), 0)
        for one in (root, child):
            assert await told(one, "touch done") == ("ok", "")
        if lost == "killed":
            for warden in children(tree.environment._sandbox.pid or 0):
                os.kill(warden, signal.SIGKILL)
        assert [(await one.result() or {})["reward"] for one in (root, child)] == [1.0, 1.0]
        assert tree.service.counts["rebuilt"]


async def test_a_check_that_does_not_end_is_not_passed() -> None:
    async with grown({"check": "sleep 60"}, check_s=0.5) as root:
        result = await root.result() or {}
        assert (result["reward"], "0.5 s" in result["check"]) == (0.0, True)


async def test_no_check_no_result() -> None:
    async with grown() as root:
        assert await root.result() is None


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"files": {"../x": ""}}, "extra.files: '../x' leads out of /files"),
        ({"files": {"/etc/x": ""}}, "leads out of /files"),
        ({"files": ["x"]}, "no object of paths and texts"),
        ({"files": {"x": 1}}, "no path with a text"),
        ({"check": "true", "check_files": {"x": 1}}, "no path with a text"),
        (
            {"check": "true", "check_files": {"x": "y" * (1 << 20)}},
            "extra.check_files: with the check they are longer",
        ),
        ({"setup": "exit 3"}, "extra.setup: The program exited with code 3"),
        ({"directory": "x"}, "environment.options.directories does not say"),
        ({"directory": 5}, "5 is no text"),
    ],
)
async def test_a_question_that_cannot_be_begun_is_named(extra: dict[str, Any], why: str) -> None:
    with pytest.raises(WorldFailed) as caught:
        async with grown(extra):
            pass
    assert why in str(caught.value)
    assert "question 'p'" in str(caught.value)


async def test_a_directory_outside_is_not_given(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "given" / "link").symlink_to(tmp_path / "secret")
    for name in ("../secret", str(tmp_path / "secret"), "link"):
        with pytest.raises((WorldFailed, ToolUnavailable)):
            async with grown({"directory": name}, directories=str(tmp_path / "given")):
                pass
    with pytest.raises(ValueError, match="no directory"):
        ShellEnvironment(directories=str(tmp_path / "none"))


async def test_a_command_that_ends_the_session_never_was() -> None:
    async with (tree := grown(wall_s=1.0)) as root:
        await told(root, "echo a > f")
        child = root.fork((0, 1), 1)
        status, text = await told(root, "echo b >> f; sleep 60")
        assert (status, text.splitlines()) == (
            "timeout",
            ["Stopped: the program ran longer than 1 s.", "The state is as before the call."],
        )
        assert await told(root, "cat f") == ("ok", "a")
        assert await told(child, "cat f") == ("ok", "a")
        assert tree.service.counts["rebuilt"] == 1


async def test_large_files_beyond_the_bound_are_made_again() -> None:
    async with (tree := grown(live_mb=12)) as root:
        branches = [root, *(root.fork((0, i), 0) for i in range(1, 4))]
        for branch in branches:
            assert await told(branch, "head -c 5000000 /dev/zero > large; ls") == ("ok", "large")
        assert len(tree.environment._live) < 4
        for branch in branches:
            assert await told(branch, "wc -c < large") == ("ok", "5000000")
        assert tree.service.counts["rebuilt"] > 0


COMMANDS = (
    "echo $((x += 1)); echo $x >> log",
    "cat log 2>&1",
    "mkdir -p d/e; cd d; pwd",
    "cd ..; ls",
    "f() { echo f $x $1; }; f 1",
    "f 2",
    "export Y=$RANDOM_NOT; a+=(v); echo ${#a[@]}",
    "rm -rf d; pwd",
    "ln -s log l; cat l",
    "ln log hard; ls",
    "mkfifo p; ls",
    "rm -f hard p; ls -la",
    "exit 4",
    "git init -q g && cd g && echo a > a && git add a && git commit -qm m && git log --format=%s",
    "date > now; cat now; id",
    "python3 -c 'print(sorted(__import__(\"os\").listdir()))'",
    "false",
    "tar cf t.tar log; tar tf t.tar; rm t.tar",
)


def test_copies_and_replay_answer_the_same() -> None:
    """Each branch of a random tree sees what a session that is given its path alone sees."""
    forks = forks_equal_replay(grown, told, COMMANDS, examples=10)
    assert forks >= 5, "those of the program that is always among them"
