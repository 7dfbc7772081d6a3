"""AdamW whose state lies in the host's memory: 12 bytes per parameter less on the GPU.

Megatron's DDP keeps parameters and float32 gradients in flat buffers, of which every rank with the same
weights owns an equal share (its reduction is a reduce-scatter then).  Here each share has its float32
parameters and moments in the host's memory, as flat.  A step takes the share in chunks: the gradients of the
next chunk come and the parameters of the one before go, through pinned memory and beside the computation,
while the CPU updates a chunk.  Then the ranks gather each other's shares.  (megatron-core's own,
``HybridDeviceOptimizer``, needs TransformerEngine or fails; it cannot run on a CPU at all.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch.optim.adamw import adamw

from system.config import LearnConfig
from system.learn.optimizer import MOMENTS, Adam, StateSlice
from system.learn.parallel import Layout
from system.learn.sizes import STAGED


class Span(NamedTuple):
    """Elements of one parameter in a share."""

    parameter: torch.nn.Parameter
    begin: int  # first in the share
    end: int
    start: int  # first in the flattened parameter

    @property
    def decays(self) -> bool:
        return self.parameter.dim() > 1


@dataclass(frozen=True)
class Share:
    """This rank's share of one flat buffer: device tensors (views), and the state that belongs to it."""

    gradient: torch.Tensor  # [n] float32, on the device
    parameter: torch.Tensor  # [n] in the model's dtype, on the device
    spans: list[Span]  # in order; what lies between is padding
    main: torch.Tensor  # [n] float32 parameters, on the host
    moments: tuple[torch.Tensor, torch.Tensor]  # [n] float32, on the host

    @staticmethod
    def of(gradient: torch.Tensor, parameter: torch.Tensor, spans: list[Span]) -> Share:
        main = torch.empty(len(parameter), dtype=torch.float32)
        main.copy_(parameter)
        return Share(gradient, parameter, spans, main, (torch.zeros_like(main), torch.zeros_like(main)))

    def runs(self, begin: int, end: int) -> Iterator[tuple[slice, bool]]:
        """[begin, end) cut where decayed and other elements meet, and whether each part decays."""
        edges = [begin, end]
        for before, after in pairwise(self.spans):
            if before.decays != after.decays and begin < after.begin < end:
                edges.insert(-1, after.begin)
        for a, b in pairwise(edges):
            yield slice(a, b), next((span.decays for span in self.spans if span.end > a), False)


class HostAdam(Adam):
    """AdamW on the CPU.  ``learn.threads`` is what it computes with."""

    def __init__(self, ddp: DistributedDataParallel, layout: Layout, learn: LearnConfig) -> None:
        """``ddp``: with ``use_distributed_optimizer``, so that each rank reduces a share."""
        super().__init__(learn)
        self._ddp, self._layout = ddp, layout
        both: Any = (ddp.buffers, ddp.expert_parallel_buffers)  # the first in place of a torch module's own
        self._shares = [
            share
            for experts, buffers in enumerate(both)
            for buffer in buffers
            for share in _shares(buffer, *layout.held(experts=bool(experts)))
        ]
        self._spans = {
            id(span.parameter): (share, span) for share in self._shares for span in share.spans
        }  # a parameter has one span at most
        most = min(STAGED, max(len(share.main) for share in self._shares))
        self._link = Link(layout.device, most, self._shares[0].parameter.dtype)

    def zero_grad(self) -> None:
        self._ddp.zero_grad_buffer()

    @torch.no_grad()
    def _clip(self, limit: float) -> float:
        square = torch.zeros((), dtype=torch.float64, device=self._layout.device)
        for share in self._shares:
            for span in share.spans:
                # What several ranks hold counts once.
                if param_is_not_shared(span.parameter) and param_is_not_tensor_parallel_duplicate(
                    span.parameter
                ):
                    square += share.gradient[span.begin : span.end].norm().double() ** 2
        layout = self._layout
        for group in (layout.cp_group, layout.dp_group, layout.tp_group, layout.pp_group):
            dist.all_reduce(square, group=group)
        norm = math.sqrt(value) if math.isfinite(value := float(square)) else math.nan
        if norm > limit:
            for share in self._shares:
                share.gradient.mul_(limit / (norm + 1e-6))  # as Megatron does
        return norm

    @torch.no_grad()
    def _apply(self, lr: float) -> None:
        chunks = [
            (share, begin, min(begin + STAGED, len(share.main)))
            for share in self._shares
            for begin in range(0, len(share.main), STAGED)
        ]
        fetched = [self._link.fetch(0, share.gradient[begin:end]) for share, begin, end in chunks[:1]]
        for number, (share, begin, end) in enumerate(chunks):
            gradient = fetched.pop()()
            if number + 1 < len(chunks):
                following, a, b = chunks[number + 1]
                fetched.append(self._link.fetch(number + 1, following.gradient[a:b]))
            self._update(share, begin, end, gradient, lr)
            self._link.send(number, share.main[begin:end], share.parameter[begin:end])
        self._link.finish()
        if self._layout.copies > 1:
            self._ddp.start_param_sync()

    def _update(self, share: Share, begin: int, end: int, gradient: torch.Tensor, lr: float) -> None:
        learn = self.learn
        for run, decays in share.runs(begin, end):
            adamw(
                [share.main[run]],
                [gradient[run.start - begin : run.stop - begin]],
                *([moment[run]] for moment in share.moments),
                max_exp_avg_sqs=[],
                state_steps=[torch.tensor(float(self.steps))],
                fused=True,
                amsgrad=False,
                beta1=learn.beta1,
                beta2=learn.beta2,
                lr=lr,
                weight_decay=learn.weight_decay if decays else 0.0,
                eps=learn.eps,
                maximize=False,
            )

    def reset(self) -> None:
        self.steps = 0
        for share in self._shares:
            for moment in share.moments:
                moment.zero_()

    def slices(self, parameter: torch.nn.Parameter, mine: bool) -> Iterator[StateSlice]:
        if found := self._spans.get(id(parameter)):
            share, span = found
            for kind, values in zip(("parameter", *MOMENTS), (share.main, *share.moments), strict=True):
                yield StateSlice(kind, values[span.begin : span.end], span.start)


class Link:
    """Copies between the device and pinned memory of the host, on a stream of their own where there is one.

    Two chunks at a time: the memory of one is free again once the CPU (gradients) or the device (parameters)
    is done with it.
    """

    def __init__(self, device: torch.device, most: int, dtype: torch.dtype) -> None:
        """``most``: parameters in a chunk; ``dtype``: of the model."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        pinned = self._stream is not None
        self._gradients, self._parameters = (
            [torch.empty(most, dtype=kind, pin_memory=pinned) for _ in range(2)]
            for kind in (torch.float32, dtype)
        )
        self._sent: list[Callable[[], object]] = [lambda: None, lambda: None]

    def fetch(self, number: int, gradient: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to bring chunk ``number``; the answer waits for it."""
        staged = self._gradients[number % 2][: len(gradient)]
        wait = self._copy(staged, gradient)

        def ready() -> torch.Tensor:
            wait()
            return staged

        return ready

    def send(self, number: int, values: torch.Tensor, parameter: torch.Tensor) -> None:
        """Begin to bring a chunk's ``values`` into ``parameter`` on the device."""
        self._sent[number % 2]()
        staged = self._parameters[number % 2][: len(values)]
        staged.copy_(values)
        self._sent[number % 2] = self._copy(parameter, staged)

    def finish(self) -> None:
        """All that was sent has arrived."""
        for wait in self._sent:
            wait()

    def _copy(self, to: torch.Tensor, source: torch.Tensor) -> Callable[[], object]:
        if self._stream is None:
            to.copy_(source)
            return lambda: None
        # What the device has been told to do to the source comes first.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            return self._stream.record_event().synchronize


def _shares(buffer: Any, copies: int, copy: int) -> Iterator[Share]:
    """This rank's shares of one of DDP's buffers, a share per bucket: it is number ``copy`` of the ``copies``
    ranks that hold the same.
    """
    places = [(begin, end, parameter) for parameter, (begin, end, _) in buffer.param_index_map.items()]
    places.sort(key=lambda place: place[0])
    for bucket in buffer.buckets:
        size = len(bucket.grad_data) // copies
        mine = slice(copy * size, (copy + 1) * size)
        first = bucket.offset + mine.start
        spans = [
            Span(parameter, max(begin - first, 0), min(end - first, size), max(first - begin, 0))
            for begin, end, parameter in places
            if begin < first + size and end > first
        ]
        yield Share.of(bucket.grad_data[mine], bucket.param_data[mine], spans)
