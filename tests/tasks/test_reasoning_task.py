"""reasoning-gym data sets by name."""

from __future__ import annotations

import pytest

from system.config import Config, ConfigError
from system.rollout.reward import BranchView
from system.tasks.reasoning import ReasoningTask
from system.tree.record import Kind, Outcome


def make(dataset: str = "chain_sum", train_size: int = 20, eval_size: int = 10, seed: int = 1, **options):
    config = Config()
    config.task.dataset, config.run.seed = dataset, seed
    config.task.train_size, config.task.eval_size = train_size, eval_size
    return ReasoningTask(config, **options)


def said(answer: str) -> BranchView:
    text = f"<think> so </think> <answer> \\boxed{{{answer}}} </answer>"
    return BranchView(((Kind.MODEL, text),), Outcome.STOPPED)


def test_prompts_are_reproducible_and_held_out():
    task, again = make(), make()
    assert task.train() == again.train()
    assert len(task.eval()) == 10
    asked = {p.messages[-1]["content"] for p in task.train()}
    assert asked
    assert not asked & {p.messages[-1]["content"] for p in task.eval()}
    assert task.train()[0].kind == "chain_sum"
    assert make(seed=2).train() != task.train()


def test_a_small_space_of_questions_stays_disjoint():
    task = make(dataset="chain_sum", train_size=300, eval_size=50, max_terms=2, max_digits=1)
    asked = {p.messages[-1]["content"] for p in task.train()}
    held_out = {p.messages[-1]["content"] for p in task.eval()}
    assert 0 < len(task.train()) < 300
    assert not asked & held_out
    assert len({p.id for p in task.train()}) == len(task.train())


def test_its_own_scorer_is_the_reward():
    task = make()
    for prompt in (task.train()[3], task.eval()[4]):
        right = task.score(prompt, said(prompt.answers[0]))
        assert (right.value, right.correct) == (1.0, True)
        wrong = task.score(prompt, said("123456789"))
        assert wrong.value < 1
        assert not wrong.correct
    broken = BranchView(((Kind.MODEL, "42"),), Outcome.STOPPED)
    assert task.score(task.train()[0], broken).value == -1.0


def test_options_reach_the_data_set():
    prompt = make(min_terms=6, max_terms=6).train()[0]
    assert prompt.extra["metadata"]["num_terms"] == 6


def test_errors_name_the_key_and_the_remedy():
    with pytest.raises(ConfigError, match=r"task\.dataset='chain_sums'.*did you mean chain_sum\?"):
        make(dataset="chain_sums")
    with pytest.raises(ConfigError, match=r"task\.options"):
        make(no_such_option=1)
    with pytest.raises(ConfigError, match=r"task\.dataset"):
        ReasoningTask(Config())
