"""What lies below torch on a machine with GPUs, in both environments: the learner's and SGLang's."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from system.config import Config
from system.engine.sglang.command import SglangMissing, interpreter

LEARNER, SGLANG = "the learner's", "SGLang's"
LOOK_S = 120.0  # for an interpreter to import torch and say what it has
_LOOK = """
import json, os, sysconfig
import torch
print(json.dumps({
    "torch": torch.__version__,
    "cuda": torch.version.cuda or "",
    "headers": os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h")),
}))
"""


@dataclass(frozen=True, slots=True)
class TorchSeen:
    """What an interpreter has.  An ``error`` is told in words; the rest is unknown then."""

    torch: str = ""
    cuda: str = ""  # the version torch was built for; empty: a CPU build
    headers: bool = True  # Python.h
    error: str = ""


@dataclass(frozen=True)
class Stack:
    """Nothing is known of what was not looked at."""

    driver: tuple[int, ...] = ()  # (580, 159, 3); empty: unknown
    glibc: tuple[int, ...] = ()
    compiler: str | None = None  # its path; empty: there is none
    interpreters: Mapping[str, TorchSeen] = field(default_factory=dict)
    gpus: int = 0  # that torch can use here
    no_peer: tuple[tuple[int, int], ...] = ()  # pairs of them that cannot read each other's memory
    memlock: int | None = None  # soft limit in bytes; -1: none


def gather_stack(config: Config, driver: str) -> Stack:
    """Look at this machine, where the recipe wants GPUs.  Importing torch twice takes some seconds."""
    if not wants_gpus(config):
        return Stack()
    pythons = {LEARNER: sys.executable}
    if own_servers(config):
        with contextlib.suppress(SglangMissing):  # which another check tells
            pythons[SGLANG] = interpreter(config.engine)
    gpus = _usable()
    return Stack(
        driver=numbers(driver),
        glibc=numbers(platform.libc_ver()[1]),
        compiler=next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), ""),
        interpreters={name: look_at(python) for name, python in pythons.items()},
        gpus=gpus,
        no_peer=_strangers(gpus),
        memlock=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
    )


def wants_gpus(config: Config) -> bool:
    return config.cluster.gpus_per_node > 0 or config.engine.device == "cuda"


def own_servers(config: Config) -> bool:
    """Whether SGLang is started here, not attached to."""
    return config.engine.name == "sglang" and not config.engine.urls


def numbers(version: str) -> tuple[int, ...]:
    """``"580.159.03"`` -> ``(580, 159, 3)``; of what begins with no number, nothing."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def look_at(python: str) -> TorchSeen:
    """What the interpreter ``python`` has."""
    try:
        done = subprocess.run(
            [python, "-c", _LOOK], capture_output=True, text=True, timeout=LOOK_S, check=True
        )
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return TorchSeen(**told)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:]
        return TorchSeen(error=last[0] if last else f"it ends with code {error.returncode}")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return TorchSeen(error=str(error) or type(error).__name__)


def _usable() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _strangers(gpus: int) -> tuple[tuple[int, int], ...]:
    import torch

    pairs = [(a, b) for a in range(gpus) for b in range(gpus) if a != b]
    return tuple(pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair))
