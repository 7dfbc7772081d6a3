"""Tasks of reasoning-gym (procedurally generated questions with their own scorers), by name."""

from __future__ import annotations

import json
from typing import Any

import reasoning_gym
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from system.config import Config, ConfigError
from system.plugins import nearest
from system.rollout.reward import BranchView, Score
from system.rollout.rewards.arpo import FORMAT_ERROR, extract_answer
from system.tasks.base import sizes
from system.tree.prompt import Prompt

EVAL_SEED_OFFSET = 1_000_003
SYSTEM_PROMPT = (
    "Answer the question step by step. Put your reasoning between <think> and </think>. When you know the "
    "answer, write <answer> and </answer> around it, with the exact answer inside \\boxed{}."
)


class ReasoningTask:
    """A reasoning-gym data set.  With ``reward.name=task`` its own scorer (0 to 1) is the reward."""

    name = "reasoning-gym"
    measured = ("format", "answer")

    def __init__(self, config: Config, **options: Any) -> None:
        """``options`` go to the data set.  Raises ConfigError for an unknown data set or option."""
        task, seed, dataset = config.task, config.run.seed, config.task.dataset
        if not dataset:
            raise ConfigError("task.name=reasoning-gym needs task.dataset=<name>, for example chain_sum")
        if dataset not in DATASETS:
            close = nearest(dataset, DATASETS) or f"; there are {len(DATASETS)}, for example chain_sum"
            raise ConfigError(f"task.dataset={dataset!r}: no such reasoning-gym data set{close}")
        self.dataset, self.system_prompt = dataset, task.system_prompt or SYSTEM_PROMPT
        train_size, eval_size = sizes(config)
        self._train = _create(dataset, train_size, seed, options)
        self._eval = _create(dataset, eval_size, seed + EVAL_SEED_OFFSET, options)

    def train(self) -> list[Prompt]:
        """Training questions.  One that the small space of a data set also drew for evaluation is left
        out."""
        held_out = {entry["question"] for entry in self._eval}
        return [
            self._prompt("train", i, entry)
            for i, entry in enumerate(self._train)
            if entry["question"] not in held_out
        ]

    def eval(self) -> list[Prompt]:
        return [self._prompt("eval", i, entry) for i, entry in enumerate(self._eval)]

    def score(self, prompt: Prompt, branch: BranchView) -> Score:
        """The data set's own score of the boxed answer; -1 for a format error.  ``correct``: the full
        score."""
        answer = extract_answer(branch)
        if answer is None:
            return Score(FORMAT_ERROR, False, {"format": 0.0})
        _, split, index = prompt.id.rsplit("/", 2)
        source = self._train if split == "train" else self._eval
        value = float(source.score_answer(answer=answer, entry=source[int(index)]))
        return Score(value, value >= 1.0, {"format": 1.0, "answer": value})

    def _prompt(self, split: str, index: int, entry: dict[str, Any]) -> Prompt:
        return Prompt(
            id=f"{self.dataset}/{split}/{index}",
            messages=(
                {"role": "system", "content": self.system_prompt},
                {"role": "user", "content": entry["question"]},
            ),
            answers=(str(entry["answer"]),),
            kind=self.dataset,
            extra={"metadata": json.loads(json.dumps(entry["metadata"], default=str))},
        )


def _create(dataset: str, size: int, seed: int, options: dict[str, Any]) -> ProceduralDataset:
    try:
        return reasoning_gym.create_dataset(dataset, size=size, seed=seed, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"task.options for reasoning-gym's {dataset}: {error}") from error
