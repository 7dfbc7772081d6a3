"""The questions of ``espalier study``, and the arms that answer each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Study:
    """Arms are settings; what one learns is compared with the control's, or the first's without it."""

    title: str
    about: str
    arms: dict[str, tuple[str, ...]]
    control: str


_FEW = "task.train_size=64"
QUESTIONS = {
    "branching": Study(
        "Does it pay to fork where the model is unsure?",
        "Trees of one size from the same start weights, trained alike; arms differ in where trees fork.",
        {
            "calibrated": ("branching=arpo-calibrated", "branching.beta=0.5"),
            "depth": ("branching=arpo-calibrated", "branching.beta=0.5", "branching.options.by_depth=true"),
            "arpo": ("branching=arpo", "branching.beta=0.2"),
            "release": ("branching=arpo-release", "branching.beta=0.2"),
            "aepo": ("branching=aepo", "branching.beta=0.2"),
            "at2po": ("branching=at2po", "branching.options.width=2"),
            "random": ("branching=random",),
            "surest": ("branching=arpo-calibrated", "branching.beta=-0.5"),  # the contrary
            "none": ("branching=none",),
        },
        control="random",
    ),
    "measures": Study(
        "What says best that the model is unsure?",
        "Trees of one size from the same start weights, trained alike; arms differ in what is measured "
        "to say where trees fork.",
        {
            "delta": ("branching=arpo-calibrated", "branching.beta=0.5"),
            **{
                by: ("branching=arpo-calibrated", "branching.beta=0.5", f"branching.options.by={by}")
                for by in ("entropy", "first", "surprise", "varentropy", "siblings")
            },
            "treerl": ("branching=treerl",),
            "random": ("branching=random",),
        },
        control="random",
    ),
    "sampling": Study(
        "Does it pay to leave out trees without signal?",
        "Trees whose leaves all earned the same are trained on, or others are grown in their places, at most "
        "64 per step (DAPO's dynamic sampling, arXiv 2503.14476). What was left out counts as spent.",
        {"all": (), "dynamic": ("flow.skip_silent=64",)},
        control="all",
    ),
    "data": Study(
        "Do pools by difficulty, or demonstrations, pay?",
        "64 questions that come again and again: in epochs, by a curriculum of difficulty, with half of the "
        "hopeless ones' trees guided by a demonstration (ActGuide), or with an expert's turns at the "
        "beginning of some branches (E3-TIR).",
        {
            "epochs": (_FEW,),
            "curriculum": (_FEW, "flow.curriculum=true"),
            "guided": (
                *(_FEW, "flow.curriculum=true", "flow.curriculum_hopeless=1"),
                *("guide.hopeless=0.5", 'guide.text="\\n{actions}"', "learn.objective=ppo"),
            ),
            "expert": (_FEW, "guide.expert=0.5"),
        },
        control="epochs",
    ),
}
