"""Trees whose branches act in worlds: what they read, what they earn, how they end, and how they go on."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_fakes import PROMPT, Script, Segment, make_world, ok
from rollout_fakes import World as Made
from test_live_properties import late

from system.config import EnvironmentConfig
from system.envs.live import BranchSession
from system.envs.protocol import Action, Environment, ForkKind, Ids, Message, Observation, Start, World
from system.envs.service import Environments, EnvironmentService
from system.plugins import SYNTAXES
from system.rollout.branching import Never, Random
from system.rollout.expanding import RandomTurns
from system.rollout.failure import RolloutFailed
from system.rollout.planting import planted
from system.rollout.reward import BranchView, Score
from system.rollout.snapshot import freeze, thaw
from system.tools.outcome import ToolSpec
from system.tree.record import Kind, Origin, Outcome, Tree
from system.twin.clock import run

PUSH = ToolSpec("push", "push it", {"type": "object"}, "what")


class Tally(World):
    """Its answer to the n-th push is n and a word made of all pushes; the answer to a message as well."""

    def __init__(self, environment: Tallies, path: tuple[str, ...], opening: str) -> None:
        self.environment, self.path, self.opening = environment, path, opening
        environment.live += 1

    async def step(self, action: Action) -> Observation:
        environment = self.environment
        await asyncio.sleep(environment.rng.exponential(environment.mean_s))
        said = action.calls[0].arguments["what"] if action.calls else f"said {action.text.strip()}"
        self.path = (*self.path, said)
        text = f"{len(self.path)} {word(self.path)}"
        return environment.answer(text, self.path, "tool" if action.calls else "user")

    async def result(self) -> dict[str, Any]:
        return {"reward": float(len(self.path))}

    async def fork(self, ids: Ids) -> World:
        await asyncio.sleep(self.environment.rng.exponential(self.environment.mean_s))
        return Tally(self.environment, self.path, "")

    async def save(self) -> tuple[str, ...]:
        return self.path

    def close(self, why: str) -> None:
        self.environment.live -= 1


Answer = Callable[[str, tuple[str, ...], str], Observation]


class Tallies(Environment):
    tools: ClassVar = {"push": PUSH}

    def __init__(
        self,
        forks: ForkKind = ForkKind.NATIVE,
        answer: Answer = lambda text, path, role: Observation((Message(text, role),)),
        mean_s: float = 0.5,
        messages: bool = False,
        opening: str = "",
    ) -> None:
        self.forks, self.answer, self.mean_s, self.opening = forks, answer, mean_s, opening
        self.answers_messages, self.live, self.rng = messages, 0, np.random.default_rng(0)

    async def open(self, start: Start) -> World:
        await asyncio.sleep(self.rng.exponential(self.mean_s))
        return Tally(self, start.saved or (), self.opening)


def word(path: tuple[str, ...]) -> str:
    return "w" + hashlib.blake2b("/".join(path).encode(), digest_size=4).hexdigest()


class Given:
    """A reward that keeps what it was shown."""

    def __init__(self) -> None:
        self.views: list[BranchView] = []

    def score(self, prompt: Any, branch: BranchView) -> Score:
        self.views.append(branch)
        return Score(1.0, True, {"one": 1.0})


@dataclass
class InWorlds:
    made: Made
    environment: Tallies
    reward: Given

    @property
    def service(self) -> EnvironmentService:
        assert self.made.context.environments is not None
        return self.made.context.environments.train

    def grown(self, seed: int = 0, pauses: tuple[float, ...] = ()) -> Tree:
        async def main() -> Tree:
            growing = await planted(self.made.context, PROMPT, seed=seed, ticket=3)
            for pause in pauses:
                task = asyncio.ensure_future(growing.run())
                await asyncio.wait([task], timeout=pause)
                if task.done():
                    return task.result()
                data = freeze(growing)
                task.cancel()
                await asyncio.wait([task])
                growing = thaw(self.made.context, PROMPT, data, 3)
            return await growing.run()

        async def all_closed() -> Tree:
            try:
                return await main()
            finally:
                await self.service.settle()
                assert self.environment.live == 0
                assert asyncio.all_tasks() == {asyncio.current_task()}

        return run(all_closed())


def in_worlds(
    script: Script, environment: Tallies, limits: EnvironmentConfig | None = None, **config: Any
) -> InWorlds:
    reward = Given()
    made = make_world(script, lambda tool, arguments: ok("r"), reward=reward, **config)
    limits = limits or EnvironmentConfig()
    services = (EnvironmentService(environment, limits, "run", purpose) for purpose in ("train", "eval"))
    specs = {**made.tools.specs, **environment.tools}
    made.context = replace(
        made.context, environments=Environments(*services), syntax=SYNTAXES.make("tags", {}, specs)
    )
    return InWorlds(made, environment, reward)


def chatty(text: str, rng: np.random.Generator) -> Segment:
    """Pushes mostly, now and then searches (which keeps no state), writes nonsense, or ends."""
    what = str(rng.choice(["push", "push", "push", "search", "bad", "end"]))
    words = "a " * int(rng.integers(1, 6))
    said = {
        "push": f"{words}<push> p{rng.integers(3)} </push>",
        "search": f"{words}<search> q </search>",
        "bad": f"{words}</push>",
        "end": f"{words}so",
    }[what]
    return Segment(said, entropy=rng.random(16) * 4, first_s=float(rng.exponential(0.5)))


def check(made: InWorlds, tree: Tree) -> None:
    """Each answer of a world on the way to a leaf is what the pushes on that very way bring about."""
    for leaf in range(tree.n_leaves):
        path, wish = (), ""
        for node in tree.path(leaf):
            text = made.made.text(tree.tokens[tree.start[node] : tree.end[node]])
            if tree.kind[node] == Kind.MODEL:
                wish = text.rpartition("</push>")[0].rpartition("<push>")[2].strip()
            elif tree.kind[node] == Kind.TOOL:
                (call,) = (call for call in tree.calls if call.node == node)
                if (call.tool, call.status) == ("push", "ok"):
                    path = (*path, wish)
                    assert text.split()[1:3] == [str(len(path)), word(path)]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_branches_read_what_their_own_path_brings_about(data: st.DataObject) -> None:
    """Also where forks, deadlines and resumes fall as they like."""
    seed = data.draw(st.integers(0, 2**32 - 1), "seed")
    forks = data.draw(st.sampled_from([ForkKind.NATIVE, ForkKind.SNAPSHOT, ForkKind.REPLAY]), "forks")
    policy = data.draw(st.sampled_from([Random(2, 0.7), RandomTurns(2), Never(3)]), "policy")
    pauses = tuple(data.draw(st.lists(st.floats(0.1, 5.0), max_size=3), "pauses"))
    mean_s = data.draw(st.sampled_from([0.1, 1.0, 4.0]), "mean seconds")
    step_s = data.draw(st.sampled_from([1e6, 3.0]), "deadline")
    environment = Tallies(forks, mean_s=mean_s)
    environment.rng = np.random.default_rng(seed)
    made = in_worlds(
        chatty,
        environment,
        EnvironmentConfig(step_s=step_s, open_s=1e6, fork_s=step_s, result_s=1e6),
        policy=policy,
        leaves=8,
        roots=3,
        call_limit=4,
        max_response_tokens=300,
        branch_deadline_s=data.draw(st.sampled_from([1e6, 15.0]), "branch deadline"),
    )
    with contextlib.suppress(RolloutFailed):  # by its deadlines
        tree = made.grown(seed, pauses)
        allowed = {Outcome.STOPPED, Outcome.CALL_LIMIT, Outcome.LENGTH, Outcome.DEADLINE}
        if mean_s > step_s / 10:  # to build a world again may be late time after time
            allowed.add(Outcome.ENVIRONMENT)
            assert (
                set(made.service.counts) & {"timeouts", "world_lost"}
                or Outcome.ENVIRONMENT not in tree.outcome
            )
        assert {Outcome(one) for one in tree.outcome} <= allowed
        check(made, tree)


def pushing(text: str, rng: np.random.Generator) -> Segment:
    """Pushes for ever."""
    return Segment("<push> p </push>", entropy=1.0)


def test_the_environment_ends_a_branch_and_its_rewards_add_up() -> None:
    def answer(text: str, path: tuple[str, ...], role: str) -> Observation:
        reward = {1: None, 2: 0.5, 3: -0.25}[len(path)]
        return Observation((Message(text, role),), reward, done=len(path) == 3)

    made = in_worlds(pushing, Tallies(answer=answer), policy=Never(4), leaves=2, roots=2, call_limit=9)
    tree = made.grown()
    assert [Outcome(one) for one in tree.outcome] == [Outcome.ENDED] * 2
    assert tree.reward.tolist() == [1.25, 1.25]
    assert tree.meta["parts"] == [{"one": 1.0, "steps": 0.25}] * 2
    for leaf in range(2):
        path = tree.path(leaf)
        assert [tree.kind[node] for node in path] == [Kind.PROMPT, *[Kind.MODEL, Kind.TOOL] * 3]
        assert tree.step_reward[path].tolist() == [0, 0, 0, 0.5, 0, -0.25, 0]
    assert [view.steps for view in made.reward.views] == [(0.5, -0.25)] * 2
    assert [view.result for view in made.reward.views] == [{"reward": 3.0}] * 2
    assert {call.tool for call in tree.calls} == {"push"}


def test_what_a_world_begins_with_joins_the_prompt() -> None:
    made = in_worlds(pushing, Tallies(opening="here we are"), leaves=2, roots=2, call_limit=1)
    tree = made.grown()
    assert made.made.text(tree.tokens[: tree.end[0]]) == "who?\n\nhere we are"
    assert made.service.counts["worlds"] == 2  # the first one was not opened for that alone


def test_a_message_is_answered_until_the_environment_says_no_more() -> None:
    def answer(text: str, path: tuple[str, ...], role: str) -> Observation:
        if len(path) == 3:
            return Observation(done=True)
        return Observation((Message(text, role),))

    environment = Tallies(answer=answer, messages=True)
    made = in_worlds(
        lambda text, rng: Segment(f"so {text.count('user')}", entropy=1.0),
        environment,
        policy=Random(2, 1.0),
        leaves=4,
        roots=1,
    )
    tree = made.grown()
    assert [Outcome(one) for one in tree.outcome] == [Outcome.ENDED] * 4
    assert tree.origins(Origin.FORK) == 3  # after messages, too
    assert not tree.calls
    told = made.made.text(tree.tokens)
    assert f"\n<user>\n1 {word(('said so 0',))}\n</user>\n" in told
    assert f"\n<user>\n2 {word(('said so 0', 'said so 2'))}\n</user>\n" in told
    few = in_worlds(
        lambda text, rng: Segment("so", entropy=1.0),
        Tallies(messages=True),
        EnvironmentConfig(turn_limit=2),
        leaves=1,
        roots=1,
    ).grown()
    assert [Outcome(one) for one in few.outcome] == [Outcome.TURN_LIMIT]
    assert few.kind.tolist() == [Kind.PROMPT, *[Kind.MODEL, Kind.TOOL] * 2, Kind.MODEL]
    assert few.reward.tolist() == [1.0]


def test_a_branch_without_a_world_is_not_scored_and_the_others_are() -> None:
    class Forgetful(Tallies):
        clock = 0

    environment = Forgetful(ForkKind.REPLAY, answer=lambda text, path, role: ticking(environment, text))

    def ticking(environment: Forgetful, text: str) -> Observation:
        environment.clock += 1
        return Observation((Message(f"{text} {environment.clock}"),))

    made = in_worlds(pushing, environment, policy=Random(2, 1.0), leaves=4, roots=2, call_limit=2)
    tree = made.grown()
    lost = tree.outcome == Outcome.ENVIRONMENT
    np.testing.assert_array_equal(lost, tree.origin == Origin.FORK)
    np.testing.assert_array_equal(np.isnan(tree.reward), lost)
    assert made.service.counts["replay_diverged"] == lost.sum() == 2
    assert {kind for kind, _ in tree.meta["mishaps"]} == {"replay_diverged"}


def test_a_tree_without_a_world_is_lost_by_name() -> None:
    class Full(Tallies):
        async def open(self, start: Start) -> World:
            raise ValueError("no")

    made = in_worlds(pushing, Full(), leaves=2, roots=2)
    with pytest.raises(RolloutFailed, match=r"environment: open_failed: run/train/3/0, .*ValueError: no"):
        made.grown()


def test_an_evaluation_has_worlds_of_its_own() -> None:
    made = in_worlds(pushing, Tallies(), leaves=4, roots=2, call_limit=2)
    assert made.made.context.environments is not None
    apart = Tallies()
    evaluation = EnvironmentService(apart, EnvironmentConfig(), "run", "eval")
    environments = replace(made.made.context.environments, eval=evaluation)
    context = replace(made.made.context, environments=environments)

    async def main() -> Tree:
        tree = await (await planted(context, PROMPT, seed=0, greedy=True)).run()
        await evaluation.settle()
        return tree

    assert run(main()).n_leaves == 1
    assert evaluation.counts["steps"] == 2
    assert not made.service.counts
    assert set(environments.counters) >= {"environment/eval/steps", "environment/eval/worlds"}


def test_a_fork_that_comes_too_late_is_found_in_the_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """What :func:`check` is there for: a world that is copied after its parent's next action."""

    def grow(seed: int) -> None:
        made = in_worlds(
            lambda text, rng: Segment(f"<push> p{rng.integers(9)} </push>", entropy=1.0, first_s=0.0),
            Tallies(mean_s=0.1),
            policy=Random(2, 1.0),
            leaves=4,
            roots=1,
            call_limit=6,
        )
        check(made, made.grown(seed))

    def ten() -> None:
        for seed in range(10):
            grow(seed)

    ten()
    monkeypatch.setattr(BranchSession, "fork", late(check=False))
    with pytest.raises(AssertionError):
        ten()
