"""The configuration's section on guided trees: sampled from a prompt that tells more than the trained one."""

from __future__ import annotations

from dataclasses import dataclass

from system.config.rule import setting

ACTIONS = "{actions}"  # where a guide's text has them


@dataclass
class GuideConfig:
    """Trees that are sampled with actions of a demonstration in their prompt, and trained without."""

    hopeless: float = setting(
        0.0,
        "share of a hopeless question's trees (flow.curriculum) that are guided; the others say whether it "
        "still is hopeless without, so leave some: the paper has 0.5 (an unguided group, then a guided one)",
        least=0,
        most=1,
    )
    others: float = setting(0.0, "share of any other question's trees that are guided", least=0, most=1)
    expert: float = setting(
        0.0,
        "share of the trees that are not guided in which half of the first branches begin with turns of the "
        "demonstration and their results (E3-TIR); it needs demonstrations with tool results",
        least=0,
        most=1,
    )
    text: str = setting(
        f"\n\nThe first steps of a solution, to go on from:\n{ACTIONS}",
        "what a guide adds to the user's last message; {actions}: the actions, a line each",
    )

    @property
    def on(self) -> bool:
        """Whether any tree may be guided."""
        return self.hopeless > 0 or self.others > 0

    @property
    def shows(self) -> bool:
        """Whether questions need demonstrations."""
        return self.on or self.expert > 0

    def told(self, actions: tuple[str, ...]) -> str:
        """What the user's last message ends with in a prompt that tells ``actions``."""
        return self.text.replace(ACTIONS, "\n".join(actions))
