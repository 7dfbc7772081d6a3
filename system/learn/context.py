"""Context parallelism: the tokens of one packed row over several ranks.

Each rank holds whole blocks of the row.  What concerns single tokens (embedding, norms, MLP, head) it
computes for its own alone; in every layer its queries attend to the keys and values of the whole row, which
are gathered from all ranks and whose gradients are summed back to where they came from.  Who holds which
block follows from the row's mask, so that all ranks deal alike and nobody has to tell.  The log-probabilities
and entropies of the scored tokens are gathered too, two numbers each: every rank then has the loss of the
whole row, and what follows (objectives that look at whole turns or paths, statistics) is as it is without.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from numpy.typing import NDArray

from system.config import ConfigError, LearnConfig
from system.learn.parallel import Layout
from system.learn.sizes import context_block
from system.tree.record import Int64


@dataclass(frozen=True)
class Context:
    """The ranks that hold a packed row together, and of how many tokens the blocks are that they hold."""

    ranks: int
    rank: int
    group: dist.ProcessGroup
    block: int

    @staticmethod
    def of(layout: Layout, learn: LearnConfig) -> Context | None:
        """This rank's; None where a rank holds whole rows.

        Raises ``ConfigError`` when a row of ``learn.micro_tokens`` has no block for every rank.
        """
        if learn.cp == 1:
            return None
        block = context_block(learn.tp, learn.sequence_parallel, gpu=layout.device.type != "cpu")
        if learn.micro_tokens < learn.cp * block:
            raise ConfigError(
                f"learn.micro_tokens={learn.micro_tokens} are less than a block of {block} tokens for each "
                f"of learn.cp={learn.cp} ranks: raise it to {learn.cp * block} or more, or lower learn.cp"
            )
        return Context(learn.cp, layout.cp_rank, layout.cp_group, block)

    @property
    def padding(self) -> int:
        """What rows are padded to a multiple of: a block for every rank."""
        return self.ranks * self.block


def attended_blocks(exit: NDArray[np.integer], block: int) -> Int64:
    """[N / block] how many blocks of keys the queries of each block attend to, in part or in whole.

    That is what attention kernels compute, and what they take time for.  ``exit`` [N] as in ``PackedBatch``.
    """
    last = exit.reshape(-1, block).max(1)  # one past the last token that may attend to any key of the block
    key = np.arange(len(last))
    query = key[:, None]
    return ((key <= query) & (last > query * block)).sum(1)


def deal(exit: NDArray[np.integer], ranks: int, block: int) -> Int64:
    """[N / block] which rank holds each block: equally many each, with about equally many attended pairs.

    The blocks are handed out by what they cost (:func:`attended_blocks`), the dearest first, one to each rank
    in turn, there and back.  So the costs of two ranks differ by no more than those of the dearest and the
    cheapest block: in each round the ranks' blocks lie between the last ones of the round before and the
    first ones of the round after.
    """
    cost = attended_blocks(exit, block)
    turn = np.arange(len(cost)) % (2 * ranks)
    owner = np.empty(len(cost), np.int64)
    owner[np.argsort(-cost, kind="stable")] = np.minimum(turn, 2 * ranks - 1 - turn)
    return owner


class RowShare:
    """What this rank holds of one packed row of N tokens of which M are scored, and how to have it whole."""

    def __init__(
        self,
        context: Context,
        exit: NDArray[np.integer],
        predictor: NDArray[np.integer],
        device: torch.device,
    ) -> None:
        """``exit`` [N] as in ``PackedBatch``; ``predictor`` [M] int: the token at which each is scored."""
        self._group, self._block = context.group, context.block
        owner = deal(exit, context.ranks, context.block)
        tokens = np.repeat(owner, context.block)
        self.index = np.flatnonzero(tokens == context.rank)  # [N / ranks] this rank's tokens in the row
        # [N / block] where the row's blocks stand when all ranks' are put one after the other
        blocks = np.argsort(np.argsort(owner, kind="stable"))
        self._blocks = torch.from_numpy(blocks).to(device)
        scorer = tokens[predictor]
        self.scored = np.flatnonzero(scorer == context.rank)  # [m] which of the M this rank scores
        self.predictor = np.searchsorted(self.index, predictor[self.scored])  # [m] among this rank's tokens
        counts = np.bincount(scorer, minlength=context.ranks)
        self._most = max(1, int(counts.max()))
        place = np.empty(len(scorer), np.int64)
        for rank, count in enumerate(counts.tolist()):
            place[scorer == rank] = rank * self._most + np.arange(count)
        # [M] where each stands when every rank gives as many as the one with the most
        self._scores = torch.from_numpy(place).to(device)

    def keys_and_values(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[N, 1, heads, d]`` the keys and the values of the whole row from this rank's ``[N / ranks, …]``.

        Collective, as is the backward pass, which sums what all ranks' queries make of a key.
        """
        both = gather_from_sequence_parallel_region(torch.cat([key, value], -1), group=self._group)
        both = both.unflatten(0, (-1, self._block)).index_select(0, self._blocks).flatten(0, 1)
        whole_key, whole_value = both.split([key.size(-1), value.size(-1)], -1)
        return whole_key, whole_value

    def of_all(self, values: torch.Tensor) -> torch.Tensor:
        """``[M, k]`` what each scored token has, from this rank's ``[m, k]``; collective.

        Every rank computes the same from it, so in the backward pass each takes its own tokens' gradient.
        """
        values = F.pad(values, (0, 0, 0, self._most - len(values)))
        gathered = gather_from_sequence_parallel_region(
            values, tensor_parallel_output_grad=False, group=self._group
        )
        return gathered.index_select(0, self._scores)
