"""Which checkpoint a resumed run goes on from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from actors.checkpoints import checkpoints, restore_newest
from system.config import Config
from system.errors import CheckpointError
from system.flow.ledger import Ledger, LedgerError
from system.observe.jsonl import JsonlWriter, read_jsonl
from system.observe.rundir import RunDir

PROMPTS = [f"q{n}" for n in range(9)]


class Learner:
    """Loads what is not in ``damaged``.  A checkpoint called so in ``copies`` is of that version."""

    def __init__(self, *damaged: str) -> None:
        self.damaged = damaged
        self.copies: dict[str, int] = {}

    async def load(self, path: str) -> dict[str, Any]:
        if Path(path).name in self.damaged:
            raise CheckpointError(f"{path}: its digest is not the manifest's")
        return {"version": self.copies.get(Path(path).name, int(path[-6:])), "recorder": {}}


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """Three steps, each with a checkpoint."""
    config = Config()
    config.run.dir = str(tmp_path)
    run = RunDir.create(config)
    log = JsonlWriter(run.ledger_path)
    ledger = Ledger.replay(PROMPTS, 0, (), 0, write=log.write)
    for version in (1, 2, 3):
        number = ledger.next().number
        ledger.queue(number)
        ledger.train([number], version)
        ledger.trained([number])
        (run.checkpoints / f"v{version:06d}").mkdir()
    return run


async def restored(run_dir: RunDir, *damaged: str) -> tuple[int, list[str]]:
    said: list[str] = []
    found = await restore_newest(Learner(*damaged), run_dir, said.append)  # type: ignore[arg-type]
    assert found is not None
    return found.version, said


async def test_the_newest_one_unless_it_is_damaged_which_is_said(run_dir: RunDir) -> None:
    assert await restored(run_dir) == (3, [])
    version, (said,) = await restored(run_dir, "v000003")
    assert version == 2
    assert "v000003: its digest is not" in said
    assert "going back to step 2" in said
    assert [path.name for path in checkpoints(run_dir)] == ["v000001", "v000002"]  # the other is set aside
    assert (run_dir.checkpoints / "v000003.unused").is_dir()
    # The run comes to that step again, and it is damaged again.
    (run_dir.checkpoints / "v000003").mkdir()
    assert (await restored(run_dir, "v000003"))[0] == 2
    assert (run_dir.checkpoints / "v000003.unused1").is_dir()
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* can be used"):
        await restored(run_dir, "v000001", "v000002")
    assert len(checkpoints(run_dir)) == 2, "nothing is set aside in vain"


async def test_a_ledger_that_knows_less_than_a_checkpoint_trains_nothing_twice(run_dir: RunDir) -> None:
    lines = run_dir.ledger_path.read_text().splitlines(keepends=True)
    for kept, version in ((len(lines) - 2, 2), (len(lines) // 2 + 1, 1)):
        run_dir.ledger_path.write_text("".join(lines[:kept]))
        with pytest.raises(LedgerError, match="the log accounts for steps up to"):
            Ledger.replay(PROMPTS, 0, read_jsonl(run_dir.ledger_path), 3)
        got, said = await restored(run_dir)
        assert got == version
        assert any("accounts for steps up to" in line for line in said)
        Ledger.replay(PROMPTS, 0, read_jsonl(run_dir.ledger_path), got)
    run_dir.ledger_path.write_text("")
    with pytest.raises(CheckpointError, match="start a new run"):
        await restored(run_dir)


async def test_a_run_without_a_checkpoint_starts_anew(run_dir: RunDir) -> None:
    shutil.rmtree(run_dir.checkpoints)
    run_dir.checkpoints.mkdir()
    assert await restore_newest(Learner("any"), run_dir, print) is None  # type: ignore[arg-type]


async def test_a_checkpoint_under_anothers_name_is_not_taken_for_it(run_dir: RunDir) -> None:
    learner, said = Learner(), list[str]()
    learner.copies["v000003"] = 1
    found = await restore_newest(learner, run_dir, said.append)  # type: ignore[arg-type]
    assert found is not None
    assert found.version == 2
    assert "v000003: it holds version 1, whatever its name says" in said[0]
