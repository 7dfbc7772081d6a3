"""The job script: ``slurm/job.sh.j2`` filled in from a configuration; nothing is submitted or written."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from system.config import Config, ConfigError, SlurmConfig

SCRIPTS = Path(__file__).parents[2] / "slurm"


def render(config: Config, run: Path, points: Sequence[Path] = (), limit: int = 0) -> str:
    """The script of one run, or of a job array over ``points``: run directories within ``run``.

    The job starts in this process's directory and, if nothing else is configured, with its virtual
    environment.  ``limit``: points that may run at once; 0: all.  Raises ConfigError for what cannot stand
    in a script.
    """
    slurm, cluster = config.slurm, config.cluster
    if not re.fullmatch(r"/[\w./+=,:@-]*", str(run)):
        raise ConfigError(f"{run}: a path in a job script may have letters, digits and . _ + = , : @ - only")
    for line in (*slurm.sbatch, *slurm.rollout_sbatch, *slurm.setup):
        if "\n" in line:
            raise ConfigError(f"{line!r}: one line each, please (slurm.sbatch, slurm.setup)")
    split = cluster.learner_nodes if slurm.heterogeneous else 0
    queue = [*queue_options(slurm), f"--time={slurm.time}"]
    # The second component is the rollout's; it inherits nothing from the first.
    second = [*queue, *_component(config, cluster.nodes - split), *slurm.rollout_sbatch] if split else []
    template = Environment(
        loader=FileSystemLoader(SCRIPTS),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template.filters["quote"] = lambda value: shlex.quote(str(value))
    here = sys.prefix if sys.prefix != sys.base_prefix and slurm.container == "none" else ""
    return template.get_template("job.sh.j2").render(
        name=f"espalier-{run.name}",
        options=[
            *queue,
            *_job_options(config, run, len(points), limit),
            *slurm.sbatch,
            *_component(config, split or cluster.nodes),
        ],
        second=second,
        points=points,
        run=run,
        job=run / "slurm",
        env=slurm.env,
        settings={
            "GPUS": cluster.gpus_per_node,
            "TIME_SIGNAL_S": slurm.signal_s,
            "MAX_RESTARTS": slurm.max_restarts,
            "MAX_FAILURES": slurm.max_failures,
            "REQUEUE": str(slurm.requeue).lower(),
            "JOIN_S": int(cluster.join_deadline_s),
            # Seconds from one task's end to the end of all; 0: for ever, as the run goes on without a node.
            "WAIT_S": 0 if cluster.on_node_loss == "continue" else 60,
            "SCRATCH": slurm.scratch,
            "SRUN_OPTIONS": " ".join(_srun_options(config, split)),
        },
        launch=_container(config, run),
        directory=os.getcwd(),
        setup=slurm.setup,
        venv=slurm.venv or here,  # its `bin` comes first in PATH; empty: the image's python
    )


def outlined(script: str) -> str:
    """A script as it is shown: without the library, which is the same in each."""
    library = (SCRIPTS / "lib.sh").read_text(encoding="utf-8").strip()
    lines = len(library.splitlines())
    return script.replace(library, f"# … {lines} lines, the same in every job: slurm/lib.sh")


def _chosen(*options: tuple[str, object]) -> list[str]:
    """The options whose condition, beside them, is true."""
    return [option for option, condition in options if condition]


def _job_options(config: Config, run: Path, points: int, limit: int) -> list[str]:
    """What counts for the whole job.  (Slurm reads these once, from before the first `hetjob` line.)"""
    slurm = config.slurm
    return _chosen(
        (f"--output={run}/slurm/job-%{'A_%a' if points else 'j'}.log", True),
        ("--open-mode=append", True),
        (f"--signal=B:USR1@{slurm.signal_s}", slurm.signal_s),
        ("--requeue" if slurm.requeue else "--no-requeue", True),
        ("--no-kill", config.cluster.on_node_loss == "continue"),
        (f"--array=0-{points - 1}{f'%{limit}' if limit else ''}", points),
    )


def queue_options(slurm: SlurmConfig) -> list[str]:
    """Where a job waits, and on whose account, as far as that is configured."""
    return _chosen(
        (f"--partition={slurm.partition}", slurm.partition),
        (f"--account={slurm.account}", slurm.account),
        (f"--qos={slurm.qos}", slurm.qos),
    )


def _tasks(nodes: int) -> list[str]:
    """So many nodes with one task each."""
    return [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]


def _component(config: Config, nodes: int) -> list[str]:
    """Options of one component."""
    slurm, gpus = config.slurm, config.cluster.gpus_per_node
    return _tasks(nodes) + _chosen(
        (f"--gpus-per-node={gpus}", gpus),
        ("--exclusive", slurm.exclusive),
        (f"--cpus-per-task={slurm.cpus_per_node}", slurm.cpus_per_node),
        (f"--mem={slurm.mem or 0}", slurm.mem or slurm.exclusive),  # 0: all of the node
    )


def _srun_options(config: Config, split: int) -> list[str]:
    cpus = config.slurm.cpus_per_node
    return (["--het-group=0,1"] if split else _tasks(config.cluster.nodes)) + _chosen(
        ("--cpu-bind=none", True),  # one task per node, with all of its cores
        ("--no-kill", config.cluster.on_node_loss == "continue"),
        (f"--cpus-per-task={cpus}", cpus and not split),  # srun does not take it from sbatch
    )


def _container(config: Config, run: Path) -> list[str]:
    """What stands before `bash job.sh task` so that it runs in the container."""
    slurm = config.slurm
    mounts = [f"{run}:{run}", *slurm.mounts]
    if slurm.container == "pyxis":
        return [f"--container-image={slurm.image}", f"--container-mounts={','.join(mounts)}"]
    if slurm.container == "apptainer":
        binds = [word for mount in mounts for word in ("--bind", mount)]
        gpu = ["--nv"] if config.cluster.gpus_per_node else []
        return ["apptainer", "exec", *gpu, *binds, slurm.image]
    return []
