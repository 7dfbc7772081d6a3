"""``espalier submit``: plan a run or a sweep for SLURM, show it, and hand it in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from system.cluster import slurm
from system.cluster.placement import by_node, paper_nodes, place, spare_gpus
from system.cluster.script import outlined, queue_options, render
from system.config import Config, ConfigError, load, to_dict
from system.observe.rundir import RunDir, RunDirError, write_atomic
from system.observe.terminal import shown
from system.redact import redact

SUBMISSION = "slurm/submission.json"
ALIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD")


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One run of a sweep."""

    name: str
    values: dict[str, str]  # swept key -> its value here
    config: Config

    @property
    def label(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items())


def describe(config: Config, *, supervised: bool = False) -> str:
    """Who runs where, the parallel layout, the memory estimate; ConfigError for what cannot run.
    ``supervised``: of a run of ``espalier sft``, whose learner has all nodes to itself.
    """
    nodes = paper_nodes(config)
    seats = place(config, nodes, "learner" if supervised else "")
    learn, slurm_, cluster = config.learn, config.slurm, config.cluster
    kind = "a heterogeneous job" if slurm_.heterogeneous else "one job"
    engines = f"{config.engine.replicas} {config.engine.name} of tp {config.engine.tp}"
    if supervised:
        engines = f"{engines}, once the learner is gone" if config.sft.samples else "none"
    lines = [
        f"{cluster.nodes} node(s) of {cluster.gpus_per_node} GPU(s), {kind}, {slurm_.time} per attempt, "
        f"partition {slurm_.partition or '(default)'}, account {slurm_.account or '(default)'}",
        *(f"  {line}" for line in by_node(seats, nodes)),
        f"learner: tp {learn.tp} x pp {learn.pp} x cp {learn.cp} x dp {learn.dp}; engines: {engines}",
    ]
    if cluster.gpus_per_node:
        from system.plan import plan, supervised_plan, text

        gpu = cluster.gpu
        lines += ["", supervised_plan(config, gpu=gpu)[0] if supervised else text(plan(config, gpu=gpu))]
        if spare := spare_gpus(seats, nodes):
            lines.append(f"note: {spare} GPU(s) of the job would stand idle")
    return "\n".join(lines)


def submit_run(
    config: Config, config_name: str, *, resume: Path | None, dry_run: bool, supervised: bool = False
) -> int:
    """Submit one run: a new one, or (``resume``) one whose run directory is there.  ``supervised``: of
    ``espalier sft``.
    """
    print(shown(describe(config, supervised=supervised)))
    config_name += "-sft" if supervised else ""
    if dry_run:
        root = resume or Path(config.run.dir) / (config.run.name or f"{config_name}-s{config.run.seed}")
        print(f"\n{shown(outlined(render(config, root.resolve())))}", end="")
        print(f"\n# dry run: nothing was submitted; the run directory would be {shown(str(root))}")
        return 0
    run = RunDir.open(resume) if resume else RunDir.create(config, config_name, supervised=supervised)
    root = run.root.resolve()
    if resume:
        _refuse_twice(root)
        run.write_config(config)
    script = _write_script(root, render(config, root))
    try:
        job = slurm.sbatch(script)
    except ConfigError as error:
        again = f"not submitted; when that is mended: espalier submit --resume {run.root}"
        raise ConfigError(f"{error}\n{again}") from error
    _record(root, [job])
    print(f"\nrun directory: {run.root}\nsubmitted as job {job}; see: espalier status {run.root}")
    return 0


def submit_sweep(
    path: Path,
    overrides: Sequence[str],
    sweeps: Sequence[str],
    *,
    at_once: int,
    dry_run: bool,
    check: Callable[[Config], None],
) -> int:
    """Submit every combination of the swept values: one job array per shape of job.

    ``check`` raises ConfigError for a point that cannot be run.
    """
    points = list(sweep_points(path, overrides, sweeps, check))
    base = points[0].config
    root = Path(base.run.dir) / (base.run.name or f"{path.stem}-sweep")
    if not dry_run:
        root = _claim(root)
    root = root.resolve()
    runs = {point.name: root / "points" / point.name for point in points}
    groups: dict[str, list[SweepPoint]] = {}  # alike in all that Slurm is asked for: an array cannot vary it
    for point in points:
        shape = to_dict(point.config)
        groups.setdefault(json.dumps([shape["cluster"], shape["slurm"]]), []).append(point)
    scripts: dict[str, str] = {}
    for group in groups.values():
        names = [point.name for point in group]
        print(f"{len(group)} point(s) alike in their job ({', '.join(names)}):")
        print(f"{shown(describe(group[0].config))}\n")
        scripts[names[0]] = render(group[0].config, root, [runs[name] for name in names], at_once)
    for point in points:
        print(f"{point.name}  {shown(point.label)}")
    if dry_run:
        print("", *(shown(outlined(script)) for script in scripts.values()), sep="\n", end="")
        print(f"\n# dry run: nothing was submitted; the sweep's directory would be {shown(str(root))}")
        return 0
    for point in points:
        point.config.run.dir, point.config.run.name = str(root / "points"), point.name
        RunDir.create(point.config)
    table = [{"name": point.name, "values": point.values} for point in points]
    write_atomic(root / "sweep.json", json.dumps({"recipe": str(path), "points": table}, indent=2) + "\n")
    jobs: list[str] = []
    for first, script in scripts.items():
        jobs.append(slurm.sbatch(_write_script(root, script, f"job-{first}.sh")))
        _record(root, jobs)
    summary = _write_script(root, render(base, root, list(runs.values()), at_once))
    # The job that runs after the last point, however that ended.
    closing = slurm.sbatch(
        _write_script(root, f'#!/bin/bash\nexec bash "{summary}" summary\n', "summary.sh"),
        [
            f"--dependency=afterany:{':'.join(jobs)}",
            "--nodes=1",
            "--ntasks=1",
            "--time=00:10:00",
            "--job-name=espalier-summary",
            f"--output={root}/slurm/summary-%j.log",
            *queue_options(base.slurm),
        ],
    )
    _record(root, [*jobs, closing])
    print(
        f"\nsubmitted as jobs {', '.join(jobs)}; job {closing} draws the table and plot in {root}\n"
        f"see: espalier status {root}"
    )
    return 0


def sweep_points(
    path: Path, overrides: Sequence[str], sweeps: Sequence[str], check: Callable[[Config], None]
) -> Iterator[SweepPoint]:
    """Every combination of ``key=a,b,c`` words, each a checked configuration."""
    axes: list[tuple[str, list[str]]] = []
    for word in sweeps:
        key, _, values = word.partition("=")
        if not key or not values:
            raise ConfigError(f"--sweep {word}: write key=a,b,c, for example --sweep flow.staleness=0,1,2")
        axes.append((key, [value for value in values.split(",") if value]))
    for number, chosen in enumerate(product(*(values for _, values in axes))):
        values = dict(zip((key for key, _ in axes), chosen, strict=True))
        config = load(path, [*overrides, *(f"{key}={value}" for key, value in values.items())])
        point = SweepPoint(f"{number:03d}", values, config)
        try:
            check(config)
            place(config, paper_nodes(config))
        except ConfigError as error:
            raise ConfigError(f"point {point.label}: {error}") from error
        yield point


def _write_script(root: Path, text: str, name: str = "job.sh") -> Path:
    path = root / "slurm" / name
    path.parent.mkdir(exist_ok=True)
    for old in (path.parent / "cancelled", root / "attempts" / "failures"):  # what an earlier job left
        old.unlink(missing_ok=True)
    write_atomic(path, text, private=redact(text) != text)
    return path


def _record(root: Path, jobs: Sequence[str]) -> None:
    path = root / SUBMISSION
    write_atomic(path, json.dumps({"jobs": list(jobs), "time": time.time()}) + "\n")


def jobs_of(root: Path) -> list[str]:
    """The jobs a run or sweep was submitted as.  Raises RunDirError for one that was not."""
    if not root.is_dir():
        raise RunDirError(f"no such run directory: {root}")
    path = root / SUBMISSION
    if not path.is_file():
        if (sweep := root.resolve().parents[1] / "sweep.json").is_file():
            raise RunDirError(f"{root} is a point of a sweep, which has its jobs: {sweep.parent}")
        raise RunDirError(f"{root} was not submitted: it has no {SUBMISSION}")
    return [str(job) for job in json.loads(path.read_text(encoding="utf-8"))["jobs"]]


def _claim(root: Path) -> Path:
    """A new directory for a sweep; a name that is taken gets the next free number."""
    number, wanted = 2, root
    while True:
        try:
            wanted.mkdir(parents=True)
        except FileExistsError:
            wanted, number = root.with_name(f"{root.name}-{number}"), number + 1
        else:
            return wanted


def _refuse_twice(root: Path) -> None:
    """Two jobs in one run directory would train one model twice."""
    if not (root / SUBMISSION).is_file():
        return
    waiting = slurm.states(jobs_of(root))
    busy = [f"{job} is {state}" for job, state in waiting.items() if state.split()[0] in ALIVE]
    if busy:
        raise RunDirError(f"{root} has a job already: {', '.join(busy)}")
