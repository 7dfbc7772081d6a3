"""``espalier bench eager``: its figures, on less work, and what it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from system.bench.baselines import Way
from system.bench.eager import Pair, Run, cases, pair, run
from system.bench.growth import Scenario, agent, twin
from system.errors import ConfigError
from system.flow.ledger import Ticket
from system.tree.prompt import Prompt
from system.tree.record import Tree
from system.tree.stats import TreeStats
from system.twin.agent import AgentModel, LeafAgent
from system.twin.clock import run as run_virtually
from system.twin.dist import Lognormal

UNEVEN = Lognormal(2.0, 1.5, 0.05)


def test_a_pair_counts_forks_by_what_the_policy_asked_for() -> None:
    both = pair(Scenario(agent(kind=LeafAgent), UNEVEN, trees=4), staleness=1, periods=2, seed=0)
    assert both.ratio == pytest.approx(both.linear.hours / both.eager.hours)
    assert 0.3 < both.eager.fork_share <= 0.5  # n - N of n leaves are kept for forks
    assert 0.5 < both.eager.said_yes < 1.0
    assert both.eager.tool_calls < both.linear.tool_calls


def calls(recipe: str, kind: type[AgentModel]) -> set[tuple[str, float]]:
    """(Question, seconds) of every call of a batch of trees."""
    scenario = Scenario(agent(kind=kind), UNEVEN, trees=8)
    world = twin(scenario, Way(recipe, ("flow.staleness=0",)), 1, seed=3, lean=True)
    found: set[tuple[str, float]] = set()
    rollout = world.rollout

    async def kept(prompt: Prompt, ticket: Ticket, seed: int) -> tuple[Tree | None, TreeStats]:
        tree, stats = await rollout(prompt, ticket, seed)
        found.update((prompt.id, round(call.latency_s, 6)) for call in stats.calls)
        return tree, stats

    world.rollout = kept
    run_virtually(world.run())
    return found


def test_both_ways_meet_the_same_slow_calls() -> None:
    """Every call that eager growth makes, linear rollouts make in the same tree, and it takes as long."""
    eager, linear = (calls(recipe, LeafAgent) for recipe in ("eager", "fully-async"))
    assert eager < linear
    assert len(eager) > 0.8 * len(linear)
    assert not calls("eager", AgentModel) < calls("fully-async", AgentModel)


def test_a_case_is_all_seeds_of_an_eta_and_a_latency() -> None:
    one = Run(100.0, 3.0, 0.0, 0.0, 0.5, 1.0, 12.0)
    found = [Pair(eta, "constant", seed, one, one) for seed in (0, 1) for eta in (1, 4)]
    assert [(key, [one.seed for one in its]) for key, its in cases(found)] == [
        ((1, "constant"), [0, 1]),
        ((4, "constant"), [0, 1]),
    ]


@pytest.mark.parametrize("words", [["0"], ["-1"], ["x"], ["1", "2"]])
def test_anything_but_a_number_of_seeds_is_refused(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(ConfigError, match="one number of seeds, 1 or more"):
        run(tmp_path, words)
