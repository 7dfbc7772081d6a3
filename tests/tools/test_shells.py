"""Shells keep their files and variables, are copied, and are nobody else's."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import resource
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from polling import eventually
from sandboxes import running
from sessions import alive, children, descendants, name, scratch_directories, text

from system.tools.outcome import ToolStatus
from system.tools.sandbox.sandbox import Sandbox, SandboxLimits, SandboxUnavailable
from system.tools.sandbox.sessions import NotForked, SandboxSession, SessionTree, TreeFull
from system.tools.sandbox.settings import Shell

pytestmark = pytest.mark.asyncio(loop_scope="module")
LIMITS = SandboxLimits(
    wall_s=60.0, cpu_s=2.0, memory_mb=300, file_mb=4, disk_mb=8, threads=12, branches=6, open_files=128
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def box(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Sandbox]:
    given = tmp_path_factory.mktemp("given")
    (given / "project" / "src").mkdir(parents=True)
    (given / "project" / "src" / "run.sh").write_text("echo ran\n")
    (given / "other").mkdir()
    async with running(Sandbox(LIMITS, namespaces=True, shell=Shell(given=str(given)))) as box:
        yield box


@pytest_asyncio.fixture(loop_scope="module")
async def tree(box: Sandbox) -> AsyncIterator[SessionTree]:
    """Whose processes are gone after the test, whatever it did."""
    assert box.pid is not None
    pid = box.pid
    idle = [one for one in children(pid) if name(one) == "sandbox-warden"]  # of calls, as it was there before
    tree = await box.tree()
    yield tree
    await tree.close()
    await eventually(lambda: descendants(pid) == idle, 20, "a process is left")


def warden(box: Sandbox) -> int:
    assert box.pid is not None
    (one,) = [pid for pid in children(box.pid) if name(pid) == "sandbox-shells"]
    return one


async def idle(box: Sandbox) -> None:
    await eventually(lambda: not children(warden(box)), 20, "something of a command is left")


async def test_files_variables_functions_and_the_directory_stay(tree: SessionTree) -> None:
    shell = await tree.open(files={"a/b.txt": "line\n", "ü.txt": "ä"})
    assert await text(shell, "pwd; cat a/b.txt ü.txt") == "/files\nline\nä"
    await text(shell, "x=5; y=(1 '2 3'); export Z=$'a\\nb'; declare -A m=([k]=v); f() { echo f $x; }; cd a")
    assert await text(shell, "pwd; f; echo ${#y[@]} ${m[k]}; printenv Z") == "/files/a\nf 5\n2 v\na\nb"
    await text(shell, "readonly R=1; unset x; set -- 1 2; shopt -s nullglob")
    assert await text(shell, "echo ${R-none} ${x-none} $# $?") == "none none 0 0"
    assert (await shell.run("exit 3")).exit_code == 3
    assert await text(shell, "pwd") == "/files/a"
    assert await text(shell, "env | grep -c espalier; grep -c espalier /state/*; true") == (
        "0\n/state/cwd:0\n/state/functions:0\n/state/variables:0"
    )


async def test_programs_run_and_end_with_their_command(box: Sandbox, tree: SessionTree) -> None:
    shell = await tree.open()
    code = "printf '#!/bin/sh\\necho own\\n' > s; chmod +x s; ./s | tr a-z A-Z; seq 3 | wc -l"
    assert await text(shell, code) == "OWN\n3"
    assert await text(shell, "(sleep 60; echo late >> late) & setsid sleep 60 & disown; echo on") == "on"
    await idle(box)
    assert await text(shell, "ls") == "s"
    result = await shell.run("kill -9 $$")
    assert (result.exit_code, shell.alive) == (137, True)
    assert (await shell.run("cat; read x; echo $x")).text == ""
    (status, said) = ((one := await shell.run("echo (")).status, one.text)
    assert status == ToolStatus.ERROR
    assert "syntax error" in said


async def test_a_fork_is_a_copy(tree: SessionTree) -> None:
    shell = await tree.open(given="project")
    await text(shell, "x=1; ln -s src link; cd link; . ./run.sh")
    child = await shell.fork()
    assert await text(child, "pwd; echo $x; echo new > ../new; x=2") == "/files/src\n1"
    assert await text(shell, "pwd; echo $x; ls ..") == "/files/src\n1\nlink\nsrc"
    grandchild = await child.fork()
    assert await text(grandchild, "cat ../new; echo $x; readlink ../link") == "new\n2\nsrc"
    await child.close()
    assert await text(grandchild, "sh run.sh") == "ran"
    later = await tree.open(given="project")
    assert await text(later, "ls; touch src/mine; ls src") == "src\nmine\nrun.sh"


@pytest.mark.parametrize("code", ["ln s t", "mkfifo p", "mkdir -p $(printf 'd/%.0s' {1..40})"])
async def test_what_no_copy_can_equal_is_not_copied(tree: SessionTree, code: str) -> None:
    shell = await tree.open(files={"s": ""})
    await text(shell, code)
    with pytest.raises(NotForked):
        await shell.fork()
    assert await text(shell, "echo on") == "on"


async def test_sessions_and_the_machine_are_out_of_reach(box: Sandbox, tree: SessionTree) -> None:
    one, other = await tree.open(files={"secret": "1"}), await tree.open()
    assert await text(one, "ls /scratch /given /files") == "/files:\nsecret\n\n/given:\n\n/scratch:"
    assert await text(other, "ls /files /tmp | grep -c secret; true") == "0"
    tries = {
        "exec 3<>/dev/tcp/127.0.0.1/22": "not permitted",
        "cat /etc/shadow": "No such file",
        f"kill -9 {warden(box)}": "No such process",
        "kill 1": "not permitted",
        "unshare -r true": "not permitted",
        "mount -t tmpfs x /files": "superuser",
        "chmod u+s /usr/bin/env": "Read-only|not permitted",
        "echo > /usr/bin/new": "Read-only|Permission denied",
        "mknod d c 1 3": "not permitted",
        "echo x > /dev/sda": "Permission denied|Read-only",
        "python3 -c 'import os; os.chroot(\".\")'": "not permitted",
        "ls /proc/self": "No such file",
    }
    for code, why in tries.items():
        result = await one.run(f"( {code} ) 2>&1; exit $?")
        assert result.exit_code, (code, result.text)
        assert any(word in result.text for word in why.split("|")), (code, result.text)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (":(){ :|:& };:; sleep 5", "more than 12 processes"),
        (
            "for i in 1 2; do python3 -c 'import time; x = bytearray(200 << 20); time.sleep(9)' & done; wait",
            "300 MB",
        ),
        ("for i in 1 2 3; do (while :; do :; done) & done; wait", "2 s of CPU"),
        ("sleep 60", "longer than 1 s"),
        ("trap '' TERM INT; while :; do sleep 1; done", "longer than 1 s"),
    ],
)
async def test_what_goes_too_far_is_ended_with_its_session(
    box: Sandbox, tree: SessionTree, code: str, why: str
) -> None:
    shell, other = await tree.open(), await tree.open()
    result = await shell.run(code, deadline_s=1.0 if "1 s" in why else 60.0)
    assert result.status != ToolStatus.OK
    assert why in result.text
    assert not shell.alive
    await idle(box)
    assert await text(other, "echo on") == "on"


async def test_files_are_bounded(tree: SessionTree) -> None:
    shell = await tree.open()
    assert "File too large" in (await shell.run("yes > a")).text
    assert "No space left" in (await shell.run("cp a b; cp a c; cp a d")).text
    assert shell.held_mb > 6
    said = await text(shell, "rm *; mkdir n; cd n; mkdir {1..3000} 2> /dev/null; ls | wc -l")
    assert 1000 < int(said) < LIMITS.files
    assert await text(shell, "cd; rm -r n; echo on") == "on"


async def test_whoever_gives_up_leaves_nothing_running(box: Sandbox, tree: SessionTree) -> None:
    shell = await tree.open()
    running = asyncio.create_task(shell.run("sleep 60 & sleep 60"))
    await eventually(lambda: len(descendants(warden(box))) >= 4, 20, "it does not begin")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not shell.alive
    await idle(box)


async def test_many_at_once_keep_apart(tree: SessionTree) -> None:
    first = await tree.open()
    shells = [first, *[await first.fork() for _ in range(5)]]
    with pytest.raises(TreeFull):
        await tree.open()

    async def count(shell: SandboxSession, mark: int) -> str:
        for i in range(4):
            await text(shell, f"n=$((n + {mark})); echo {i} >> lines")
        return await text(shell, "echo $n; wc -l < lines")

    assert await asyncio.gather(*(count(shell, mark) for mark, shell in enumerate(shells))) == [
        f"{4 * mark}\n4" for mark in range(6)
    ]


async def test_a_killed_warden_takes_all_with_it(box: Sandbox, tree: SessionTree) -> None:
    shell = await tree.open()
    running = asyncio.create_task(shell.run("sleep 60"))
    await eventually(lambda: len(descendants(warden(box))) >= 3, 20, "it does not begin")
    pid = warden(box)
    below = descendants(pid)

    os.kill(pid, signal.SIGKILL)
    with pytest.raises(Exception, match="died"):
        await running
    await eventually(lambda: not alive(below), 20, "something of a command is left")


async def test_long_and_odd_commands(tree: SessionTree) -> None:
    shell = await tree.open()
    assert await text(shell, "#" + "x" * 400_000 + "\necho 'tail'") == "tail"
    assert await text(shell, "echo ä\0b \ud800") == "äb ?"
    assert "line 3" in (await shell.run("\n\nnosuchprogram")).text


async def test_many_deep_copies_at_once_leave_descriptors_for_calls() -> None:
    """Each copy holds two descriptors for each directory on its way down."""
    limits = dataclasses.replace(LIMITS, branches=40)
    box = Sandbox(limits, namespaces=True, shell=Shell())
    try:
        await box.start()
        tree = await box.tree()
        first = await tree.open()
        fill = "for i in {1..300}; do echo $i > $i; done"
        await text(first, f"d=$(printf 'd/%.0s' {{1..30}}); mkdir -p $d; cd $d; {fill}")
        deep = [first, *[await first.fork() for _ in range(11)]]
        others = [await tree.open() for _ in range(6)]

        async def called(shell: SandboxSession) -> None:
            for _ in range(3):
                assert await text(shell, "echo on") == "on"

        await asyncio.gather(*(shell.fork() for shell in deep), *map(called, others))
    finally:
        await box.close()


async def test_a_command_that_cannot_be_begun_leaves_nothing(box: Sandbox, tree: SessionTree) -> None:
    """Its session is of no use to anybody, and is not kept."""
    shell, pid = await tree.open(), warden(box)
    await text(shell, "true")
    await eventually(lambda: len(os.listdir(f"/proc/{pid}/task")) == 1, 20, "a call is not over")
    held = {int(one) for one in os.listdir(f"/proc/{pid}/fd")}
    free = [number for number in range(max(held) + 9) if number not in held]
    most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    for few in (2, 4, 6):  # the first is the call's own
        one = await tree.open()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[few], most[1]))
        try:
            with pytest.raises(SandboxUnavailable, match="Too many open files"):
                await one.run("true")
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, most)
    assert await text(shell, "echo on") == "on"
    await eventually(lambda: {int(one) for one in os.listdir(f"/proc/{pid}/fd")} == held, 20, "descriptors")
    assert len(scratch_directories(pid)) == 1


async def test_a_copy_of_a_file_with_holes_is_counted_as_it_is(tree: SessionTree) -> None:
    shell = await tree.open()
    await text(shell, "truncate -s 3M holes")
    assert shell.held_mb < 1
    assert (await shell.fork()).held_mb > 2.9
