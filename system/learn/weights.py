"""Weights between Hugging Face files and Megatron's shards, in both directions, never whole in one process.

Loading reads of each Hugging Face tensor only the slices that this rank holds.  Exporting brings the shards
of one parameter (or of one expert) at a time to rank 0, from all ranks that hold one, and hands the Hugging
Face tensors on in buckets of bounded size: rank 0 holds one bucket, one parameter and one shard of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from system.config import ConfigError
from system.learn.lora import drawn, is_adapter, module_of
from system.learn.model import TreeGPTModel
from system.learn.parallel import Layout
from system.learn.shards import MappedParameter, WeightMap
from system.models.adapter import Rounding, read_adapter
from system.models.files import by_bytes, write_model
from system.models.weights import WeightReader

Bucket = dict[str, torch.Tensor]


@torch.no_grad()
def load(model: TreeGPTModel, layout: Layout, path: str | Path) -> None:
    """Fill this rank's shard of every parameter from a Hugging Face directory.

    Raises ``ConfigError`` when a tensor is missing, of another shape or not finite, and where a tied model
    has a head of its own.
    """
    where, reader = WeightMap.of(model), WeightReader(path)
    embedding = model.shape.tensor("embedding")
    for key, parameter in model.named_parameters():
        if is_adapter(key):
            continue
        mapped = where.parameter(layout.pp_rank, key)
        assert tuple(parameter.shape) == where.shard_shape(mapped), key
        filled = 0
        for block in where.blocks(mapped, layout.part(experts=bool(mapped.experts))):
            name, shape = block.name, mapped.shapes[block.name]
            if name not in reader:
                raise ConfigError(f"{path}: the weights lack {name}")
            if (found := reader.shape(name)) != shape:
                raise ConfigError(f"{path}: {name} has shape {found}; the configuration makes it {shape}")
            rows = reader.read(name, parameter.dtype, block.box(parameter))
            if name == embedding:
                reader.check_tied(model.shape, parameter.dtype, block.box(parameter))
            parameter[block.start : block.start + block.rows].copy_(rows)
            filled += block.rows
        parameter[filled:].zero_()  # rows that pad the vocabulary


@torch.no_grad()
def start_adapters(model: TreeGPTModel, layout: Layout, seed: int, source: str = "") -> None:
    """Fill this rank's part of every adapter from a directory in PEFT's format, or as drawn by ``seed``.

    Raises ``AdapterError`` for a directory that does not fit.
    """
    where, adapter = WeightMap.of(model), model.adapter
    assert adapter is not None
    given = read_adapter(source, model.shape, adapter) if source else {}
    for key, parameter in model.named_parameters():
        if not is_adapter(key):
            continue
        mapped = where.parameter(layout.pp_rank, key)
        assert tuple(parameter.shape) == where.shard_shape(mapped), key
        for block in where.blocks(mapped, layout.tp_rank):
            tensor = given[block.name] if given else drawn(block.name, mapped.shapes[block.name], seed)
            parameter[block.start : block.start + block.rows].copy_(tensor[block.box(parameter)])


@torch.no_grad()
def norm(model: TreeGPTModel, layout: Layout) -> float:
    """L2 norm of all weights that are trained, those that several ranks hold counted once; collective."""
    square = torch.zeros((), dtype=torch.float64, device=layout.device)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        _, copy = layout.held(experts=not getattr(parameter, "allreduce", True))
        own = param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)
        if own and copy == 0:
            square += parameter.float().norm().double() ** 2
    for group in (layout.tp_group, layout.cp_group, layout.dp_group, layout.pp_group):
        dist.all_reduce(square, group=group)
    return math.sqrt(float(square))


class Export:
    """One pass over the model's full tensors under Hugging Face names, adapters merged, in buckets.

    The plan, known to every rank, says which parameters go into which bucket.
    """

    def __init__(
        self, model: TreeGPTModel, layout: Layout, max_bytes: int, *, adapters: bool = False
    ) -> None:
        """``max_bytes``: size of a bucket, exceeded only by a parameter (or expert) that is larger alone.
        ``adapters``: these alone, under PEFT's names.
        """
        self._model, self._layout = model, layout
        self._map, self.rounding = WeightMap.of(model), Rounding()  # of merging, on rank 0
        size = model.config.params_dtype.itemsize
        what = self._map.adapters() if adapters else self._map.pieces()
        self.plan = by_bytes(((one, one.numel * size) for one in what), max_bytes)
        self._beside: dict[tuple[int, str], list[MappedParameter]] = {}  # adapters by their layer
        for one in self._map.adapters() if not adapters else ():
            self._beside.setdefault((one.stage, module_of(one.key)), []).append(one)

    def buckets(self, *, on_gpu: bool = False) -> Iterator[Bucket]:
        """The buckets, each with copies of its own, on CPU or (``on_gpu``) where gathered; collective.

        Every rank iterates to the end over the same number of buckets; only rank 0's have tensors.
        """
        parameters = dict(self._model.named_parameters())
        for bucket_plan in self.plan:
            bucket: Bucket = {}
            for mapped in bucket_plan:
                full = self._merged(mapped, parameters)
                if on_gpu:
                    bucket |= full
                    continue
                # From a GPU into pinned memory (which torch keeps for the next bucket), without waiting: many
                # times as fast as into new pages.
                bucket |= {name: tensor.to("cpu", non_blocking=True) for name, tensor in full.items()}
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the copies of this bucket
            yield bucket
            del bucket

    @torch.no_grad()
    def _merged(self, mapped: MappedParameter, parameters: Mapping[str, torch.Tensor]) -> Bucket:
        full = self.gather(mapped, parameters.get(mapped.key))
        adapters: Bucket = {}
        for one in self._beside.get((mapped.stage, module_of(mapped.key)), ()):
            adapters |= self.gather(one, parameters.get(one.key))
        return self._model.adapter.merged(full, adapters, self.rounding) if self._model.adapter else full

    @torch.no_grad()
    def gather(self, mapped: MappedParameter, shard: torch.Tensor | None) -> Bucket:
        """The full tensors of one parameter, or of some experts of it, on rank 0 and its device; collective.

        ``shard`` is this rank's part of the parameter (or of a tensor of the same shape, such as its
        gradient), used where this rank owns one.
        """
        layout = self._layout
        owners, experts = self._map.holders(mapped), bool(mapped.experts)
        ranks = [layout.holder(part, mapped.stage, experts=experts) for part in owners]
        if layout.rank != 0:
            if layout.rank in ranks:
                assert shard is not None
                own = self._rows(mapped, owners[ranks.index(layout.rank)])
                dist.send(shard.detach()[own].contiguous(), dst=0)
            return {}
        like = next(self._model.parameters()) if shard is None else shard
        full = {
            name: torch.empty(shape, dtype=like.dtype, device=like.device)
            for name, shape in mapped.shapes.items()
        }
        received: torch.Tensor | None = None
        for owner, rank in zip(owners, ranks, strict=True):
            rows = self._rows(mapped, owner)
            if rank == 0:
                part = None if shard is None else shard[rows]
            else:
                if received is None:
                    shape = self._map.shard_shape(mapped)
                    received = torch.empty(shape, dtype=like.dtype, device=like.device)
                dist.recv(received, src=rank)
                part = received
            assert part is not None
            for block in self._map.blocks(mapped, owner):
                first = block.start - rows.start
                full[block.name][block.box(part)].copy_(part[first : first + block.rows])
        return full

    def _rows(self, mapped: MappedParameter, owner: int) -> slice:
        """The rows of a parameter that a piece of it is; of a whole one all."""
        start = self._map.blocks(mapped, owner)[0].start if mapped.experts else 0
        return slice(start, start + self._map.shard_shape(mapped)[0])


def save_hf(
    model: TreeGPTModel, layout: Layout, path: Path, source: str | Path, *, file_bytes: int = 2**31
) -> float | None:
    """Write a complete Hugging Face directory, in files of at most ``file_bytes`` (one parameter at least);
    adapters are merged.  Returns on rank 0 the share of their change that was kept (``Rounding.kept``).

    Collective; only rank 0 touches the disk, as :func:`~system.models.files.write_model` does.
    """
    export = Export(model, layout, file_bytes)
    if layout.rank != 0:
        for _ in export.buckets():
            pass
        return None
    write_model(path, source, model.config.params_dtype, export.buckets(), len(export.plan))
    return export.rounding.kept


def save_adapters(model: TreeGPTModel, layout: Layout, path: Path, base: str, source: str | Path) -> None:
    """Write the adapters in PEFT's format; ``base``: what the model in ``source``, to which they belong, is
    called.  Collective; only rank 0 touches the disk.
    """
    tensors: Bucket = {}
    for bucket in Export(model, layout, 2**31, adapters=True).buckets():
        tensors |= bucket
    if layout.rank == 0 and model.adapter:
        model.adapter.write(path, tensors, base, source)
