"""Sharded checkpoints that any layout can read: torch's distributed format under Hugging Face names.

Every rank writes the boxes it holds of each Hugging Face tensor that is trained (with adapters these alone,
under PEFT's names): the float32 parameters, Adam's two moments and the reference model.  A rank of another
layout asks for other boxes of the same tensors, and torch's planner cuts them out of the files.
(megatron-core's own checkpoints of a distributed optimizer cannot be read back where the optimizer is torch's
AdamW.)

Saving copies the boxes to the host's memory; a thread writes them while training goes on.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as read_boxes
from torch.distributed.checkpoint.state_dict_saver import save as write_boxes
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from system.errors import CheckpointError, naming
from system.learn.background import Background
from system.learn.model import TreeGPTModel
from system.learn.optimizer import Adam, StateSlice
from system.learn.parallel import COLLECTIVE_DEADLINE, Layout
from system.learn.shards import MappedParameter, WeightMap
from system.whole import take_name

MANIFEST = "manifest.json"
PLAN = ".metadata"  # torch's own: which boxes are in which file
SLOWEST = 50e6  # bytes per second of one rank, below which writing a checkpoint counts as stuck


@dataclass(frozen=True)
class Box:
    """A box of a named tensor, and this rank's memory for it (a view)."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    offsets: tuple[int, ...]
    data: torch.Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), self.data.shape)


class TrainingState:
    """What a checkpoint holds of a learner rank: model, optimizer, reference model, average of the weights,
    and torch's generator.
    """

    def __init__(
        self,
        layout: Layout,
        model: TreeGPTModel,
        optimizer: Adam,
        others: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> None:
        """``others``: parameters of the same shapes that are kept besides, by a word for each set of them."""
        self._layout, self._model, self._optimizer = layout, model, optimizer
        self._others = others
        self._where = WeightMap.of(model)
        # Writing is among ranks, too, beside the collectives of training, and takes its time by size.
        size = sum(box.data.nbytes for box in self._held(writing=False))
        deadline = COLLECTIVE_DEADLINE + timedelta(seconds=size / SLOWEST)
        group = dist.new_group(backend="gloo", timeout=deadline)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._under_way: Background | None = None

    @torch.no_grad()
    def save(self, path: Path, *, extra: dict[str, Any]) -> None:
        """Begin to write a checkpoint of this moment, once the one before is written; collective over all
        ranks, which must share the file system.

        The directory appears under its name only when complete, with a manifest of its files' digests, and
        replaces an older one.
        """
        self.saved()
        own = [whole("rng", torch.get_rng_state())] if self._layout.rank == 0 else []
        copies = [
            replace(box, data=box.data.to("cpu", copy=True)) for box in (*own, *self._held(writing=True))
        ]
        contents = {"step": self._optimizer.steps, "extra": copy.deepcopy(extra)}  # may change meanwhile
        self._under_way = Background(lambda: self._write(path, copies, contents))

    def saved(self, *, wait: bool = True) -> bool:
        """Whether no checkpoint is under way any more; ``wait`` until that is so.

        Raises, once, what kept it from being written: OSError where a disk did not take it.
        """
        if self._under_way and self._under_way.ended(wait):
            ended, self._under_way = self._under_way, None
            ended.check()
        return self._under_way is None

    def _write(self, path: Path, boxes: Sequence[Box], contents: dict[str, Any]) -> None:
        rank, world = self._layout.rank, dist.get_world_size()
        partial = path.with_name(path.name + ".partial")
        with naming(partial):
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            dist.barrier(self._group)
            writer = _Writer(partial, single_file_per_rank=True, sync_files=True)
            try:
                write_boxes({}, storage_writer=writer, planner=_BoxSaver(boxes), process_group=self._group)
            except CheckpointException as error:  # no Exception, and the same on every rank
                cause, _ = next(iter(error.failures.values()))
                raise cause from error
            dist.barrier(self._group)
            files = sorted(file.name for file in partial.iterdir())
            mine = {name: _digest(partial / name) for name in files[rank::world]}
            digests = {name: digest for part in _from_all(mine, self._group) for name, digest in part.items()}
            if rank == 0:
                with (partial / MANIFEST).open("w") as file:
                    json.dump(_sealed(contents | {"files": digests}), file, indent=2)
                    file.flush()
                    os.fsync(file.fileno())
                take_name(partial, path)
        dist.barrier(self._group)

    @torch.no_grad()
    def load(self, path: Path) -> dict[str, Any]:
        """Restore everything :meth:`save` wrote, whatever layout wrote it; returns its ``extra``.

        Collective over all ranks.  Raises :class:`CheckpointError` on all of them, before anything is
        changed, when the checkpoint is missing, incomplete, damaged, or of another model; and, when a part of
        it may have been taken, if it cannot be read after all.
        """
        self.saved()
        manifest = _verified(path, self._layout, self._group)
        rng = torch.get_rng_state()
        reader = FileSystemReader(path)
        planner = BoxLoader([whole("rng", rng), *self._held(writing=False)], reader.read_metadata())
        _agree(path, planner.problems, self._group)
        try:
            read_boxes({}, storage_reader=reader, planner=planner, process_group=self._group)
        except CheckpointException as error:  # no Exception, and the same on every rank
            cause, _ = next(iter(error.failures.values()))
            raise CheckpointError(f"{path}: it cannot be read: {cause}") from error
        self._optimizer.resume(manifest["step"])
        torch.set_rng_state(rng)
        return manifest["extra"]

    def _held(self, *, writing: bool) -> Iterator[Box]:
        """The boxes that this rank reads: its parameters whole, and what its optimizer holds of them.

        ``writing``: the boxes that it writes; all ranks together write every element once.
        """
        layout = self._layout
        trained = [(key, one) for key, one in self._model.named_parameters() if one.requires_grad]
        for number, (key, parameter) in enumerate(trained):
            mapped = self._where.parameter(layout.pp_rank, key)
            if writing and ((mapped.replicated and layout.tp_rank) or self._where.is_copy(key)):
                continue
            copies, copy = layout.held(experts=bool(mapped.experts))
            mine = not writing or number % copies == copy  # the copies share the work
            parts = [] if writing else [StateSlice("parameter", parameter.detach(), 0)]
            parts += self._optimizer.slices(parameter, mine)
            if mine:
                parts += [StateSlice(kind, one[key].detach(), 0) for kind, one in self._others.items()]
            for kind, tensor, start in parts:
                yield from self._boxes(mapped, parameter.shape, kind, tensor, start)

    def _boxes(
        self, mapped: MappedParameter, shape: torch.Size, kind: str, tensor: torch.Tensor, start: int
    ) -> Iterator[Box]:
        """The boxes of Hugging Face tensors that ``tensor`` is: a parameter's elements from ``start`` on.

        ``shape`` is the parameter's.  A slice may begin and end inside a row: each block of rows then gives
        up to three boxes, a part of a row, whole rows, and a part of a row.
        """
        flat = tensor.view(-1)
        stop = start + flat.numel()
        width = shape[1] if len(shape) == 2 else 1
        for block in self._where.blocks(mapped, self._layout.part(experts=bool(mapped.experts))):
            a, b = max(start, block.start * width), min(stop, (block.start + block.rows) * width)
            while a < b:
                row, column = divmod(a, width)
                rows = max(1, (b - a) // width) if column == 0 else 1
                end = min(b, (row + rows) * width)
                data = flat[a - start : end - start]
                offsets = (block.row + row - block.start,)
                if len(shape) == 2:
                    offsets, data = (*offsets, block.column + column), data.view(rows, -1)
                yield Box(f"{kind}/{block.name}", mapped.shapes[block.name], offsets, data)
                a = end


def whole(name: str, tensor: torch.Tensor) -> Box:
    return Box(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


# ---------------------------------------------------------------------- torch's writer and planners


class _Writer(FileSystemWriter):
    """Raises the error of the disk that torch hides behind one of its own."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            hidden: BaseException | None = error
            while hidden is not None and not isinstance(hidden, OSError):
                hidden = hidden.__context__
            raise hidden or error from None


class _BoxSaver(DefaultSavePlanner):
    """Writes this rank's boxes."""

    def __init__(self, boxes: Iterable[Box]) -> None:
        super().__init__()
        self._boxes = {(box.name, box.offsets): box for box in boxes}

    def create_local_plan(self) -> SavePlan:
        return SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(box.name, box.offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=box.chunk,
                        properties=TensorProperties.create_from_tensor(box.data),
                        size=torch.Size(box.shape),
                    ),
                )
                for box in self._boxes.values()
            ]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            written = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
            assert written == math.prod(tensor.size), f"{name}: {written} elements written of {tensor.size}"
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self._boxes[index.fqn, tuple(index.offset)].data


class BoxLoader(DefaultLoadPlanner):
    """Fills this rank's boxes from whatever boxes were written; ``problems`` says why it cannot, if so."""

    def __init__(self, boxes: Iterable[Box], metadata: Metadata) -> None:
        super().__init__()
        self.problems: list[str] = []
        self._items: list[ReadItem] = []
        self._boxes: dict[str, list[Box]] = {}
        for box in boxes:
            self._boxes.setdefault(box.name, []).append(box)
        for name, own in self._boxes.items():
            found = metadata.state_dict_metadata.get(name)
            if not isinstance(found, TensorStorageMetadata):
                self.problems.append(f"it does not hold {name}")
            elif tuple(found.size) != own[0].shape:
                self.problems.append(
                    f"{name} has shape {tuple(found.size)}, not {own[0].shape}: another model's"
                )
            else:
                items = create_read_items_for_chunk_list(name, found, [box.chunk for box in own])
                wanted = sum(box.data.numel() for box in own)
                if sum(math.prod(item.lengths) for item in items) != wanted:
                    self.problems.append(f"parts of {name} are missing")
                self._items += items

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(self._items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        assert index.index is not None
        return self._boxes[index.fqn][index.index].data


# ---------------------------------------------------------------------- verification


def _verified(path: Path, layout: Layout, group: dist.ProcessGroup) -> dict[str, Any]:
    """The manifest, once the ranks have compared every file with it."""
    manifest, problems = look(path, layout.rank, dist.get_world_size())
    _agree(path, problems, group)
    return manifest


def look(path: Path, rank: int = 0, world: int = 1) -> tuple[dict[str, Any], list[str]]:
    """The manifest of a checkpoint, and what is wrong with this rank's share of the files it names."""
    if not (path / MANIFEST).is_file():
        return {"files": {}}, [f"it is not a learner checkpoint ({MANIFEST} is missing)"]
    try:
        manifest = _manifest(path / MANIFEST)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        return {"files": {}}, [f"{MANIFEST} is damaged: {error!r}"]
    problems: list[str] = []
    for name in sorted(manifest["files"])[rank::world]:
        if not (path / name).is_file():
            problems.append(f"{name} is missing")
        elif _digest(path / name) != manifest["files"][name]:
            problems.append(f"{name} is damaged: its digest is not the manifest's")
    return manifest, problems


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a digest of itself, as JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(manifest))
    return plain | {"digest": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def _manifest(file: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = dict(json.loads(file.read_text()))
    digest = manifest.pop("digest", None)
    if digest not in (None, _sealed(manifest)["digest"]):  # until 2026-11-28 there was none
        raise ValueError("its digest is another")
    files, extra, step = dict(manifest["files"]), dict(manifest["extra"]), manifest["step"]
    if PLAN not in files or len(files) == 1:
        raise ValueError("it does not name all files")
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step {step}")
    return {"step": step, "extra": extra, "files": files}


def _agree(path: Path, problems: list[str], group: dist.ProcessGroup) -> None:
    """Raise on every rank the first that any of them found."""
    for found in filter(None, _from_all(problems, group)):
        raise CheckpointError(f"{path}: {found[0]}")


def _from_all(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group)
    return values


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
