"""Peaks of a training step at real shapes, measured on fake tensors: what `peaks.json` holds, how it is made.

    python tests/plan/fake_peaks.py          measures all of them and writes the file (a few minutes)
    python tests/plan/fake_peaks.py lora     … those with such a word in their name

A stage's layers all take the same, so that two and four layers per stage say what all of them take; the tests
show that six then take what these two say.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from system.config import LearnConfig, LoraConfig
from system.models.known import KNOWN
from system.models.shape import ModelShape

FILE = Path(__file__).with_name("peaks.json")


@dataclass(frozen=True)
class Case:
    """A layout of the learner."""

    model: str
    tokens: int  # of a row
    recompute: str
    tp: int
    pp: int
    sequence_parallel: bool = True
    cp: int = 1
    lora: int = 0  # rank of adapters on all projections

    @property
    def name(self) -> str:
        spread = "" if self.sequence_parallel else " no-sp"
        shared = f" cp{self.cp}" if self.cp > 1 else ""
        adapted = f" lora{self.lora}" if self.lora else ""
        layout = f"tp{self.tp} pp{self.pp}{shared}{spread}{adapted}"
        return f"{self.model} {self.tokens} {self.recompute} {layout}"

    @property
    def shape(self) -> ModelShape:
        return KNOWN[self.model]

    @property
    def learn(self) -> LearnConfig:
        return LearnConfig(
            tp=self.tp,
            pp=self.pp,
            cp=self.cp,
            recompute=self.recompute,
            sequence_parallel=self.sequence_parallel,
            micro_tokens=self.tokens,
            lora=LoraConfig(rank=self.lora),
        )


LAYOUTS = [
    ("qwen2.5-7b", 11_264, 1, 1, True, 1),
    ("qwen2.5-7b", 11_264, 4, 1, True, 1),
    ("qwen2.5-7b", 11_264, 4, 1, False, 1),
    ("qwen2.5-7b", 11_264, 2, 2, True, 1),
    ("qwen2.5-7b", 65_536, 4, 1, True, 1),
    ("qwen3-14b", 18_432, 4, 1, True, 1),
    ("qwen3-14b", 18_432, 4, 2, True, 1),
    ("qwen3-14b", 65_536, 4, 1, True, 1),
    ("qwen3-14b", 18_432, 8, 1, False, 1),
    ("qwen3-32b", 18_432, 8, 1, True, 1),
    ("qwen3-32b", 18_432, 8, 2, True, 1),
    ("qwen3-32b", 18_432, 4, 4, True, 1),
    ("qwen3-14b", 18_432, 4, 1, True, 2),
    ("qwen3-14b", 65_536, 8, 1, True, 4),
    ("qwen3-14b", 65_536, 4, 2, True, 2),
    ("qwen2.5-7b", 65_536, 2, 1, False, 4),
    ("qwen3-32b", 131_072, 8, 1, True, 2),
]
CASES = [
    Case(model, tokens, recompute, tp, pp, spread, cp)
    for (model, tokens, tp, pp, spread, cp), recompute in itertools.product(
        LAYOUTS, ("none", "selective", "full")
    )
]
CASES += [
    Case("qwen3-32b", 18_432, recompute, 4, pp, lora=rank)
    for recompute, pp, rank in (("none", 1, 16), ("selective", 1, 16), ("full", 1, 16), ("selective", 2, 64))
]


def stage_peaks(case: Case, layers: int) -> list[int]:
    """Bytes of the first and of the last stage, with ``layers`` layers each."""
    from system.bench.memory import StepSettings, measure

    shape = replace(case.shape, layers=layers * case.pp)
    settings = StepSettings(
        "",
        case.recompute,
        sequence_parallel=case.sequence_parallel,
        pp=case.pp,
        cp=case.cp,
        lora=case.lora,
    )
    return [
        measure(shape, case.tp, case.tokens, replace(settings, stage=stage)).device
        for stage in sorted({0, case.pp - 1})
    ]


def peak(case: Case) -> int:
    """Bytes of the fullest rank."""
    layers = case.shape.layers // case.pp
    two, four = stage_peaks(case, 2), stage_peaks(case, 4)
    return max(a + (layers - 2) * (b - a) // 2 for a, b in zip(two, four, strict=True))


if __name__ == "__main__":
    found: dict[str, int] = {}
    chosen = sys.argv[1:]  # words of names: these cases anew, all others as they are
    if chosen:
        found = json.loads(FILE.read_text())
    for one in CASES:
        if not all(word in one.name for word in chosen):
            continue
        found[one.name] = peak(one)
        print(one.name, found[one.name] / 2**30, flush=True)
    FILE.write_text(json.dumps(found, indent=1) + "\n")
