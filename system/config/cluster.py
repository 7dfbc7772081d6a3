"""What is asked of machines: nodes, and SLURM's job."""

from __future__ import annotations

import re
from collections.abc import Iterator

from system.config.schema import Config


def cluster_problems(config: Config) -> Iterator[str]:
    """Nodes, and what SLURM is asked for."""
    cluster, slurm = config.cluster, config.slurm
    if cluster.learner_nodes and cluster.learner_nodes >= cluster.nodes:
        yield (
            f"cluster.learner_nodes={cluster.learner_nodes} leaves none of cluster.nodes={cluster.nodes} for "
            "rollout; 0 lets learner and rollout share all nodes"
        )
    if slurm.heterogeneous and not cluster.learner_nodes:
        yield "slurm.heterogeneous=true needs cluster.learner_nodes: the size of the first component"
    limit = seconds(slurm.time)
    if limit is None:
        yield f"slurm.time={slurm.time!r}: write minutes, H:MM:SS or D-HH:MM:SS (in YAML in quotes)"
    elif limit <= slurm.signal_s:
        yield (
            f"slurm.time={slurm.time} leaves no time to train: the run checkpoints slurm.signal_s="
            f"{slurm.signal_s} seconds before the limit; ask for more time, or set slurm.signal_s lower"
        )
    if slurm.container != "none" and not slurm.image:
        yield f"slurm.container={slurm.container} needs slurm.image"
    if slurm.image and slurm.container == "none":
        yield "slurm.image is set: choose slurm.container=pyxis or slurm.container=apptainer"


def seconds(limit: str) -> int | None:
    """A time limit as sbatch reads it: M, M:SS, H:MM:SS, D-H, D-H:MM or D-H:MM:SS; None if it is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:  # minutes come first
        numbers.insert(0, 0)
    hours, minutes, rest = [*numbers, 0, 0][:3]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + rest
