"""Which actors grow trees, under which names and where; Ray itself is left out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import rollout_pool as module
from actors.placement import Place, Placement
from actors.rollout_pool import Arrivals, RolloutPool
from system.cluster.placement import Node, Seat, place
from system.config import load

NAMES = ("engine-0", "engine-1", "tool-python", "rollout-0", "rollout-1")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """The arguments of every actor that was started, by its name."""
    made: dict[str, tuple[Any, ...]] = {}

    def spawn(actor: type, name: str, *arguments: Any, **options: Any) -> Any:
        async def done() -> None: ...

        made[name] = arguments
        call = SimpleNamespace(remote=done)
        return SimpleNamespace(name=name, ready=call, check_tools=call, close=call)

    monkeypatch.setattr(module, "spawn", spawn)
    return made


async def test_workers_engines_and_tools_find_each_other(started: dict[str, tuple[Any, ...]]) -> None:
    config = load(None, ["tools.names=[python]", "engine.replicas=2", "rollout.workers=2"])
    seats = [Seat(name, 0) for name in NAMES]
    places = Placement([Node("127.0.0.1")], seats, {name: Place("127.0.0.1") for name in NAMES}, False)
    told: list[str] = []
    pool = await RolloutPool.start(config, "model", None, places, Path("logs"), Arrivals(told.append))
    assert told[2] == "waiting for engine-0, engine-1, tool python"
    assert told[-2:] == ["waiting for rollout-0, rollout-1", "waiting for rollout-1"]
    assert started.keys() == {*NAMES}
    assert [*pool.workers] == ["rollout-0", "rollout-1"]
    assert [*pool.engines] == ["engine-0", "engine-1"]
    assert [server.name for server in pool.servers.values()] == ["engine-0", "engine-1", "tool-python"]
    _, model, host, port, number, log = started["engine-1"]
    assert (model, host, number, log) == ("model", "127.0.0.1", 1, "logs/sglang-1.log")
    assert pool.engines["engine-1"] == f"http://127.0.0.1:{port}"
    tool, _, corpus, host, port = started["tool-python"]
    assert (tool, corpus, host) == ("python", "", "127.0.0.1")
    _, model, engines, tools, run_dir = started["rollout-1"]
    assert (model, engines) == ("model", [*pool.engines.values()])
    assert tools == {"python": f"http://127.0.0.1:{port}"}
    assert run_dir == Path()
    assert pool.evaluation is None
    await pool.close()


async def test_evaluations_have_engines_and_a_worker_of_their_own(
    started: dict[str, tuple[Any, ...]],
) -> None:
    config = load(None, ["tools.names=[python]", "engine.replicas=2", "eval.engines=1"])
    seats = place(config, [Node("127.0.0.1")], "rollout")
    places = Placement([Node("127.0.0.1")], seats, {seat.actor: Place("127.0.0.1") for seat in seats}, False)
    pool = await RolloutPool.start(config, "model", None, places, Path("logs"))
    assert started.keys() == {seat.actor for seat in seats}
    own = pool.evaluation
    assert own is not None
    assert [*own.workers, *own.engines, *own.servers] == ["eval-rollout-0", "eval-engine-0", "eval-engine-0"]
    *_, number, log = started["eval-engine-0"]
    assert (number, log) == (2, "logs/sglang-eval-0.log")
    *_, engines, tools, _ = started["eval-rollout-0"]
    assert engines == [*own.engines.values()]
    assert tools == started["rollout-0"][3]
    await pool.close()
