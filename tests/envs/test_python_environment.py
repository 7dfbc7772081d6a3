"""The python environment under the rollout's sessions: forks, rebuilding, parking, equality with replay."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
from grown import Tree, forks_equal_replay
from sandboxes import running

from system.config import EnvironmentConfig
from system.envs.live import BranchSession
from system.envs.make import make_environment
from system.envs.protocol import Acted, ForkKind, Observation
from system.envs.python import PythonEnvironment
from system.tools.sandbox.sandbox import Sandbox, SandboxUnavailable
from system.tools.tool import ToolUnavailable
from system.tree.prompt import Prompt

PROMPT = Prompt("p", ({"role": "user", "content": "?"},), ())
LIMITS = EnvironmentConfig(name="python")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def usable() -> AsyncIterator[None]:
    async with running(Sandbox(namespaces=True)):
        yield


def grown(**options: Any) -> Tree:
    return Tree(PythonEnvironment(**{"packages": [], **options}))


async def act(session: BranchSession, *codes: str) -> Observation:
    return await session.act([Acted("python", {"code": code}) for code in codes], "")


async def told(session: BranchSession, *codes: str) -> tuple[str, str]:
    message = (await act(session, *codes)).messages[-1]
    return message.status, message.text


pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("usable")]


async def test_branches_fork_with_their_state() -> None:
    made = make_environment(EnvironmentConfig(name="python", options={"cpu_s": 3, "packages": []}))
    assert isinstance(made, PythonEnvironment)
    assert (made.forks, list(made.tools)) == (ForkKind.NATIVE, ["python"])
    async with (tree := grown()) as root:
        await act(root, "x = [1]", "open('f', 'w').write('a')")
        child = root.fork((0, 1), 1)
        assert await told(root, "x.append(2); x") == ("ok", "[1, 2]")
        assert await told(child, "x.append(3); print(open('f').read())\nx") == ("ok", "a\n[1, 3]")
        other = root.fork((0, 2), 1)  # its parent has gone on: by replay
        assert await told(other, "x") == ("ok", "[1]")
        assert tree.service.counts["forks_native"] == 1
        assert tree.service.counts["forks_replay"] == 1


async def test_what_cannot_be_copied_is_replayed() -> None:
    async with (tree := grown()) as root:
        await act(root, "f = open('f', 'w'); x = 7; print(f.fileno() > 2)")
        child = root.fork((0, 1), 1)
        assert await told(child, "(x, f.closed)") == ("ok", "(7, False)")
        assert tree.service.counts["forks_refused"] == tree.service.counts["forks_replay"] == 1


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("x = 9\nimport time\ntime.sleep(60)", "longer than 1 s"),
        ("x = 9\nwhile True: pass", "longer than 1 s"),
        ("x = 9\nimport os\nos._exit(1)", "ended its interpreter"),
    ],
)
async def test_a_call_that_ends_the_session_never_was(code: str, why: str) -> None:
    async with (tree := grown(wall_s=1.0)) as root:
        await act(root, "x = 1")
        child = root.fork((0, 1), 1)
        _, text = await told(root, code)
        assert why in text
        assert text.endswith("The state is as before the call.")
        grandchild = root.fork((0, 2), 1)
        assert await told(root, "x += 1; x") == ("ok", "2")
        assert await told(child, "x") == ("ok", "1")
        assert await told(grandchild, "x") == ("ok", "1")
        assert tree.service.counts["rebuilt"] == 1


async def test_idle_sessions_beyond_the_bound_are_built_again_when_needed() -> None:
    async with (tree := grown(live_sessions=3)) as root:
        await act(root, "import random\nx = []")
        branches = [root.fork((0, i), 1) for i in range(6)]
        for step in range(2):
            for i, branch in enumerate(branches):
                assert (await told(branch, f"x.append({i}); x"))[1] == str([i] * (step + 1))
                assert len(tree.environment._live) <= 3
        assert tree.service.counts["rebuilt"] > 0


async def test_large_states_beyond_the_bound_are_built_again_when_needed() -> None:
    async with (tree := grown(live_mb=100)) as root:
        await act(root, "x = 1")
        branches = [root.fork((0, i), 1) for i in range(4)]
        for branch in branches:
            assert await told(branch, "large = list(range(10**6)); x") == ("ok", "1")  # 40 MB
            assert sum(session.held_mb for session in tree.environment._live.values()) < 100
        assert len(tree.environment._live) < 4
        assert await told(branches[0], "len(large)") == ("ok", "1000000")


async def test_a_tree_of_more_branches_than_sessions_belong_together() -> None:
    tree = grown()
    tree.environment._sandbox.limits = replace(tree.environment._sandbox.limits, branches=3)
    async with tree as root:
        await act(root, "x = 1")
        branches = [root.fork((0, i), 1) for i in range(7)]
        assert [await told(branch, "x") for branch in branches] == [("ok", "1")] * 7
        assert len(tree.environment._trees["r", "train", "1"].sessions) == 3
        assert tree.service.counts["forks_native"] == 2


async def test_a_killed_warden_costs_a_rebuild() -> None:
    async with (tree := grown()) as root:
        await act(root, "x = 1")
        (one,) = tree.environment._trees.values()
        await one.sessions[0].close()  # as if it had died
        assert await told(root, "x + 1") == ("ok", "2")


async def test_refused_by_name_where_sessions_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = PythonEnvironment(packages=[])

    async def start(self: Sandbox) -> None:
        raise SandboxUnavailable("python cannot be sandboxed here: with namespaces: no")

    monkeypatch.setattr(Sandbox, "start", start)
    with pytest.raises(ToolUnavailable, match=r"with namespaces: no.*tools.names=\[python\]"):
        await environment.check()


async def test_check() -> None:
    environment = PythonEnvironment(packages=[])
    await environment.check()
    await environment._sandbox.close()


async def test_packages_are_loaded_and_draw_by_the_seed() -> None:
    async with grown(packages=["numpy"]) as root:
        code = "import numpy as np\nnp.random.rand() < 2, np.arange(3).sum()"
        assert (await told(root, code))[0] == "ok"
        child = root.fork((0, 1), 1)
        assert await told(child, "int(np.arange(4).sum())") == ("ok", "6")


# --- random programs ---------------------------------------------------------------------------------------

CELLS = (
    "x = x + [len(x)] if 'x' in globals() else [0]\nx",
    "import random\nrandom.random()",
    "def f(n, seen=[]):\n    seen.append(n)\n    return list(seen)",
    "f(3)",
    "numbers = (i * i for i in range(100))",
    "next(numbers)",
    "open('log', 'a').write('line\\n')\nprint(open('log').read())",
    "import os\nprint(os.listdir('.'), os.path.exists(os.environ['HOME']))",
    "import os\nhere = os.path.abspath('log')\nprint(here)",
    "open(here, 'a').write('x')",
    "import os\nos.makedirs(f'd{len(os.listdir())}/e')\nos.listdir()",
    "import os\nos.chdir(os.listdir()[0])",
    "import os\nos.chdir('..')",
    "class A:\n    n = 0\n    def up(self):\n        A.n += 1\n        return self\na = A()\na.up().n",
    "a.up().n, a",
    "1 / 0",
    "import sys\nsys.exit(len(sys.argv))",
    "held = open('held', 'w')",
    "held.write('y'); held.close(); open('held').read()",
    "import tempfile\nwith tempfile.NamedTemporaryFile() as t:\n    t.write(b'x')\nprint(len(os.listdir()))",
    "sorted(k for k in globals() if not k.startswith('_'))",
    "import decimal\ndecimal.getcontext().prec += 1\ndecimal.Decimal(1) / 3",
    "import threading\nthreading.Thread(target=lambda: print('t')).start()",
    "import functools\ng = functools.lru_cache(lambda n: random.random())\ng(1) == g(1)",
)


def test_native_forks_and_replay_answer_the_same() -> None:
    """Each branch of a random tree sees what a session that is given its path alone sees."""
    forks = forks_equal_replay(grown, act, CELLS, examples=12)
    assert forks >= 5, "those of the program that is always among them"
