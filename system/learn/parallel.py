"""Process groups and the device of one learner rank."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from system.config import Config, ConfigError
from system.learn import cpu

# A rank that waits longer than this for another one fails instead of hanging.
COLLECTIVE_DEADLINE = timedelta(minutes=10)


@dataclass(frozen=True)
class Layout:
    """Where this rank stands.

    Ranks are numbered with the tensor-parallel rank fastest, then the context-parallel rank, the
    data-parallel rank and the pipeline stage; expert parallelism takes ``ep`` of a stage together, as they
    are numbered.  Ranks with equal ``dp_rank`` train on the same rows; those of
    them with equal ``cp_rank`` hold one model copy.  Rank 0 stands first in all: it reports metrics and
    receives exported weights; the loss is known on the last stage.
    """

    rank: int
    device: torch.device
    tp: int
    pp: int
    cp: int
    dp: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    ep: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def copies(self) -> int:
        """Ranks that hold the same weights as this one, itself among them."""
        return self.cp * self.dp

    @property
    def copy(self) -> int:
        """Which of them this rank is."""
        return self.cp_rank + self.cp * self.dp_rank

    @property
    def _index(self) -> int:
        """Which rank of its pipeline stage this is."""
        return self.tp_rank + self.tp * self.copy

    @property
    def ep_rank(self) -> int:
        """Which of the parts of the experts this rank holds."""
        return self._index % self.ep

    @property
    def expert_copies(self) -> int:
        """Ranks that hold the same parts of experts as this one, itself among them."""
        return self.tp * self.copies // self.ep if self.ep > 1 else self.copies

    @property
    def expert_copy(self) -> int:
        """Which of them this rank is."""
        return self._index // self.ep if self.ep > 1 else self.copy

    def part(self, *, experts: bool) -> int:
        """Which share of a parameter, or of ``experts``, this rank holds (``WeightMap.blocks``)."""
        return self.ep_rank if experts and self.ep > 1 else self.tp_rank

    def holder(self, part: int, stage: int, *, experts: bool) -> int:
        """The first rank of a stage that holds a share."""
        if experts and self.ep > 1:  # the first `ep` ranks of a stage
            return part + self.global_rank(tp_rank=0, cp_rank=0, dp_rank=0, pp_rank=stage)
        return self.global_rank(tp_rank=part, cp_rank=0, dp_rank=0, pp_rank=stage)

    def held(self, *, experts: bool) -> tuple[int, int]:
        """Ranks that hold the same share as this one, and which of them this is."""
        return (self.expert_copies, self.expert_copy) if experts else (self.copies, self.copy)

    def global_rank(self, *, tp_rank: int, cp_rank: int, dp_rank: int, pp_rank: int) -> int:
        return tp_rank + self.tp * (cp_rank + self.cp * (dp_rank + self.dp * pp_rank))


def start(config: Config, *, rank: int, world: int, init_method: str) -> Layout:
    """Join the process group (NCCL on CUDA, gloo without), build Megatron's groups and seed the generators.

    One per process; collective over all ``world`` ranks.  Raises ``ConfigError`` unless the layout has as
    many.
    """
    learn = config.learn
    if (ranks := learn.ranks) != world:
        raise ConfigError(
            f"learn.tp={learn.tp} times learn.pp={learn.pp} times learn.cp={learn.cp} times "
            f"learn.dp={learn.dp} needs {ranks} ranks, not {world}"
        )
    cpu.install()
    torch.set_num_threads(learn.threads)
    if cpu.needed():
        device = torch.device("cpu")
    else:
        # Under Ray each rank sees only its own GPU; under torchrun it sees all of its machine's.
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if cpu.needed() else "nccl",
        init_method=init_method,
        rank=rank,
        world_size=world,
        timeout=COLLECTIVE_DEADLINE,
        # No `device_id`: with it every later group is split off this one (ncclCommSplit), which takes all
        # ranks, and the group that carries weights to the engines is rank 0's alone.
    )
    return lay_out(config, rank, device)


def lay_out(config: Config, rank: int, device: torch.device) -> Layout:
    """Megatron's groups among ranks that have joined, and the generators' seed; collective."""
    learn = config.learn
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=learn.tp,
        pipeline_model_parallel_size=learn.pp,
        context_parallel_size=learn.cp,
        expert_model_parallel_size=learn.ep,
        expert_tensor_parallel_size=learn.expert_tp,
        distributed_timeout_minutes=int(COLLECTIVE_DEADLINE.total_seconds() // 60),
        create_gloo_process_groups=False,  # for Megatron's own checkpoints
    )
    torch.manual_seed(config.run.seed)
    # The "inference" tracker forks no RNG state, which needs no CUDA and is right while dropout is zero.
    tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed, inference_rng_tracker=True)
    return Layout(
        rank=rank,
        device=device,
        tp=learn.tp,
        pp=learn.pp,
        cp=learn.cp,
        dp=learn.dp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        ep=learn.ep,
        tp_group=_group(parallel_state.get_tensor_model_parallel_group()),
        pp_group=_group(parallel_state.get_pipeline_model_parallel_group()),
        cp_group=_group(parallel_state.get_context_parallel_group()),
        dp_group=_group(parallel_state.get_data_parallel_group()),
    )


def _group(group: object) -> dist.ProcessGroup:
    assert isinstance(group, dist.ProcessGroup)
    return group


def gather_rows(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[Σn, k] the ``rows`` [n, k] of all ranks of a group, with rows of zeros among them; collective."""
    most = torch.tensor(len(rows), device=rows.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, int(most) - len(rows)))
    gathered = [torch.empty_like(padded) for _ in range(group.size())]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat(gathered)


def stop() -> None:
    """Leave all process groups; the process may :func:`start` again."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
