"""The command line of an SGLang server, from the configuration; and the process that keeps it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from actors import learner
from system.config import Config, ConfigError, EngineConfig, LoraConfig, load, to_dict
from system.config.check import SET_BY
from system.engine.sglang.command import Command, SglangMissing, interpreter, server_command, words
from system.engine.sglang.server import ServerFailed, SglangServer


def command(engine: EngineConfig, cpu: bool = True, **settings: object) -> Command:
    defaults = {
        "python": "py",
        "model": "/m",
        "dtype": "bfloat16",
        "host": "127.0.0.2",
        "port": 7000,
        "cpu": cpu,
        "cores": (4, 5),
    }
    return server_command(engine, **{**defaults, **settings})  # type: ignore[arg-type]


def value(command: Command, flag: str) -> str | None:
    return command.argv[command.argv.index(flag) + 1] if flag in command.argv else None


def test_our_settings_become_sglangs_flags() -> None:
    engine = EngineConfig(name="sglang", max_context=700, max_running=9, chunk_tokens=3)
    line = command(engine, seed=5, replica=2)
    assert line.argv[:3] == ["py", "-m", "sglang.launch_server"]
    expected = {
        "--model-path": "/m",
        "--host": "127.0.0.2",
        "--port": "7000",
        "--dtype": "bfloat16",
        "--context-length": "700",
        "--max-running-requests": "9",
        "--stream-interval": "3",
        "--random-seed": "7",
        "--device": "cpu",
    }
    assert {flag: value(line, flag) for flag in expected} == expected
    assert "--incremental-streaming-output" in line.argv
    assert "--enable-return-routed-experts" not in line.argv
    assert "--enable-return-routed-experts" in command(engine, routes=True).argv


def test_a_server_of_adapters_is_told_which_will_come() -> None:
    engine = EngineConfig(name="sglang", sglang={"lora_backend": "triton"})
    assert "--enable-lora" not in command(engine).argv  # merged weights come
    apart = LoraConfig(rank=8, targets=["q", "down"])
    line = command(engine, cpu=False, lora=apart).argv
    assert " --enable-lora --max-lora-rank 8 --lora-target-modules q_proj down_proj " in " ".join(line)
    mixture = command(engine, lora=LoraConfig(rank=8), experts=True).argv
    assert " --lora-target-modules q_proj k_proj v_proj o_proj --" in " ".join(mixture)
    assert value(command(engine, lora=apart), "--lora-backend") == "triton"
    assert value(command(EngineConfig(name="sglang"), lora=apart), "--lora-backend") == "torch_native"


def test_nccl_is_told_the_same_in_server_and_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the environment says otherwise: one of the two would not hear of it."""
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    monkeypatch.setattr(learner.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    seen: list[str] = []

    def make(*_: object, **__: object) -> SimpleNamespace:
        seen.append(os.environ["NCCL_CUMEM_ENABLE"])
        return SimpleNamespace(warnings=[])

    rank = object.__new__(learner.LearnerRank)
    rank._make, rank._rank, rank._world = make, 0, 1
    rank.setup(to_dict(Config()), "", "tcp://127.0.0.1:1")
    assert seen == [command(EngineConfig(name="sglang"), cpu=False).env["NCCL_CUMEM_ENABLE"]] == ["0"]


def test_native_flags_pass_through_and_replace_defaults() -> None:
    native = {"mem_fraction_static": 0.8, "enable_metrics": True, "disable_cuda_graph": False}
    engine = EngineConfig(name="sglang", sglang={**native, "max_total_tokens": None, "cuda_graph_bs": [1, 2]})
    line = command(engine)
    assert value(line, "--mem-fraction-static") == "0.8"
    assert "--enable-metrics" in line.argv
    assert not {"--disable-cuda-graph", "--max-total-tokens"} & set(line.argv)
    at = line.argv.index("--cuda-graph-bs")
    assert line.argv[at + 1 : at + 3] == ["1", "2"]
    assert words({"json_model_override_args": {"a": 1}}) == ["--json-model-override-args", '{"a": 1}']


def test_only_a_cpu_server_gets_the_shim() -> None:
    cpu, gpu = (command(EngineConfig(name="sglang", tp=2, threads=1), cpu=cpu) for cpu in (True, False))
    assert "cpu_shim" in cpu.env["PYTHONPATH"]
    assert cpu.env["SGLANG_CPU_OMP_THREADS_BIND"] == "4|5"
    assert value(cpu, "--attention-backend") == "torch_native"
    assert "--sleep-on-idle" in cpu.argv, "or an idle server takes a core from everybody else"
    assert "cpu_shim" not in gpu.env["PYTHONPATH"]
    assert not {"--attention-backend", "--sampling-backend", "--mem-fraction-static"} & set(gpu.argv)
    plugin = gpu.env["PYTHONPATH"]
    assert list(Path(plugin).glob("*.dist-info/entry_points.txt")), "SGLang finds plug-ins by entry point"
    assert cpu.env["PYTHONPATH"].startswith(f"{plugin}:")


def test_a_restarted_server_is_paused_and_not_warmed_up() -> None:
    line = command(EngineConfig(name="sglang"), cpu=False, paused=True)
    assert line.env["ESPALIER_START_PAUSED"] == "1"
    assert "--skip-server-warmup" in line.argv
    assert command(EngineConfig(name="sglang"), cpu=False).env["ESPALIER_START_PAUSED"] == "0"


@pytest.mark.parametrize("flag", sorted(SET_BY))
def test_flags_that_we_set_are_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.sglang.{flag} is set by {SET_BY[flag]}"):
        load(None, ["engine=sglang", f"engine.sglang.{flag}=1"])


FLOAT8 = ["engine=sglang", "model.dtype=bfloat16"]


def test_float8_goes_through_to_sglang() -> None:
    flags = "engine.sglang={quantization: fp8, load-format: flash_rl, kv_cache_dtype: fp8_e5m2}"
    line = command(load(None, [*FLOAT8, flags]).engine)
    assert value(line, "--quantization") == "fp8"
    assert value(line, "--load-format") == "flash_rl"
    assert value(line, "--kv-cache-dtype") == "fp8_e5m2"


@pytest.mark.parametrize(
    ("flags", "words", "told"),
    [
        ("quantization: fp8", "", "codes of old ones: set engine.sglang.load_format=flash_rl too"),
        ("load_format: flash_rl", "", "quantises: set engine.sglang.quantization=fp8 too"),
        ("quantization: awq", "", "engine.sglang.quantization=awq: SGLang takes no new weights"),
        ("kv_cache_dtype: nvfp4", "", "kv_cache_dtype=nvfp4 is not supported: choose of auto, .*fp8_e4m3"),
        ("kv_cache_dtype: fp8_e5m2", "engine.device=cpu", "computes with float8 on a GPU only"),
        ("torchao_config: fp8wo", "", r"engine\.sglang\.torchao_config: .* take it out"),
        ("quantization: fp8, load_format: flash_rl", "engine.weights=disk", "reads files once.*distributed"),
        ("quantization: fp8, load_format: flash_rl", "model.dtype=float32", "set model.dtype=bfloat16"),
        (
            "quantization: fp8, load_format: flash_rl",
            "learn.lora.rank=4 learn.lora.sync=adapter",
            "has not been tried: set learn.lora.sync=merged",
        ),
    ],
)
def test_what_takes_no_new_weights_is_refused(flags: str, words: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(None, [*FLOAT8, f"engine.sglang={{{flags}}}", *words.split()])


def test_urls_are_for_sglang_and_look_like_urls() -> None:
    assert load(None, ["engine=sglang", "engine.urls=[http://h:1]"]).engine.urls == ["http://h:1"]
    with pytest.raises(ConfigError, match="must begin with http"):
        load(None, ["engine=sglang", "engine.urls=[h:1]"])
    with pytest.raises(ConfigError, match="set engine=sglang"):
        load(None, ["engine.urls=[http://h:1]"])


def test_an_interpreter_without_sglang_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(SglangMissing, match="make sglang"):
        interpreter(EngineConfig(python=str(tmp_path / "python")))
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(SglangMissing, match="no SGLang for"):
        interpreter(EngineConfig(python=str(bare)))


# The process -------------------------------------------------------------------------------------

# Stands for the server: answers /health, has a child of its own, and ignores SIGTERM if told to.
FAKE = """
import http.server, signal, subprocess, sys, time
port, stubborn = int(sys.argv[1]), sys.argv[2] == "stubborn"
print("fake server", flush=True)
if sys.argv[2] == "broken":
    sys.exit("no such model")
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if sys.argv[2] != "never" else 503)
        self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


@pytest.fixture
def start(tmp_path: Path, free_port: Callable[[], int]):
    """``start(kind)``: a fake server that is gone after the test."""
    made: list[SglangServer] = []

    def make(kind: str = "good") -> SglangServer:
        port = free_port()
        line = Command([sys.executable, "-c", FAKE, str(port), kind], {"ESPALIER_TEST": kind})
        made.append(SglangServer(line, f"http://127.0.0.1:{port}", tmp_path / "logs" / "engine-0.log"))
        return made[-1]

    yield make
    for server in made:
        server.kill()


def family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # it may end between two looks
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def gone(processes: list[psutil.Process], within_s: float = 20.0) -> bool:
    until = time.monotonic() + within_s
    while any(map(runs, processes)):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def settled(pid: int, count: int) -> list[psutil.Process]:
    """The descendants of ``pid`` once there are ``count`` of them."""
    until = time.monotonic() + 30
    while len(found := family(pid)) < count:
        assert time.monotonic() < until, found
        time.sleep(0.05)
    return found


def test_ready_then_stopped_with_all_it_started(start: Callable[..., SglangServer]) -> None:
    server = start()
    assert server.wait_ready(20) == server.url
    processes = settled(server._supervisor.pid, 2)
    assert server.exited() is None
    server.stop()
    assert server.exited() == 128 + signal.SIGTERM
    assert gone(processes)


def test_an_early_end_and_a_missed_deadline_carry_the_log(start: Callable[..., SglangServer]) -> None:
    with pytest.raises(ServerFailed, match=r"ended with status 1(?s:.*)fake server(?s:.*)no such model"):
        start("broken").wait_ready(20)
    with pytest.raises(ServerFailed, match=r"not ready within 4 s(?s:.*)fake server") as missed:
        start("never").wait_ready(4.0)
    assert "no such model" not in str(missed.value), "the log of an earlier start"


def test_waiting_tells_why_a_server_ended(start: Callable[..., SglangServer]) -> None:
    server = start()
    server.wait_ready(20)
    settled(server._supervisor.pid, 2)[0].kill()
    assert re.search(r"ended with status 137(?s:.*)fake server", str(server.wait()))


def test_a_server_that_hangs_is_killed(
    start: Callable[..., SglangServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("system.engine.sglang.server.WATCH_S", 0.1)
    server = start()
    server.wait_ready(20)
    processes = settled(server._supervisor.pid, 2)
    next(p for p in processes if len(p.cmdline()) > 3).suspend()
    assert "no answer for 0.5 s, killed" in str(server.wait(hung_s=0.5))
    assert gone(processes)


def test_a_server_that_ignores_sigterm_is_killed_at_once_on_demand(
    start: Callable[..., SglangServer],
) -> None:
    server = start("stubborn")
    server.wait_ready(20)
    processes = settled(server._supervisor.pid, 2)
    server.kill()
    assert gone(processes)


@pytest.mark.parametrize("victim", ["owner", "supervisor"])
def test_no_orphan_is_left_when_the_owner_or_the_warden_is_killed(
    tmp_path: Path, free_port: Callable[[], int], victim: str
) -> None:
    port = free_port()
    code = f"""
    import sys, time
    from pathlib import Path
    from system.engine.sglang.command import Command
    from system.engine.sglang.server import SglangServer
    fake = Path({str(tmp_path / "fake.py")!r})
    line = Command([sys.executable, str(fake), "{port}", "stubborn"], {{}})
    server = SglangServer(line, "http://127.0.0.1:{port}", Path({str(tmp_path / "log")!r}))
    server.wait_ready(30)
    print(server._supervisor.pid, flush=True)
    time.sleep(600)
    """
    (tmp_path / "fake.py").write_text(FAKE)
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    supervisor = int(owner.stdout.readline())
    processes = settled(supervisor, 2)
    leader = next(p for p in processes if str(port) in p.cmdline())
    os.kill(owner.pid if victim == "owner" else supervisor, signal.SIGKILL)
    # A killed supervisor takes the server with it; SGLang's own children look after themselves in that case.
    assert gone(processes if victim == "owner" else [leader])
    for process in [psutil.Process(owner.pid), *processes]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    owner.wait()
    owner.stdout.close()
