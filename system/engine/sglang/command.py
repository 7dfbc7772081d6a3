"""From the configuration to the command line of one SGLang server.  Pure, but for finding the interpreter.

What the rest of the system must agree on (model, address, context length, …) comes from ``engine.*``; every
other flag of SGLang is passed through from ``engine.sglang`` under SGLang's own name and never declared
again here: ``engine.sglang={mem_fraction_static: 0.8, enable_metrics: true}`` becomes
``--mem-fraction-static 0.8 --enable-metrics``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from system.config import EngineConfig, LoraConfig
from system.config.schema_lora import MODULES
from system.engine.protocol import EngineError
from system.engine.weights.base import GROUP_DEADLINE_S
from system.serving import KEY_VARIABLE

IN_SERVER = Path(__file__).parent / "in_server"
CHECKOUT = Path(__file__).parents[3]
# SGLang sets this for itself; NCCL wants it alike on all ranks, so the learner sets it, too.
NCCL = {"NCCL_CUMEM_ENABLE": "0"}
REMEDY = "run `make sglang`, or set engine.python to an interpreter that has it"


class SglangMissing(EngineError):
    """The interpreter that is to run the server has no SGLang."""


@dataclass(frozen=True, slots=True)
class Command:
    """How to start one server: ``env`` is added to the caller's environment."""

    argv: list[str]
    env: dict[str, str]


def interpreter(engine: EngineConfig) -> str:
    """The Python that runs SGLang: ``engine.python``; else this one if it has SGLang, else what
    ``make sglang`` made.  Raises :class:`SglangMissing`, which names the remedy.
    """
    made = str(CHECKOUT / ".venv-sglang" / "bin" / "python")
    candidates = [engine.python] if engine.python else [sys.executable, made]
    for python in candidates:
        if _has_sglang(python):
            return python
    raise SglangMissing(f"no SGLang for {' or '.join(candidates)}: {REMEDY}")


def _has_sglang(python: str) -> bool:
    look = "import importlib.util as u, sys; sys.exit(0 if u.find_spec('sglang') else 3)"
    try:
        done = subprocess.run([python, "-c", look], capture_output=True, timeout=60, check=False)
    except OSError:  # no such program
        return False
    return done.returncode == 0


def server_command(
    engine: EngineConfig,
    *,
    python: str,
    model: str,
    dtype: str,
    port: int,
    host: str | None = None,
    seed: int = 0,
    replica: int = 0,
    cpu: bool,
    cores: Sequence[int] = (0,),
    paused: bool = False,
    key: str = "",
    routes: bool = False,
    lora: LoraConfig | None = None,
    experts: bool = False,
) -> Command:
    """The command of server number ``replica``, over the GPUs that its process sees (``engine.tp`` of them).

    ``host``: where it listens, if not at ``engine.host``.  ``cpu``: without a GPU, over the shim.  ``cores``:
    what the tensor-parallel ranks may be bound to, on a CPU.  ``paused``: generate nothing before
    ``/continue_generation``.  ``key``: SGLang's ``api_key``, which our plug-in takes from the environment:
    every user of the machine can read a command line.  ``routes``: record which experts tokens go through.
    ``lora``: the adapters that will come by themselves (``adapters_travel``), if any do; ``experts``: to a
    mixture of experts.
    """
    # A null takes a default away.  Engines are asked every second how they are: no log line for each answer.
    defaults = {"log_level_http": "warning", **(_cpu_defaults(engine) if cpu else {})}
    native = {**defaults, **engine.sglang}
    if routes:
        native["enable_return_routed_experts"] = True
    if lora:
        native = _lora_flags(lora, experts, cpu) | native
    if paused:
        native["skip_server_warmup"] = True  # it would wait for ever
    fixed = {
        "model_path": model,
        "host": host or engine.host,
        "port": port,
        "device": "cpu" if cpu else "cuda",
        "dtype": dtype,
        "tp_size": engine.tp,
        "context_length": engine.max_context,
        "max_running_requests": engine.max_running,
        "stream_interval": engine.chunk_tokens,
        "incremental_streaming_output": True,
        "random_seed": seed + replica,
    }
    argv = [python, "-m", "sglang.launch_server", *words(fixed), *words(native)]
    return Command(argv, _environment(engine, cpu, cores, paused) | ({KEY_VARIABLE: key} if key else {}))


def words(settings: Mapping[str, Any]) -> list[str]:
    """``{"a_b": 1, "on": True, "off": False, "gone": None}`` -> ``["--a-b", "1", "--on"]``.

    A list becomes several words after its flag, a mapping JSON.
    """
    line: list[str] = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        line.append("--" + name.replace("_", "-"))
        if value is True:
            continue
        if isinstance(value, list | tuple):
            line += [str(item) for item in value]
        else:
            line.append(json.dumps(value) if isinstance(value, Mapping) else str(value))
    return line


def _lora_flags(lora: LoraConfig, experts: bool, cpu: bool) -> dict[str, Any]:
    flags = {
        "enable_lora": True,
        "max_lora_rank": lora.rank,
        "lora_target_modules": [MODULES[part] for part in lora.parts(experts=experts)],
    }
    return flags | ({"lora_backend": "torch_native"} if cpu else {})  # the others are Triton


def _cpu_defaults(engine: EngineConfig) -> dict[str, Any]:
    return {
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "disable_cuda_graph": True,
        "skip_server_warmup": True,
        "sleep_on_idle": True,  # its scheduler would keep a core busy
        "mem_fraction_static": 0.05,
        "max_total_tokens": (engine.max_running + engine.cache_slots) * engine.max_context,
    }


def _environment(engine: EngineConfig, cpu: bool, cores: Sequence[int], paused: bool) -> dict[str, str]:
    env = {
        "PYTHONPATH": str(IN_SERVER / "plugin"),
        "HF_HUB_OFFLINE": "1",  # the model is a directory
        "TOKENIZERS_PARALLELISM": "false",
        # It reads no YaRN factor off a config.json; that the model knows so many positions has been checked.
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",  # /health must answer while generation is paused
        "ESPALIER_START_PAUSED": str(int(paused)),
        "ESPALIER_GROUP_DEADLINE_S": str(GROUP_DEADLINE_S),
    }
    if not cpu:
        return env | NCCL
    env["PYTHONPATH"] += f":{IN_SERVER / 'cpu_shim'}"
    env |= {
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",
        "OMP_NUM_THREADS": str(engine.threads),
    }
    if engine.tp > 1:
        env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
            ",".join(str(cores[(rank * engine.threads + i) % len(cores)]) for i in range(engine.threads))
            for rank in range(engine.tp)
        )
    return env
