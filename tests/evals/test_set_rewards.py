"""What scores the questions of ``eval.sets``: the run's reward, one of the set's own, or its task."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from system.config import ConfigError, all_rewards, eval_sets, load, rewards, scored
from system.doctor.preflight import look
from system.evals.sets import only, question_sets, without_idle_reward, without_training_data
from system.rollout.scorer import Scorer
from system.tasks.base import make_task

JUDGE = "{name: judge, deadline_s: 60, options: {base_url: 'http://127.0.0.1:9/v1', model: m}}"


def of(run: str, of_set: str) -> Any:
    """The configuration that scores a set."""
    config = load(None, [f"reward={run}", f"eval.sets=[{{name: a, path: x, {of_set}}}]"])
    return scored(config, *eval_sets(config.eval))


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A task of one's own that scores its answers."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_scores.py").write_text(
        """
from system.rollout.reward import Score
from system.tree.prompt import Prompt

class Silent:
    name = "own"
    made = 0

    def __init__(self, config):
        Silent.made += 1

    def train(self):
        return self.eval()

    def eval(self):
        return [Prompt("q", ({"role": "user", "content": "?"},), ("7",))]


class Scoring(Silent):
    def score(self, prompt, branch):
        return Score(0.25, True)


def plain(config):
    return Scoring(config)
"""
    )
    return "own_scores"


def test_one_that_says_nothing_is_scored_as_the_run() -> None:
    assert of("arpo", "questions: 3") is None


def test_a_name_and_keys_are_merged_over_the_runs() -> None:
    own = of("{name: arpo, deadline_s: 7, workers: 3}", "reward: f1")
    assert [(one.name, one.deadline_s, one.key) for one in rewards(own.reward, "k")] == [("f1", 7.0, "k")]
    assert own.reward.workers == 3
    same = of(JUDGE, "reward: {options: {model: other}, concurrency: 4}").reward
    assert (same.name, same.concurrency, same.deadline_s) == ("judge", 4, 60.0)
    assert same.options == {"base_url": "http://127.0.0.1:9/v1", "model": "other"}


def test_another_reward_takes_no_options_and_no_weight_of_the_runs() -> None:
    own = of(f"[{JUDGE}, {{name: arpo, weight: 0.5}}]", "reward: f1").reward
    assert (own.name, own.parts, own.options, own.weight) == ("f1", [], {}, 1.0)
    assert of(JUDGE, "reward: f1").reward.options == {}


@pytest.mark.parametrize(
    ("run", "given", "says"),
    [
        (
            "[arpo, {name: f1, weight: 0.5}]",
            "{options: {x: 1}}",
            "options: of several rewards each has its own",
        ),
        ("arpo", "{parts: [f1], weight: 2}", "weight: of several rewards each has its own"),
    ],
)
def test_what_would_change_nothing_is_refused(run: str, given: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"eval\.sets\[a\]\.reward\.{says}"):
        of(run, f"reward: {given}")


def test_several_weighted_ones() -> None:
    own = of("arpo", "reward: [f1, {name: judge, weight: 0.5, options: {base_url: 'http://a', model: m}}]")
    found = rewards(own.reward, "eval.sets[a].reward")
    assert [(one.name, one.weight) for one in found] == [("f1", 1.0), ("judge", 0.5)]
    assert found[1].key == "eval.sets[a].reward.parts[1]"


def test_a_task_that_scores_its_own_answers_does(task: str) -> None:
    sets = (
        f"eval.sets=[{{name: a, task: '{task}:Scoring'}}, {{name: b, task: '{task}:Silent'}}, "
        f"{{name: c, task: '{task}:Scoring', reward: f1}}, {{name: d, task: '{task}:plain'}}]"
    )
    config = load(None, [sets])
    found = [scored(config, one) for one in eval_sets(config.eval)]
    assert [own and own.reward.name for own in found] == ["task", None, "f1", "task"]
    assert [own and own.task.name for own in found] == [
        f"{task}:Scoring",
        None,
        f"{task}:Scoring",
        f"{task}:plain",
    ]
    assert found[0] is not None
    reward = Scorer.of(found[0], rewards(found[0].reward)[0]).reward
    assert reward.score(None, None).value == 0.25
    told = "\n".join(map(str, look(load(None, [sets, "reward=task"]), training=False)["evaluation sets"]))
    assert "eval.sets[b]: reward.name=task, but the task 'own' has no score" in told


@pytest.mark.parametrize("training", [True, False])
def test_a_task_that_scores_itself_is_made_once_to_be_looked_at(task: str, training: bool) -> None:
    words = [f"task={task}:Scoring", "reward=task", "model.path=x", "tools.names=[]", "warmstart.steps=0"]
    config, silent = load(None, words), importlib.import_module(task).Silent
    before = silent.made
    assert look(config, training=training)["task"] == []
    assert silent.made == before + 1


def test_the_rewards_of_sets_are_looked_at_before_a_run(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "?", "answer": "7"}) + "\n")
    path = tmp_path / "a.jsonl"
    judged = f"{{name: a, path: {path}, reward: {JUDGE}}}"
    keyed = "{name: judge, options: {base_url: 'http://127.0.0.1:9/v1', model: m, api_key_env: NO_SUCH_KEY}}"
    config = load(None, [f"eval.sets=[{judged}, {{name: b, path: {path}, reward: [f1, {keyed}]}}]"])
    assert len(all_rewards(config)) == 4
    told = [str(one) for problems in look(config).values() for one in problems]
    at = "eval.sets[a].reward.options"
    assert any(one.startswith(f"{at}.base_url=http://127.0.0.1:9/v1: does not answer") for one in told)
    parts = "eval.sets[b].reward.parts[1].options"
    assert any(one.startswith(f"{parts}.api_key_env=NO_SUCH_KEY: this environment variable") for one in told)
    wrong = load(
        None, [f"eval.sets=[{{name: a, path: {path}, reward: {{name: judge, options: {{modl: m}}}}}}]"]
    )
    (first, *_) = look(wrong)["parts"]
    assert str(first).startswith(
        "eval.sets[a].reward.options.modl: judge has no such option; did you mean model"
    )


def test_only_some_sets(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}?", "answer": "7"}) + "\n" for i in range(5)))
    sets = f"eval.sets=[{{name: a, path: {path}}}, {{name: b, path: nowhere, questions: 1}}]"
    config = load(None, ["eval.questions=2", "task.eval_size=3", sets])
    asked = question_sets(only(config, ["a"]), make_task(config))
    assert [(one.name, len(one.questions)) for one in asked] == [("", 0), ("a", 2)]
    own = question_sets(only(config, ["held-out", "a"]), make_task(config))
    assert [(one.name, len(one.questions)) for one in own] == [("", 2), ("a", 2)]
    with pytest.raises(ConfigError, match=r"--sets c: there are held-out, a, b"):
        only(config, ["a", "c"])
    with pytest.raises(ConfigError, match=r"eval\.sets\[b\]: .*nowhere"):  # called as with all sets
        question_sets(only(config, ["b"]), make_task(config))


def test_sets_that_score_themselves_need_no_judge_of_the_runs() -> None:
    sets = (
        "eval.sets=[{name: a, path: x, reward: f1}, {name: b, path: x}, {name: c, path: x, reward: "
        "{deadline_s: 9}}, {name: d, path: x, reward: [f1, {name: arpo, weight: 0.5}]}]"
    )
    config = load(None, [f"reward={JUDGE}", "reward.workers=3", sets])
    alone = without_idle_reward(only(config, ["a", "d"]))
    assert [one.name for one in all_rewards(alone)] == ["arpo", "f1", "f1", "arpo"]
    for name in ("a", "d"):
        before, after = (
            next(scored(one, each) for each in eval_sets(one.eval) if each.name == name)
            for one in (config, alone)
        )
        assert before is not None
        assert after is not None
        assert rewards(after.reward, "k") == rewards(before.reward, "k")
        assert after.reward.workers == 3
    own = load(None, [f"reward={JUDGE}", "eval.questions=0", "eval.sets=[{name: a, path: x, reward: f1}]"])
    assert [one.name for one in all_rewards(without_idle_reward(own))] == ["arpo", "f1"]
    for names in (["a", "b"], ["a", "held-out"], ["c"]):
        assert "judge" in [one.name for one in all_rewards(without_idle_reward(only(config, names)))]


def test_an_evaluation_needs_no_training_data(tmp_path: Path) -> None:
    path = tmp_path / "held-out.jsonl"
    path.write_text(json.dumps({"question": "?", "answer": "7"}) + "\n")
    config = load(
        None,
        ["task=jsonl", f"task.path={tmp_path}/gone.jsonl", f"task.eval_path={path}", "tools.names=[]"],
    )
    found, told = without_training_data(config)
    assert "no such data file" in told
    task = make_task(found)
    assert len(task.eval()) == 1
    with pytest.raises(ConfigError, match=r"task\.name=jsonl needs task\.path"):
        task.train()
    assert look(found, training=False)["task"] == []
    assert [str(one) for one in look(found)["task"]] == [
        "task.name=jsonl needs task.path=<a data file, a directory or a glob>"
    ]
    there = load(None, ["task=jsonl", f"task.path={path}"])
    assert without_training_data(there) == (there, "")


@pytest.mark.parametrize("setting", ["rollout.top_p=0.5", "rollout.top_k=20"])
def test_an_evaluation_samples_as_it_is_told_and_training_from_all(setting: str) -> None:
    config = load(None, [setting])
    (problem,) = look(config)["sampling"]
    assert f"{setting}" in str(problem)
    assert "training needs samples of the whole distribution" in str(problem)
    assert "sampling" not in look(config, training=False)
    from actors.train import train  # Ray: slow

    with pytest.raises(ConfigError, match="training needs samples of the whole distribution"):
        train(config, config_name="x", resume=None)
