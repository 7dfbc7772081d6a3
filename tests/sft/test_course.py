"""The order of examples, the learning rate, and which model is taken: pure functions."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from system.config import ConfigError, SftConfig, load
from system.sft.choice import SavedModel, chosen, rule
from system.sft.course import Course, batches


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 4), st.integers(0, 5))
def test_every_example_comes_once_an_epoch(examples: int, batch: int, epochs: int, seed: int) -> None:
    course = Course(SftConfig(batch=batch, epochs=epochs), examples, seed)
    made = course.batches()
    assert len(made) == course.steps
    order = np.concatenate(made).tolist()
    assert Counter(order) == Counter(dict.fromkeys(range(examples), epochs))
    for epoch in range(epochs):
        assert sorted(order[epoch * examples : (epoch + 1) * examples]) == list(range(examples))
    assert all(len(rows) == batch for rows in made[:-1])
    assert order == np.concatenate(course.batches()).tolist()
    ends = [step for step in range(1, course.steps + 1) if course.due(step, 0)]
    assert ends[-1] == course.steps
    assert {-(-epoch * examples // batch) for epoch in range(1, epochs + 1)} == set(ends)


def test_another_seed_is_another_order() -> None:
    one, other = (np.concatenate(batches(50, 5, 10, seed)).tolist() for seed in (0, 1))
    assert one != other


def test_the_rate_rises_and_falls_by_a_cosine() -> None:
    course = Course(SftConfig(batch=1, epochs=1, lr=2.0, warmup=0.1), 100, 0)
    rates = [course.lr(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert course.lr(54) == pytest.approx(1.0, abs=0.05)


def test_every_so_many_steps_and_at_the_end() -> None:
    course = Course(SftConfig(batch=4, epochs=1), 30, 0)
    assert [step for step in range(1, 9) if course.due(step, 3)] == [3, 6, 8]


def test_the_best_model_and_why() -> None:
    saved = [SavedModel(10, 0.5), SavedModel(20, 0.4), SavedModel(30, 0.4)]
    best, why = chosen(saved, "loss")
    assert best.step == 20
    assert why == "the lowest held-out loss, 0.4000 nats per token, of 3, steps 10, 20, 30"
    for one, right in zip(saved, ([2, 0, 1], [0, 2, 2], [1, 0, 1]), strict=True):
        one.rate(right, 2)
    assert [round(one.solved or 0, 3) for one in saved] == [0.667] * 3
    best, why = chosen(saved, "pass@2")
    assert best.step == 20
    assert why.startswith("the highest pass@2, 0.667 (0.667 of all samples right), of 3")
    assert chosen(saved, "last")[0].step == 30
    diverged = SavedModel(1, loss=math.nan)
    assert chosen([diverged, *saved], "loss")[0].loss == 0.4
    assert chosen(saved[:1], "loss")[1] == "the only one there is to choose by loss"
    with pytest.raises(ValueError, match="not measured"):
        chosen([SavedModel(1), SavedModel(2)], "loss")


def test_what_decides() -> None:
    assert rule(SftConfig()) == "last"
    assert rule(SftConfig(eval_share=0.1)) == "loss"
    assert rule(SftConfig(eval_share=0.1, choose="pass@4")) == "pass@4"
    assert SftConfig(choose="pass@4").samples == 4


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["sft.choose=pass@0"], "sft.choose='pass@0': choose auto, last, loss or pass@k"),
        (["sft.choose=loss"], "needs held-out conversations"),
        (["sft.eval_path=a.jsonl", "sft.eval_share=0.1"], "both hold conversations out"),
        (["sft.form=sharegtp"], "did you mean sharegpt"),
        (["sft.num_train_epochs=3"], "did you mean sft.epochs"),
    ],
)
def test_settings_that_do_not_agree(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, overrides)
    assert says in str(caught.value)
