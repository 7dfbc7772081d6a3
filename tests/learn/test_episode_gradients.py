"""Episodes of many chains: the learner's gradient is that of their chains, each by itself in Hugging Face,
with numbers worked out here: an episode is one member of its group, and a token of it weighs once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from learner_ranks import Place, Ranks
from learner_reference import (
    gradients,
    is_model,
    learner_config,
    load_hf,
    make_trees,
    path_logprobs,
    path_tokens,
    relative_distance,
    train,
)
from test_learner_equality import hf_gradients, open_trainer

from system.tree.record import Tree, validate

CASES: dict[str, dict[str, Any]] = {
    "decoupled": {"objective": "decoupled"},
    "decoupled, cut": {"objective": "decoupled", "micro_tokens": 48},
    "ppo, cut": {"objective": "ppo", "micro_tokens": 48},
    "ppo, sequence mean, cut": {"objective": "ppo", "aggregate": "seq-mean", "micro_tokens": 48},
    "grpo-flat": {"objective": "grpo-flat"},
}


def of_agents() -> list[Tree]:
    """Three groups: chains that share turns with chains of their own episode and with those of others, side
    by side or not; an episode with no score; and one of a single chain that is a turn of another's.
    """
    dealt = (
        (0, [0, 0, 1, 0, 1, 2, 2], [1.0, 0.0, 0.5]),
        (3, [0, 1, 2, 0, 2, 0, 3], [0.0, 1.0, np.nan, 0.25]),
        (2, [0, 1, 0, 0], [2.0, -1.0]),
    )
    made = make_trees(1)
    trees: list[Tree] = []
    for number, episode, rewards in dealt:
        reward = np.asarray(rewards, np.float32)[episode]
        correct = np.where(np.isfinite(reward), reward >= 1, -1).astype(np.int8)
        tree = replace(made[number], episode=np.asarray(episode, np.int32), reward=reward, correct=correct)
        validate(tree)
        trees.append(tree)
    return trees


def members(tree: Tree) -> list[tuple[float, list[np.ndarray], int]]:
    """Of each scored episode its advantage, its chains as indices of tokens, and how many tokens it said:
    GRPO's (r - mean) / (std + 1e-6) over episodes.
    """
    by_episode: dict[int, list[int]] = {}
    for leaf, episode in enumerate(tree.episode.tolist()):
        by_episode.setdefault(episode, []).append(leaf)
    rewards = {one: float(tree.reward[leaves[0]]) for one, leaves in by_episode.items()}
    known = {one: reward for one, reward in rewards.items() if reward == reward}
    mean, std = np.mean([*known.values()]), np.std([*known.values()], ddof=1)
    found: list[tuple[float, list[np.ndarray], int]] = []
    for one, reward in known.items():
        chains = [path_tokens(tree, leaf) for leaf in by_episode[one]]
        said = np.unique(np.concatenate(chains))
        found.append((float((reward - mean) / (std + 1e-6)), chains, int(is_model(tree)[said].sum())))
    return found


def expected_loss(model: Any, trees: list[Tree], learn: Any) -> torch.Tensor:
    """Σ over episodes of w · Σ over their tokens, each in the first chain that holds it."""
    groups = [(tree, members(tree)) for tree in trees]
    episodes = sum(len(found) for _, found in groups)
    tokens = sum(size for _, found in groups for *_, size in found)
    total = torch.zeros(())
    for tree, found in groups:
        for a, chains, size in found:
            weight = 1 / (episodes * size) if learn.aggregate.name == "seq-mean" else 1 / tokens
            seen = np.zeros(tree.n_tokens, bool)
            for index in chains:
                mask = torch.from_numpy((is_model(tree) & ~seen)[index][1:])
                seen[index] = True
                logp, _ = path_logprobs(model, tree.tokens[index])
                behaviour = torch.from_numpy(tree.logprob[index][1:])
                start = logp.detach() if learn.objective.name == "decoupled" else behaviour
                scale = (start - behaviour).exp().clamp(max=learn.tis_cap)
                ratio = (logp - start).exp()
                clipped = ratio.clamp(1 - learn.clip_low, 1 + learn.clip_high)
                gain = torch.minimum(ratio * a, clipped * a)
                if learn.dual_clip > 0 and a < 0:
                    gain = torch.maximum(gain, torch.tensor(learn.dual_clip * a))
                total = total - weight * (scale * gain)[mask].sum()
    return total


def episode_case(place: Place, model: str, name: str, layout: dict[str, int]) -> dict[str, float]:
    trainer = open_trainer(place, learner_config(credit="grpo", **CASES[name], **layout), model)
    try:
        hf, trees = load_hf(model), of_agents()
        stats = train(trainer, trees)
        loss = expected_loss(hf, trees, trainer.learn)
        loss.backward()
        mine = hf_gradients(trainer)
        return {
            "gradient error": relative_distance(mine, gradients(hf)) if mine else 0.0,
            "loss error": abs(stats["loss"] - float(loss)) / abs(float(loss)),
            "norm": stats["grad_norm"],
        }
    finally:
        trainer.close()


@pytest.mark.parametrize("name", CASES)
def test_an_episode_counts_once_in_the_gradient(
    ranks: Ranks, tiny_model: Callable[..., str], name: str
) -> None:
    (report,) = ranks.run(episode_case, world=1, model=tiny_model(), name=name, layout={})
    assert report["norm"] > 0
    assert report["gradient error"] < 1e-5
    assert report["loss error"] < 1e-5


def test_episodes_are_summed_over_data_parallel_ranks(ranks: Ranks, tiny_model: Callable[..., str]) -> None:
    for report in ranks.run(
        episode_case, world=2, model=tiny_model(), name="decoupled, cut", layout={"dp": 2}
    ):
        assert report["gradient error"] < 1e-5
        assert report["loss error"] < 1e-5
