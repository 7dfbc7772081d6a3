"""A reward with which every tree has a signal, however little its model knows."""

import zlib

from system.rollout.reward import BranchView, Score
from system.tree.prompt import Prompt


class VariedReward:
    """Differs between any two different answers, and means nothing."""

    def score(self, prompt: Prompt, branch: BranchView) -> Score:
        return Score(zlib.crc32(branch.model_text.encode()) / 2**32, correct=False)
