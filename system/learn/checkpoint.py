"""Sharded checkpoints: Megatron's dist_checkpointing in ``torch_dist`` format, written by each rank itself.

A checkpoint can be read back under another tensor- or data-parallel layout.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,  # pyright: ignore[reportPrivateUsage]
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as write_state_dict

from system.learn import cpu
from system.learn.model import TreeGPTModel
from system.learn.weights import replace

EXTRA = "extra.json"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing or incomplete; the message names it."""


class _SaveInProcess(TorchDistSaveShardedStrategy):
    """The stock strategy's format without its processes.

    The stock writer starts a spawn-context manager, which imports ``__main__`` again, and forks writers;
    neither belongs in a worker process of an actor system.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        state, _flat, _renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        write_state_dict(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=FileSystemWriter(checkpoint_dir, single_file_per_rank=True, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def fill_optimizer_state(optimizer: MegatronOptimizer, *, reset: bool = False) -> None:
    """Give every parameter its Adam state (zero moments, step 0) before the first step.

    Torch makes it lazily, but a checkpoint taken before the first step must have the same entries as any
    other.
    """
    for inner in optimizer.chained_optimizers:  # pyright: ignore[reportAttributeAccessIssue]
        adam = inner.optimizer
        if reset:
            adam.state.clear()
        for group in adam.param_groups:
            for parameter in group["params"]:
                state = adam.state[parameter]
                state.setdefault("step", torch.zeros((), dtype=torch.float32))
                for moment in ("exp_avg", "exp_avg_sq"):
                    if moment not in state:
                        state[moment] = torch.zeros_like(parameter)


def save(
    path: Path,
    model: TreeGPTModel,
    optimizer: MegatronOptimizer,
    reference: TreeGPTModel | None,
    *,
    step: int,
    extra: dict[str, Any],
) -> None:
    """Write a checkpoint; collective over all ranks, which must share the file system.

    The directory appears under its name only when complete, and replaces an older one.
    """
    partial = path.with_name(path.name + ".partial")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    with cpu.scope():
        state = _state(model, optimizer, reference, loading=False)
        state |= {"step": step, "rng": torch.get_rng_state()}
        dist_checkpointing.save(state, str(partial), sharded_strategy=_SaveInProcess("torch_dist", 1))
    if first:
        (partial / EXTRA).write_text(json.dumps(extra, indent=2))
        replace(partial, path)
    dist.barrier()


def load(
    path: Path, model: TreeGPTModel, optimizer: MegatronOptimizer, reference: TreeGPTModel | None
) -> tuple[int, dict[str, Any]]:
    """Restore everything :func:`save` wrote; returns (step, extra).  Collective over all ranks."""
    if not (path / EXTRA).is_file():
        raise CheckpointError(f"{path} is not a learner checkpoint ({EXTRA} is missing)")
    with cpu.scope():
        fill_optimizer_state(optimizer)
        wanted = _state(model, optimizer, reference, loading=True)
        loaded = dist_checkpointing.load(wanted, str(path))
        assert isinstance(loaded, dict)
        model.load_state_dict(loaded["model"])
        inner = loaded["optimizer"].get(
            "optimizer", loaded["optimizer"]
        )  # nested when there are master weights
        # Megatron leaves a step count of zero out, and then cannot read the checkpoint back.
        inner["state"].setdefault("common_step", torch.zeros((), dtype=torch.float32))
        optimizer.load_state_dict(loaded["optimizer"])
        if reference is not None:
            reference.load_state_dict(loaded["reference"])
    torch.set_rng_state(loaded["rng"])
    return int(loaded["step"]), json.loads((path / EXTRA).read_text())


def _state(
    model: TreeGPTModel, optimizer: MegatronOptimizer, reference: TreeGPTModel | None, *, loading: bool
) -> dict[str, Any]:
    sharded = model.sharded_state_dict()
    state: dict[str, Any] = {
        "model": sharded,
        "optimizer": optimizer.sharded_state_dict(sharded, is_loading=loading),
    }
    if reference is not None:
        frozen = reference.sharded_state_dict()
        for tensor in frozen.values():
            if hasattr(tensor, "key"):
                tensor.key = f"reference.{tensor.key}"
        state["reference"] = frozen
    return state
