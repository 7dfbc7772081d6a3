"""Trees without tokens against the real rollout: the same events at the same times."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, cast

import pytest
from twin_worlds import config, models

from system.bench.baselines import Way
from system.bench.growth import Grown, Scenario, agent, grow
from system.twin.agent import AgentModel, LeafAgent
from system.twin.dist import Constant, Lognormal
from system.twin.lean import LeanTwin
from system.twin.records import TwinResult
from system.twin.tools import ToolModel

COUNTED = ("trees", "leaves", "forks", "forks_unasked", "top_ups", "tool_calls", "tokens", "staleness")


def figures(result: TwinResult) -> dict[str, Any]:
    """All of them, event by event, but for what a tree's nodes say."""
    return asdict(result) | {"totals": {name: result.totals[name] for name in COUNTED}}


def both(latency: Lognormal, recipe: str, staleness: int, kind: type[AgentModel]) -> tuple[Grown, Grown]:
    """The real rollout's trees, and trees without tokens."""
    scenario = Scenario(agent(kind=kind), latency, trees=4, slots=24)
    way = Way(recipe, (f"flow.staleness={staleness}",))
    real, lean = (grow(scenario, way, 4, seed=0, skip=1, lean=lean) for lean in (False, True))
    return real, lean


def figures_alike(one: Any, other: Any) -> None:
    """Equal, seconds to the rounding of sums."""
    if isinstance(other, dict):
        assert one.keys() == other.keys()
        for key, value in cast(dict[str, Any], other).items():
            figures_alike(one[key], value)
    elif isinstance(other, list | tuple):
        assert len(one) == len(cast(list[Any], other))
        for mine, value in zip(one, cast(list[Any], other), strict=True):
            figures_alike(mine, value)
    elif isinstance(other, float):
        assert one == pytest.approx(other, rel=1e-9, nan_ok=True)
    else:
        assert one == other


@pytest.mark.parametrize(
    ("recipe", "staleness", "kind"),
    [
        ("fully-async", 1, AgentModel),
        ("fully-async", 4, LeafAgent),
        ("espalier", 1, AgentModel),
        ("eager", 1, LeafAgent),
        ("eager", 4, AgentModel),
    ],
)
@pytest.mark.parametrize("latency", [Lognormal(2.0, 0.5), Lognormal(2.0, 1.5, 0.05)], ids=str)
def test_trees_without_tokens_grow_as_the_real_ones(
    latency: Lognormal, recipe: str, staleness: int, kind: type[AgentModel]
) -> None:
    """A digest is over every event and its time: ends of segments, answers, versions, the ledger's."""
    real, lean = both(latency, recipe, staleness, kind)
    figures_alike(figures(lean.result), figures(real.result))
    figures_alike([lean.work_s, lean.longest_step_s], [real.work_s, real.longest_step_s])
    assert math.isnan(lean.critical_path_s)


@pytest.mark.parametrize("recipe", ["fully-async", "eager"])
def test_where_events_meet_in_one_moment_their_order_matters_little(recipe: str) -> None:
    real, lean = both(Lognormal(2.0), recipe, 1, LeafAgent)
    assert lean.result.step_s == pytest.approx(real.result.step_s, rel=0.02)
    assert lean.per_tree == pytest.approx(real.per_tree, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "world", "why"),
    [
        ("rollout.schedule=lockstep flow.staleness=0", {}, "rollout.schedule=lockstep"),
        ("branching=arpo-release", {}, "branching=arpo-release"),
        ("branching=at2po", {}, "branching=at2po"),
        ("tools.cache_size=1", {}, "tools.cache_size=0"),
        ("", {"tools": {"search": ToolModel(Constant(1.0), failures=0.1)}}, "tools that fail"),
    ],
)
def test_worlds_that_take_more_are_refused(settings: str, world: dict[str, Any], why: str) -> None:
    chosen = config("tools.cache_size=0", *settings.split())
    with pytest.raises(ValueError, match=why):
        LeanTwin(chosen, models(**world), steps=1)
