"""What became of a run under faults, and the words for it."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass

from system.chaos.account import Account
from system.chaos.faults import Fault

HUNG_S = 90.0  # a fault must have been noticed by then: by a step, or by the end of the session


@dataclass(frozen=True, slots=True)
class Recovery:
    """What became of the run after a fault."""

    fault: Fault
    seconds: float  # from the fault (of a frozen driver or a full disk: from its end) to the next step
    resumed: bool  # the session ended, and another one made that step
    exit_code: int | None  # of the session that ended
    hung: bool  # neither a step nor the session's end came within HUNG_S


@dataclass(frozen=True, slots=True)
class Findings:
    """A whole run of ``espalier chaos``."""

    seed: int
    recoveries: list[Recovery]
    left_out: list[str]  # faults that could not be made here
    unexpected: list[str]  # sessions that ended with a code that forbids going on
    orphans: list[str]  # processes that outlived their session
    leftovers: list[str]  # temporary directories that nobody swept
    account: Account

    @property
    def sound(self) -> bool:
        """Nothing lost, trained twice, hung or left behind."""
        bad = self.account.lost or self.account.twice or self.orphans or self.leftovers or self.unexpected
        return not bad and not any(one.hung for one in self.recoveries)


def in_words(recovery: Recovery | None) -> str:
    if recovery is None:
        return "left out"
    how = "resumed" if recovery.resumed else "went on"
    parts = [f"{how} after {recovery.seconds:.1f} s"]
    if recovery.exit_code is not None:
        parts.append(f"exit code {recovery.exit_code}")
    parts += ["HUNG"] * recovery.hung
    return ", ".join(parts)


def text(findings: Findings) -> str:
    """A line per kind of fault, then the sum of it."""
    by_kind: dict[str, list[Recovery]] = defaultdict(list)
    for one in findings.recoveries:
        by_kind[f"{one.fault.kind} {one.fault.target}"].append(one)
    width = max((len(name) for name in by_kind), default=5)
    lines = ["", f"{'fault':{width}}  times  resumed  median s    max s"]
    for name, ones in sorted(by_kind.items()):
        seconds = [one.seconds for one in ones]
        resumed, middle = sum(one.resumed for one in ones), statistics.median(seconds)
        lines.append(f"{name:{width}}  {len(ones):5}  {resumed:7}  {middle:8.1f} {max(seconds):8.1f}")
    made, hung = findings.account, sum(one.hung for one in findings.recoveries)
    lines += [
        "",
        f"{len(findings.recoveries)} faults, {made.versions} steps, {made.trained} prompts trained: "
        f"{made.lost} lost, {made.twice} trained twice, {hung} hung beyond {HUNG_S:g} s, "
        f"{len(findings.orphans)} orphans, {len(findings.leftovers)} directories left behind",
        *findings.unexpected,
        *(f"orphan: {name}" for name in findings.orphans),
        *findings.left_out,
    ]
    return "\n".join(lines)
