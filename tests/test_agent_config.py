"""What an agent of one's own does not go with is said at the start, by name and with the remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from system.agents.forking import misfits
from system.config import AgentConfig, ConfigError, load
from system.config.check import part_problems
from system.doctor.preflight import look

EXAMPLES = Path(__file__).parents[1] / "examples"
FITS = ("agent.command=./agent", "branching=none", "tools.names=[]")


def run(session: object, task: object, effort: int = 1) -> None:
    """An agent."""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["branching=arpo"], "cannot be forked, and branching=arpo forks: set branching=none"),
        (["tools.names=[search]"], "brings its own tools: set tools.names="),
        (["agent.run=mine:run"], "which agent is it"),
        (["agent.options.effort=3"], "agent.options are keywords of a function"),
        (["environment=python"], "acts in its own world"),
        (["rollout.rescore=true"], r"rollout.rescore=true is for branches"),
        (["rollout.schedule=eager"], "rollout.schedule=eager is for branches"),
        (["guide.others=0.5"], "it says itself what the model is told"),
        (["agent.deadline_s=900"], "agent.deadline_s=900 exceeds rollout.tree_deadline_s=600"),
        (["agent.concurrency=4"], "agent.concurrency=4 is below rollout.leaves=8"),
        (
            ["agent.command=", "agent.run=mine:run", "agent.env={MODE: fast}"],
            "agent.env is the environment of a",
        ),
        (["agent.command=", "agent.run=mine:run", "agent.env_from=[HF_TOKEN]"], "agent.env_from is the"),
        (["agent.env={OPENAI_API_KEY: mine}"], "OPENAI_API_KEY says where the session is"),
        (["agent.env_from=[ANTHROPIC_API_KEY]"], "ANTHROPIC_API_KEY says where the session is"),
        (["agent.env={'A=B': c}"], "'A=B' is no name of a variable"),
        (["agent.turns=-1"], "agent.turns=-1 must be 0 or more"),
    ],
)
def test_what_an_agent_does_not_go_with(words: list[str], says: str) -> None:
    load(None, list(FITS))
    with pytest.raises(ConfigError, match=says):
        load(None, [*FITS, *words])


def test_only_as_many_groups_run_as_there_is_room_for_their_episodes() -> None:
    config = load(None, [*FITS, "agent.concurrency=20", "rollout.workers=3", "rollout.concurrency=50"])
    assert config.trees_at_once == 6  # 2 of 8 episodes on each worker
    assert load(None, ["agent.concurrency=20", "rollout.concurrency=50"]).trees_at_once == 50


def test_no_agent_is_no_agent() -> None:
    assert not AgentConfig().on
    assert AgentConfig(command="x").on
    assert part_problems(load()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["agent.run=no_such_module:run"], "no_such_module"),
        ([f"agent.run={__name__}:run", "agent.options.zeal=2"], r"agent\.options\.zeal: .*no such option"),
    ],
)
def test_a_function_that_is_not_there_or_takes_other_options(words: list[str], says: str) -> None:
    (problem,) = part_problems(load(None, ["branching=none", "tools.names=[]", *words]))
    assert re.search(says, problem)


def test_a_word_that_is_no_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"agent\.run='runs'"):
        load(None, ["branching=none", "tools.names=[]", "agent.run=runs"])


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("none", "never forks"),
        ("treerl", "forks where no request"),
        ("arpo-release", "forks where no"),
    ],
)
def test_a_policy_that_no_replay_can_follow(policy: str, says: str) -> None:
    config = load(None, [*FITS, "agent.forks=replay", f"branching={policy}"])
    assert any(says in line for line in misfits(config))
    assert not [
        *misfits(load(None, [*FITS, "agent.command=python x.py", "agent.forks=replay", "branching=arpo"]))
    ]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("no-such-program --fast", "there is no program 'no-such-program'"),
        ("./README.md", "there is no program './README.md'"),
        ("python 'unfinished", "No closing quotation"),
        (" ", "has no words"),
        ("python x.py --ask={quesion}", "{quesion} stands for nothing: {question} is filled in"),
    ],
)
def test_a_command_that_cannot_be_run(command: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    config = load(None, list(FITS))
    config.agent.command = command
    assert says in next(misfits(config))
    config.agent.command = "python examples/search_agent.py {question} '{print}'"
    assert not [*misfits(config)]


def test_the_example_has_all_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    assert not any(look(load(EXAMPLES / "search_agent.yaml")).values())


def test_a_column_that_is_not_there_is_told_at_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(EXAMPLES)
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1 + 1?", "answer": "2", "repo": "a"}\n')
    words = ["task=jsonl", f"task.path={data}", "agent.columns=[repo, rebo]"]
    problems = [str(one) for one in look(load(EXAMPLES / "search_agent.yaml", words))["task"]]
    (told,) = [one for one in problems if one.startswith("agent.columns")]
    assert "has a column 'rebo'; name columns that are there: " in told
    assert "repo" in told
