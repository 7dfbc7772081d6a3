"""From packed micro-batches to device tensors: what one forward pass reads."""

from __future__ import annotations

import math

import numpy as np
import torch

from system.learn.attention import BLOCK, TreeMask
from system.learn.context import Context, RowShare
from system.learn.logprob import vocab_parallel_logprob_entropy
from system.learn.model import TreeGPTModel
from system.learn.objective import LossTokens
from system.learn.parallel import Layout
from system.tree.pack import PackedBatch


class Row:
    """One packed row of N tokens on this rank's device, and the M tokens of it to score.

    Under context parallelism the device has this rank's n = N / cp tokens and the m of the M that are scored
    at them; without, n = N and m = M.
    """

    def __init__(
        self, batch: PackedBatch, device: torch.device, *, trained: bool, context: Context | None = None
    ) -> None:
        """``trained``: score the tokens that are trained on, not every one that has a predecessor."""

        def put(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array.astype(np.int64)).to(device)

        self.batch = batch
        # [M] index of each target in the row
        self.scored = np.flatnonzero((batch.predictor >= 0) & ((batch.mult > 0) | (not trained)))
        tokens, position, predictor = batch.tokens, batch.position, batch.predictor[self.scored]
        target = tokens[self.scored]
        self._share = RowShare(context, batch.exit, predictor, device) if context else None
        query = gather = None
        if share := self._share:
            query, gather = put(share.index), share.keys_and_values
            tokens, position = tokens[share.index], position[share.index]
            predictor, target = share.predictor, target[share.scored]
        self.tokens = put(tokens)  # [n] int64
        self.position = put(position)  # [n] int64
        self.mask = TreeMask(put(batch.exit), query, gather)
        self.predictor = put(predictor)  # [m] int64 rows whose logits are needed
        self.target = put(target)  # [m] int64 the tokens they predict
        self.proximal: torch.Tensor | None = None  # [M] :attr:`LossTokens.proximal`

    def run(self, model: TreeGPTModel) -> torch.Tensor:
        """The forward pass of this rank's stage: logits of the targets on the last, hidden states before."""
        return model(self.tokens, self.position, self.mask, self.predictor)

    def logprob_entropy(
        self, logits: torch.Tensor, model: TreeGPTModel, layout: Layout, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[M] log-probability and [M] entropy of the targets under the policy softmax(logits / temperature).

        ``logits`` ``[m, V/tp]``: what :meth:`run` returns on the last pipeline stage.
        """
        vocab, group = model.shape.vocab, layout.tp_group
        own = vocab_parallel_logprob_entropy(logits, self.target, vocab, group, temperature)
        if self._share is None:
            return own
        logprob, entropy = self._share.of_all(torch.stack(own, 1)).T.contiguous()
        return logprob, entropy

    def log_ratio(self, logprob: torch.Tensor) -> torch.Tensor:
        """[M] float64: a policy's log-probabilities of the targets less those they were sampled with."""
        return logprob.double() - torch.from_numpy(self.batch.logprob[self.scored]).to(logprob.device)

    def loss_tokens(
        self, logprob: torch.Tensor, entropy: torch.Tensor, version: int, reference: torch.Tensor | None
    ) -> LossTokens:
        """The objective's view of the row.  ``version``: the weight version that is being trained."""

        def pick(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array[self.scored].astype(np.float32)).to(logprob.device)

        def count(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array[self.scored].astype(np.int64)).to(logprob.device)

        batch = self.batch
        return LossTokens(
            logprob=logprob,
            entropy=entropy,
            behaviour=pick(batch.logprob),
            s_plus=pick(batch.s_plus),
            s_minus=pick(batch.s_minus),
            mult=pick(batch.mult),
            staleness=pick(version - batch.version),
            node=count(batch.node),
            # A part of a tree begins with the token that nothing predicts; padding lies behind all of them.
            path=count(np.cumsum(batch.predictor < 0) - 1),
            proximal=self.proximal,
            reference=reference,
        )


def row_padding(device: torch.device, spread: int = 1) -> int:
    """What row lengths are padded to a multiple of.

    On GPU attention works on whole blocks.  On CPU padding is pure waste.  ``spread``: ranks that a row is
    divided over (sequence parallelism).
    """
    return spread if device.type == "cpu" else math.lcm(BLOCK, spread)
