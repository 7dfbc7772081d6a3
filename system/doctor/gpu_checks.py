"""Would torch, Triton and SGLang work on these GPUs?  Pure: from :class:`Stack` to findings."""

from __future__ import annotations

from collections.abc import Iterator

from system.config import Config
from system.doctor.finding import Finding, finding
from system.doctor.gpu_facts import SGLANG, Stack, TorchSeen, numbers, own_servers, wants_gpus

# The oldest driver of NVIDIA's that runs programs of a CUDA release ("CUDA minor version compatibility").
DRIVERS = {11: 450, 12: 525, 13: 580}
GLIBC = (2, 34)  # sglang-kernel's wheel is manylinux_2_34


def examine(stack: Stack, config: Config) -> Iterator[Finding]:
    """Every check's findings; none for a recipe without GPUs."""
    if not wants_gpus(config):
        return
    for name, seen in stack.interpreters.items():
        yield cuda(name, seen, stack.driver)
    if stack.glibc and own_servers(config):
        yield glibc(stack.glibc)
    if stack.compiler is not None:
        yield compiler(stack.compiler)
    yield from headers(stack)
    if stack.gpus > 1:
        yield peers(stack.no_peer)
    if stack.memlock is not None and config.cluster.nodes > 1:
        yield memlock(stack.memlock)


def cuda(name: str, seen: TorchSeen, driver: tuple[int, ...]) -> Finding:
    """A build of torch against the driver."""
    topic = f"{name} torch"
    install = "make sglang BUILD=gpu" if name == SGLANG else "make gpu"
    if seen.error:
        return finding(True, topic, seen.error, f"install that environment anew: {install}", stops=True)
    if not seen.cuda:
        remedy = f"point pip at PyPI, which has CUDA builds, remove that environment, then {install}"
        return finding(True, topic, f"{seen.torch}, a CPU build", remedy, stops=True)
    wanted = DRIVERS.get(numbers(seen.cuda)[0], max(DRIVERS.values()))
    found = f"{seen.torch} for CUDA {seen.cuda}, which needs driver {wanted}"
    if not driver:  # a login node
        return finding(False, topic, f"{found}; none here", "", stops=True)
    remedy = f"have the driver updated to {wanted} or newer (the cluster's admins do that), on every node"
    found += f"; {'.'.join(map(str, driver))} is here"
    return finding(driver[0] < wanted, topic, found, remedy, stops=True)


def glibc(version: tuple[int, ...]) -> Finding:
    needed = ".".join(map(str, GLIBC))
    found = f"{'.'.join(map(str, version))}; SGLang's kernels need {needed}"
    remedy = "use a newer system (Debian 12, Ubuntu 22.04, RHEL 9.2 on are), or a container: slurm/container/"
    return finding(version[:2] < GLIBC, "glibc", found, remedy, stops=True)


def compiler(path: str) -> Finding:
    remedy = "Triton compiles with it on every node: apt-get install gcc, module load gcc, or set CC"
    return finding(not path, "C compiler", path or "none", remedy, stops=True)


def headers(stack: Stack) -> Iterator[Finding]:
    seen = {name: one for name, one in stack.interpreters.items() if not one.error}
    if seen:
        lacking = [name for name, one in seen.items() if not one.headers]
        found = f"Python.h is missing for {' and '.join(lacking)} Python" if lacking else "there"
        remedy = "Triton compiles against it: apt-get install python3-dev (dnf install python3-devel)"
        yield finding(bool(lacking), "Python headers", found, remedy, stops=True)


def peers(strangers: tuple[tuple[int, int], ...]) -> Finding:
    found = "all GPUs reach each other's memory"
    if strangers:
        some = ", ".join(f"{a}→{b}" for a, b in strangers[:4])
        found = f"{len(strangers)} of the pairs of GPUs do not reach each other's memory: {some}"
    remedy = (
        "NCCL goes through the host then, far slower: see nvidia-smi topo -m; IOMMU, ACS or MIG forbid it"
    )
    return finding(bool(strangers), "gpu to gpu", found, remedy, stops=False)


def memlock(limit: int) -> Finding:
    found = "no limit" if limit < 0 else f"limit {limit >> 10} KiB"
    remedy = (
        "InfiniBand pins memory: ulimit -l unlimited, in /etc/security/limits.d, and for jobs in slurmd's "
        "unit (LimitMEMLOCK)"
    )
    return finding(0 <= limit < 1 << 30, "locked memory", found, remedy, stops=False)
