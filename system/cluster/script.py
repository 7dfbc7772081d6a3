"""The job script: ``slurm/job.sh.j2`` filled in from a configuration; nothing is submitted or written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from system.config import Config, ConfigError, SlurmConfig

SCRIPTS = Path(__file__).parents[2] / "slurm"


@dataclass(frozen=True, slots=True)
class Site:
    """Where the job will find things, as the submitting process knows them."""

    directory: str  # relative paths of the configuration start here
    venv: str  # its `bin` comes first in PATH; empty: the image's python


def render(
    config: Config, *, name: str, run: Path, site: Site, points: Sequence[Path] = (), limit: int = 0
) -> str:
    """The script of one run, or of a job array over ``points``: run directories within ``run``.

    ``limit``: points that may run at once; 0: all.  Raises ConfigError for what cannot stand in a script.
    """
    slurm, cluster = config.slurm, config.cluster
    if not re.fullmatch(r"/[\w./+=,:@-]*", str(run)):
        raise ConfigError(f"{run}: a path in a job script may have letters, digits and . _ + = , : @ - only")
    for line in (name, *slurm.sbatch, *slurm.rollout_sbatch, *slurm.setup):
        if "\n" in line:
            raise ConfigError(f"{line!r}: one line each, please (slurm.sbatch, slurm.setup, run.name)")
    split = cluster.learner_nodes if slurm.heterogeneous else 0
    template = Environment(
        loader=FileSystemLoader(SCRIPTS),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template.filters["quote"] = lambda value: shlex.quote(str(value))
    return template.get_template("job.sh.j2").render(
        name=name,
        options=[*_job_options(config, run, len(points), limit), *slurm.sbatch],
        first=_component(config, split or cluster.nodes),
        second=_second(config, cluster.nodes - split) if split else [],
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
            "SRUN_OPTIONS": _srun_options(config, split),
        },
        launch=_container(config, run),
        directory=site.directory,
        setup=slurm.setup,
        venv=slurm.venv or ("" if slurm.container != "none" else site.venv),
    )


def _job_options(config: Config, run: Path, points: int, limit: int) -> list[str]:
    """What counts for the whole job.  (Slurm reads these once, from before the first `hetjob` line.)"""
    slurm = config.slurm
    options = [*queue_options(slurm), *_time(slurm)]
    options += [f"--output={run}/slurm/job-%{'A_%a' if points else 'j'}.log", "--open-mode=append"]
    if slurm.signal_s:
        options.append(f"--signal=B:USR1@{slurm.signal_s}")
    options.append("--requeue" if slurm.requeue else "--no-requeue")
    if config.cluster.on_node_loss == "continue":
        options.append("--no-kill")
    if points:
        options.append(f"--array=0-{points - 1}{f'%{limit}' if limit else ''}")
    return options


def _second(config: Config, nodes: int) -> list[str]:
    """The rollout component of a heterogeneous job; it inherits nothing from the first."""
    slurm = config.slurm
    return [*queue_options(slurm), *_time(slurm), *_component(config, nodes), *slurm.rollout_sbatch]


def queue_options(slurm: SlurmConfig) -> list[str]:
    """Where a job waits, and on whose account, as far as that is configured."""
    named = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos}
    return [f"--{key}={value}" for key, value in named.items() if value]


def _time(slurm: SlurmConfig) -> list[str]:
    return [f"--time={slurm.time}"] if slurm.time else []


def _component(config: Config, nodes: int) -> list[str]:
    """Options of one component: so many nodes with one task each."""
    slurm, gpus = config.slurm, config.cluster.gpus_per_node
    options = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    if gpus:
        options.append(f"--gpus-per-node={gpus}")
    if slurm.exclusive:
        options.append("--exclusive")
    if slurm.cpus_per_node:
        options.append(f"--cpus-per-task={slurm.cpus_per_node}")
    if slurm.mem or slurm.exclusive:
        options.append(f"--mem={slurm.mem or 0}")  # 0: all of the node
    return options


def _srun_options(config: Config, split: int) -> str:
    nodes = config.cluster.nodes
    options = (
        ["--het-group=0,1"] if split else [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    )
    options.append("--cpu-bind=none")  # one task per node, with all of its cores
    if config.cluster.on_node_loss == "continue":
        options.append("--no-kill")
    if config.slurm.cpus_per_node and not split:
        options.append(f"--cpus-per-task={config.slurm.cpus_per_node}")  # srun does not take it from sbatch
    return " ".join(options)


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
