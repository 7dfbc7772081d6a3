"""What ``espalier chaos`` decides and sees; a whole run of it stands in tests/e2e."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from system.chaos.account import account
from system.chaos.faults import KINDS, Fault, draw
from system.chaos.findings import Findings, Recovery, text
from system.chaos.harm import damage
from system.chaos.run import run
from system.errors import ConfigError
from system.flow.ledger import Ledger
from system.observe.jsonl import JsonlWriter, read_jsonl

BATCH = 2


def history(steps: int, log: list[dict[str, Any]], prompts: int = 40) -> Ledger:
    """A ledger in which ``steps`` batches were trained, one after the other; events go to ``log``."""
    ledger = Ledger.replay([f"q{n}" for n in range(prompts)], 0, (), 0, write=log.append)
    for version in range(1, steps + 1):
        train(ledger, version)
    return ledger


def train(ledger: Ledger, version: int) -> None:
    numbers = [ledger.next().number for _ in range(BATCH)]
    for number in numbers:
        ledger.queue(number)
    ledger.train(numbers, version)
    ledger.trained(numbers)


def test_a_run_that_goes_back_to_a_checkpoint_trains_nothing_twice() -> None:
    log: list[dict[str, Any]] = []
    history(3, log)
    again = Ledger.replay([f"q{n}" for n in range(40)], 0, list(log), 2, write=log.append)
    train(again, 3)
    again.next()
    found = account(log, BATCH, staleness=1, window=1)
    assert (found.versions, found.trained, found.twice, found.lost, found.waiting) == (3, 6, 0, 0, 1)


def test_a_prompt_trained_twice_and_one_given_up_are_found() -> None:
    log: list[dict[str, Any]] = []
    ledger = history(3, log)
    ledger.abandon(ledger.next().number, "deadline")
    twice = [event for event in log if event["event"] == "train"][-1]
    log.append(twice | {"version": 4})
    found = account(log, BATCH, staleness=1, window=1)
    assert (found.twice, found.lost) == (BATCH, 1)


def test_a_prompt_left_behind_is_lost() -> None:
    log: list[dict[str, Any]] = []
    ledger = Ledger.replay([f"q{n}" for n in range(40)], 0, (), 0, write=log.append)
    ledger.next()  # nobody comes back to it
    for version in range(1, 5):
        train(ledger, version)
    assert account(log, BATCH, staleness=1, window=1).lost == 1


def test_every_kind_of_fault_is_drawn_as_often_as_the_others() -> None:
    drawn = draw(3 * len(KINDS), seed=1)
    assert set(Counter((f.kind, f.target, f.moment) for f in drawn).values()) == {3}
    assert draw(10, 1) == drawn[:10] != draw(10, 2)
    assert all(0 <= fault.delay_s <= 3 for fault in drawn)


def test_only_what_a_crash_can_harm_is_harmed(tmp_path: Path) -> None:
    log = JsonlWriter(tmp_path / "ledger.jsonl")
    log.write({"event": "open"})
    log.close()
    assert damage(tmp_path, "ledger")
    assert list(read_jsonl(tmp_path / "ledger.jsonl")) == [{"event": "open"}]
    assert not damage(tmp_path, "trees")
    for name in ("v000001", "v000002"):
        assert not damage(tmp_path, "checkpoint"), "the only one is left alone"
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "small").write_bytes(bytes(10))
        (tmp_path / "checkpoints" / name / "large").write_bytes(bytes(100))
    assert damage(tmp_path, "checkpoint")
    sizes = {path.relative_to(tmp_path).as_posix(): path.stat().st_size for path in tmp_path.rglob("*e")}
    assert sizes["checkpoints/v000002/large"] == 50
    assert sizes["checkpoints/v000001/large"] == 100


def test_findings_are_sound_only_without_a_loss() -> None:
    log: list[dict[str, Any]] = []
    history(3, log)
    good = Recovery(Fault("kill", "engine"), 3.0, False, None, False)
    hung = Recovery(Fault("freeze", "engine"), 95.0, True, 75, True)
    whole = account(log, BATCH, 1, 1)
    assert Findings(0, [good], [], [], [], [], whole).sound
    found = Findings(0, [good, hung], [], [], [], [], whole)
    assert not found.sound
    assert "2 faults, 3 steps, 6 prompts trained: 0 lost, 0 trained twice, 1 hung" in text(found)
    assert not Findings(0, [good], [], [], ["raylet"], [], whole).sound


def test_wrong_words_are_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "used").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        run(tmp_path, Path("configs/quickstart.yaml"), 1, 0)
    with pytest.raises(ConfigError, match="kill engine"):
        run(tmp_path / "new", Path("configs/quickstart.yaml"), 1, 0, only="kill the engine")
    assert not (tmp_path / "new").exists()
