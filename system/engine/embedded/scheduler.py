"""Continuous batching: which sequences run, one model step for all of them, and what came of it.

Every step is one forward pass over the running rows (one token each) together with the prompts admitted since
the last one (only the part that no KV slot holds).  Owned by a single thread; nothing here blocks or does
I/O.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from system.config import EngineConfig
from system.engine.embedded.adapters import AdapterStack, AdapterWeights
from system.engine.embedded.batching import Batcher, RowSlice, similar_widths
from system.engine.embedded.grouping import Regrouping
from system.engine.embedded.job import Event, Job
from system.engine.embedded.model import Batch, Decoder, KVStore
from system.engine.embedded.rows import Rows
from system.engine.embedded.sampler import sample
from system.engine.embedded.slots import SlotTable, prefix_lengths
from system.engine.embedded.weights import Weights
from system.engine.protocol import Finish
from system.models.shape import ModelShape
from system.text import named

Emitted = tuple[Job, Event]

# Prompt tokens computed in one step at most: what still fits a processor's cache, or fills a GPU, without
# keeping the running sequences waiting for long.
_PREFILL = {"cpu": 1024, "cuda": 8192}

# A prompt waits one step for a neighbour that is about to compute its prefix, if that saves at least so many
# tokens.
_WORTH_WAITING = 16

# After so many steps in a row that failed it is not the sequences: a GPU that is broken fails at every step.
FAILED_STEPS = 32

# Versions of adapters at once; where there are more, sequences of the oldest are recomputed with the newest.
MOST_ADAPTERS = 8

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    requests: int = 0
    generated_tokens: int = 0
    prefill_tokens: int = 0  # prompt tokens computed (recomputation after an update included)
    cached_tokens: int = 0  # prompt tokens served from the KV cache
    recomputed_sequences: int = 0
    steps: int = 0
    row_steps: int = 0  # sum over steps of the rows in the batch
    updates: int = 0
    idle_updating_s: float = 0.0
    busy_s: float = 0.0
    # Sums over steps of products of rows r, prefilled tokens p and seconds t.  With the plain sums they are
    # all that least squares of t on (1, r, p) needs: what a step, a row and a prefilled token cost.
    moment_rr: float = 0.0
    moment_rp: float = 0.0
    moment_pp: float = 0.0
    moment_rt: float = 0.0
    moment_pt: float = 0.0

    def timed(self, rows: int, prefill: int, seconds: float) -> None:
        """One step has taken ``seconds``."""
        self.busy_s += seconds
        self.moment_rr += rows * rows
        self.moment_rp += rows * prefill
        self.moment_pp += prefill * prefill
        self.moment_rt += rows * seconds
        self.moment_pt += prefill * seconds


@dataclass(slots=True)
class _Admitted:
    job: Job
    slot: int
    cached: int

    @property
    def suffix(self) -> int:
        return self.job.tokens.size - self.cached


class Scheduler:
    """The engine's state machine; sequences of at most ``context`` tokens."""

    def __init__(
        self,
        config: EngineConfig,
        shape: ModelShape,
        context: int,
        weights: Weights,
        eos: Iterable[int],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.weights = weights
        self.adapters = AdapterStack()
        self.version = 0
        self.counters = Counters()
        self._decoder = Decoder(shape, context, dtype, device)
        self._slots = SlotTable(config.max_running, config.cache_slots, context)
        self._batcher = Batcher(context, shape.kv_heads, dtype, device)
        self._kv = KVStore(shape, self._slots.total, context, dtype, device)
        self._rows = Rows(config.max_running, config.chunk_tokens, shape.vocab, device)
        self._regrouping = Regrouping()
        self._waiting: deque[Job] = deque()
        self._failures = 0  # steps in a row
        self._draft = np.full((config.max_running, context), -1, np.int32)
        self._max_running, self._max_prefill = config.max_running, _PREFILL[device.type]
        self._eos = np.zeros(shape.vocab, bool)
        self._eos[[token for token in eos if token < shape.vocab]] = True

    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        return bool(self._rows.jobs or self._waiting)

    def jobs(self) -> list[Job]:
        """Everything that runs or waits."""
        return [*self._rows.jobs, *self._waiting]

    def submit(self, job: Job) -> bool:
        """Queue a job; False when its request id is in use."""
        if any(job.rid == other.rid for other in self.jobs()):
            return False
        self._waiting.append(job)
        self.counters.requests += 1
        return True

    def abort(self, which: Callable[[Job], bool], message: str = "aborted") -> list[Emitted]:
        """End the jobs that ``which`` picks, with the tokens they have."""
        finish = Finish("abort", message=message)
        emitted: list[Emitted] = []
        for job in [job for job in self._waiting if which(job)]:
            self._waiting.remove(job)
            emitted.append((job, Event([], [], [], [], self.version, finish, max(job.cached_tokens, 0))))
        return emitted + self._finish({row: finish for row, job in enumerate(self._rows.jobs) if which(job)})

    def retract(self, which: Callable[[Job], bool] = lambda job: True) -> list[Emitted]:
        """Put the running sequences that ``which`` picks back to the head of the queue, to be recomputed."""
        rows = [row for row, job in enumerate(self._rows.jobs) if which(job)]
        emitted = self._flush(rows)
        jobs = [self._rows.jobs[row] for row in rows]
        for row, job in zip(rows, jobs, strict=True):
            job.tokens = self._slots.tokens[row, : self._rows.length[row]].copy()
        self._waiting.extendleft(reversed(jobs))
        self.counters.recomputed_sequences += len(jobs)
        for row in reversed(rows):
            self._remove(row)
        return emitted

    def swap(
        self, weights: Weights | AdapterWeights, version: int, kv: Literal["recompute", "keep"]
    ) -> list[Emitted]:
        """New weights from the next token on; new adapters for sequences that begin from now on."""
        began = time.perf_counter()
        emitted: list[Emitted] = []
        if isinstance(weights, AdapterWeights):
            self.adapters.add(version, weights)
            self._forget_adapters()
            if len(old := self.adapters.versions) > MOST_ADAPTERS:
                emitted = self.retract(lambda job: job.version == old[0])
        else:
            emitted = self.retract() if kv == "recompute" else self._flush(range(len(self._rows)))
            for job in self._rows.jobs:
                job.version = version
            self.weights = weights
            self.adapters.clear()
        self._slots.invalidate()
        self.version = version
        self.counters.updates += 1
        self.counters.idle_updating_s += time.perf_counter() - began
        return emitted

    def _forget_adapters(self) -> None:
        """Those that no running sequence uses."""
        self.adapters.keep({job.version for job in self._rows.jobs})

    def drop_cache(self) -> bool:
        """Forget finished sequences; False while anything runs or waits."""
        if self.busy:
            return False
        self._slots.drop_cached()
        return True

    def step(self) -> list[Emitted]:
        """One token for every running sequence, and the first one of every sequence admitted now.

        A step that fails ends those sequences with an error; what waits goes on waiting.  Raises what it
        failed with when ``FAILED_STEPS`` in a row have.
        """
        waiting = [*self._waiting]
        try:
            emitted = self._step()
        except Exception as error:
            self._failures += 1
            if self._failures >= FAILED_STEPS:
                raise
            log.exception("a decoding step failed")
            return self._fail(waiting, f"a decoding step failed: {named(error)}")
        self._failures = 0
        return emitted

    def _fail(self, waiting: list[Job], why: str) -> list[Emitted]:
        """End what runs, and what was ``waiting`` and is no more; forget all KV: nobody knows what of it the
        step had written.
        """
        still = {*self._waiting}
        jobs = [*dict.fromkeys([*self._rows.jobs, *(job for job in waiting if job not in still)])]
        self._rows.clear()
        self._slots.clear()
        return [(job, Event([], [], [], [], self.version, error=why)) for job in jobs]

    def _step(self) -> list[Emitted]:
        decoding = len(self._rows)
        if len(self.adapters.versions) > 1:
            self._forget_adapters()
        self._regroup(decoding)
        admitted = self._admit()
        batch = self._batch(decoding, admitted)
        hidden = self._decoder.forward(self.weights, self._kv, batch, self.adapters.layers)
        at = decoding
        for one in admitted:
            self._score(one.job, hidden[at : at + one.suffix], one.cached)
            at += one.suffix
        logits = self._decoder.logits(self.weights, batch.of_last(hidden))
        rows = self._rows
        sampled = sample(logits, rows.sampling, rows.uniforms())
        count = len(rows)
        span = np.arange(count)
        self._slots.length[:count] = rows.length[:count]
        self._slots.tokens[span, rows.length[:count]] = sampled.tokens
        rows.record(sampled)
        self.counters.steps += 1
        self.counters.row_steps += count
        self.counters.generated_tokens += count
        finished: dict[int, Finish] = {}
        for row in rows.stop_candidates(sampled.tokens, self._eos).tolist():
            if finish := self._finish_reason(row, int(sampled.tokens[row])):
                finished[row] = finish
        emitted = self._flush(row for row in rows.chunk_due().tolist() if row not in finished)
        return emitted + self._finish(finished)

    # Admission -----------------------------------------------------------------------------------

    def _admit(self) -> list[_Admitted]:
        """Give waiting jobs rows, the longest to compute first, each with the longest prefix a slot holds."""
        chosen: list[_Admitted] = []
        postponed: list[Job] = []
        budget = self._max_prefill
        while self._waiting and len(self._rows) + len(chosen) < self._max_running and budget > 0:
            job = self._waiting.popleft()
            slot, cached = self._slots.longest_prefix(job.reusable)
            if self._neighbour_will_compute(job, cached, chosen):
                postponed.append(job)
                continue
            if slot >= 0:
                self._slots.touch(slot)
            self._draft[len(chosen)] = -1
            self._draft[len(chosen), : job.tokens.size] = job.tokens
            chosen.append(_Admitted(job, slot, cached))
            budget -= chosen[-1].suffix
        self._waiting.extendleft(reversed(postponed))
        chosen.sort(key=lambda admitted: admitted.suffix, reverse=True)
        for admitted in chosen:
            self._start(admitted)
        return chosen

    def _neighbour_will_compute(self, job: Job, cached: int, chosen: list[_Admitted]) -> bool:
        if not chosen:
            return False
        reusable = job.reusable
        shared = int(prefix_lengths(self._draft[: len(chosen), : reusable.size], reusable).max())
        return shared > cached and (shared >= cached + _WORTH_WAITING or shared == reusable.size)

    def _start(self, admitted: _Admitted) -> None:
        job, cached = admitted.job, admitted.cached
        row = self._rows.append(job)
        job.scores.clear()
        job.version = self.version
        self._kv.copy(admitted.slot, row, 0, cached)
        self._slots.tokens[row, : job.tokens.size] = job.tokens
        self._slots.length[row] = cached
        self._slots.epoch[row] = self._slots.current
        if job.cached_tokens < 0:
            job.cached_tokens = cached
        self.counters.cached_tokens += cached
        self.counters.prefill_tokens += admitted.suffix
        # A very long prompt: all but its last part in passes of its own.
        while admitted.suffix > self._max_prefill:
            stop = admitted.cached + self._max_prefill
            piece = RowSlice(row, np.array([admitted.cached]), np.array([stop]))
            nobody = np.zeros(0, np.int64)
            batch = self._batcher.pack(self._slots.tokens, nobody, [], [piece], self._adapted)
            hidden = self._decoder.forward(self.weights, self._kv, batch, self.adapters.layers)
            self._score(job, hidden, admitted.cached)
            admitted.cached = stop

    def _score(self, job: Job, hidden: torch.Tensor, first: int) -> None:
        """Of the prompt's tokens that are wanted, those that ``hidden`` predict: states of the positions from
        ``first`` on.
        """
        if job.score_from is None:
            return
        begin, end = max(job.score_from - 1, first), min(job.prompt.size - 1, first + len(hidden))
        if begin < end:
            target = torch.from_numpy(job.prompt[begin + 1 : end + 1].astype(np.int64)).to(hidden.device)
            states = hidden[begin - first : end - first]
            job.scores += self._decoder.scores(self.weights, states, target, job.temperature)

    def _batch(self, decoding: int, admitted: list[_Admitted]) -> Batch:
        """Running rows first, then the admitted ones (descending by what is to be computed)."""
        pieces, length = [], self._rows.length
        for first, last in similar_widths([one.suffix for one in admitted]):
            start = np.array([one.cached for one in admitted[first:last]])
            pieces.append(RowSlice(decoding + first, start, length[decoding + first : decoding + last]))
        runs = self._regrouping.runs(length[:decoding])
        return self._batcher.pack(self._slots.tokens, length[:decoding], runs, pieces, self._adapted)

    @property
    def _adapted(self) -> torch.Tensor | None:
        """[rows, K] which adapters each row runs with."""
        return self.adapters.mask([job.version for job in self._rows.jobs]) if self.adapters else None

    def _regroup(self, decoding: int) -> None:
        """Move running rows, keys and all, when that spares more padding than it costs."""
        length = self._rows.length[:decoding]
        moves = self._regrouping.due(length)
        if moves is not None:
            sources, targets = moves
            self._kv.move(sources, targets, int(length[sources].max()))
            self._slots.move(sources, targets)
            self._rows.move(sources, targets)

    # Endings -------------------------------------------------------------------------------------

    def _finish_reason(self, row: int, token: int) -> Finish | None:
        """A token that stops a sequence and also exhausts its budget counts as a stop."""
        job = self._rows.jobs[row]
        if token in job.stop_ids or (self._eos[token] and not job.ignore_eos):
            return Finish("stop", matched=token)
        length = int(self._rows.length[row])
        if job.stops is not None and job.stops.completes[token]:
            generated = self._slots.tokens[row, job.prompt.size : length]
            if text := job.stops.match(generated):
                return Finish("stop", matched=text)
        return Finish("length") if length >= job.prompt.size + job.max_new_tokens else None

    def _flush(self, rows: Iterable[int], finishes: Mapping[int, Finish] | None = None) -> list[Emitted]:
        """Events with the unsent tokens of ``rows``."""
        table, emitted = self._slots.tokens, []
        for row in rows:
            finish = finishes.get(row) if finishes else None
            sent, length = int(self._rows.sent[row]), int(self._rows.length[row])
            if sent == length and finish is None:
                continue
            logprob, kept, entropy = self._rows.pending[row, : length - sent].T.tolist()
            job = self._rows.jobs[row]
            tokens = table[row, sent:length].tolist()
            event = Event(tokens, logprob, kept, entropy, job.version, finish, job.cached_tokens)
            if job.routes_from is not None and finish and finish.type != "abort":
                event.routes = self._kv.routes_of(row, job.routes_from, length - 1)
            emitted.append((job, event))
            self._rows.mark_sent(row)
        return emitted

    def _finish(self, finished: Mapping[int, Finish]) -> list[Emitted]:
        """Send the last events of rows, keep their KV for later prompts, and close the gaps."""
        emitted = self._flush(finished, finished)
        for row in sorted(finished, reverse=True):
            self._keep(row)
            self._remove(row)
        return emitted

    def _remove(self, row: int) -> None:
        """A row is no more; the last one closes the gap."""
        moved = self._rows.remove(row)
        if moved != row:
            self._copy(moved, row, 0)
        self._slots.release(moved)

    def _keep(self, row: int) -> None:
        slot, there = self._slots.place(row)
        if slot < 0:
            return
        if there < self._slots.length[row]:
            self._copy(row, slot, there)
        self._slots.touch(slot)

    def _copy(self, source: int, target: int, there: int) -> None:
        """Bring what slot ``source`` holds to ``target``, which has the first ``there`` tokens of it."""
        size = int(self._slots.length[source])
        self._kv.copy(source, target, there, size)
        self._slots.move(source, target)
