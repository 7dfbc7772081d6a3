"""Which checkpoint a resumed run goes on from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.checkpoints import LINEAGE, checkpoints, restore_newest
from system.config import Config
from system.errors import CheckpointError
from system.flow.ledger import Ledger, LedgerError, State, lineage
from system.observe.jsonl import JsonlWriter, read_jsonl
from system.observe.rundir import RunDir

PROMPTS = [f"q{n}" for n in range(20)]


class Learner:
    """Loads what is not in ``damaged``.  A checkpoint called so in ``copies`` is of that version."""

    def __init__(self, *damaged: str) -> None:
        self.damaged = damaged
        self.copies: dict[str, int] = {}

    async def load(self, path: str) -> dict[str, Any]:
        if Path(path).name in self.damaged:
            raise CheckpointError(f"{path}: its digest is not the manifest's")
        kept = Path(path) / LINEAGE
        extra = {LINEAGE: kept.read_text()} if kept.exists() else {}
        return {"version": self.copies.get(Path(path).name, int(path[-6:])), "recorder": {}, **extra}


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
    log.close()
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


class TwoLives:
    """A run that went back from step 4 to its checkpoint of step 2, and on; what each checkpoint was trained
    on, for sure.
    """

    def __init__(self, run_dir: RunDir) -> None:
        shutil.rmtree(run_dir.checkpoints)
        run_dir.checkpoints.mkdir()
        run_dir.ledger_path.unlink()
        self.run_dir, self.trained = run_dir, dict[int, set[str]]()
        self._live(0, (1, 2, 3, 4), kept=(0, 2, 4))
        shutil.rmtree(run_dir.checkpoints / "v000004")  # its machine took that with it
        self._live(2, (3, 4, 5, 6), kept=(2, 3, 4, 5, 6))

    def _live(self, begin: int, versions: Sequence[int], kept: Sequence[int]) -> None:
        log, events = JsonlWriter(self.run_dir.ledger_path), read_jsonl(self.run_dir.ledger_path)
        ledger = Ledger.replay(PROMPTS, 0, list(events), begin, write=log.write)
        trained = set(self.trained.get(begin, ()))
        self._keep(ledger, begin, trained)
        for version in versions:
            ledger.next()  # grows, and is lost
            ticket = ledger.next()
            ledger.queue(ticket.number)
            ledger.train([ticket.number], version)
            ledger.trained([ticket.number])
            trained.add(ticket.prompt_id)
            if version in kept:
                self._keep(ledger, version, trained)
        log.close()

    def _keep(self, ledger: Ledger, version: int, trained: set[str]) -> None:
        path = self.run_dir.checkpoints / f"v{version:06d}"
        path.mkdir(exist_ok=True)
        (path / LINEAGE).write_text(lineage(ledger.updates, version))
        self.trained[version] = set(trained)


LINES = 1 + 4 * 5 + 1 + 4 * 5  # open; issue, issue, queue, train, trained; restore


@pytest.mark.parametrize("harm", [lambda line: b"\0" * len(line), lambda line: b'{"event": "is\n'])
@pytest.mark.parametrize("line", range(LINES))
async def test_a_damaged_line_costs_what_follows_and_no_prompt(
    run_dir: RunDir, line: int, harm: Callable[[bytes], bytes]
) -> None:
    lives = TwoLives(run_dir)
    lines = run_dir.ledger_path.read_bytes().splitlines(keepends=True)
    assert len(lines) == LINES
    lines[line] = harm(lines[line])
    whole = b"".join(lines)
    run_dir.ledger_path.write_bytes(whole)
    torn = whole.endswith(b"\0")  # the last line without its end: one that was never written
    version, said = await restored(run_dir)
    trains = {0: -1, 2: 9, 3: 25, 4: 30, 5: 35, 6: 40}  # the line that says what a checkpoint was trained on
    assert version == max(one for one, there in trains.items() if there < line)
    rest = run_dir.root / "ledger.jsonl.unused"
    if not torn:
        assert f"line {line + 1}: not JSON" in said[-1]
        assert said[-1].endswith(f"the ledger from there on is kept as {rest}")
        assert run_dir.ledger_path.read_bytes() + rest.read_bytes() == whole, "nothing is deleted"
    assert checkpoints(run_dir)[-1].name == f"v{version:06d}"
    ledger = Ledger.replay(PROMPTS, 0, read_jsonl(run_dir.ledger_path), version)
    trained = {prompt for prompt in PROMPTS if ledger.state(0, prompt) == State.TRAINED}
    assert trained == lives.trained[version], "else one would be trained twice, or never"
    assert await restored(run_dir) == (version, []), "mended for good"


async def test_a_checkpoint_of_other_trees_than_the_ledger_tells_of_is_not_used(run_dir: RunDir) -> None:
    """Cut before the return to step 2, the ledger tells of the first step 4; the checkpoint is the second."""
    lives = TwoLives(run_dir)
    lines = run_dir.ledger_path.read_bytes().splitlines(keepends=True)
    run_dir.ledger_path.write_bytes(b"".join(lines[:21]))
    version, said = await restored(run_dir)
    assert version == 2
    assert sum("it was trained on other trees than ledger.jsonl says" in line for line in said) == 2
    ledger = Ledger.replay(PROMPTS, 0, read_jsonl(run_dir.ledger_path), version)
    assert {p for p in PROMPTS if ledger.state(0, p) == State.TRAINED} == lives.trained[2]


async def test_without_a_checkpoint_a_damaged_ledger_is_begun_anew(run_dir: RunDir) -> None:
    shutil.rmtree(run_dir.checkpoints)
    run_dir.checkpoints.mkdir()
    whole = bytes(100) + b"\n" + run_dir.ledger_path.read_bytes()
    run_dir.ledger_path.write_bytes(whole)
    said: list[str] = []
    assert await restore_newest(Learner(), run_dir, said.append) is None  # type: ignore[arg-type]
    assert "line 1: not JSON" in said[0]
    assert run_dir.ledger_path.read_bytes() == b""
    assert (run_dir.root / "ledger.jsonl.unused").read_bytes() == whole


async def test_nothing_is_set_aside_where_no_checkpoint_is_of_use(run_dir: RunDir) -> None:
    whole = bytes(100) + b"\n" + run_dir.ledger_path.read_bytes()
    run_dir.ledger_path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"put .*ledger.jsonl back as it was(.|\n)*line 1: not JSON"):
        await restored(run_dir)
    assert run_dir.ledger_path.read_bytes() == whole


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
