"""From packed micro-batches to device tensors: what one forward pass reads."""

from __future__ import annotations

import math

import numpy as np
import torch
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from system.learn.attention import TreeMask
from system.learn.context import Context, RowShare
from system.learn.head import logprob_entropy
from system.learn.model import TreeGPTModel
from system.learn.objective import LossTokens
from system.learn.parallel import Layout
from system.learn.replay import RoutesOfRow
from system.learn.sizes import BLOCK
from system.tree.pack import PackedBatch


class Row:
    """One packed row of N tokens on this rank's device, and the M tokens of it to score.

    Under context parallelism the device has this rank's n = N / cp tokens and the m of the M that are scored
    at them; without, n = N and m = M.
    """

    def __init__(
        self,
        batch: PackedBatch,
        device: torch.device,
        *,
        trained: bool,
        context: Context | None = None,
        replays: bool = True,
    ) -> None:
        """``trained``: score the tokens that are trained on, not every one that has a predecessor.
        ``replays``: tokens go through the experts that an engine chose, where a record says which.
        """

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
        padding = batch.tree < 0 if share is None else batch.tree[share.index] < 0
        self.padding = torch.from_numpy(padding).to(device)  # [n] bool
        index = None if share is None else share.index
        known = batch.routes if replays else None
        self._routes = None if known is None else RoutesOfRow(known, index, device)
        self.predictor = put(predictor)  # [m] int64 rows that are projected
        self.target = put(target)  # [m] int64 the tokens they predict
        self.proximal: torch.Tensor | None = None  # [M] :attr:`LossTokens.proximal`
        self.anchored = False  # :attr:`LossTokens.anchored`

    def run(self, model: TreeGPTModel, *, replays: bool = True) -> torch.Tensor:
        """The forward pass of this rank's stage: hidden states, on the last one those of the predictors.

        ``replays``: through the experts of the record, if there is one; the policy's passes all do.
        """
        padding = self.padding
        if replays and self._routes is not None:
            padding = self._routes.beside(padding, model.shape.experts, _stage(model))
        return model(self.tokens, self.position, self.mask, self.predictor, padding)

    def logprob_entropy(
        self, hidden: torch.Tensor, model: TreeGPTModel, layout: Layout, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[M] log-probability and [M] entropy of the targets under the policy softmax(logits / temperature).

        ``hidden`` ``[m, h]``: what :meth:`run` returns on the last pipeline stage.
        """
        vocab, group = model.shape.vocab, layout.tp_group
        own = logprob_entropy(hidden, model.output_weight, self.target, vocab, group, temperature)
        if self._share is None:
            return own
        logprob, entropy = self._share.of_all(torch.stack(own, 1)).T.contiguous()
        return logprob, entropy

    def anchor(self) -> None:
        """Take what the engine found when the tokens' nodes closed for the proximal policy's."""
        self.proximal = torch.from_numpy(self.batch.closed[self.scored]).to(self.target.device)
        self.anchored = True

    def log_ratio(self, logprob: torch.Tensor) -> torch.Tensor:
        """[M] float64: a policy's log-probabilities of the targets less those they were sampled with; 0 where
        nothing sampled them.
        """
        sampled = torch.from_numpy(self.batch.logprob[self.scored]).to(logprob.device)
        return torch.where(sampled.isnan(), 0.0, logprob.double() - sampled)

    def loss_tokens(
        self,
        logprob: torch.Tensor,
        entropy: torch.Tensor,
        version: int,
        reference: torch.Tensor | None,
        average: torch.Tensor | None = None,
    ) -> LossTokens:
        """The objective's view of the row.  ``version``: the weight version that is being trained;
        ``average``: [M] log-probabilities under the average that teaches; None: the trees have the teacher's,
        if there is one.
        """

        def pick(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array[self.scored].astype(np.float32)).to(logprob.device)

        def count(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array[self.scored].astype(np.int64)).to(logprob.device)

        batch = self.batch
        behaviour, sampled = pick(batch.logprob), pick(batch.version >= 0)
        # What nothing sampled has a ratio of 1: μ is the policy that is trained, or where it is known π_prox.
        own = logprob.detach() if self.proximal is None else self.proximal
        behaviour = torch.where(sampled > 0, behaviour, own.to(behaviour))
        # Of what nothing sampled, no teacher says anything.
        teacher = pick(batch.teacher) if average is None else torch.where(sampled > 0, average, torch.nan)
        return LossTokens(
            logprob=logprob,
            entropy=entropy,
            behaviour=behaviour,
            s_plus=pick(batch.s_plus),
            s_minus=pick(batch.s_minus),
            mult=pick(batch.mult),
            staleness=sampled * pick(version - batch.version),
            guided=pick(batch.guided),
            node=count(batch.node),
            # A part of a tree begins with the token that nothing predicts; padding lies behind all of them.
            path=count(np.cumsum(batch.predictor < 0) - 1),
            proximal=self.proximal,
            reference=reference,
            teacher=teacher,
            anchored=self.anchored,
            clip_scale=pick(batch.clip_scale),
        )


def _stage(model: TreeGPTModel) -> range:
    """The layers that this rank's stage has, by their numbers from 0."""
    first = get_transformer_layer_offset(model.config)
    return range(first, first + model.decoder.num_layers_per_pipeline_rank)


def row_padding(device: torch.device, spread: int = 1) -> int:
    """What row lengths are padded to a multiple of.

    On GPU attention works on whole blocks.  On CPU padding is pure waste.  ``spread``: ranks that a row is
    divided over (sequence parallelism).
    """
    return spread if device.type == "cpu" else math.lcm(BLOCK, spread)
