"""The configuration's sections on machines: a run's nodes, and how it asks Slurm for them."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field
from __future__ import annotations

from dataclasses import dataclass

from system.config.rule import setting


@dataclass
class ClusterConfig:
    """Which nodes a run has.  Any of it may change on resume."""

    address: str = setting(
        "", "Ray cluster to join, HOST:PORT; empty: $RAY_ADDRESS where set, else this machine alone"
    )
    nodes: int = setting(1, "machines", least=1)
    gpus_per_node: int = setting(0, "0: everything runs on CPU", least=0)
    gpu: str = setting("h100", "for the memory estimate", choices=("h100", "h200", "a100"))
    learner_nodes: int = setting(
        0, "the first nodes, for the learner alone; 0: learner and rollout share all nodes", least=0
    )
    join_deadline_s: float = setting(
        300.0, "for all nodes to be there and all actors in their place", least=1
    )
    start_deadline_s: float = setting(
        180.0,
        "for an actor to come up, or back after it was lost (an engine: engine.start_deadline_s more)",
        least=1,
    )
    call_deadline_s: float = setting(
        1800.0, "of one call of the learner: a training step, an export, a checkpoint", least=1
    )
    silent_s: float = setting(
        60.0, "an actor that answers no heartbeat for so long is killed and started again", least=2
    )
    fork: str = setting(
        "auto",
        "fork the actors from one interpreter, which has imported what they need; only on this machine "
        "alone, of Linux, with gpus_per_node=0. auto: if it has no GPU; true: also if it has; false: not",
        choices=("auto", "true", "false"),
    )
    ray_agents: bool = setting(
        False,
        "start Ray's own agents (118 MB, 1.4 s) where this machine alone is the cluster: only runtime_env of "
        "Ray tasks of your own, or a Ray tool that asks them, needs any",
    )
    worker_restarts: int = setting(
        10,
        "times a rollout worker may die between two training steps before the run stops with the cause; 0: "
        "any number",
        least=0,
    )
    on_node_loss: str = setting(
        "end",
        "end: stop, so that the job requeues; continue: as long as an engine is left",
        choices=("end", "continue"),
    )


@dataclass
class SlurmConfig:
    """How a run asks SLURM for its nodes.  Any of it may change on resume."""

    partition: str = setting("", "empty: the site's default, as with account and qos")
    account: str = setting("", "who pays")
    qos: str = setting("", "quality of service")
    time: str = setting("04:00:00", "limit of one attempt; a run goes on over as many as it needs")
    signal_s: int = setting(
        600, "this long before the limit it checkpoints and requeues (Slurm may be 60 s early)", least=0
    )
    requeue: bool = setting(True, "go on in a further attempt")
    max_restarts: int = setting(50, "attempts after the first, for any reason", least=0)
    max_failures: int = setting(3, "infrastructure failures in a row, with no training step between", least=0)
    exclusive: bool = setting(True, "whole nodes")
    cpus_per_node: int = setting(0, "0: all of an exclusive node, else the site's default", least=0)
    mem: str = setting("", "per node, as sbatch takes it; empty: all of an exclusive node")
    heterogeneous: bool = setting(False, "learner nodes and rollout nodes as two components of one job")
    sbatch: list[str] = setting([], 'further options, e.g. ["--reservation=trees"]')
    rollout_sbatch: list[str] = setting([], "of the rollout component, if heterogeneous")
    venv: str = setting("", "virtual environment on every node; empty: the one that submits", path=True)
    setup: list[str] = setting([], 'shell lines on every node first, e.g. "module load cuda"')
    env: dict[str, str] = setting({}, "environment variables of every process")
    container: str = setting("none", "what wraps every process", choices=("none", "pyxis", "apptainer"))
    image: str = setting("", "container image; its python must have espalier", path=True)
    mounts: list[str] = setting([], "SRC:DST; the run directory is mounted anyway")
    scratch: str = setting("/tmp", "local to each node: Ray's session lives there", path=True)
