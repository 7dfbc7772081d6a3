"""Environments of gymnasium as they are: what the model reads, forks, seeds, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import gymnasium
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from system.config import Config, ConfigError, EnvironmentConfig, load
from system.envs.gym import GymEnvironment
from system.envs.live import BranchSession, TreeSessions
from system.envs.make import make_environment
from system.envs.protocol import Acted, ForkKind, WorldFailed
from system.envs.service import EnvironmentService
from system.plugins import PluginError
from system.tasks.base import make_task
from system.tree.prompt import Prompt

LAKE = {"id": "FrozenLake-v1", "actions": ["left", "down", "right", "up"]}
DRY = {**LAKE, "make": {"is_slippery": False}}
WAYS = ("left", "down", "right", "up")


class Echo(gymnasium.Env[str, str]):
    """Says what it hears, and holds what nobody can copy."""

    metadata = {"render_modes": []}  # noqa: RUF012
    observation_space = spaces.Text(20)
    action_space = spaces.Text(5, charset="abc")

    def __init__(self, locked: bool = False) -> None:
        import threading

        self.heard, self.lock = "", threading.Lock() if locked else None

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return "say something", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.heard += action
        return self.heard, 0.5, len(self.heard) >= 9, False, {}


gymnasium.register("Echo-v0", Echo)


def sessions(options: dict[str, Any], extra: dict[str, Any] | None = None) -> TreeSessions:
    config = EnvironmentConfig(name="gymnasium", options=options)
    environment = make_environment(config)
    assert environment is not None
    prompt = Prompt("p", ({"role": "user", "content": "?"},), (), extra={} if extra is None else extra)
    return TreeSessions(EnvironmentService(environment, config, "r", "train"), prompt, "1", 7)


async def told(session: BranchSession, action: str) -> tuple[str, float | None, bool]:
    seen = await session.act([Acted("act", {"action": action})], "")
    return seen.messages[0].text, seen.reward, seen.over


async def test_the_model_reads_a_picture_and_earns_by_steps() -> None:
    tree = sessions(DRY)
    assert await tree.begin() == "[S]FFF\nFHFH\nFFFH\nHFFG"
    root = tree.root((0,))
    assert (await told(root, "down"))[0] == "  (Down)\nSFFF\n[F]HFH\nFFFH\nHFFG"
    for way in ("down", "right", "down", "right"):
        assert (await told(root, way))[1:] == (0.0, False)
    assert (await told(root, "right"))[1:] == (1.0, True)
    refused = await root.act([Acted("act", {"action": "jump"})], "")
    assert (refused.messages[0].status, "'jump'" in refused.messages[0].text) == ("rejected", True)
    await tree.close()
    await tree.service.settle()


async def test_a_question_says_where_it_begins() -> None:
    blackjack = {"id": "Blackjack-v1", "actions": ["stick", "hit"]}
    began = []
    for seed in (3, 3, 11):
        tree = sessions(blackjack, {"seed": seed})
        began.append(await tree.begin())
        await tree.close()
        await tree.service.settle()
    assert began[0] == began[1] == repr(tuple(int(n) for n in eval(began[0])))
    assert began[0] != began[2]


async def test_text_is_an_action_and_what_cannot_be_copied_is_replayed() -> None:
    tree = sessions({"id": "Echo-v0", "make": {"locked": True}})
    assert await tree.begin() == "say something"
    root = tree.root((0,))
    assert await told(root, "ab") == ("ab", 0.5, False)
    child = root.fork((0, 1), 1)
    assert await told(root, "c") == ("abc", 0.5, False)
    assert await told(child, "a") == ("aba", 0.5, False)
    assert tree.service.counts["forks_replay"] == tree.service.counts["forks_refused"] == 1
    text, *_ = await told(root, "xyz")
    assert "not in Text" in text
    await tree.close()
    await tree.service.settle()


PROGRAMS = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from(WAYS), st.booleans()), min_size=4, max_size=14
)


@settings(max_examples=25, deadline=None)
@given(PROGRAMS, st.booleans())
def test_each_branch_sees_what_its_path_alone_sees(
    program: Sequence[tuple[int, str, bool]], stochastic: bool
) -> None:
    """On slippery ice, where a step draws; a stochastic fork draws by its own seed, as its replay does."""

    async def grown() -> None:
        tree = sessions({**LAKE, "stochastic": stochastic})
        await tree.begin()
        branches, over = [tree.root((0,))], set[int]()
        for which, way, forks in program:
            number = which % len(branches)
            if number in over:
                continue
            if forks and len(branches) < 6:
                parent = branches[number]
                branches.append(parent.fork((0, len(branches)), len(parent.journal)))
            if (await told(branches[number], way))[2]:
                over.add(number)
        for branch in branches:
            await branch.world()
            branch.discard("to build it again, compared with what it was answered")
            await branch.world()
        await tree.close()
        await tree.service.settle()

    asyncio.run(grown())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"id": "NoSuch-v0"}, "environment.options.id='NoSuch-v0'"),
        ({"id": "CartPole-v1", "show": "picture"}, "show=observation"),
        ({"id": "FrozenLake-v1", "actions": ["left"]}, "4 different names are needed"),
        ({"id": "FrozenLake-v1", "make": {"map_name": "9x9"}}, "cannot be made"),
        ({}, "environment.options.id: name"),
    ],
)
def test_what_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(PluginError) as caught:
        make_environment(EnvironmentConfig(name="gymnasium", options=options))
    assert why in str(caught.value)


def test_continuous_actions_are_refused() -> None:
    class Box(Echo):
        action_space = spaces.Box(0.0, 1.0)  # type: ignore[assignment]

    gymnasium.register("Boxed-v0", Box)
    with pytest.raises(PluginError, match="cannot be told in words"):
        GymEnvironment("Boxed-v0")


def test_it_forks_and_needs_nothing_else() -> None:
    made = GymEnvironment(**DRY)
    assert (made.forks, made.tools["act"].parameters["properties"]["action"]["enum"]) == (
        ForkKind.NATIVE,
        list(WAYS),
    )


def configured(*words: str) -> Config:
    return load(None, ["task.name=gymnasium", "task.train_size=8", "task.eval_size=4", *words])


def test_the_task_is_a_seed_for_each_question() -> None:
    here = ["environment.name=gymnasium", "environment.options.id=FrozenLake-v1"]
    task: Any = make_task(configured(*here, "task.options.instructions=Reach the goal."))
    train, held = task.train(), task.eval()
    seeds = [prompt.extra["seed"] for prompt in (*train, *held)]
    assert len(set(seeds)) == 12
    assert train[0].messages[-1] == {"role": "user", "content": "Reach the goal."}
    with pytest.raises((ConfigError, PluginError), match="instructions"):
        make_task(configured(*here))
    with pytest.raises((ConfigError, PluginError), match=r"goes with environment\.name=gymnasium"):
        make_task(configured("task.options.instructions=x"))


@pytest.mark.parametrize("seed", ["x", -1, None, 1.5])
async def test_a_seed_that_is_none_is_named(seed: Any) -> None:
    tree = sessions(DRY, {"seed": seed})
    with pytest.raises(WorldFailed, match=r"question 'p': extra.seed: .* is no whole number from 0 on"):
        await tree.begin()
    await tree.close()
