"""A tree of sessions in an environment of the sandbox, and random programs by which it grows."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from system.config import EnvironmentConfig
from system.envs.live import BranchSession, TreeSessions
from system.envs.python import PythonEnvironment
from system.envs.service import EnvironmentService
from system.envs.shell import ShellEnvironment
from system.tree.prompt import Prompt


class Tree:
    """One tree in an environment, whose processes are gone after the block."""

    def __init__(
        self, environment: PythonEnvironment | ShellEnvironment, extra: Mapping[str, Any] | None = None
    ) -> None:
        self.environment = environment
        self.service = EnvironmentService(environment, EnvironmentConfig(name="?"), "r", "train")
        prompt = Prompt("p", ({"role": "user", "content": "?"},), (), extra=extra or {})
        self.sessions = TreeSessions(self.service, prompt, "1", 0)

    async def __aenter__(self) -> BranchSession:
        try:
            await self.sessions.begin()
        except BaseException:
            await self.__aexit__()
            raise
        return self.sessions.root((0,))

    async def __aexit__(self, *_: object) -> None:
        await self.sessions.close()
        await self.service.settle()
        assert not self.environment._trees
        assert not self.environment._live
        assert not getattr(self.environment, "_idle", None)
        await self.environment._sandbox.close()


Act = Callable[[BranchSession, str], Any]  # a coroutine function


def forks_equal_replay(new: Callable[[], Tree], act: Act, actions: Sequence[str], examples: int) -> int:
    """Grow random trees by ``actions``; each branch is then built again by its path alone, which fails where
    the answers differ.  Returns the number of native forks.
    """
    counts: Counter[str] = Counter()

    async def grow(program: Sequence[tuple[int, str, bool]]) -> None:
        async with (tree := new()) as root:
            branches = [root]
            for which, action, forks in program:
                branch = branches[which % len(branches)]
                if forks and len(branches) < 6:
                    branches.append(branch.fork((0, len(branches)), len(branch.journal)))
                await act(branch, action)
            for branch in branches:
                await branch.world()
                branch.discard("to build it again, compared with what it was answered")
                await branch.world()
        counts.update(tree.service.counts)

    step = st.tuples(st.integers(0, 99), st.sampled_from(actions), st.booleans())

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @example([(0, actions[0], True)] * 5)
    @given(st.lists(step, min_size=3, max_size=14))
    def same(program: Sequence[tuple[int, str, bool]]) -> None:
        asyncio.run(grow(program))

    same()
    return counts["forks_native"]
