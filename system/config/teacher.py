"""What on-policy distillation does not go with."""

from __future__ import annotations

from collections.abc import Iterator

from system.config.schema import Config


def teacher_problems(config: Config) -> Iterator[str]:
    """A line each, with the remedy."""
    learn, teacher, rollout = config.learn, config.teacher, config.rollout
    key = f"learn.teacher={learn.teacher}"
    if (learn.teacher == "server") != bool(teacher.urls):
        yield (
            f"{key} and teacher.urls={teacher.urls}: set both, learn.teacher=server and "
            "teacher.urls=[http://host:port], or neither"
        )
    if learn.teacher == "none" and learn.credit.name == "none":
        yield "learn.credit=none leaves nothing to learn from: set learn.teacher, or another credit"
    if learn.teacher == "average" and learn.lora.on:
        yield f"{key}: no moving average of adapters is kept: set learn.teacher=server, or learn.lora.rank=0"
    if learn.teacher != "none" and config.flow.skip_silent:
        yield (
            f"{key}: a teacher has something to say of a tree whose leaves all earned the same, and "
            f"flow.skip_silent={config.flow.skip_silent} leaves it out: set flow.skip_silent=0"
        )
    if learn.teacher != "server":
        return
    if rollout.temperature != 1 or "rollout.temperature" in config.run.by_step:
        yield (
            f"{key}: SGLang scores given tokens at temperature 1 only: leave rollout.temperature="
            f"{rollout.temperature:g} at 1, in run.by_step, too"
        )
    if config.guide.on:
        yield (
            f"{key}: a guided tree is sampled under another prompt than it is trained under, and a teacher "
            "reads one: set guide.hopeless and guide.others to 0"
        )
    if config.agent.on:
        yield (
            f"{key}: a teacher reads branches that grow here, and an agent's do not: set "
            "learn.teacher=average, or none"
        )
