"""``espalier chaos``: faults, one after the other, in a run that is to go on as if nothing had been.

The run is started as a user starts it; when a fault ends it, it is resumed as SLURM would resume it.  What is
asked of it: the next training step comes, in time; and at the end the ledger accounts for every prompt.
"""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from system.chaos.account import account
from system.chaos.faults import KINDS, Fault, draw
from system.chaos.findings import HUNG_S, Findings, Recovery, in_words, text
from system.chaos.harm import damage, fill, small_disk
from system.chaos.session import Session, ended, stop_and_go
from system.config import ConfigError, load
from system.errors import DONE, FAILED, LOST, STOPPED, EspalierError
from system.observe.jsonl import jsonable, read_jsonl
from system.observe.rundir import write_atomic
from system.scratch import PREFIX

LOG = "run.log"
EVALUATING = "] evaluating"  # in the line that the run prints when an evaluation begins
START_S = 180.0  # for the first step of a session
LATE_S = 60.0  # after the last session, for whatever outlived its own
BACK_S = 30.0  # for a process to be back from the fault before
SILENT_S = 8.0  # cluster.silent_s of the run
MOST_SESSIONS = 4  # for the step after a fault
FULL_S = 6.0  # how long the disk stays full
SETTINGS = (
    "run.steps=1000000",
    "warmstart.steps=30",
    "warmstart.demos=300",
    "eval.questions=12",
    "eval.every=2",
    "checkpoint.every=1",
    "observe.wandb=disabled",
    "observe.progress_s=1",
    f"cluster.silent_s={SILENT_S}",
)
GOES_ON = (DONE, STOPPED, LOST, -signal.SIGKILL)  # exit codes after which a run is resumed without asking


class ChaosError(EspalierError, RuntimeError):
    """The run did not come to the point at which a fault was to be made."""


def run(
    out_dir: Path, config: Path, count: int, seed: int, overrides: Sequence[str] = (), only: str = ""
) -> Findings:
    """Make ``count`` faults in a run of ``config`` and write ``out_dir/chaos.json``.

    ``out_dir`` must be new.  ``only``: faults whose description contains this.  Prints a line per fault.
    Raises ConfigError when the run does not even start.
    """
    faults = _chosen(count, seed, only)
    out_dir.mkdir(parents=True, exist_ok=True)
    if any(out_dir.iterdir()):
        raise ConfigError(f"--out {out_dir} is not empty: name a new directory")
    # A short name: Ray's sockets lie below it, and a socket's path has at most 107 characters.
    with small_disk(out_dir / "disk") as disk, tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        trial = _Trial(out_dir, disk, Path(temporary), config, overrides)
        try:
            return trial.make(faults, seed)
        finally:
            trial.session.clear()
            if disk is not None:
                shutil.copytree(disk / "run", out_dir / "run", dirs_exist_ok=True)


def _chosen(count: int, seed: int, only: str) -> list[Fault]:
    kinds = [kind for kind in KINDS if only in str(kind)]
    if not kinds:
        raise ConfigError(f"--only {only!r}: no fault is called that; there are {', '.join(map(str, KINDS))}")
    return draw(count, seed, kinds)


class _Trial:
    """The run, the faults made so far, and what came of them."""

    def __init__(
        self, out: Path, disk: Path | None, temporary: Path, config: Path, overrides: Sequence[str]
    ) -> None:
        self.out, self.disk, self.temporary = out, disk, temporary
        parent = disk or out
        self.directory = parent / "run"
        self.flow = load(config, [*SETTINGS, *overrides])
        words = [str(config), f"run.dir={parent}", "run.name=run", *SETTINGS, *overrides]
        self.session = Session(words, self.directory, temporary, out / LOG)
        self.recoveries: list[Recovery] = []
        self.left_out: list[str] = []
        self.unexpected: list[str] = []
        self.late: list[psutil.Process] = []  # outlived their session, so far

    def make(self, faults: Sequence[Fault], seed: int) -> Findings:
        self._step()
        for number, fault in enumerate(faults, start=1):
            recovery = self._one(fault)
            if recovery is not None:
                self.recoveries.append(recovery)
            print(f"{number}/{len(faults)}  {fault}: {in_words(recovery)}", flush=True)
        self._stop()
        made = account(self._events(), *self._batch)
        self._resume(f"run.steps={made.versions + 2}")
        self._wait(lambda: self.session.exit_code is not None, "the end of the run")
        if self.session.exit_code != DONE:
            self.unexpected.append(f"the last session: exit code {self.session.exit_code}")
        self._clear()
        findings = Findings(
            seed=seed,
            recoveries=self.recoveries,
            left_out=self.left_out,
            unexpected=self.unexpected,
            orphans=ended(self.late, LATE_S),
            leftovers=sorted(path.name for path in self.temporary.glob(f"{PREFIX}*")),
            account=account(self._events(), *self._batch),
        )
        write_atomic(self.out / "chaos.json", json.dumps(jsonable(asdict(findings)), indent=2) + "\n")
        print(text(findings))
        return findings

    # One fault

    def _one(self, fault: Fault) -> Recovery | None:
        """Make a fault and see the run recover; None where it cannot be made."""
        if fault.kind == "fill" and self.disk is None:
            self.left_out.append(f"{fault}: no small file system could be mounted here")
            return None
        self._reach(fault)
        since = self._harm(fault)
        if since is None:
            self.left_out.append(f"{fault}: there was nothing to harm")
            return None
        return self._recover(fault, self.session.steps(), since)

    def _reach(self, fault: Fault) -> None:
        """Wait until the run does what it is to be hit in."""
        match fault.moment:
            case "start":
                self._stop()
                self._resume()
                time.sleep(5 * fault.delay_s)
            case "shutdown":
                self._step()
                self.session.interrupt()
                time.sleep(fault.delay_s / 3)
            case "evaluation":
                self._step()
                seen = self.session.printed().count(EVALUATING)
                self._wait(lambda: self.session.printed().count(EVALUATING) > seen, "an evaluation")
            case "checkpoint":
                self._step()
                self._wait(self._saving, "a checkpoint")
            case _:
                self._step()
                time.sleep(fault.delay_s)

    def _harm(self, fault: Fault) -> float | None:
        """Do it; returns the time (monotonic) from which the run has to recover, None if there is no way."""
        if fault.kind == "fill":
            assert self.disk is not None
            fill(self.disk, FULL_S)
        elif fault.kind == "damage":
            if not damage(self.directory, fault.target):
                return None
            self.session.below()
            self.session.process.kill()  # what was damaged is read by the next session only
        elif (process := self._process(fault.target)) is None:
            return None
        elif fault.kind == "kill":
            process.kill()
        elif fault.target == "driver":  # suspended and resumed: nobody is to be declared dead for it
            stop_and_go(process, SILENT_S + 4)
        else:
            threading.Thread(target=stop_and_go, args=(process, 4 * SILENT_S), daemon=True).start()
        return time.monotonic()

    def _process(self, target: str) -> psutil.Process | None:
        """It may still be on its way back from the fault before."""
        end = time.monotonic() + BACK_S
        while self.session.exit_code is None and time.monotonic() < end:
            if found := self.session.find(target):
                return found
            time.sleep(0.1)
        return None

    def _recover(self, fault: Fault, before: int, since: float) -> Recovery:
        """Wait for the step after the next, which may have been about to end anyway, over as many sessions as
        that takes.
        """
        code, hung, sessions = None, False, 0
        ends = fault.kind == "damage" or fault.moment == "shutdown"  # a step of this session proves nothing
        limit = since + HUNG_S
        while self.session.steps() <= before + 1 or (ends and not sessions):
            if (end := self.session.exit_code) is not None:
                code, sessions = end, sessions + 1
                if sessions > MOST_SESSIONS:
                    raise ChaosError(f"{fault}: the run does not go on; see {self.out / LOG}")
                # Of a dead raylet, Ray may end the driver before the driver knows (actors/raylet.py).
                accepted = (*GOES_ON, FAILED) if fault.target == "raylet" else GOES_ON
                if end not in accepted and fault.kind != "fill":
                    self.unexpected.append(f"{fault}: exit code {end}")
                self._clear()
                before = self.session.steps() - 1
                self._resume()
                limit = time.monotonic() + START_S
            elif time.monotonic() > limit:
                hung = True
                self._clear()
            self.session.below()
            time.sleep(0.2)
        return Recovery(fault, time.monotonic() - since, sessions > 0, code, hung)

    # The run

    def _resume(self, *overrides: str) -> None:
        if not (self.directory / "config.yaml").exists():
            raise ConfigError(f"the run never began: see {self.out / LOG}")
        words = ["--resume", str(self.directory), *overrides]
        self.session = Session(words, self.directory, self.temporary, self.out / LOG)

    def _stop(self) -> None:
        """End the session as Ctrl-C does."""
        self.session.interrupt()
        self._wait(lambda: self.session.exit_code is not None, "the end after Ctrl-C")
        self._clear()

    def _clear(self) -> None:
        self.late += self.session.clear()

    def _step(self) -> None:
        """Wait for a training step from now on; a session that ended late for an earlier fault is resumed."""
        if self.session.exit_code is not None:
            self._clear()
            self._resume()
        before = self.session.steps()
        self._wait(lambda: self.session.steps() > before or self.session.exit_code is not None, "a step")
        if self.session.exit_code is not None:
            if self.session.exit_code not in GOES_ON:
                self.unexpected.append(f"between two faults: exit code {self.session.exit_code}")
            self._step()

    def _saving(self) -> bool:
        """A checkpoint is being written."""
        return any((self.directory / "checkpoints").glob("*.partial"))

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + START_S
        while not condition():
            if time.monotonic() > end:
                raise ChaosError(f"not within {START_S:g} s: {what}; see {self.out / LOG}")
            time.sleep(0.02)

    @property
    def _batch(self) -> tuple[int, int, int]:
        flow = self.flow.flow
        return flow.batch_leaves // self.flow.rollout.leaves, flow.staleness, flow.window

    def _events(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.directory / "ledger.jsonl"))
