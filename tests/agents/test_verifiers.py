"""Environments of the real verifiers, as they are: their requests, their scores, their misfortunes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from agent_models import END

from system.agents.launch import AgentFailed, reward_of
from system.agents.runner import address
from system.agents.verifiers.agent import COLUMN, VerifiersAgent
from system.agents.verifiers.command import interpreter
from system.config import ConfigError, load
from system.tasks.base import make_task
from system.tree.record import Kind, Outcome

pytestmark = pytest.mark.verifiers
HERE = Path(__file__).parent
GAMES = {"taskset": {"id": "verifiers_games"}, "agent": {"runtime": {"type": "subprocess"}}}


@pytest.fixture(autouse=True)
def installed() -> None:
    """Skipped by name where verifiers is not installed, and failed there if ``ESPALIER_REQUIRE_VERIFIERS`` is
    set, as CI does.
    """
    try:
        interpreter("")
    except ConfigError as error:
        missing = pytest.fail if os.environ.get("ESPALIER_REQUIRE_VERIFIERS") else pytest.skip
        missing(f"verifiers is not installed: {error}")


def config(*words: str, **options: Any) -> Any:
    made = load(None, ["task=verifiers", "agent.run=verifiers", "branching=none", "tools.names=[]", *words])
    made.agent.options = {"environment": GAMES, **options}
    made.agent.env = {"PYTHONPATH": str(HERE)}
    return made


async def test_whatever_an_environment_does_is_one_episode(
    scripted: Callable[..., Awaitable[Any]], tmp_path: Path
) -> None:
    """Its questions, an episode of each, and what is recorded of it."""
    settings = config("task.eval_size=0", "agent.turns=2")
    questions = {one.extra[COLUMN]["data"]["does"]: one for one in make_task(settings).train()}
    assert [one["role"] for one in questions["many"].messages] == ["system", "user"]
    lines = [f"It is 42.{END}", f"Hm.{END}", f"It is 41.{END}", *[f"It is 42.{END}"] * 10]
    place, engine = await scripted(*lines)
    agent = VerifiersAgent(**settings.agent.options, settings=settings.agent, directory=tmp_path)

    async def play(does: str, within_s: float = 60.0) -> tuple[Any, Any]:
        session = await place.open(3)
        extra = questions[does].extra
        try:
            async with asyncio.timeout(within_s):
                result = await agent(address(session), {"extra": extra})
        except (AgentFailed, TimeoutError) as error:
            result = error
        return result, session.close(Outcome.ENDED)

    try:
        result, episode = await play("right")
        assert result == {"reward": 1.5, "correct": True, "parts": {"right": 1.0, "brief": 0.5, "turns": 1.0}}
        assert [piece.kind for piece in episode.forest.pieces] == [Kind.TOOL, Kind.MODEL]
        assert all(piece.trained for piece in episode.forest.pieces if piece.kind == Kind.MODEL)

        result, episode = await play("many")
        assert (result["reward"], result["parts"]["turns"]) == (0.5, 2.0)
        assert (len(episode.chosen), episode.rewrites, episode.retries) == (1, 0, 0)
        asked = engine.tokenizer.decode(engine.requests[-1].input_ids)
        assert "Be brief." in asked
        assert asked.count("And?") == 1

        assert (await play("print"))[0]["reward"] == 1.5  # and not 7
        failed, episode = await play("raise")
        assert "TaskError: " in str(failed)
        assert "no luck" in str(failed)
        with pytest.raises(AgentFailed, match="no finite number"):
            reward_of((await play("nan"))[0])
        assert "its process died" in str((await play("die"))[0])
        for does in ("hang", "wait"):
            assert isinstance((await play(does, within_s=3.0))[0], TimeoutError)
        both = await asyncio.gather(play("right"), play("right"))
        assert [one["reward"] for one, _ in both] == [1.5, 1.5]
    finally:
        await agent.close()


async def test_the_turns_that_are_allowed_end_an_episode_which_is_scored(
    scripted: Callable[..., Awaitable[Any]], tmp_path: Path
) -> None:
    settings = config("agent.turns=2")
    place, engine = await scripted(*[f"Hm.{END}"] * 5)
    agent = VerifiersAgent(**settings.agent.options, settings=settings.agent, directory=tmp_path)
    session = await place.open(3, turns=2)
    try:
        given = {"split": "train", "data": {"prompt": "What is it?", "does": "right"}}
        result = await agent(address(session), {"extra": {COLUMN: given}})
    finally:
        await agent.close()
    assert (result["reward"], result["correct"], result["parts"]["turns"]) == (0.5, False, 2.0)
    assert len(engine.requests) == 2
    assert session.close(Outcome.ENDED).outcome == Outcome.ENDED


def test_other_settings_of_the_taskset_are_held_out() -> None:
    task = make_task(config(held_out={"split": "test"}))
    assert [one.messages[0]["content"] for one in task.eval()] == ["held out"]
    assert len(task.train()) == 8


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ("no_such_taskset", "agent.options.environment: .*'no_such_taskset' not found"),
        ({"taskset": {"id": "verifiers_games", "splt": "x"}}, "agent.options.environment: .*splt"),
        (
            {"taskset": {"id": "verifiers_games"}},
            r"agent plays in Prime's sandboxes, .*agent\.env_from=\[PRIME_API_KEY\], or have it play on this "
            r"machine: \{taskset: \{id: verifiers_games\}, agent: \{runtime: \{type: subprocess\}\}\}",
        ),
    ],
)
def test_what_verifiers_refuses_is_told_with_the_field(environment: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        make_task(config(environment=environment)).train()
