"""Ray of this machine alone has no processes but those that somebody here uses."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import ray
from ray import cloudpickle

from actors.ray_support import answer, ray_session
from actors.raylet import beside
from system.config import Config
from tests.conftest import living

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules

LATE_S = 60.0


def process() -> int:
    return os.getpid()


def variable() -> str:
    return os.environ["ASKED"]


def another() -> int:
    return os.getpid()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with ray_session(Config(), tmp_path_factory.mktemp("session")):
        yield


@pytest.mark.slow
def test_its_agents_wait_for_the_raylets_end_and_do_nothing_else(tmp_path: Path) -> None:
    with ray_session(Config(), tmp_path):
        (raylet,) = [pid for pid, words in living().items() if words and words[0].endswith("/raylet")]
        agents = psutil.Process(raylet).children()
        assert [Path(one.cmdline()[3]).name for one in agents] == ["no_agent.py"] * 2  # and their arguments
        assert all(one.memory_info().rss < 20e6 for one in agents)
    gone, alive = psutil.wait_procs(agents, LATE_S)
    assert len(gone) == 2, alive


@pytest.mark.slow
def test_rays_own_agents_can_be_had_back(tmp_path: Path) -> None:
    config = Config()
    config.cluster.ray_agents = True
    with ray_session(config, tmp_path):
        (raylet,) = [pid for pid, words in living().items() if words and words[0].endswith("/raylet")]
        agents = [" ".join(one.cmdline()) for one in psutil.Process(raylet).children()]
        assert len(agents) >= 2
        assert not any("no_agent.py" in one for one in agents), agents
        task = cast(Any, ray.remote)(variable).options(num_cpus=0, runtime_env={"env_vars": {"ASKED": "7"}})
        assert asyncio.run(answer(task.remote(), LATE_S, "a task in an environment")) == "7"


@pytest.mark.slow
@pytest.mark.usefixtures("session")
async def test_tasks_share_one_process_which_is_the_only_one_that_waits() -> None:
    async def done(function: object, **how: bool) -> int:
        return await answer(beside(function, **how), LATE_S, "a task")  # type: ignore[arg-type]

    found = [await done(function) for function in (process, another, process, another)]
    assert len({*found}) == 1
    waiting = [words for words in living().values() if words and words[0].startswith("ray::")]
    assert len(waiting) == 1, waiting

    once = await done(process, alone=True)
    until = time.monotonic() + LATE_S
    while psutil.pid_exists(once) and psutil.Process(once).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "it has ended"
        await asyncio.sleep(0.05)


DRIVER = """
import asyncio, sys
from pathlib import Path
from actors.new_model import new_model
from actors.ray_support import ray_session
from system.config import load
from system.tasks.base import make_task

config, root = load("configs/quickstart.yaml"), Path(sys.argv[1])
with ray_session(config, root):
    for _ in range(2):
        asyncio.run(new_model(root / "start", config, make_task(config)))
print([name for name in ("torch", "transformers.modeling_utils") if name in sys.modules])
"""


@pytest.mark.slow
def test_a_new_model_is_made_without_torch_in_the_driver(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=170
    )
    assert done.stdout.strip() == "[]", done.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "start").iterdir()
    }
