"""The tasks of `espalier study`: solvable by the real tools, and demonstrations that mark no place."""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from system.cluster.placement import served_tools
from system.config import Config, load
from system.plugins import SYNTAXES
from system.rollout.reward import BranchView
from system.rollout.rewards.arpo import ArpoReward
from system.rollout.syntax.base import ParsedCall
from system.tasks.base import Demonstration, HasCorpus, make_task
from system.tasks.generated import GeneratedTask
from system.tasks.inputs import corpus_file
from system.tasks.skill import Skill
from system.tasks.study import code, game, hops
from system.tools.outcome import CallContext
from system.tools.servers import served
from system.tools.service import ToolService, build_tools
from system.tree.record import Kind, Outcome

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "study").glob("*.yaml"))
every_task = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)


def settings(recipe: Path, seed: int = 3) -> Config:
    return load(recipe, [f"run.seed={seed}", "task.train_size=300", "task.eval_size=60"])


def made(recipe: Path, seed: int = 3) -> GeneratedTask[Any]:
    task = make_task(settings(recipe, seed))
    assert isinstance(task, GeneratedTask)
    return task


@contextlib.asynccontextmanager
async def real_tools(config: Config, task: GeneratedTask[Any], scratch: Path) -> AsyncIterator[ToolService]:
    corpus = corpus_file(config, task, scratch) if isinstance(task, HasCorpus) else None
    async with contextlib.AsyncExitStack() as stack:
        names = served_tools(config)
        keys = dict.fromkeys(names, "")
        urls = await stack.enter_async_context(served(names, config.tools, str(corpus or ""), keys))
        tools = build_tools(config.tools, urls)
        stack.push_async_callback(tools.close)
        await tools.check()
        yield tools


def shown(task: GeneratedTask[Any], skill: Skill, rng: random.Random) -> list[Demonstration]:
    pairs = zip(task.held_out, task.eval(), strict=True)
    return [task.demonstrate(question, prompt, skill, rng) for question, prompt in pairs]


@every_task
async def test_the_right_expert_earns_everything_and_any_expert_shows_what_tools_say(
    recipe: Path, tmp_path: Path
) -> None:
    config, task, rng = settings(recipe), made(recipe), random.Random(0)
    demos = [(demo, True) for demo in shown(task, Skill(1.0), rng)]
    demos += [(demo, False) for demo in shown(task, Skill(0.2), rng)]
    async with real_tools(config, task, tmp_path) as tools:
        syntax = SYNTAXES.make(config.rollout.syntax.name, {}, tools.specs)
        for demo, right in demos:
            used: list[tuple[str, str]] = []
            for (_, text), (author, result) in zip(demo.segments, demo.segments[1:], strict=False):
                if author != "tool":
                    continue
                call = syntax.parse(text)
                assert isinstance(call, ParsedCall), text
                outcome = await tools.call(call.tool, call.arguments, CallContext(prompt_id=demo.prompt.id))
                assert syntax.render_result(outcome.text) == result, text
                used.append((call.tool, outcome.status))
            assert len(used) <= config.rollout.call_limit
            kinds = {"model": Kind.MODEL, "tool": Kind.TOOL}
            branch = BranchView(
                tuple((kinds[author], text) for author, text in demo.segments), Outcome.STOPPED, tuple(used)
            )
            score = ArpoReward().score(demo.prompt, branch)
            assert score.parts["format"] == 1
            assert (score.value, score.correct) == (1, True) or not right


@every_task
def test_splits_share_no_question_and_a_seed_repeats(recipe: Path) -> None:
    task, again, other = made(recipe), made(recipe), made(recipe, seed=4)
    train, held_out = task.train(), task.eval()
    demos = task.demonstrations(300, 0)
    assert (train, held_out, demos) == (again.train(), again.eval(), again.demonstrations(300, 0))
    texts = [{p.messages[0]["content"] for p in some} for some in (train, held_out, other.train())]
    assert [len(some) for some in texts] == [300, 60, 300]
    assert not texts[0] & texts[1]
    assert texts[0] != texts[2]
    assert not texts[1] & {demo.prompt.messages[0]["content"] for demo in demos}


class Watched(Skill):
    """Counts by place, the options and how many choices came before, how often the right one was taken."""

    def __init__(self, right: float, slip: float) -> None:
        super().__init__(right, slip)
        object.__setattr__(self, "taken", defaultdict(list))
        object.__setattr__(self, "before", 0)

    def choose(self, right, options, rng):
        made = super().choose(right, options, rng)
        share = self.right + (1 - self.right - self.slip) / len(options)
        self.taken[self.before].append((made == right) - share)
        object.__setattr__(self, "before", self.before + 1)
        return made


@every_task
def test_the_expert_is_as_sure_at_every_place(recipe: Path) -> None:
    """Its share of right choices is what its skill says, however many choices came before."""
    task, rng = made(recipe), random.Random(1)
    watched = Watched(task.skill.right, task.skill.slip)
    for _ in range(10):
        for question, prompt in zip(task.held_out, task.eval(), strict=True):
            object.__setattr__(watched, "before", 0)
            task.demonstrate(question, prompt, watched, rng)
    places = [found for found in watched.taken.values() if len(found) >= 200]
    assert len(places) >= 3
    for found in places:
        assert abs(sum(found)) / len(found) < 4 * 0.5 / len(found) ** 0.5


@every_task
def test_texts_are_words_of_the_tokenizer_and_fit(recipe: Path) -> None:
    config, task = settings(recipe), made(recipe)
    tokenizer = task.tokenizer()
    for demo in task.demonstrations(300, 1):
        prompt = demo.prompt.messages[0]["content"]
        said = "".join(text for _, text in demo.segments)
        ids = tokenizer.encode(prompt + said)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == prompt + said
        assert len(tokenizer.encode(said)) <= config.rollout.max_response_tokens
        assert len(ids) < config.engine.max_context
        for author, text in demo.segments:
            assert author == "model" or len(tokenizer.encode(text)) <= config.rollout.max_tool_result_tokens


def test_only_the_tool_knows_the_secret_of_a_game() -> None:
    """Games whose prompts differ in nothing but their number have different secrets."""
    task = made(next(recipe for recipe in RECIPES if recipe.stem == "game"))
    secrets: dict[str, set[str]] = defaultdict(set)
    for prompt in task.train():
        (message,) = prompt.messages
        words = message["content"].split()
        assert words[2] == prompt.id.rpartition("/")[2]
        secrets[" ".join(words[:2] + words[3:])].add(prompt.answers[0])
        assert prompt.extra == {}
    assert len(secrets) == len(game.LOWEST) * len(game.CANDIDATES)
    assert sum(len(some) > 5 for some in secrets.values()) > 0.9 * len(secrets)


def test_a_game_needs_the_middle() -> None:
    """The right expert finds every secret; from the lowest number on, four in n are found."""
    task = made(next(recipe for recipe in RECIPES if recipe.stem == "game"))
    for skill, low, high in ((Skill(1.0), 1.0, 1.0), (Skill(0.0, 1.0), 0.15, 0.45)):
        demos = shown(task, skill, random.Random(0))
        found = [f"boxed{{{demo.prompt.answers[0]} }}" in demo.segments[-1][1] for demo in demos]
        assert low <= sum(found) / len(found) <= high


def test_a_program_fails_for_two_reasons() -> None:
    """A name that Python has not, and a division by zero, of the question or of a wrong operator."""
    asked = code.Calculation("largest", (23, 47), "over", "less", (14, 14), 50)
    assert asked.text == "Q: largest 23 47 over 14 less 14 else 50 ?"
    assert asked.right == "print(max([23,47])//(14-14))"
    said, failed = code.run(asked.right)
    assert failed
    assert said.endswith("ZeroDivisionError: integer division or modulo by zero")
    said, failed = code.run(asked.program("avg", "+", "+"))
    assert failed
    assert said.endswith("NameError: name 'avg' is not defined")
    assert code.run(asked.program("max", "//", "+")) == ("1", False)
    task = made(next(recipe for recipe in RECIPES if recipe.stem == "code"))
    otherwise = [str(q.otherwise) == p.answers[0] for q, p in zip(task.held_out, task.eval(), strict=True)]
    assert 0.05 < sum(otherwise) / len(otherwise) < 0.35


def test_a_name_does_not_say_which_is_meant() -> None:
    """Most names are those of several entities; the right kind finds the right document first."""
    task = made(next(recipe for recipe in RECIPES if recipe.stem == "hops"))
    assert isinstance(task, hops.HopsTask)
    kinds: dict[str, list[str]] = defaultdict(list)
    for kind, name in task.facts:
        kinds[name].append(kind)
        assert hops.read(task.search(f"{kind} {name}")) == task.facts[kind, name]
    assert sum(len(some) > 1 for some in kinds.values()) > len(kinds) / 2
