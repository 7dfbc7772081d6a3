"""A user's own parts by dotted path."""

import pytest

from system import plugins
from system.rollout.reward import BranchView, Score
from system.rollout.rewards import make_reward
from system.tree.prompt import Prompt

NOT_CALLABLE = 3


class AlwaysRight:
    def score(self, prompt: Prompt, branch: BranchView) -> Score:
        return Score(1.0, correct=True)


def test_ones_own_reward() -> None:
    assert isinstance(make_reward(f"{__name__}:AlwaysRight"), AlwaysRight)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("nowhere.at_all:Reward", "ModuleNotFoundError"),
        (f"{__name__}:Missing", "AttributeError"),
        (f"{__name__}:NOT_CALLABLE", "not callable"),
    ],
)
def test_a_path_that_leads_nowhere_says_why(path: str, why: str) -> None:
    with pytest.raises(plugins.PluginError, match=why):
        plugins.load(path)
    with pytest.raises(ValueError, match=r"reward\.name"):
        make_reward(path)
