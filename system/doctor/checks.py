"""From facts about a machine to findings: what is well, what is doubtful, what stops a recipe from running.

Pure: no I/O.  Each check looks at one thing and yields its findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from system.config import Config, without_effect
from system.doctor import cluster_checks, gpu_checks
from system.doctor.facts import Facts
from system.doctor.finding import Finding, Level, finding
from system.doctor.problem import Problem
from system.plan.units import byte_size

GIB = 1 << 30


Check = Callable[[Facts, Config], Iterator[Finding]]


def examine(facts: Facts, config: Config) -> list[Finding]:
    """Every check's findings, in a fixed order."""
    return [found for check in CHECKS for found in check(facts, config)]


def stops(findings: Sequence[Finding]) -> bool:
    return any(one.level is Level.PROBLEM for one in findings)


def software(facts: Facts, config: Config) -> Iterator[Finding]:
    found = f"{'.'.join(map(str, facts.python))} on {facts.system}"
    yield finding(facts.python < (3, 11, 0), "python", found, "use Python 3.11 or newer", stops=True)
    for name, version in facts.packages.items():
        if version is None:
            yield Finding(Level.PROBLEM, name, "not installed", "make install (or pip install -e .)")
        else:
            yield _installed(facts, name, version)


def _installed(facts: Facts, name: str, version: str) -> Finding:
    """Is it the version that Espalier is tested with?"""
    pin = facts.pins.get(name, "")
    if pin in ("", version.split("+")[0]):
        return Finding(Level.OK, name, version)
    return Finding(Level.WARNING, name, f"{version}, tested with {pin}", f"pip install '{name}=={pin}'")


def gpus(facts: Facts, config: Config) -> Iterator[Finding]:
    wanted = config.cluster.gpus_per_node
    if config.engine.device == "cuda":
        wanted = max(wanted, 1)
    if facts.gpus:
        found = f"{len(facts.gpus)} × {facts.gpus[0]}, driver {facts.driver or 'unknown'}, CUDA {facts.cuda}"
    elif facts.gpus_listed:
        build = facts.cuda or "a CPU build"
        found = f"{facts.gpus_listed} listed by driver {facts.driver}, none usable by torch ({build})"
    else:
        found = "none"
    short, unusable = len(facts.gpus) < wanted, facts.gpus_listed > len(facts.gpus)
    remedy = f"this recipe wants {wanted} per node (cluster.gpus_per_node, engine.device): "
    if unusable:
        remedy += "install a CUDA build of torch that this driver supports, or look at CUDA_VISIBLE_DEVICES"
    else:
        remedy += "run it where they are, or set cluster.gpus_per_node=0 and engine.device=cpu"
    yield finding(short or unusable, "gpu", found, remedy, stops=short)


def layout(facts: Facts, config: Config) -> Iterator[Finding]:
    """Are there CPUs for the learner and the engines?"""
    world = config.learn.ranks
    found = f"learner {world} ranks (tp×pp×cp×dp), engines {config.engine.replicas} × {config.engine.tp}"
    crowded = config.cluster.gpus_per_node == 0 and world + config.engine.replicas > 2 * facts.cpus
    remedy = f"only {facts.cpus} CPUs: fewer ranks or replicas would be faster"
    yield finding(crowded, "processes", found, remedy, stops=False)


def sglang(facts: Facts, config: Config) -> Iterator[Finding]:
    if facts.sglang is not None:
        yield _installed(facts, "sglang", facts.sglang)
        if facts.nccl:
            yield _one_nccl(facts, config)
        return
    needed = config.engine.name == "sglang" and not config.engine.urls
    found = "not installed" + ("" if needed else " (only engine=sglang needs it)")
    yield finding(needed, "sglang", found, facts.sglang_error, stops=True)


def _one_nccl(facts: Facts, config: Config) -> Finding:
    """NCCL refuses to talk to another version of itself, and weights go from one environment to the other."""
    found = f"{facts.nccl} here, {facts.sglang_nccl or 'none (a CPU build)'} in SGLang's environment"
    remedy = (
        "pip install --no-deps -r system/engine/sglang/requirements-nccl.txt, into both environments"
        if facts.sglang_nccl
        else "rm -r .venv-sglang, then make sglang BUILD=gpu: what is there was installed for CPU"
    )
    needed = config.engine.name == "sglang" and not config.engine.urls and config.cluster.gpus_per_node > 0
    return finding(facts.nccl != facts.sglang_nccl, "one nccl", found, remedy, stops=needed)


def network(facts: Facts, config: Config) -> Iterator[Finding]:
    for backend, error in facts.collectives.items():
        needed = backend == ("nccl" if config.cluster.gpus_per_node else "gloo")
        remedy = (
            "NCCL_DEBUG=INFO says more; check driver, CUDA_VISIBLE_DEVICES, /dev/shm and NCCL_SOCKET_IFNAME"
            if backend == "nccl"
            else "check that the loopback interface is up (ip addr) and GLOO_SOCKET_IFNAME"
        )
        found = error or "all-reduce on this machine works"
        yield finding(bool(error), backend, found, remedy, stops=needed)
    name = facts.hostname
    found = f"{name}: {facts.hostname_error or 'resolves'}"
    remedy = f"add {name} to /etc/hosts or to the site's DNS: other nodes look it up"
    yield finding(bool(facts.hostname_error), "hostname", found, remedy, stops=config.cluster.nodes > 1)


def room(facts: Facts, config: Config) -> Iterator[Finding]:
    """Shared memory, disk and memory, and open files."""
    remedy = "Ray's object store and NCCL use it; in a container start with --shm-size=8g"
    found = f"{byte_size(facts.shm_bytes)} free"
    yield finding(facts.shm_bytes < 2 * GIB, "/dev/shm", found, remedy, stops=False)
    found = f"{byte_size(facts.disk_bytes)} free in {facts.disk_path}"
    remedy = "make room, or set run.dir to a larger file system; checkpoint.keep bounds what a run keeps"
    yield finding(facts.disk_bytes < 10 * GIB, "disk", found, remedy, stops=False)
    remedy = "end other programs, or use fewer learner ranks, engine replicas and rollout workers"
    found = f"{byte_size(facts.memory_bytes)} available"
    yield finding(facts.memory_bytes < 4 * GIB, "memory", found, remedy, stops=facts.memory_bytes < GIB)
    # A rollout worker holds a connection per branch; Ray and the libraries need some hundreds.
    branches = config.rollout.concurrency * config.rollout.leaves // config.rollout.workers
    wanted, hard = 512 + branches, facts.open_files_hard
    raised = "" if hard >= wanted else f", whose hard limit ({hard}) must rise"
    found = f"limit {facts.open_files}; {branches} branches per rollout worker"
    remedy = f"ulimit -n {wanted}{raised}; or set rollout.concurrency lower, or rollout.workers higher"
    yield finding(facts.open_files < wanted, "open files", found, remedy, stops=True)


def sandbox(facts: Facts, config: Config) -> Iterator[Finding]:
    found = facts.sandbox_error or f"programs are confined by {', '.join(facts.sandbox)}"
    remedy = "allow user namespaces, seccomp or Landlock here, or take python out of tools.names"
    needed = "python" in config.tools.names
    yield finding(bool(facts.sandbox_error), "sandbox", found, remedy, stops=needed)


def recipe(facts: Facts, config: Config) -> Iterator[Finding]:
    """What :mod:`system.doctor.preflight` has against the recipe; what two checks meet is told once."""
    told = set[Problem]()
    for topic, problems in facts.preflight.items():
        if not problems:
            yield Finding(Level.OK, topic, "nothing stands against the recipe")
        for one in (problem for problem in problems if problem not in told):
            told.add(one)
            found = str(replace(one, remedy=""))
            yield Finding(Level.PROBLEM, topic, found, one.remedy or "correct it in the recipe")
    for line in without_effect(config):
        yield Finding(Level.WARNING, "settings", line, "take it out of the recipe, or set what it goes with")


def environment(facts: Facts, config: Config) -> Iterator[Finding]:
    """Worlds that are built again: do they answer as before?"""
    if (tried := facts.replays) is None:
        return
    if tried.untried:
        yield Finding(Level.WARNING, "replay", f"not tried: {tried.untried}", "look at it in a short run")
        return
    found = f"{tried.same} of {tried.tried} demonstrations answered the same when done again"
    remedy = (
        "draw from a generator that reseed(seed) sets, and take clocks and paths out by normalise(text): "
        "forks and resumes that replay would end unscored"
    )
    fault = f": {tried.fault}" if tried.fault else ""
    yield finding(tried.same < tried.tried, "replay", found + fault, remedy, stops=False)


def slurm(facts: Facts, config: Config) -> Iterator[Finding]:
    told = facts.slurm
    if "SLURM_JOB_ID" not in told:
        return
    nodes, wanted = told.get("SLURM_JOB_NUM_NODES", "1"), config.cluster.nodes
    found = f"job {told['SLURM_JOB_ID']} has {nodes}, the recipe wants {wanted}"
    remedy = f"ask for --nodes={wanted} (espalier submit does), or set cluster.nodes={nodes}"
    yield finding(nodes != str(wanted), "slurm nodes", found, remedy, stops=True)
    granted = told.get("SLURM_GPUS_ON_NODE", "")
    if granted.isdigit():
        found = f"{granted} granted on this node, {len(facts.gpus)} usable"
        remedy = (
            "the grant and CUDA_VISIBLE_DEVICES disagree: ask for --gpus-per-node; see the site's gres.conf"
        )
        yield finding(int(granted) != len(facts.gpus), "slurm gpus", found, remedy, stops=False)


def stack(facts: Facts, config: Config) -> Iterator[Finding]:
    yield from gpu_checks.examine(facts.stack, config)


def nodes(facts: Facts, config: Config) -> Iterator[Finding]:
    yield from cluster_checks.examine(facts.nodes, config)


CHECKS: tuple[Check, ...] = (
    *(software, gpus, stack, layout, sglang, network, room, sandbox, recipe, environment, slurm, nodes),
)
