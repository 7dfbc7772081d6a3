"""The running sequences as parallel arrays: row r of every array belongs to the sequence in KV slot r."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from system.engine.embedded.job import Job
from system.engine.embedded.sampler import Sampled, SamplingBatch, scrambled, uniforms
from system.engine.embedded.slots import Indices
from system.engine.embedded.stops import StopStrings

_GROWTH = 8  # the largest chunk, in units of the configured one


@dataclass(slots=True)
class _Groups:
    """What depends only on which rows are running, rebuilt when that changes."""

    sampling: SamplingBatch
    stops: list[tuple[StopStrings, np.ndarray]]  # rows by stop set
    stop_ids: list[int]  # rows that have stop token ids


class Rows:
    """Row state a decoding step touches, vectorised: no Python runs per row and token."""

    def __init__(self, rows: int, chunk: int, vocab: int, device: torch.device):
        self.jobs: list[Job] = []
        self.length = np.zeros(rows, np.int64)  # tokens so far, the newest (not yet in the KV cache) included
        self.sent = np.zeros(rows, np.int64)  # of these, how many the caller has (prompt included)
        self._limit = np.zeros(rows, np.int64)
        self._seed = np.zeros(rows, np.uint64)
        self._temperature = np.zeros(rows, np.float32)
        self._top_p = np.zeros(rows, np.float32)
        self._top_k = np.zeros(rows, np.int64)
        self._ends_at_eos = np.zeros(rows, bool)
        # Of the unsent tokens: log-probability, the same renormalised, entropy.
        self.pending = np.zeros((rows, _GROWTH * chunk, 3))
        self._due = np.zeros(rows, np.int64)  # unsent tokens that make an event
        self._chunk, self._vocab, self._device = chunk, vocab, device
        self._groups: _Groups | None = None
        self._arrays = (
            self.length, self.sent, self._limit, self._seed, self._temperature, self._top_p, self._top_k,
            self._ends_at_eos, self._due, self.pending,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.jobs)

    def append(self, job: Job) -> int:
        row = len(self.jobs)
        self.jobs.append(job)
        self.length[row] = self.sent[row] = job.tokens.size
        self._limit[row] = job.prompt.size + job.max_new_tokens
        self._seed[row] = scrambled(job.seed)
        self._temperature[row], self._top_p[row], self._top_k[row] = job.temperature, job.top_p, job.top_k
        self._ends_at_eos[row] = not job.ignore_eos
        self._set_due(row)
        self._groups = None
        return row

    def remove(self, row: int) -> int:
        """Drop a row and move the last one into its place; returns where that one was (``row``: none
        moved).
        """
        last = len(self.jobs) - 1
        self.jobs[row] = self.jobs[last]
        self.jobs.pop()
        for array in self._arrays:
            array[row] = array[last]
        self._groups = None
        return last

    def clear(self) -> None:
        """Drop every row."""
        self.jobs.clear()
        self._groups = None

    def move(self, sources: Indices, targets: Indices) -> None:
        """What was row ``sources[i]`` becomes ``targets[i]``."""
        jobs = [self.jobs[source] for source in sources]
        for target, job in zip(targets, jobs, strict=True):
            self.jobs[target] = job
        for array in self._arrays:
            array[targets] = array[sources]
        self._groups = None

    def mark_sent(self, row: int) -> None:
        """The caller has every token of this row."""
        self.sent[row] = self.length[row]
        self._set_due(row)

    def _set_due(self, row: int) -> None:
        """How many tokens the next event gathers.

        The first ones come in small chunks, for a probe of a branch's first tokens waits for them; later ones
        may grow to half of what has been sent, which spares most of the HTTP traffic of a long answer.
        """
        job = self.jobs[row]
        if job.chunk:
            self._due[row] = min(job.chunk, self._chunk)
        else:
            generated = int(self.sent[row]) - job.prompt.size
            self._due[row] = min(max(generated, self._chunk), _GROWTH * self._chunk)

    @property
    def sampling(self) -> SamplingBatch:
        return self._grouped().sampling

    def uniforms(self) -> np.ndarray:
        """[N] the number that decides each row's next token."""
        n = len(self.jobs)
        return uniforms(self._seed[:n], self.length[:n])

    def record(self, sampled: Sampled) -> None:
        """Count one new token per row and keep its numbers until they are sent."""
        n = len(self.jobs)
        place = self.length[:n] - self.sent[:n]
        self.pending[np.arange(n), place] = sampled.numbers
        self.length[:n] += 1

    def stop_candidates(self, tokens: np.ndarray, eos: np.ndarray) -> np.ndarray:
        """Rows whose newest token may end them (a superset but for EOS and length, which are exact)."""
        n = len(self.jobs)
        groups = self._grouped()
        maybe = (eos[tokens] & self._ends_at_eos[:n]) | (self.length[:n] >= self._limit[:n])
        for stops, rows in groups.stops:
            maybe[rows] |= stops.completes[tokens[rows]]
        for row in groups.stop_ids:
            maybe[row] |= int(tokens[row]) in self.jobs[row].stop_ids
        return np.flatnonzero(maybe)

    def chunk_due(self) -> np.ndarray:
        """Rows with a full chunk to send."""
        n = len(self.jobs)
        return np.flatnonzero(self.length[:n] - self.sent[:n] >= self._due[:n])

    def _grouped(self) -> _Groups:
        if self._groups is None:
            n = len(self.jobs)
            sets: dict[int, tuple[StopStrings, list[int]]] = {}
            for row, job in enumerate(self.jobs):
                if job.stops is not None:
                    sets.setdefault(id(job.stops), (job.stops, []))[1].append(row)
            self._groups = _Groups(
                sampling=SamplingBatch.build(
                    self._temperature[:n], self._top_p[:n], self._top_k[:n], self._vocab, self._device
                ),
                stops=[(stops, np.array(rows)) for stops, rows in sets.values()],
                stop_ids=[row for row, job in enumerate(self.jobs) if job.stop_ids],
            )
        return self._groups
