"""The configuration's sections ``cluster`` (which nodes a run has) and ``slurm`` (how it asks for them)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass
class ClusterConfig:
    address: str = (
        ""  # Ray cluster to join, HOST:PORT; empty: $RAY_ADDRESS where set, else this machine alone
    )
    nodes: int = 1
    gpus_per_node: int = 0  # 0: everything runs on CPU
    gpu: str = "h100"  # h100 | h200 | a100, for the memory estimate
    learner_nodes: int = 0  # the first nodes, for the learner alone; 0: learner and rollout share all nodes
    join_deadline_s: float = 300.0  # for all nodes to be there and all actors to have their place
    on_node_loss: str = "end"  # end: stop, so that the job requeues | continue: as long as an engine is left


@dataclass
class SlurmConfig:
    partition: str = ""  # empty: the site's default, as with account and qos
    account: str = ""
    qos: str = ""
    time: str = "04:00:00"  # limit of one attempt; a run goes on over as many as it needs
    signal_s: int = 600  # this long before the limit it checkpoints and requeues (Slurm may be 60 s early)
    requeue: bool = True
    max_restarts: int = 50  # attempts after the first, for any reason
    max_failures: int = 3  # infrastructure failures in a row without a training step between them
    exclusive: bool = True  # whole nodes
    cpus_per_node: int = 0  # 0: all of an exclusive node, else the site's default
    mem: str = ""  # per node, as sbatch takes it; empty: all of an exclusive node
    heterogeneous: bool = False  # learner nodes and rollout nodes as two components of one job
    sbatch: list[str] = field(default_factory=list)  # further options, e.g. ["--reservation=trees"]
    rollout_sbatch: list[str] = field(default_factory=list)  # of the rollout component, if heterogeneous
    venv: str = ""  # virtual environment on every node; empty: the one that submits
    setup: list[str] = field(default_factory=list)  # shell lines on every node first, e.g. "module load cuda"
    env: dict[str, str] = field(default_factory=dict)  # environment variables of every process
    container: str = "none"  # none | pyxis | apptainer
    image: str = ""  # container image; its python must have espalier
    mounts: list[str] = field(default_factory=list)  # SRC:DST; the run directory is mounted anyway
    scratch: str = "/tmp"  # local to each node: Ray's session lives there


MINIMA = {
    "cluster.nodes": 1,
    "cluster.gpus_per_node": 0,
    "cluster.learner_nodes": 0,
    "cluster.join_deadline_s": 1,
    "slurm.signal_s": 0,
    "slurm.max_restarts": 0,
    "slurm.max_failures": 0,
    "slurm.cpus_per_node": 0,
}

CHOICES: dict[str, tuple[str, ...]] = {
    "cluster.gpu": ("h100", "h200", "a100"),
    "cluster.on_node_loss": ("end", "continue"),
    "slurm.container": ("none", "pyxis", "apptainer"),
}


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


def problems(cluster: ClusterConfig, slurm: SlurmConfig) -> list[str]:
    """What types and ranges alone cannot tell, each with its remedy."""
    found: list[str] = []
    if cluster.learner_nodes and cluster.learner_nodes >= cluster.nodes:
        found.append(
            f"cluster.learner_nodes={cluster.learner_nodes} leaves none of cluster.nodes={cluster.nodes} for "
            "rollout; 0 lets learner and rollout share all nodes"
        )
    if slurm.heterogeneous and not cluster.learner_nodes:
        found.append("slurm.heterogeneous=true needs cluster.learner_nodes: the size of the first component")
    limit = seconds(slurm.time)
    if limit is None:
        found.append(f"slurm.time={slurm.time!r}: write minutes, H:MM:SS or D-HH:MM:SS (in YAML in quotes)")
    elif limit <= slurm.signal_s:
        found.append(
            f"slurm.time={slurm.time} leaves no time to train: the run checkpoints slurm.signal_s="
            f"{slurm.signal_s} seconds before the limit"
        )
    if slurm.container != "none" and not slurm.image:
        found.append(f"slurm.container={slurm.container} needs slurm.image")
    if slurm.image and slurm.container == "none":
        found.append("slurm.image is set: choose slurm.container=pyxis or slurm.container=apptainer")
    return found
