"""The learner: one :class:`Trainer` per rank, from closed trees to new weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from numpy.typing import NDArray

from system.config import Config, ConfigError
from system.learn import checkpoint, cpu, objective, parallel, weights
from system.learn.aggregate import leaf_weights
from system.learn.credit import advantages, is_hard
from system.learn.model import TreeGPTModel, build, read_shape, transformer_config
from system.learn.objective import LossTokens, Statistics
from system.learn.pipeline import Pipeline
from system.learn.rows import (
    Row,
    logprob_entropy,
    loss_row,
    loss_tokens,
    row_budget,
    row_padding,
    score_row,
    share,
)
from system.learn.weights import Export, HuggingFaceFiles
from system.models.files import DTYPES
from system.tree.pack import flatten, pack, path_model_tokens
from system.tree.packed import PackedBatch
from system.tree.record import Tree

log = logging.getLogger(__name__)


@dataclass
class _MicroBatch:
    batch: PackedBatch
    row: Row
    proximal: torch.Tensor | None = None


class Trainer:
    """One rank of the learner.  Every public method except ``step_count`` is collective: all ranks call it
    alike.
    """

    def __init__(self, config: Config, hf_path: str, *, rank: int, world: int, init_method: str) -> None:
        """Join the other ranks at ``init_method`` (``tcp://host:port``) and load the model from ``hf_path``.

        Raises ``ConfigError`` when the layout or the model cannot be run.
        """
        learn = config.learn
        if learn.objective.name == "grpo-flat" and is_hard(learn.credit.name):
            raise ConfigError(
                f"learn.credit={learn.credit.name} averages over shared tokens, and "
                "learn.objective=grpo-flat has none: use arpo-soft or grpo"
            )
        self.config, self.learn, self.hf_path = config, learn, hf_path
        self.layout = parallel.start(config, rank=rank, world=world, init_method=init_method)
        shape = read_shape(hf_path)
        transformer = transformer_config(shape, learn, DTYPES[config.model.dtype])
        self.model = build(shape, transformer)
        with HuggingFaceFiles(hf_path) as files:
            weights.load(self.model, self.layout, files.read)
        self.reference: TreeGPTModel | None = None
        if learn.kl_coef:
            self.reference = build(shape, transformer)
            self.reference.requires_grad_(False)
            self._freeze_reference()
        with cpu.scope():
            ddp = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=learn.distributed_optimizer
            )
            self.ddp = DistributedDataParallel(transformer, ddp, self.model)
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=learn.lr,
                    weight_decay=learn.weight_decay,
                    adam_beta1=learn.beta1,
                    adam_beta2=learn.beta2,
                    adam_eps=learn.eps,
                    clip_grad=learn.grad_clip,
                    bf16=transformer.bf16,
                    params_dtype=transformer.params_dtype,
                    use_distributed_optimizer=learn.distributed_optimizer,
                ),
                [self.ddp],
            )
        checkpoint.fill_optimizer_state(self.optimizer)
        self._step = 0
        spread = learn.tp if transformer.sequence_parallel else 1
        self._padding = row_padding(learn.micro_tokens, self.layout.device, spread)

    @property
    def step_count(self) -> int:
        """Optimizer steps since the start or the last :meth:`reset_optimizer`."""
        return self._step

    # ------------------------------------------------------------------ training

    def train(self, trees: Sequence[Tree], *, version: int) -> dict[str, float]:
        """One training batch: ``learn.updates`` optimizer steps, each on its share of the trees.

        Every rank passes the same trees in the same order.  ``version`` is the weight version being trained
        (the one the engines hold now), for staleness.  Returns statistics over all ranks: totals and means
        over the batch's tokens, and times in seconds.
        """
        learn = self.learn
        started = time.perf_counter()
        gains = advantages(learn.credit.name, [tree.reward for tree in trees])
        bounds = np.linspace(0, len(trees), learn.updates + 1).astype(int)
        updates = [self._micro_batches(trees[a:b], gains[a:b]) for a, b in pairwise(bounds)]
        if learn.objective.name == "decoupled":
            # The proximal policy is the one before the first update, whose own tokens therefore need no extra
            # pass.
            later = [micro for update in updates[1:] for micro in update]
            for micro, scores in zip(later, self._score(self.model, [m.row for m in later]), strict=True):
                micro.proximal = scores
        packed_s = time.perf_counter() - started
        results = [self._update(learn.objective.name, update, version, self._lr()) for update in updates]
        stats = _combine(results)
        stats["time_pack_s"] = packed_s
        stats["trees_without_signal"] = float(sum(not np.any(g) for g in gains))
        return stats

    def supervise(self, trees: Sequence[Tree], lr: float | None = None) -> dict[str, float]:
        """Warm start: one optimizer step on the mean negative log-likelihood of the trees' MODEL tokens.

        A token counts once per leaf through it, scored or not.  ``lr`` defaults to ``warmstart.lr``.
        """
        lengths = [path_model_tokens(tree) for tree in trees]
        total = max(sum(int(n.sum()) for n in lengths), 1)
        w = [(n > 0).astype(np.float32) / np.float32(total) for n in lengths]
        batches = self._pack(trees, [np.zeros_like(x) for x in w], w, drop_zero=False)
        micro = [_MicroBatch(b, loss_row(b, self.layout.device)) for b in batches]
        return self._update("nll", micro, 0, self.config.warmstart.lr if lr is None else lr)

    def logprobs(self, trees: Sequence[Tree]) -> list[NDArray[np.float32]]:
        """Per tree [T]: every token's log-probability under the current policy; NaN at the first token."""
        rows = []
        for tree in trees:
            ones = np.ones(tree.n_leaves, np.float32)
            whole = -(-tree.n_tokens // self._padding) * self._padding
            (batch,) = pack([tree], [ones], [ones], budget=whole, pad_to=self._padding)
            rows.append(score_row(batch, self.layout.device))
        results = []
        for tree, row, scores in zip(trees, rows, self._score(self.model, rows), strict=True):
            if scores is None:
                scores = torch.empty(row.target.numel(), device=self.layout.device)
            self._tell_all_stages(scores)
            values = np.full(tree.n_tokens, np.nan, np.float32)
            values[row.scored] = scores.cpu().numpy()
            results.append(values)
        return results

    def reset_optimizer(self) -> None:
        """Where reinforcement learning begins: zero moments and step count, reference model := current
        policy.
        """
        checkpoint.fill_optimizer_state(self.optimizer, reset=True)
        self._step = 0
        self._freeze_reference()

    # ------------------------------------------------------------------ weights and state

    def export(self) -> Iterator[dict[str, torch.Tensor]]:
        """Full weights on CPU under Hugging Face names, in buckets of ``learn.bucket_mb``.

        All ranks iterate to the end, over the same number of buckets; only global rank 0's buckets have
        tensors.
        """
        return Export(self.model, self.layout, self.learn.bucket_mb << 20).buckets()

    def save_hf(self, path: str | Path) -> None:
        """Write a complete Hugging Face directory (configuration, tokenizer files, safetensors)."""
        weights.save_hf(self.model, self.layout, Path(path), self.hf_path)
        torch.distributed.barrier()

    def save(self, path: str | Path, extra: dict[str, Any]) -> None:
        """Write a sharded checkpoint of model, optimizer, reference model, RNG and step, with ``extra``
        (JSON).
        """
        checkpoint.save(
            Path(path),
            self.layout,
            self.model,
            self.optimizer,
            self.reference,
            step=self._step,
            extra=extra,
        )

    def load(self, path: str | Path) -> dict[str, Any]:
        """Restore a checkpoint, whatever layout wrote it; returns its ``extra``."""
        self._step, extra = checkpoint.load(
            Path(path), self.layout, self.model, self.optimizer, self.reference
        )
        return extra

    def close(self) -> None:
        """Leave the process group."""
        parallel.stop()

    # ------------------------------------------------------------------ inside one step

    def _micro_batches(
        self, trees: Sequence[Tree], gains: Sequence[NDArray[np.float32]]
    ) -> list[_MicroBatch]:
        """This rank's share of one optimizer step."""
        learn, hard = self.learn, is_hard(self.learn.credit.name)
        w = leaf_weights(
            learn.aggregate.name, trees, length_cap=self.config.rollout.max_response_tokens, hard=hard
        )
        if learn.objective.name == "grpo-flat":
            trees, gains, w = flat_paths(trees, gains, w)
        # Trees without signal do not move the loss unless a regulariser acts on every token.
        silent = not learn.kl_coef and not learn.entropy_coef
        batches = self._pack(trees, gains, w, hard=hard, drop_zero=silent)
        return [_MicroBatch(b, loss_row(b, self.layout.device)) for b in batches]

    def _pack(
        self,
        trees: Sequence[Tree],
        gains: Sequence[NDArray[np.float32]],
        w: Sequence[NDArray[np.float32]],
        *,
        hard: bool = False,
        drop_zero: bool,
    ) -> list[PackedBatch]:
        budget = row_budget(trees, self.learn.micro_tokens, self.layout.dp)
        batches = pack(trees, gains, w, budget=budget, hard=hard, pad_to=self._padding, drop_zero=drop_zero)
        return share([b for b in batches if b.mult.any()], self.layout.dp, self.layout.dp_rank)

    def _update(
        self, name: str, micro_batches: Sequence[_MicroBatch], version: int, lr: float
    ) -> dict[str, float]:
        """Gradients of all micro-batches, summed over data-parallel ranks, then one optimizer step."""
        function = objective.OBJECTIVES[name]
        temperature = 1.0 if name == "nll" else self.config.rollout.temperature
        started = time.perf_counter()
        rows = [micro.row for micro in micro_batches]
        references: list[torch.Tensor | None] = [None] * len(rows)
        if self.reference and name != "nll":
            references = self._score(self.reference, rows)
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        statistics = Statistics()

        def compute(i: int) -> torch.Tensor:
            micro, row = micro_batches[i], rows[i]
            output = row.run(self.model)
            if not self.layout.last_stage:
                return output
            logprob, entropy = logprob_entropy(output, row, self.model, self.layout, temperature)
            tokens = loss_tokens(
                micro.batch,
                row,
                logprob,
                entropy,
                version=version,
                proximal=micro.proximal,
                reference=references[i],
            )
            loss, measured = function(tokens, self.learn)
            measured.sums["tokens_computed"] = loss.new_tensor(row.n_tokens).detach()
            statistics.add(measured)
            return loss

        Pipeline(self.model, self.layout).train([row.length for row in rows], compute)
        # A rank without micro-batches still joins the reduction, with zeros.
        finalize_model_grads([self.ddp])
        computed = time.perf_counter()
        grad_norm, applied = self._optimizer_step(lr)
        groups = (self.layout.dp_group, self.layout.pp_group)
        stats = statistics.reduce(self._expected(name), self.layout.device, groups)
        stats |= {"grad_norm": grad_norm, "lr": lr, "skipped_steps": 0.0 if applied else 1.0}
        stats["time_compute_s"] = computed - started
        stats["time_optimizer_s"] = time.perf_counter() - computed
        return stats

    def _optimizer_step(self, lr: float) -> tuple[float, bool]:
        """Clip and step; returns (gradient norm, whether the step was taken).  A non-finite gradient is not
        applied.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
            # Megatron's own scheduler would do this; without it norms and biases are decayed too.
            group["weight_decay"] = self.learn.weight_decay * group["wd_mult"]
        with cpu.scope():
            self.optimizer.prepare_grads()
            limit = self.learn.grad_clip if self.learn.grad_clip > 0 else float("inf")
            norm = float(self.optimizer.clip_grad_norm(limit))
            finite = bool(np.isfinite(norm))
            if finite:
                self.optimizer.step_with_ready_grads()
                self._step += 1
            else:
                log.warning("optimizer step %d skipped: the gradient norm is %s", self._step, norm)
        return norm, finite

    def _lr(self) -> float:
        """Linear warm-up over ``warmup_steps`` optimizer steps, then constant."""
        warmup = self.learn.warmup_steps
        return self.learn.lr * (min(1.0, (self._step + 1) / warmup) if warmup else 1.0)

    def _score(self, model: TreeGPTModel, rows: Sequence[Row]) -> list[torch.Tensor | None]:
        """[M] log-probabilities of each row's targets, without gradient; None before the last stage."""

        def compute(i: int) -> torch.Tensor:
            output = rows[i].run(model)
            if not self.layout.last_stage:
                return output
            temperature = self.config.rollout.temperature
            return logprob_entropy(output, rows[i], model, self.layout, temperature)[0]

        scores = Pipeline(model, self.layout).score([row.length for row in rows], compute)
        return [*scores] if self.layout.last_stage else [None] * len(rows)

    def _tell_all_stages(self, values: torch.Tensor) -> None:
        """Give the last stage's values to the others, in place."""
        source = self.layout.global_rank(
            tp_rank=self.layout.tp_rank, dp_rank=self.layout.dp_rank, pp_rank=self.layout.pp - 1
        )
        torch.distributed.broadcast(values, src=source, group=self.layout.pp_group)

    def _freeze_reference(self) -> None:
        if self.reference is not None:
            self.reference.load_state_dict(self.model.state_dict())

    def _expected(self, name: str) -> Statistics:
        """The statistics an objective leaves, for ranks that computed none: measured on one token of weight
        zero.
        """
        zero = torch.zeros(1, device=self.layout.device)
        reference = zero if self.reference and name != "nll" else None
        token = LossTokens(zero, zero, zero, zero, zero, zero, zero, None, reference)
        _, statistics = objective.OBJECTIVES[name](token, self.learn)
        statistics.sums["tokens_computed"] = zero[0]
        return statistics


def flat_paths(
    trees: Sequence[Tree], gains: Sequence[NDArray[np.float32]], w: Sequence[NDArray[np.float32]]
) -> tuple[list[Tree], list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """The same leaves as separate root-to-leaf paths, each with its leaf's advantage and weight."""
    paths = [path for tree in trees for path in flatten(tree)]
    return (
        paths,
        [g[i : i + 1] for g in gains for i in range(g.shape[0])],
        [x[i : i + 1] for x in w for i in range(x.shape[0])],
    )


def _combine(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """One report from the updates of a batch: totals add up, maxima stay maxima, the rest is averaged."""
    totals = (*objective.TOTALS, "skipped_steps", "time_compute_s", "time_optimizer_s")
    combined = {}
    for name in results[0]:
        values = [result[name] for result in results]
        if name in totals:
            combined[name] = sum(values)
        else:
            combined[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return combined
