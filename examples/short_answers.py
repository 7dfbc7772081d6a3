"""A reward of one's own.  In the directory of this file, or with it on PYTHONPATH:

espalier train ../configs/quickstart.yaml reward=short_answers:Short
"""

from system.rollout.reward import Score
from system.rollout.rewards.arpo import ArpoReward


class Short(ArpoReward):
    def score(self, prompt, branch):
        score = super().score(prompt, branch)
        return Score(score.value - 0.001 * len(branch.model_text), score.correct, score.parts)
