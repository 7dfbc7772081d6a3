"""Which checkpoint a resumed supervised run goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.supervised import SftState, Supervised
from system.config import Config
from system.errors import CheckpointError
from system.observe.progress import Progress
from system.observe.recorder import Status
from system.observe.rundir import RunDir

ALL = {"v000001", "v000002"}


class Learner:
    """Loads what is not in ``damaged``."""

    warnings = ()

    def __init__(self, *damaged: str) -> None:
        self.damaged = damaged

    async def load(self, path: str) -> dict[str, Any]:
        if Path(path).name in self.damaged:
            raise CheckpointError(f"{path}: it does not hold the adapters")
        return {"sft": {"step": int(path[-6:])}}


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    config = Config()
    config.run.dir = str(tmp_path)
    made = RunDir.create(config)
    for name in ALL:
        (made.checkpoints / name).mkdir()
    return made


async def restored(run_dir: RunDir, *damaged: str) -> int:
    state = SftState()
    learner: Any = Learner(*damaged)
    run = Supervised(
        Config(), run_dir, state, learner, [], Progress(Status, total_steps=2, interval_s=60), "last"
    )
    await run._restore(2)  # pyright: ignore[reportPrivateUsage]
    return state.step


async def test_one_that_cannot_be_read_is_set_aside_for_an_older_one(run_dir: RunDir) -> None:
    assert await restored(run_dir, "v000002") == 1
    assert {path.name for path in run_dir.checkpoints.iterdir()} == {"v000001", "v000002.unused"}


async def test_where_none_is_of_use_all_stay_for_the_next_try(run_dir: RunDir) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* can be used"):
        await restored(run_dir, *ALL)
    assert {path.name for path in run_dir.checkpoints.iterdir()} == ALL
    assert await restored(run_dir) == 2
