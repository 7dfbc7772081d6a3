"""Accelerators by name, with the vendor's published figures and the efficiencies that we assume."""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9  # vendors count in powers of ten
GIB = 2.0**30
NODE = 8  # GPUs of a machine, where a configuration names none


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peak figures (NVIDIA's data sheets) and the share of each that a well-run program reaches."""

    name: str
    memory: float  # bytes
    flops: float  # dense bf16, per second
    hbm: float  # bytes per second
    network: float  # bytes per second and GPU, between machines, one direction
    nvlink: float  # the same, between the GPUs of one machine
    pcie: float  # to and from pinned memory of the host (measured on an H100)
    # Assumptions, not data-sheet values.
    train_mfu: float = 0.50  # share of `flops` in one rank's kernels of a training step; 0.53 was measured
    prefill_mfu: float = 0.50  # the same, of a prompt's forward pass
    decode_mfu: float = 0.50  # the same, of the matrix products of a decode step with many sequences
    hbm_share: float = 0.70  # share of `hbm` that a decode step reaches
    network_share: float = 0.50  # share of `network` that a weight transfer reaches
    nvlink_share: float = 0.70  # share of `nvlink` that a collective of large tensors reaches
    bucket_s: float = 0.01  # of one bucket of weights: a request to each server, all at once, and its answer
    swap_s: float = 0.3  # of one update, each server for itself: pausing at a token boundary, proof, going on
    step_overhead_s: float = 2e-3  # of one decode step: launches, scheduling, sampling
    sequence_overhead_s: float = 1e-5  # of one sequence in a decode step: sampling and streaming on the host
    host: float = 40 * GB  # bytes per second of its host's memory that one rank's CPU threads reach
    allreduce_s: float = 1.5e-5  # latency of one all-reduce of a decode step (two per layer under TP)
    reserved: float = 3 * GIB  # CUDA context, NCCL buffers, allocator's fragments


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 80 * GB, 989e12, 3.35e12, 50 * GB, 450 * GB, 55 * GB),
        Gpu("h200", 141 * GB, 989e12, 4.8e12, 50 * GB, 450 * GB, 55 * GB),
        Gpu("a100", 80 * GB, 312e12, 2.0e12, 25 * GB, 300 * GB, 25 * GB),
    )
}
