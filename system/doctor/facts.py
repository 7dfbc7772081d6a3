"""What is so on this machine: gathered once, judged elsewhere (:mod:`system.doctor.checks`)."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from system.config import Config, ToolsConfig
from system.doctor.cluster_facts import Nodes, gather_nodes
from system.doctor.gpu_facts import Stack, gather_stack
from system.doctor.preflight import look
from system.doctor.problem import Problem
from system.doctor.replay_facts import Replays, replays
from system.engine.sglang.command import SglangMissing, interpreter
from system.serving import free_port

PACKAGES = ("torch", "megatron-core", "ray", "transformers", "aiohttp", "safetensors")
COLLECTIVE_DEADLINE_S = 90.0
SANDBOX_DEADLINE_S = 60.0
_ALL_REDUCE = """
import sys, torch, torch.distributed as dist
backend, rank, world, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
device = f"cuda:{rank}" if backend == "nccl" else "cpu"
one = torch.ones(4, device=device) * (rank + 1)
dist.all_reduce(one)
assert one.tolist() == [world * (world + 1) / 2] * 4, one
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Facts:
    """An error is told in words; an empty text means that all is well."""

    python: tuple[int, int, int] = (0, 0, 0)
    system: str = ""
    packages: Mapping[str, str | None] = field(default_factory=dict)  # name -> version; None: missing
    pins: Mapping[str, str] = field(default_factory=dict)  # name -> the version Espalier asks for
    cpus: int = 0
    gpus: tuple[str, ...] = ()  # names, as torch sees them
    gpus_listed: int = 0  # as the driver's own tool lists them
    driver: str = ""
    cuda: str = ""  # the version torch was built for; empty: a CPU build
    sglang: str | None = None  # version, in whichever environment runs it
    sglang_error: str = ""
    nccl: str = ""  # version that torch runs with; empty: a CPU build
    sglang_nccl: str = ""  # the same of SGLang's interpreter, looked at where torch here has one
    collectives: Mapping[str, str] = field(default_factory=dict)  # backend -> error
    hostname: str = ""
    hostname_error: str = ""
    shm_bytes: int = 0  # free
    disk_bytes: int = 0  # free, where runs are written
    disk_path: str = ""
    open_files: int = 0  # soft limit
    open_files_hard: int = 0
    memory_bytes: int = 0  # available
    sandbox: tuple[str, ...] = ()  # how programs are confined
    sandbox_error: str = ""
    preflight: Mapping[str, Sequence[Problem]] = field(default_factory=dict)  # topic -> what stops the recipe
    replays: Replays | None = None  # None: there are no worlds, or none that would be replayed
    slurm: Mapping[str, str] = field(default_factory=dict)  # SLURM_* of the allocation this runs in
    stack: Stack = field(default_factory=Stack)  # below torch
    nodes: Nodes = field(default_factory=Nodes)  # of the allocation, where it has several


def gather(config: Config) -> Facts:
    """Look at this machine: a few seconds, most of them the collectives'."""
    cuda, gpus = _torch()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    place = _existing(Path(config.run.dir))
    sglang, sglang_error = _sglang(config)
    confined, sandbox_error = asyncio.run(_sandbox(config.tools))
    hostname = socket.gethostname()
    driver, listed = _driver()
    nccl = _nccl(sys.executable) if cuda else ""
    slurm = {key: value for key, value in os.environ.items() if key.startswith("SLURM_")}
    return Facts(
        python=sys.version_info[:3],
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages={name: version_of(name) for name in PACKAGES},
        pins=_pins(),
        cpus=usable_cpus(),
        gpus=gpus,
        gpus_listed=listed,
        driver=driver,
        cuda=cuda,
        sglang=sglang,
        sglang_error=sglang_error,
        nccl=nccl,
        sglang_nccl=_nccl(interpreter(config.engine)) if nccl and sglang else "",
        collectives={
            "gloo": all_reduce("gloo", 2),
            **({"nccl": all_reduce("nccl", min(len(gpus), 2))} if gpus else {}),
        },
        hostname=hostname,
        hostname_error=_error(lambda: socket.getaddrinfo(hostname, None)),
        shm_bytes=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        disk_bytes=shutil.disk_usage(place).free,
        disk_path=str(place),
        open_files=soft,
        open_files_hard=hard,
        memory_bytes=psutil.virtual_memory().available,
        sandbox=confined,
        sandbox_error=sandbox_error,
        preflight=look(config, without=left_out(slurm)),
        replays=replays(config),
        slurm=slurm,
        stack=gather_stack(config, driver),
        nodes=gather_nodes(slurm, place),
    )


def left_out(slurm: Mapping[str, str]) -> set[str]:
    """Topics of :func:`look` for others: engine and GPUs are looked at more closely here, and on the nodes of
    an allocation (its variables ``slurm``) it is the job that starts Ray.
    """
    return {"engine", "gpus"} | ({"ray"} if "SLURM_JOB_ID" in slurm else set[str]())


def all_reduce(backend: str, world: int, deadline_s: float = COLLECTIVE_DEADLINE_S) -> str:
    """Add up a tensor over ``world`` processes of this machine; the error, if there was one."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _ALL_REDUCE, backend, str(rank), str(world), port],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors: list[str] = []
    try:
        for rank in ranks:
            _, said = rank.communicate(timeout=deadline_s)
            if rank.returncode:
                errors.append(_last_line(said))
    except subprocess.TimeoutExpired:
        errors.append(f"no answer within {deadline_s:.0f} s")
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.communicate()
    return errors[0] if errors else ""


def _torch() -> tuple[str, tuple[str, ...]]:
    try:
        import torch
    except ImportError:  # told by its missing version
        return "", ()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.version.cuda or "", tuple(torch.cuda.get_device_name(i) for i in range(count))


def _driver() -> tuple[str, int]:
    """(driver version, GPUs) as nvidia-smi tells them."""
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "", 0
    return (told[0] if told else ""), len(told)


def _sglang(config: Config) -> tuple[str | None, str]:
    try:
        python = interpreter(config.engine)
        look = "import importlib.metadata as m; print(m.version('sglang'))"
        done = subprocess.run([python, "-c", look], capture_output=True, text=True, timeout=60, check=True)
    except SglangMissing as error:
        return None, str(error)
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"its interpreter fails: {error}"
    return done.stdout.strip(), ""


def _nccl(python: str) -> str:
    """The version of NCCL in an interpreter's torch; empty for a CPU build, words if it cannot be told."""
    look = "import torch; v = torch.version.cuda and torch.cuda.nccl.version(); print(*v or '', sep='.')"
    try:
        done = subprocess.run([python, "-c", look], capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"
    return done.stdout.strip()


async def _sandbox(tools: ToolsConfig) -> tuple[tuple[str, ...], str]:
    from system.tools.sandbox.sandbox import Sandbox, SandboxLimits, SandboxUnavailable

    sandbox = Sandbox(SandboxLimits.from_config(tools), concurrency=1)
    try:
        async with asyncio.timeout(SANDBOX_DEADLINE_S):
            await sandbox.start()
            return tuple(sandbox.mechanisms), ""
    except (SandboxUnavailable, OSError, TimeoutError) as error:
        return (), str(error) or type(error).__name__
    finally:
        await sandbox.close()


def _error(attempt: Callable[[], object]) -> str:
    """What the system has against ``attempt``."""
    try:
        attempt()
    except OSError as error:
        return str(error)
    return ""


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version_of(name: str) -> str | None:
    """Of an installed package; None: it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pins() -> dict[str, str]:
    """Exact versions among Espalier's requirements, optional ones included."""
    try:
        wanted = importlib.metadata.requires("espalier") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
        return {}
    found = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in wanted)
    return {match[1]: match[2] for match in found if match}


def _existing(path: Path) -> Path:
    """``path`` or its nearest ancestor that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path if os.access(path, os.W_OK) else Path(tempfile.gettempdir())


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "failed without a word"
