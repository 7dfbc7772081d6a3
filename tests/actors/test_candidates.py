"""The models that a run's is chosen of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.candidates import Candidates
from system.config import load
from system.observe.rundir import RunDir


def written(directory: str, name: str, text: str) -> None:
    Path(directory).mkdir(parents=True)
    (Path(directory) / name).write_text(text)


class Learner:
    async def save_adapters(self, path: str, base: str) -> None:
        written(path, "of", base)

    async def save_hf(self, path: str) -> float:
        written(path, "step", path[-6:])
        return 0.5


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("rank", [0, 8])
async def test_one_becomes_the_runs_with_its_adapters(tmp_path: Path, rank: int, stays: bool) -> None:
    config = load(None, [f"run.dir={tmp_path}", f"learn.lora.rank={rank}", "model.path=some/base"])
    run = RunDir.create(config)
    learner: Any = Learner()
    candidates = Candidates(config, run)
    for step in (1, 2, 2, 3):  # once more in a session after one that was lost
        assert await candidates.save(step, learner) == 0.5
    (run.candidates / "step-000004.partial").mkdir()
    assert candidates.steps == [1, 2, 3]
    candidates.drop(3)
    for _ in range(1 + stays):  # by a run that goes on, too
        candidates.leave(2, stays=stays)
        assert (run.model / "step").read_text() == "000002"
        assert run.adapter.is_dir() == bool(rank)
    left = {path.name for path in run.candidates.glob("step-??????*") if path.suffix != ".partial"}
    steps = ["step-000001"] + ["step-000002"] * stays
    assert left == {*steps, *(f"{step}-adapter" for step in steps if rank)}


async def test_adapters_that_were_taken_before_the_process_was_killed_are_not_missed(tmp_path: Path) -> None:
    config = load(None, [f"run.dir={tmp_path}", "learn.lora.rank=8", "model.path=some/base"])
    run = RunDir.create(config)
    learner: Any = Learner()
    candidates = Candidates(config, run)
    await candidates.save(1, learner)
    (run.candidates / "step-000001-adapter").rename(run.adapter)
    candidates.leave(1, stays=False)
    assert (run.adapter / "of").read_text() == "base"
    assert (run.model / "step").is_file()
