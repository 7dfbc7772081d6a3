"""Whole simulated runs: determinism, known limits, and what must hold whatever fails."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from twin_worlds import FailingTwin, Failure, config, models, surviving

from system.tree.record import Origin
from system.twin.agent import AgentModel
from system.twin.clock import run
from system.twin.dist import Constant, Lognormal
from system.twin.speeds import LinearLearner
from system.twin.tools import ToolModel
from system.twin.world import Twin, simulate

NOISY = models(
    agent=AgentModel(segment_tokens=Lognormal(50, 0.8)),
    tools={"search": ToolModel(Lognormal(1.0, 1.0, 0.05), failures=0.1)},
)


@pytest.mark.parametrize("schedule", ["barrier-free", "eager"])
def test_the_same_seed_gives_the_same_interleaving_and_another_does_not(schedule: str) -> None:
    chosen = f"rollout.schedule={schedule}"
    first, again = (simulate(config(chosen), NOISY, steps=4) for _ in range(2))
    other = simulate(config(chosen, "run.seed=1"), NOISY, steps=4)
    assert first.events == again.events > 200
    assert first.digest == again.digest
    assert first == again
    assert other.digest != first.digest


def test_neither_hash_seeds_nor_the_machine_change_the_interleaving() -> None:
    program = (
        "from twin_worlds import config, models\nfrom system.twin.world import simulate\n"
        "print(simulate(config(), models(), steps=2).digest)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2")
    }
    assert digests == {simulate(config(), models(), steps=2).digest + "\n"}


def test_a_slow_learner_sets_the_pace_and_never_waits() -> None:
    slow = models(learner=LinearLearner(500.0, 0.0))
    result = simulate(config(), slow, steps=5, skip=2)
    assert result.step_s == pytest.approx(500.0 + 0.5 + 0.1, abs=0.5)  # the update waits for a boundary
    assert result.idle["learner"]["no batch"] == pytest.approx(0.0, abs=1e-3)


def test_without_staleness_generation_and_training_take_turns() -> None:
    lazy = models(learner=LinearLearner(10.0, 0.0))
    waits = simulate(config("flow.staleness=0"), lazy, steps=6, skip=1)
    flows = simulate(config("flow.staleness=1"), lazy, steps=6, skip=1)
    training = 10.0 + 0.5 + 0.1
    assert waits.step_s * (1 - waits.idle["learner"]["no batch"]) == pytest.approx(training, abs=0.2)
    assert waits.totals["staleness"]["max"] == 0
    assert flows.step_s < waits.step_s - 0.5
    assert waits.idle["rollout"]["staleness bound"] > flows.idle["rollout"]["staleness bound"]


def test_thousands_of_branches_and_a_day_are_simulated_at_once() -> None:
    large = config(
        "rollout.leaves=16",
        "rollout.roots=16",
        "rollout.concurrency=128",
        "flow.batch_leaves=1024",
        "engine.max_running=4096",
        "tools.deadline_s=1e6",
        "tools.concurrency=4096",
    )
    patient = models(
        tools={"search": ToolModel(Constant(20_000.0))},
        agent=AgentModel(segment_tokens=Constant(20), p_call=(1.0, 0.0)),
    )
    live = 0

    async def main(twin: Twin) -> None:
        nonlocal live
        running = asyncio.create_task(twin.run())
        await asyncio.sleep(15_000.0)
        live = twin.tools.running
        await running

    twin = Twin(large, patient, steps=1)
    run(main(twin))
    assert live == 128 * 16
    assert twin.records[-1]["time/wall_s"] > 20_000


CHAOS = [
    Failure(12.0, "engine", 0, for_s=20.0),
    Failure(18.0, "tool", for_s=10.0),
    Failure(30.0, "learner"),
    Failure(32.0, "engine", 1, for_s=40.0),
    Failure(55.0, "learner"),
]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("chaos", [False, True])
def test_budget_staleness_and_ledger_hold_whatever_fails(seed: int, chaos: bool) -> None:
    rng = np.random.default_rng(seed)
    staleness, window = int(rng.integers(0, 3)), int(rng.integers(1, 4))
    update = ["in-flight", "drained"][int(rng.integers(2))]
    schedule = {1: "eager", 3: "lockstep", 6: "eager", 7: "lockstep"}.get(seed, "barrier-free")
    twin = FailingTwin(
        config(
            f"run.seed={seed}",
            f"flow.staleness={0 if schedule == 'lockstep' else staleness}",
            f"flow.window={window}",
            f"flow.update={update}",
            f"flow.curriculum={str(seed % 2 == 0).lower()}",
            f"rollout.schedule={schedule}",
            f"branching={['arpo', 'random', 'none', 'arpo-paper'][seed // 2 % 4]}",
            f"engine.kv_after_update={['recompute', 'keep'][int(rng.integers(2))]}",
            "engine.replicas=2",
            "flow.max_attempts=20",
            "rollout.branch_deadline_s=400",
        ),
        NOISY,
        steps=8,
        patience_s=20_000.0,
        failures=[Failure(f.at_s + float(rng.uniform(-6, 6)), f.what, f.which, f.for_s) for f in CHAOS]
        if chaos
        else (),
    )

    async def main() -> None:
        await twin.run()
        assert asyncio.all_tasks() == {asyncio.current_task()}  # no orphan
        assert twin.tools.running == 0

    run(main())
    if chaos:
        assert twin.sessions > 1
    for tree in twin.trees:  # the budget identity
        assert sum(tree.origins(origin) for origin in Origin) == tree.n_leaves == tree.budget
    settings = twin.config.flow
    assert twin.totals["staleness"]["max"] <= settings.staleness + settings.window  # the staleness bound
    if settings.curriculum:
        assert sum(twin.totals["pools"].values()) == pytest.approx(1.0)
        assert twin.totals["pools"]["unknown"] < 1
        assert {f"flow/pool/{name}": share for name, share in twin.totals["pools"].items()}.items() <= (
            twin.records[-1].items()
        )
    history = surviving(twin.log)
    assert [version for version, _ in history] == sorted(v for v in range(1, 9) for _ in range(4))
    assert max(Counter(prompt for _, prompt in history).values()) == 1  # none twice
    issued = list(dict.fromkeys((e["epoch"], e["prompt"]) for e in twin.log if e["event"] == "issue"))
    abandoned = sum(event["event"] == "abandon" for event in twin.log)
    left = set(issued) - {prompt for _, prompt in history}
    assert abandoned == 0
    assert len(left) <= (settings.staleness + 1) * 4  # none lost: what is left was in flight at the end


def test_a_limit_on_staleness_evicts_trees_in_a_simulation_too() -> None:
    tail = models(tools={"search": ToolModel(Lognormal(1.0, 1.0, 0.02, 100.0))})
    overtaking = ("flow.staleness=1", "flow.window=4")
    free = simulate(config(*overtaking), tail, steps=12)
    limited = simulate(config(*overtaking, "flow.max_staleness=1"), tail, steps=12)
    assert free.totals["dropped"] == {}
    assert free.totals["staleness"]["max"] > 1
    assert limited.totals["dropped"]["stale"]["trees"] > 0
    assert limited.totals["staleness"]["max"] <= 1


def test_scores_at_the_close_cost_prefills_and_nothing_else() -> None:
    """The same trees in the same steps, in more time; each version stands for all of a turn."""
    plain, scored = (simulate(config(*more), models(), steps=3) for more in ((), ("rollout.rescore=true",)))
    assert scored.step_s >= plain.step_s
    assert scored.digest != plain.digest
    twin = Twin(config("rollout.rescore=true"), models(), steps=2)
    run(twin.run())
    assert [record["rollout/rescored_share"] for record in twin.records] == [1, 1]
    assert {record["rollout/rescored_gap"] for record in twin.records} == {0}
