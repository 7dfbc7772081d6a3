"""The learner: one :class:`Trainer` per rank, from packed micro-batches to new weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from numpy.typing import NDArray

from system.config import Config, at_step
from system.learn import cpu, parallel, weights
from system.learn.average import active_share
from system.learn.batch import BatchPlanner
from system.learn.beside import Beside
from system.learn.checkpoint import TrainingState
from system.learn.context import Context
from system.learn.correction import Correction, NodeRatios, effect, spread, twice_weighed, weigh
from system.learn.experts import Loads
from system.learn.lora import AdapterCopy
from system.learn.model import TreeGPTModel, build, transformer_config
from system.learn.objective import (
    TOTALS,
    LossTokens,
    NegativeLogLikelihood,
    Objective,
    Statistics,
    inert_clip,
    make_objective,
    row_loss,
)
from system.learn.offload import HostAdam
from system.learn.optimizer import Adam, DeviceAdam
from system.learn.pipeline import Pipeline
from system.learn.rows import Row, row_padding
from system.learn.schedule import learning_rate
from system.learn.weights import Export
from system.models.adapter import adapter_of
from system.models.files import DTYPES
from system.models.shape import ModelShape
from system.plugins import CORRECTIONS
from system.tree.pack import PackedBatch, pack, padding, with_credit_of
from system.tree.plan import BatchPlan, MicroBatch, Part, reweighed, signed_leaves
from system.tree.record import Tree

_CREDIT = "credit"  # its state, among what a checkpoint keeps besides tensors


class Trainer:
    """One rank of the learner.  Every public method is collective: all ranks call it alike."""

    def __init__(self, config: Config, hf_path: str, *, rank: int, world: int, init_method: str) -> None:
        """Join the other ranks at ``init_method`` (``tcp://host:port``) and load the model from ``hf_path``.

        Raises ``ConfigError`` when the layout, the model or the algorithm's parts cannot be run.
        """
        learn = config.learn
        self.config, self.learn, self.hf_path = config, learn, hf_path
        self.layout = parallel.start(config, rank=rank, world=world, init_method=init_method)
        spread = learn.tp if learn.sequence_parallel and learn.tp > 1 else 1
        self._context = Context.of(self.layout, learn)
        self._padding = self._context.padding if self._context else row_padding(self.layout.device, spread)
        self.objective = make_objective(learn)
        self._now = config  # as it is at the step that is trained
        self.planner = BatchPlanner(
            config,
            flat=self.objective.flat,
            dp=self.layout.dp,
            pad_to=self._padding,
            clip_scale=self.objective.clip_scale if self.objective.scales else None,
        )
        self.correction: Correction = CORRECTIONS.make(learn.correction.name, learn.correction.options)
        warnings = (
            inert_clip(self.objective, learn, config.run.by_step),
            twice_weighed(self.correction, self.objective),
        )
        self.warnings = [warning for warning in warnings if warning]  # about the settings, to be told once
        shape = ModelShape.from_directory(hf_path)
        transformer = transformer_config(shape, learn, DTYPES[config.model.dtype])
        adapter = adapter_of(learn.lora, shape)
        self.model = build(shape, transformer, learn.attention, adapter)
        weights.load(self.model, self.layout, hf_path)
        self._loads = Loads(self.model, self.layout, learn, sparse=bool(shape.experts))
        if adapter:
            weights.start_adapters(self.model, self.layout, config.run.seed, learn.lora.init)
        self.beside = Beside(
            config,
            self.model,
            lambda: build(shape, transformer, learn.attention),
            clips=self.objective.ratio == "proximal",
        )
        with cpu.scope():
            # A gradient is reduced to the ranks that step with it.
            split = learn.distributed_optimizer or learn.offload
            ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=split)
            self.ddp = DistributedDataParallel(transformer, ddp, self.model)
        self.optimizer: Adam = (
            HostAdam(self.ddp, self.layout, learn)
            if learn.offload
            else DeviceAdam(self.ddp, transformer, learn)
        )
        self._state = TrainingState(self.layout, self.model, self.optimizer, self.beside.tensors())

    @property
    def step_count(self) -> int:
        """Optimizer steps since the start or the last :meth:`reset_optimizer`."""
        return self.optimizer.steps

    # ------------------------------------------------------------------ training

    def train(
        self, plan: BatchPlan, updates: Sequence[Sequence[PackedBatch]], *, version: int
    ) -> dict[str, float]:
        """One training batch: an optimizer step on each of ``updates``, this rank's share of ``plan``.

        ``version`` is the weight version being trained (the one the engines hold now), for staleness.
        Returns statistics over all ranks: totals and means over the batch's tokens, and times in seconds.
        """
        if self.config.run.by_step:
            self._now = at_step(self.config, version)
            self.objective = make_objective(self._now.learn)
        steps, average = [self._rows(update) for update in updates], self.beside.average
        corrects = not self.correction.none
        anchored = self.learn.proximal == "closed" and (corrects or self.objective.ratio == "proximal")
        if anchored:
            for row in (row for step in steps for row in step if self.layout.last_stage):
                row.anchor()
        elif corrects or self.objective.ratio == "proximal":
            # Unless it is an average, the proximal policy is the one before the first update, whose own
            # tokens therefore need no extra pass for it.
            proximal = average.model if average else self.model
            rows = [row for step in steps[0 if corrects or average else 1 :] for row in step]
            for row, scores in zip(rows, self._score(proximal, rows), strict=True):
                row.proximal = scores
        corrected = self._correct(plan, steps) if corrects else {}
        # Rows that the current policy has scored.
        known = steps[0] if corrects and not (average or anchored) else None
        results: list[dict[str, float]] = []
        for ranks, step in zip(plan.updates, steps, strict=True):
            if self.objective.adapts:
                scores = [row.proximal for row in step] if step is known else self._score(self.model, step)
                self._adapt(plan, ranks[self.layout.dp_rank], step, scores)
            results.append(self._update(self.objective, step, version, self._lr()))
            self.beside.stepped()
        combined = _combine(results) | corrected
        if average:
            combined["proximal_active"] = active = active_share(combined)
            if active < self.learn.proximal_reset:
                average.reset(self.model)
        return combined

    def supervise(self, micro_batches: Sequence[PackedBatch], lr: float) -> dict[str, float]:
        """One optimizer step on the mean negative log-likelihood of the MODEL tokens of this rank's
        micro-batches (:meth:`BatchPlanner.supervised`), those of all ranks weighed alike.
        """
        return self._update(NegativeLogLikelihood(), self._rows(micro_batches), 0, lr)

    def supervised_loss(self, micro_batches: Sequence[PackedBatch]) -> float:
        """What :meth:`supervise` would step on: nats per token, over all ranks."""
        rows = self._rows(micro_batches)
        total = torch.zeros(1, dtype=torch.float64, device=self.layout.device)
        for row, logprob in zip(rows, self._score(self.model, rows, temperature=1.0), strict=True):
            if logprob is not None:  # on the last pipeline stage
                weight = torch.from_numpy(row.batch.mult[row.scored]).to(total)
                total -= (weight * logprob).sum()
        for group in (self.layout.dp_group, self.layout.pp_group):
            torch.distributed.all_reduce(total, group=group)
        return float(total)

    def logprobs(self, trees: Sequence[Tree]) -> list[NDArray[np.float32]]:
        """Per tree [T]: every token's log-probability under the current policy; NaN at the first token."""
        rows = []
        for tree in trees:
            whole = Part(0, np.arange(tree.n_nodes), np.zeros((tree.n_nodes, 3)), tree.n_tokens)
            packed = pack([whole], {0: tree}, self._padding)
            rows.append(Row(packed, self.layout.device, trained=False, context=self._context))
        results = []
        for tree, row, scores in zip(trees, rows, self._score(self.model, rows, replays=False), strict=True):
            if scores is None:
                scores = torch.empty(len(row.scored), device=self.layout.device)
            # From the last stage to the others.
            torch.distributed.broadcast(scores, group=self.layout.pp_group, group_src=self.layout.pp - 1)
            values = np.full(tree.n_tokens, np.nan, np.float32)
            values[row.scored] = scores.cpu().numpy()
            results.append(values)
        return results

    def reset_optimizer(self) -> None:
        """Where reinforcement learning begins: zero moments and step count, reference model and average :=
        current policy.
        """
        self.optimizer.reset()
        self.beside.follow()

    # ------------------------------------------------------------------ weights and state

    def export(self, *, on_gpu: bool = False, adapters: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """Full weights under Hugging Face names (``adapters``: these alone, under PEFT's), in buckets of
        ``learn.bucket_mb``: on CPU, or ``on_gpu`` on this rank's device.

        All ranks iterate to the end, over the same number of buckets; only global rank 0's buckets have
        tensors.
        """
        export = Export(self.model, self.layout, self.learn.bucket_mb << 20, adapters=adapters)
        self.rounding = export.rounding  # of the last export, once it is read to its end; on rank 0
        return export.buckets(on_gpu=on_gpu)

    def save_hf(self, path: str | Path) -> float | None:
        """Write a complete Hugging Face directory (configuration, tokenizer files, safetensors), adapters
        merged.  Returns on rank 0 the share of their change that was kept (``Rounding.kept``).
        """
        kept = weights.save_hf(self.model, self.layout, Path(path), self.hf_path)
        torch.distributed.barrier()
        return kept

    def save_adapters(self, path: str | Path, base: str) -> None:
        """Write the adapters in PEFT's format; ``base``: what the model that they belong to is
        called.
        """
        weights.save_adapters(self.model, self.layout, Path(path), base, self.hf_path)
        torch.distributed.barrier()

    def save(self, path: str | Path, extra: dict[str, Any]) -> None:
        """Begin to write a sharded checkpoint of model, optimizer, reference model, RNG, step and the
        credit's state, with ``extra`` (JSON); training may go on at once.
        """
        if state := self.planner.credit.state_dict():
            extra = {**extra, _CREDIT: state}
        self._state.save(Path(path), extra={**extra, **self.beside.state()})

    def saved(self, *, wait: bool = True) -> bool:
        """Whether the last checkpoint is there; ``wait`` until it is.  Raises OSError if it cannot be."""
        return self._state.saved(wait=wait)

    def load(self, path: str | Path) -> dict[str, Any]:
        """Restore a checkpoint, whatever layout wrote it; returns its ``extra``."""
        extra = self._state.load(Path(path))
        if state := extra.pop(_CREDIT, None):
            self.planner.credit.load_state_dict(state)
        self.beside.take_state(extra)
        return extra

    def close(self) -> None:
        """Leave the process group, once a checkpoint that is under way is written."""
        try:
            self.saved()
        finally:
            # A dispatcher keeps tensors of the last step, whose graph leads through the hooks on gradients to
            # the model again: a circle through C++, where no garbage collector looks, with all groups in it.
            for module in self.model.modules():
                vars(module).pop("token_dispatcher", None)
            parallel.stop()

    # ------------------------------------------------------------------ inside one step

    def _rows(self, micro_batches: Sequence[PackedBatch]) -> list[Row]:
        device, context = self.layout.device, self._context
        replays = self.config.rollout.replay_routes
        return [Row(one, device, trained=True, context=context, replays=replays) for one in micro_batches]

    def _correct(self, plan: BatchPlan, steps: Sequence[Sequence[Row]]) -> dict[str, float]:
        """Multiply each leaf's share of S+ and S- by its weight; returns what that did."""
        layout = self.layout

        def paired(plan: BatchPlan) -> Iterator[tuple[MicroBatch, Row]]:
            for ranks, rows in zip(plan.updates, steps, strict=True):
                yield from zip(ranks[layout.dp_rank], rows, strict=True)

        if plan.assigned is None:
            raise ValueError("a supervised batch has nothing to correct")
        nodes = NodeRatios(plan.assigned, layout.device)
        for parts, row in paired(plan):
            if row.proximal is not None:  # on the last pipeline stage
                nodes.add(parts, row.batch.node[row.scored], row.log_ratio(row.proximal))
        nodes.reduce((layout.dp_group, layout.pp_group))
        chosen, leaves = nodes.leaves()
        factors = weigh(self.correction, leaves).to(layout.device)
        # One rank decides: rounding must not let two of them disagree about a bound.
        torch.distributed.broadcast(factors, src=0)
        for parts, row in paired(reweighed(plan, spread(factors, chosen))):
            row.batch = with_credit_of(row.batch, parts)
        return effect(factors)

    def _adapt(
        self,
        plan: BatchPlan,
        parts: Sequence[MicroBatch],
        rows: Sequence[Row],
        scores: Sequence[torch.Tensor | None],
    ) -> None:
        """Show the objective the tokens of an optimizer step, of all ranks, under the current policy, which
        has given them ``scores`` (:meth:`_score`).
        """
        if plan.assigned is None or not self.layout.last_stage:
            return
        # Log ratio, leaves below of positive and of negative advantage.
        seen = [torch.zeros(0, 3, dtype=torch.float64, device=self.layout.device)]
        for micro, row, logprob in zip(parts, rows, scores, strict=True):
            if logprob is not None:
                leaves = np.concatenate([signed_leaves(plan.assigned, part) for part in micro])
                leaves = torch.from_numpy(leaves[row.batch.node[row.scored]]).to(seen[0])
                seen.append(torch.cat([row.log_ratio(logprob)[:, None], leaves], 1))
        tokens = parallel.gather_rows(torch.cat(seen), self.layout.dp_group)
        self.objective.adapt(tokens[:, 0], tokens[:, 1:])

    def _update(self, objective: Objective, rows: Sequence[Row], version: int, lr: float) -> dict[str, float]:
        """Gradients of all micro-batches, summed over data-parallel ranks, then one optimizer step."""
        temperature = 1.0 if objective.supervised else self._now.rollout.temperature
        started = time.perf_counter()
        references: list[torch.Tensor | None] = [None] * len(rows)
        if self.beside.reference and not objective.supervised:
            references = self._score(self.beside.reference, rows, replays=False)
        taught: list[torch.Tensor | None] = [None] * len(rows)
        if self.beside.teacher and not objective.supervised:
            taught = self._score(self.beside.teacher.model, rows, replays=False)
        self.optimizer.zero_grad()
        statistics = self._no_statistics(objective)
        self._loads.begin(sum(int((row.batch.tree >= 0).sum()) for row in rows))
        passes = self._passes(rows)

        def compute(i: int) -> torch.Tensor:
            row = passes[i]
            output = row.run(self.model)
            if not self.layout.last_stage:
                return output
            if i >= len(rows):
                return 0.0 * output.sum()
            logprob, entropy = row.logprob_entropy(output, self.model, self.layout, temperature)
            tokens = row.loss_tokens(logprob, entropy, version, references[i], taught[i])
            loss, measured = self._loss(objective, tokens)
            measured.sums["tokens_computed"] = loss.new_tensor(int((row.batch.tree >= 0).sum())).detach()
            statistics.add(measured)
            return loss

        Pipeline(self.model, self.layout).train([row.tokens.numel() for row in passes], compute)
        # A rank without micro-batches still joins the reduction, with zeros.
        finalize_model_grads([self.ddp])
        if self.layout.device.type == "cuda":
            torch.cuda.synchronize()  # kernels are only launched so far: the optimizer would wait for them
        computed = time.perf_counter()
        grad_norm, applied = self.optimizer.step(lr)
        groups = (self.layout.dp_group, self.layout.pp_group)
        stats = statistics.reduce(groups)
        stats |= {"grad_norm": grad_norm, "weight_norm": weights.norm(self.model, self.layout), "lr": lr}
        stats |= self._loads.statistics()
        stats["skipped_steps"] = 0.0 if applied else 1.0
        stats["time_compute_s"] = computed - started
        stats["time_optimizer_s"] = time.perf_counter() - computed
        return stats

    def _loss(self, objective: Objective, tokens: LossTokens) -> tuple[torch.Tensor, Statistics]:
        learn = self.learn
        if learn.teacher == "none":  # trees may have a teacher's scores from before a resume
            tokens = replace(tokens, teacher=None)
        return row_loss(
            objective,
            tokens,
            entropy_coef=learn.entropy_coef,
            kl_coef=learn.kl_coef,
            teacher_coef=learn.teacher_coef,
            teacher_cap=learn.tis_cap,
        )

    def _lr(self) -> float:
        learn = self.learn
        return learning_rate(
            self.step_count,
            self.config.run.steps * learn.updates,
            learn.lr,
            warmup=learn.warmup_steps,
            decay=learn.lr_decay,
            end=learn.lr_end,
        )

    def _score(
        self,
        model: TreeGPTModel | AdapterCopy,
        rows: Sequence[Row],
        temperature: float | None = None,
        *,
        replays: bool = True,
    ) -> list[torch.Tensor | None]:
        """[M] log-probabilities of each row's targets, without gradient; None before the last stage.
        ``temperature``: the rollout's by default; ``replays`` as in :meth:`Row.run`.
        """
        if isinstance(model, AdapterCopy):
            with model.in_place():
                return self._score(self.model, rows, temperature, replays=replays)
        divisor = self._now.rollout.temperature if temperature is None else temperature
        passes = self._passes(rows)

        def compute(i: int) -> torch.Tensor:
            output = passes[i].run(model, replays=replays)
            if not self.layout.last_stage:
                return output
            return passes[i].logprob_entropy(output, model, self.layout, divisor)[0]

        scores = Pipeline(model, self.layout).score([row.tokens.numel() for row in passes], compute)
        return [*scores[: len(rows)]] if self.layout.last_stage else [None] * len(rows)

    def _passes(self, rows: Sequence[Row]) -> list[Row]:
        """The rows, and under expert parallelism as many silent ones behind them as make their number that of
        every data-parallel rank: in each layer all ranks exchange tokens.
        """
        if self.layout.ep == 1:
            return [*rows]
        most = torch.tensor(len(rows), device=self.layout.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=self.layout.dp_group)
        silent = self._rows([padding(self._padding)] * (int(most) - len(rows)))
        return [*rows, *silent]

    def _no_statistics(self, objective: Objective) -> Statistics:
        """What every rank begins with: one without micro-batches, or not on the last pipeline stage, measures
        nothing.  The names are those that an objective leaves at a token.
        """
        zero = torch.zeros(1, device=self.layout.device)
        reference = zero if self.beside.reference and not objective.supervised else None
        none = zero.long()
        token = LossTokens(*([zero] * 7), node=none, path=none, reference=reference, teacher=zero)
        _, statistics = self._loss(objective, token)
        statistics.sums["tokens_computed"] = zero.new_tensor(0)
        return statistics.zeros()


def _combine(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """One report from the updates of a batch: totals add up, maxima stay maxima, the rest is averaged."""
    totals = (*TOTALS, "skipped_steps", "time_compute_s", "time_optimizer_s")
    combined = {}
    for name in results[0]:
        values = [result[name] for result in results]
        if name in totals:
            combined[name] = sum(values)
        else:
            combined[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return combined
