"""Algorithms by name: what ``algorithm: dapo`` in a recipe, or ``algorithm=dapo`` after it, stands for.

Each is a list of settings that come before the other ones of the same file or command line, so that these can
still change them.  ``docs/algorithms.md`` says where each part comes from, and what of a method is not there.
"""

from __future__ import annotations

_TOKENS, _SEQUENCES = "learn.aggregate=token-mean", "learn.aggregate=seq-mean"
_PPO = ("learn.objective=ppo", "learn.clip_low=0.2", "learn.clip_high=0.2", "learn.dual_clip=3")

ALGORITHMS: dict[str, tuple[str, ...]] = {
    "grpo": ("branching=none", "learn.credit=grpo", *_PPO, _SEQUENCES),
    "dr-grpo": ("branching=none", "learn.credit=dr-grpo", *_PPO, "learn.aggregate=constant"),
    "dapo": (
        *("branching=none", "learn.credit=grpo", *_PPO, "learn.clip_high=0.28", "learn.dual_clip=10"),
        *(_TOKENS, "flow.skip_silent=100"),
    ),
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
    "aepo": ("branching=aepo", "learn.credit=arpo-soft", *_PPO, "learn.objective=aepo", _TOKENS),
    "at2po": ("branching=at2po", "learn.credit=at2po", "learn.objective=at2po", _SEQUENCES),
    "tree-grpo": ("branching=random-turns", "learn.credit=tree-grpo", *_PPO, _TOKENS),
    "treepo": (
        *("branching=random", "learn.credit=treepo", *_PPO, "learn.clip_high=0.28", "learn.dual_clip=10"),
        _TOKENS,
    ),
    "gigpo": ("branching=random", "learn.credit=gigpo", *_PPO, _SEQUENCES),
    "treerl": ("branching=treerl", "learn.credit=treerl", *_PPO, _TOKENS),
    "vineppo": ("branching=random", "learn.credit=vineppo", *_PPO, _TOKENS),
    "actguide": (
        *("branching=none", "learn.credit=grpo", *_PPO, "learn.kl_coef=0.001", _TOKENS, "guide.hopeless=0.5"),
        *("flow.curriculum=true", "flow.curriculum_trees=1", "flow.curriculum_hopeless=1"),
    ),
}
