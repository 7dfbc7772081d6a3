"""Workers forked from an interpreter that has imported what they need."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from actors.forked import SOCKET
from actors.forking import GROWING, TRAINING, fork_server
from actors.ray_support import answer, ray_session, returned, spawn
from system.config import Config
from system.tools.sandbox.kernel import die_with_parent
from tests.conftest import living

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules

LATE_S = 120.0


class Look:
    """Tells what it found as it began."""

    def __init__(self) -> None:
        self.found = {"numbers": np.random.random(3).tolist(), "modules": [*sys.modules]}

    def look(self) -> dict[str, object]:
        return self.found | {"pid": os.getpid(), "environment": dict(os.environ)}

    def check(self) -> None:
        pass


def forking() -> Config:
    config = Config()
    config.cluster.fork = True
    return config


def ancestors(pid: object) -> list[str]:
    """The commands of the processes above ``pid``."""
    assert isinstance(pid, int)
    return [" ".join(above.cmdline()) for above in psutil.Process(pid).parents()]


def forked(pid: object) -> bool:
    return any("actors.fork_server" in command for command in ancestors(pid))


@pytest.mark.slow
async def test_actors_are_forked_with_imports_but_have_their_own_seeds(tmp_path: Path) -> None:
    with fork_server(forking(), ["colorsys"]), ray_session(Config(), tmp_path):
        actors = [spawn(Look, f"look-{number}") for number in range(2)]
        first, second = [await answer(actor.look.remote(), LATE_S, "a look") for actor in actors]
        for one in (first, second):
            assert forked(one["pid"])
            assert {"colorsys", "actors.rollout", "actors.learner"} <= {*one["modules"]}
            assert one["environment"]["RAY_RAYLET_PID"].isdigit()
        assert first["pid"] != second["pid"]
        assert first["numbers"] != second["numbers"]

        os.kill(first["pid"], signal.SIGKILL)
        await returned(actors[0], LATE_S, "the one that was killed")
        again = await answer(actors[0].look.remote(), LATE_S, "a look")
        assert again["pid"] != first["pid"]
        assert forked(again["pid"]), ancestors(again["pid"])


@pytest.mark.slow
async def test_without_its_server_an_actor_starts_by_itself(tmp_path: Path) -> None:
    code = f"""
import os, signal, psutil
from pathlib import Path
from system.config import Config
from actors.forking import fork_server
config = Config()
config.cluster.fork = True
from actors.ray_support import ray_session, spawn
import ray

class Look:
    def parent(self):
        return psutil.Process().parent().name()

with fork_server(config, []):
    server, = psutil.Process().children()
    server.kill()
    server.wait()
    with ray_session(Config(), Path({str(tmp_path)!r})):
        print(ray.get(spawn(Look, "look").parent.remote()))
"""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        stdout=asyncio.subprocess.PIPE,
        preexec_fn=lambda: die_with_parent(signal.SIGKILL),
    )
    out, _ = await asyncio.wait_for(process.communicate(), LATE_S)
    assert out.split() == [b"raylet"]
    assert process.returncode == 0


def test_the_server_ends_with_the_block() -> None:
    with fork_server(forking(), []):
        (server,) = [pid for pid, command in living().items() if "actors.fork_server" in command]
        path = Path(os.environ[SOCKET])
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert not psutil.pid_exists(server)
    assert not path.exists()


def test_nothing_is_forked_on_a_cluster_with_gpus_or_where_it_is_not_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joins, holds, will_not = forking(), forking(), Config()
    joins.cluster.address, holds.cluster.gpus_per_node = "10.0.0.1:6379", 1
    for config in (joins, holds, will_not):
        with fork_server(config, [*TRAINING, *GROWING]):
            assert SOCKET not in os.environ
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with fork_server(forking(), []):
        assert SOCKET not in os.environ
