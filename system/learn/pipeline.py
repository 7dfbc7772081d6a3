"""Micro-batches through the pipeline stages of one model copy.

The schedule is 1F1B (PipeDream-Flush, arXiv 2006.09503 §2.2; Megatron-LM, arXiv 2104.04473 §2.2.1): a stage
runs ahead by as many forward passes as there are stages behind it, then alternates, so that it never holds
the activations of more micro-batches than the pipeline has stages.  Megatron's own schedules want
micro-batches of equal length, or exchange the lengths; here every stage has packed the same trees and knows
them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from system.learn.model import TreeGPTModel
from system.learn.parallel import Layout

# The forward pass of micro-batch i on this stage: hidden states for the next one, or on the last stage
# whatever is wanted (for training the loss, a scalar).
Compute = Callable[[int], torch.Tensor]


class Pipeline:
    """This rank's stage of one model.  Without pipeline parallelism nothing is sent, and the order is plain
    gradient accumulation.
    """

    def __init__(self, model: TreeGPTModel, layout: Layout) -> None:
        self._model, self._layout = model, layout
        self._link = P2PCommunicator(layout.pp_group, model.config)
        self._spread = layout.tp if model.config.sequence_parallel else 1

    def train(self, lengths: Sequence[int], compute: Compute) -> None:
        """Forward and backward passes of micro-batches with rows of ``lengths`` tokens; gradients add up.

        Collective over the ranks of one model copy.
        """
        link, first, last = self._link, self._layout.pp_rank == 0, self._layout.last_stage
        shapes, n = self._shapes(lengths), len(lengths)
        ahead = min(self._layout.pp - self._layout.pp_rank - 1, n)
        held: deque[tuple[torch.Tensor | None, torch.Tensor]] = deque()

        def forward(i: int, received: torch.Tensor | None) -> torch.Tensor:
            output = self._forward(i, received, compute)
            held.append((received, output))
            return output

        def backward(gradient: torch.Tensor | None) -> torch.Tensor | None:
            received, output = held.popleft()
            torch.autograd.backward(output, gradient)
            return None if received is None else received.grad

        for i in range(ahead):
            link.send_forward(forward(i, _one(link.recv_forward(shapes[i], first))), last)
        received = _one(link.recv_forward(shapes[ahead], first)) if ahead < n else None
        for i in range(ahead, n):
            output = forward(i, received)
            gradient = backward(_one(link.send_forward_recv_backward(output, shapes[i - ahead], last)))
            if i + 1 < n:
                received = _one(link.send_backward_recv_forward(gradient, shapes[i + 1], first))
            else:
                link.send_backward(gradient, first)
        for i in range(n - ahead, n):
            link.send_backward(backward(_one(link.recv_backward(shapes[i], last))), first)

    @torch.no_grad()
    def score(self, lengths: Sequence[int], compute: Compute) -> list[torch.Tensor]:
        """Forward passes alone; what ``compute`` gives on the last stage, nothing on the others.

        Collective over the ranks of one model copy.
        """
        first, last = self._layout.pp_rank == 0, self._layout.last_stage
        results = []
        for i, shape in enumerate(self._shapes(lengths)):
            output = self._forward(i, _one(self._link.recv_forward(shape, first)), compute)
            self._link.send_forward(output, last)
            if last:
                results.append(output)
        return results

    def _forward(self, i: int, received: torch.Tensor | None, compute: Compute) -> torch.Tensor:
        self._model.set_input_tensor(received)  # pyright: ignore[reportArgumentType]: None on the first stage
        return compute(i)

    def _shapes(self, lengths: Sequence[int]) -> list[tuple[int, int, int]]:
        """Shapes of the hidden states that travel between stages."""
        return [(n // self._spread, 1, self._model.config.hidden_size) for n in lengths]


def _one(received: torch.Tensor | list[torch.Tensor] | None) -> torch.Tensor | None:
    """What the link gives for one shape: a tensor, or None at the pipeline's ends."""
    assert not isinstance(received, list)
    return received
