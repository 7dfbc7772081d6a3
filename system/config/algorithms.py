"""Algorithms by name: what ``algorithm: dapo`` in a recipe, or ``algorithm=dapo`` after it, stands for.

Each is a list of settings that come before the other ones of the same file or command line, so that these can
still change them.  ``docs/algorithms.md`` says where each part comes from, and what of a method is not there.
"""

from __future__ import annotations

_TOKENS, _SEQUENCES = "learn.aggregate=token-mean", "learn.aggregate=seq-mean"


def _clipped(objective: str = "ppo", high: float = 0.2, dual: int = 3) -> tuple[str, ...]:
    return (
        *(f"learn.objective={objective}", "learn.clip_low=0.2"),
        *(f"learn.clip_high={high}", f"learn.dual_clip={dual}"),
    )


_PPO, _DAPO = _clipped(), _clipped(high=0.28, dual=10)

ALGORITHMS: dict[str, tuple[str, ...]] = {
    "grpo": ("branching=none", "learn.credit=grpo", *_PPO, _SEQUENCES),
    "dr-grpo": ("branching=none", "learn.credit=dr-grpo", *_PPO, "learn.aggregate=constant"),
    "dapo": ("branching=none", "learn.credit=grpo", *_DAPO, _TOKENS, "flow.skip_silent=100"),
    "rloo": ("branching=none", "learn.credit=rloo", *_PPO, _TOKENS),
    "reinforce++": ("branching=none", "learn.credit=reinforce++", *_PPO, _TOKENS),
    "reinforce++-baseline": ("branching=none", "learn.credit=reinforce++-baseline", *_PPO, _TOKENS),
    "cispo": ("branching=none", "learn.credit=grpo", "learn.objective=cispo", _TOKENS),
    "sapo": ("branching=none", "learn.credit=grpo", "learn.objective=sapo", _SEQUENCES),
    "gspo": ("branching=none", "learn.credit=grpo", "learn.objective=gspo", _SEQUENCES),
    "dppo": ("branching=none", "learn.credit=grpo", "learn.objective=dppo-tv", _TOKENS),
    "topr": ("branching=none", "learn.credit=grpo", "learn.objective=topr", _TOKENS),
    "ucpo": ("branching=none", "learn.credit=ucpo", *_PPO, _TOKENS),
    "g2rpo": ("branching=none", "learn.credit=g2rpo", *_PPO, _TOKENS),
    "ema-grpo": ("branching=none", "learn.credit=ema-grpo", *_PPO, _TOKENS),
    "arpo": ("branching=arpo", "learn.credit=arpo-soft", *_PPO, _TOKENS),
    "aepo": ("branching=aepo", "learn.credit=arpo-soft", *_clipped("aepo"), _TOKENS),
    "at2po": ("branching=at2po", "learn.credit=at2po", "learn.objective=at2po", _SEQUENCES),
    "tree-grpo": ("branching=random-turns", "learn.credit=tree-grpo", *_PPO, _TOKENS),
    "treepo": ("branching=random", "learn.credit=treepo", *_DAPO, _TOKENS),
    "gigpo": ("branching=random", "learn.credit=gigpo", *_PPO, _SEQUENCES),
    "a2tgpo": (
        *("branching=none", "learn.credit=a2tgpo", "rollout.score_answer=true", "learn.objective=a2tgpo"),
        _SEQUENCES,
    ),
    "igpo": ("branching=none", "learn.credit=igpo", "rollout.score_answer=true", *_PPO, _SEQUENCES),
    "treerl": ("branching=treerl", "learn.credit=treerl", *_PPO, _TOKENS),
    "vineppo": ("branching=random", "learn.credit=vineppo", *_PPO, _TOKENS),
    "actguide": (
        *("branching=none", "learn.credit=grpo", *_PPO, "learn.kl_coef=0.001", _TOKENS, "guide.hopeless=0.5"),
        *("flow.curriculum=true", "flow.curriculum_trees=1", "flow.curriculum_hopeless=1"),
    ),
}
