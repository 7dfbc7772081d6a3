"""What stands in examples/ works: each part alone, and all of them in one small run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer

from system.config import load
from system.doctor.preflight import look
from system.plugins import REWARDS
from system.rollout.reward import BranchView
from system.rollout.rewards.arpo import ArpoReward
from system.tasks.base import HasDemonstrations, HasTokenizer, make_task, task_reward
from system.tasks.quickstart.task import QuickstartTask
from system.tasks.tiny_model import create_model
from system.tools.outcome import CallContext, ToolStatus
from system.tools.service import build_tools
from system.tree.prompt import Prompt
from system.tree.record import Kind, Outcome
from system.tree.store import read_trees

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one's own are looked for in the current directory."""
    monkeypatch.chdir(EXAMPLES)


async def test_the_tool_behind_the_service(here: None) -> None:
    config = load(None, ["tools.names=[weekday_tool:Weekday]"])
    tools = build_tools(config.tools, {})
    try:
        await tools.check()
        outcome = await tools.call("weekday", {"date": "2026-01-31"}, CallContext())
        assert (outcome.status, outcome.text) == (ToolStatus.OK, "Saturday")
        assert (await tools.call("weekday", {"date": "2026-01-31"}, CallContext())).cached
        outcome = await tools.call("weekday", {"date": "tomorrow"}, CallContext())
        assert outcome.status == ToolStatus.ERROR
    finally:
        await tools.close()


def test_the_reward_prefers_the_shorter_of_two_right_answers(here: None) -> None:
    short_reward = REWARDS.make("short_answers:Short", {})
    prompt = Prompt("q", ({"role": "user", "content": "6 * 7?"},), ("42",))
    short = BranchView(
        ((Kind.MODEL, r"<think> easy </think> <answer> \boxed{42} </answer>"),), Outcome.STOPPED
    )
    long = dataclasses.replace(
        short, segments=((Kind.MODEL, r"<think> 40 + 2 </think> <answer> \boxed{42} </answer>"),)
    )
    assert ArpoReward().score(prompt, short).value == ArpoReward().score(prompt, long).value
    assert short_reward.score(prompt, short).value > short_reward.score(prompt, long).value


def test_the_readme_shows_what_is_run_here() -> None:
    shown = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    lines = {line.split("  #")[0].strip() for path in EXAMPLES.glob("*.py") for line in path.open()}
    for line in shown.splitlines():
        assert line.split("  #")[0].strip() in lines, line


def test_a_recipe_of_ones_own_needs_only_a_model_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the README shows, and nothing stands against it once its files are there."""
    recipe = (EXAMPLES / "my.yaml").read_text()
    assert f"```yaml\n{recipe[recipe.index('model:') :]}```" in (ROOT / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    config = load(EXAMPLES / "my.yaml")
    found = [str(problem) for problems in look(config).values() for problem in problems]
    assert [line.split(":")[0] for line in found] == ["model.path", "task.path", "task.eval_path"]
    for path in (config.task.path, config.task.eval_path):
        Path(path).write_text(json.dumps({"question": f"Which file? {path}", "answer": path}) + "\n")
    task = QuickstartTask(
        load(ROOT / "configs" / "quickstart.yaml", ["task.train_size=1", "task.eval_size=1"])
    )
    create_model(Path(config.model.path), task.tokenizer(), config.model, 0)
    (only,) = [str(problem) for problems in look(config).values() for problem in problems]
    assert re.match(r"model\.path: \d+ of the first \d+ tokens .* unknown", only)  # which it is
    (Path(config.model.path) / "tokenizer.json").write_text(byte_tokenizer().to_str())
    assert not any(look(config).values())


def test_the_task_of_sums(here: None) -> None:
    """Its demonstrations say what python says, its tokenizer knows them, and its score knows the answers."""
    config = load("sums.yaml", ["task.train_size=50", "task.eval_size=10"])
    task = make_task(config)
    assert isinstance(task, HasDemonstrations)
    assert isinstance(task, HasTokenizer)
    tokenizer, right = task.tokenizer(), 0
    for shown in task.demonstrations(50, 0):
        programs = [re.search(r"print\((.*)\)", text)[1] for author, text in shown.segments[:-1:2]]
        results = [text for author, text in shown.segments if author == "tool"]
        assert [eval(program) for program in programs] == [int(text.split("\n")[1]) for text in results]
        text = shown.prompt.messages[0]["content"] + "".join(text for _, text in shown.segments)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        kinds = {"model": Kind.MODEL, "tool": Kind.TOOL}
        segments = tuple((kinds[author], text) for author, text in shown.segments)
        score = task_reward(config).score(shown.prompt, BranchView(segments, Outcome.STOPPED))
        gold = re.search(r"boxed\{(.*) \}", shown.segments[-1][1])[1] == shown.prompt.answers[0]
        assert (score.value, score.correct) == ((1.0, True) if gold else (0.1, False))
        right += gold
        silent = task_reward(config).score(shown.prompt, BranchView(segments[1:2], Outcome.STOPPED))
        assert (silent.value, silent.correct) == (0.0, False)  # a tool's result is no answer
    assert 5 < right < 45
    asked, held_out = ({one.messages[0]["content"] for one in split} for split in (task.train(), task.eval()))
    assert (len(asked), len(held_out), asked & held_out) == (50, 10, set())


def trained(cwd: Path, recipe: Path, *words: str) -> dict[str, Any]:
    """The summary of a run that was started in ``cwd`` as a user starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "actors.cli.main", "train", str(recipe), *words, "observe.wandb=disabled"],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    name = next(word for word in words if word.startswith("run.name=")).removeprefix("run.name=")
    place = next((word.removeprefix("run.dir=") for word in words if word.startswith("run.dir=")), "runs")
    return json.loads((cwd / place / name / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_task_of_sums_is_trained(tmp_path: Path) -> None:
    words = ("run.steps=2", "warmstart.steps=60", "warmstart.demos=600", "eval.questions=8")
    summary = trained(EXAMPLES, EXAMPLES / "sums.yaml", *words, "run.name=sums", f"run.dir={tmp_path}")
    assert summary["versions"] == 2
    assert summary["tokens"]["trained"] > 0
    assert {tree.prompt_id.split("/")[0] for tree in read_trees(tmp_path / "sums" / "trees")} == {"sums"}


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_run_with_all_of_them(tmp_path: Path) -> None:
    """As a user starts it, from the directory where the parts lie, which is not ours; and synchronously."""
    for path in EXAMPLES.glob("*.py"):
        shutil.copy(path, tmp_path)
    words = (
        "reward=short_answers:Short",
        "tools.names=[search,python,weekday_tool:Weekday]",
        "learn.credit=treerl_credit:ParentMean",
        "branching=treerl_credit:AtUnsureResults",
        "branching.options.threshold=0.05",
        "flow.staleness=0",
        "run.steps=3",
        "run.name=mine",
        "warmstart.steps=30",
        "warmstart.demos=300",
        "eval.questions=8",
    )
    summary = trained(tmp_path, ROOT / "configs" / "quickstart.yaml", *words)
    run = tmp_path / "runs" / "mine"
    assert summary["versions"] == 3
    assert summary["tokens"]["trained"] > 0
    assert summary["config"]["learn"]["credit"]["name"] == "treerl_credit:ParentMean"
    trees = list(read_trees(run / "trees"))
    assert {fork.probability for tree in trees for fork in tree.forks} == {0.0, 1.0}  # our own states chances
    assert summary["staleness"]["max"] == 0
    assert summary["trees"] == len(trees)  # nothing was grown ahead of the learner
    assert all(len({int(version) for version in tree.version if version >= 0}) == 1 for tree in trees)
