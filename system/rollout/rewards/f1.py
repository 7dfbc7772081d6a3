"""Token F1, as question answering over several documents is measured (HotpotQA, 2WikiMultihopQA, MuSiQue,
Bamboogle).
"""

from __future__ import annotations

from typing import ClassVar

from system.rollout.reward import BranchView, Score
from system.rollout.words import final_answer, normalize, token_f1
from system.tree.prompt import Prompt


class F1Reward:
    """The token F1 of the final answer with the gold answer, the best over several of these, in [0, 1].

    SQuAD's (arXiv 1606.05250, §4.2) over words without case, punctuation and articles; as HotpotQA has it,
    yes, no and noanswer earn nothing for a part.  ``correct``: the same words in the same order, SQuAD's
    exact match.  The final answer is what is boxed, or in ``<answer>``, else what follows the thinking.
    """

    answer_format: ClassVar[str] = (
        "When you know the answer, write it, and nothing else, between <answer> and </answer>, as short as "
        "it can be said."
    )
    trusted: ClassVar[bool] = True

    def quick(self, prompt: Prompt, branch: BranchView) -> Score:
        return self.score(prompt, branch)

    def score(self, prompt: Prompt, branch: BranchView) -> Score:
        answer = final_answer(branch.model_text)
        words = normalize(answer)
        exact = bool(words) and any(words == normalize(gold) for gold in prompt.answers)
        return Score(max((token_f1(answer, gold) for gold in prompt.answers), default=0.0), exact)
