"""Mixtures of experts in the learner: the experts of a rank, and the router that chooses among all.

The tokens travel by megatron-core's ``MoELayer``: all-to-all to the ranks that hold their experts, and back.
Two parts are ours.  :class:`GroupedExperts` computes all experts of a rank in two grouped matrix products of
PyTorch (megatron-core wants a package that is built from source for it, or loops over the experts).
:class:`ExpertRouter` counts what each expert gets, and holds the loss that balances it, each of a packed
row's tokens once, padding not at all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn

from system.config import LearnConfig
from system.learn import cpu
from system.learn.parallel import Layout
from system.learn.replay import Forced, split
from system.models.experts import Experts


def settings(experts: Experts, layers: int, learn: LearnConfig) -> dict[str, Any]:
    """What ``TransformerConfig`` says of a model's experts, so that it computes what transformers does."""
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_layer_freq": [int(experts.at(layer)) for layer in range(layers)],
        "moe_router_topk": experts.chosen,
        "moe_router_score_function": "softmax",
        # The softmax over the chosen scores is that over all, made to add up to 1.
        "moe_router_pre_softmax": not experts.normalised,
        "moe_router_load_balancing_type": "none",  # ours is in ExpertRouter
        "moe_router_dtype": None,  # scores in the model's dtype, their softmax in float32
        "moe_token_dispatcher_type": "alltoall",  # the others want equally many tokens on all ranks
        "expert_model_parallel_size": learn.ep,
        "expert_tensor_parallel_size": learn.expert_tp,
    }


def install() -> None:
    """Mend megatron-core 0.16.1 in this process, where it lacks TransformerEngine or CUDA; idempotent."""
    if not hasattr(moe_utils, "te_general_gemm"):  # read in every router, defined with TransformerEngine only
        setattr(moe_utils, "te_general_gemm", None)  # noqa: B010
    if cpu.needed():
        dispatcher = MoEAlltoAllTokenDispatcher
        setattr(dispatcher, "cuda_dtoh_stream", object())  # noqa: B010 -- what is not None is not made
        setattr(dispatcher, "_maybe_dtoh_and_synchronize", _splits_on_cpu)  # noqa: B010


def _splits_on_cpu(dispatcher: Any, _point: str, tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """In place of copies from the GPU on a stream of their own: all-to-all reads its splits as arrays."""
    for name in ("input_splits", "output_splits", "output_splits_tp"):
        value = getattr(dispatcher, name)
        if isinstance(value, torch.Tensor):
            setattr(dispatcher, name, value.numpy())
    return tokens_per_expert


class GroupedExperts(nn.Module):
    """The experts that a rank holds: SwiGLU MLPs, each for the rows that were sent to it.

    ``fc1`` ``[n·2f, h]`` and ``fc2`` ``[n·h, f]`` hold those of n experts one below the other, of each its
    gate before its up projection; f is an expert's width, or this rank's share of it.
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, pg_collection: Any = None, **_: Any
    ) -> None:
        super().__init__()
        self.count = num_local_experts
        ffn = (config.moe_ffn_hidden_size or 0) // pg_collection.expt_tp.size()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        for name, rows, columns in (
            ("fc1", 2 * ffn, config.hidden_size),
            ("fc2", config.hidden_size, ffn),
        ):
            weight = torch.empty(self.count * rows, columns, dtype=config.params_dtype, device=device)
            parameter = nn.Parameter(nn.init.normal_(weight, 0.0, config.init_method_std))
            # Every rank's are its own: Megatron's norm counts what is not so marked on one rank alone.
            setattr(parameter, "tensor_model_parallel", True)  # noqa: B010
            # Without expert parallelism they are as the dense parameters are; with it they are reduced over
            # the ranks that hold the same experts.
            setattr(parameter, "allreduce", config.expert_model_parallel_size == 1)  # noqa: B010
            self.register_parameter(name, parameter)

    def forward(
        self, rows: torch.Tensor, tokens_per_expert: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """``[m, h]`` outputs for ``rows`` ``[m, h]``, which stand in the experts' order.

        ``tokens_per_expert`` ``[n]``: how many are each expert's; ``weights`` ``[m]``: the router's.
        """
        fc1, fc2 = (parameter.unflatten(0, (self.count, -1)).mT for parameter in self.parameters())
        ends = tokens_per_expert.to(rows.device).cumsum(0).int()
        gate, up = F.grouped_mm(rows, fc1, offs=ends).chunk(2, -1)
        inside = F.silu(gate) * up * weights[:, None]
        return F.grouped_mm(inside.to(rows.dtype), fc2, offs=ends), None


class ExpertRouter(TopKRouter):
    """Sends each token to the experts that score highest, and watches how evenly.

    The balancing loss is that of Switch Transformer (arXiv 2101.03961, section 2.2) for k choices: E/k ·
    Σ f·P over the E experts of a layer, f the share of a row's tokens that an expert gets, P its mean
    probability; 1 where all is even.  A step's is the mean over its tokens, added up over the layers.
    """

    def __init__(self, config: TransformerConfig, pg_collection: Any = None) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        device = self.weight.device if config.use_cpu_initialization else torch.cuda.current_device()
        # [E] tokens of this rank that went to each expert since the step began
        self.load = torch.zeros(len(self.weight), dtype=torch.int64, device=device)
        # Tokens since then: all, those whose experts were given, and of these the ones that would have others
        self.replayed = torch.zeros(3, dtype=torch.int64, device=device)
        self.balance = 0.0  # what the loss of a token counts in the step's: coefficient / tokens of the step

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and choice (bool) ``[n, E]`` for ``logits`` ``[n, 1, E]``; ``padding_mask``: ``[n, 1]``, or
        with the experts that are given ``[n, 1, 1 + s·E]`` (:mod:`system.learn.replay`).
        """
        real, taken = None, None
        if padding_mask is not None:
            padding, taken = split(padding_mask, self._place, len(self.weight))
            real = ~padding
        forced = None if taken is None else Forced(taken)
        self.router_replay: Any = forced
        probs, chosen = super().routing(logits)
        self.router_replay = None
        # A pass without gradients scores, or will be computed again.
        if not torch.is_grad_enabled():
            return probs, chosen
        counted = chosen if real is None else chosen & real[:, None]
        self.load += counted.sum(0)
        self.replayed[0] += counted.any(1).sum()
        if forced is not None and real is not None:
            self.replayed[1:] += forced.counts(real)
        if self.balance:
            real = counted.any(1, keepdim=True)
            loss = self._balancing(logits.flatten(0, -2), counted, real)
            probs = moe_utils.MoEAuxLossAutoScaler.apply(probs, self.balance * loss)
        return probs, chosen

    @property
    def _place(self) -> int:
        """Its number among the routers of the stage, from 0."""
        sparse: Any = self.config.moe_layer_freq
        return sum(sparse[get_transformer_layer_offset(self.config) : (self.layer_number or 1) - 1])

    def _balancing(self, logits: torch.Tensor, chosen: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """This rank's part of the row's loss times the row's tokens; the ranks of a row add up to it."""
        share = chosen.sum(0).float()
        dist.all_reduce(share, group=self.tp_cp_group)  # [E] of all the row's tokens
        probability = (logits.float().softmax(-1) * real).sum(0)
        # f = share / (k·T) and P = probability / T; the row weighs T.
        tokens = (share.sum() / self.topk).clamp(min=1.0)
        return len(share) * (share / (self.topk * tokens) * probability).sum()


class Loads:
    """The routers of a rank's stage, from step to step."""

    def __init__(self, model: nn.Module, layout: Layout, learn: LearnConfig, *, sparse: bool) -> None:
        """``sparse``: some stage of the model has experts."""
        self._sparse = sparse
        self._routers = [module for module in model.modules() if isinstance(module, ExpertRouter)]
        self._layout, self._coefficient = layout, learn.aux_loss

    def begin(self, tokens: int) -> None:
        """A step on ``tokens`` tokens of this rank's rows begins; collective over the data-parallel ranks,
        unless the model is dense.
        """
        if not self._sparse:
            return
        total = torch.tensor(float(tokens), device=self._layout.device)
        dist.all_reduce(total, group=self._layout.dp_group)
        for router in self._routers:
            router.load.zero_()
            router.replayed.zero_()
            router.balance = self._coefficient / max(float(total), 1.0)

    def statistics(self) -> dict[str, float]:
        """The fullest expert's tokens over the mean of its layer: the mean over the layers, and the largest.
        And the share of tokens that went through given experts, and of these those that would have chosen
        others.  Collective over all ranks; of a dense model there are none.
        """
        if not self._sparse:
            return {}
        layout = self._layout
        sums = torch.zeros(5, dtype=torch.float64, device=layout.device)
        worst = torch.zeros((), dtype=torch.float64, device=layout.device)
        if self._routers:
            each = [torch.cat([router.load, router.replayed]) for router in self._routers]
            counts = torch.stack(each).double()  # [layers, E + 3]
            for group in (layout.tp_group, layout.cp_group, layout.dp_group):
                dist.all_reduce(counts, group=group)
            load, replayed = counts[:, :-3], counts[:, -3:]
            fullest = load.amax(1) / load.mean(1).clamp(min=1e-9)
            sums += torch.cat([fullest.sum()[None], fullest.new_tensor([len(load)]), replayed.sum(0)])
            worst = fullest.max()
        dist.all_reduce(sums, group=layout.pp_group)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=layout.pp_group)
        fullest, layers, tokens, given, others = sums.tolist()
        return {
            "expert_load": fullest / layers,
            "expert_load_max": float(worst),
            "routes_replayed": given / max(tokens, 1.0),
            "routes_changed": others / max(given, 1.0),
        }
