"""What goes together in the section ``reward``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from system.config.rule_checks import broken_rules
from system.config.schema import Config
from system.config.schema_reward import ON_LOOP, RewardConfig, RewardPart, rewards
from system.config.settings import settings
from system.errors import ConfigError
from system.plugins import REWARDS


def reward_problems(config: Config) -> Iterator[str]:
    """Of the run's rewards."""
    yield from section_problems(config.reward)


def section_problems(section: RewardConfig, key: str = "reward") -> Iterator[str]:
    """One reward or several, each of the latter against the rules of the former; ``key``: where it stands."""
    if bool(section.name) == bool(section.parts):
        yield (
            f"{key}.name={section.name!r} beside {key}.parts: write `reward: [{{name: …}}, …]` for several "
            "rewards, or one name"
        )
        return
    try:
        chosen = rewards(section, key)
    except ConfigError as error:
        yield from str(error).splitlines()
        return
    for reward in chosen if section.parts else ():
        yield from values_problems(reward, reward.key)
    for reward in chosen:
        rate, at_once = reward.options.get("rate_per_s"), reward.concurrency or ON_LOOP
        if isinstance(rate, int | float) and 0 < rate * reward.deadline_s < at_once:
            yield (
                f"{reward.key}.options.rate_per_s={rate:g}: with {at_once} scores at once the last waits "
                f"{at_once / rate:g} s for its turn, longer than {reward.key}.deadline_s="
                f"{reward.deadline_s:g}: lower {reward.key}.concurrency, or raise the deadline"
            )
    if not any(reward.weight for reward in chosen):
        yield f"{key}: every weight is 0: every leaf would earn the same; give one another weight"


def values_problems(values: RewardPart, key: str) -> Iterator[str]:
    """Each value of a section, or of a part, at ``key`` against the rule of its setting."""
    several = isinstance(values, RewardConfig) and values.parts  # it has no name then
    for one in settings().values():
        if one.section == "reward" and hasattr(values, one.name) and not (several and one.name == "name"):
            own = REWARDS.at(key) if one.rule.registry else None
            rule = dataclasses.replace(one.rule, registry=own)
            there = dataclasses.replace(one, section=key, rule=rule)
            yield from broken_rules(there, getattr(values, one.name))
