"""Workers forked from an interpreter that has imported what they need."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from ray import cloudpickle

from actors import forked
from actors import forking as forking_module
from actors.cli.main import main
from actors.forked import SOCKET
from actors.forking import GROWING, TRAINING, fork_server, wanted
from actors.ray_support import answer, ray_session, returned, spawn
from system.config import Config, load, to_yaml
from system.tools.sandbox.kernel import die_with_parent

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules

LATE_S = 120.0


class Look:
    """Tells what it found as it began."""

    def __init__(self) -> None:
        self.found = {"numbers": np.random.random(3).tolist(), "modules": [*sys.modules]}

    def look(self) -> dict[str, Any]:
        return self.found | {
            "pid": os.getpid(),
            "environment": dict(os.environ),
            "stdin": os.readlink("/proc/self/fd/0"),
            "cuda": torch.cuda.is_initialized(),
            "files": resource.getrlimit(resource.RLIMIT_NOFILE),
            "core": resource.getrlimit(resource.RLIMIT_CORE),
            "oom": int(Path("/proc/self/oom_score_adj").read_text()),
        }

    def check(self) -> None:
        pass


def forking() -> Config:
    config = Config()
    config.cluster.fork = "true"
    return config


def ancestors(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).parents()


def is_forked(pid: int) -> bool:
    return any("actors.fork_server" in above.cmdline() for above in ancestors(pid))


async def looked(actor: Any) -> dict[str, Any]:
    return await answer(actor.look.remote(), LATE_S, "a look")


@pytest.mark.slow
async def test_actors_are_forked_with_imports_but_have_their_own_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONLY_WHILE_THE_SERVER_STARTS", "1")
    with fork_server(forking(), ["colorsys"]):
        monkeypatch.delenv("ONLY_WHILE_THE_SERVER_STARTS")
        with ray_session(Config(), tmp_path):
            actors = [spawn(Look, f"look-{number}") for number in range(2)]
            first, second = [await looked(one) for one in actors]
            raylet = first["environment"]["RAY_RAYLET_PID"]
            for one in (first, second):
                assert is_forked(one["pid"])
                assert {"colorsys", "actors.rollout", "actors.learner"} <= {*one["modules"]}
                assert one["stdin"] == "/dev/null"
                assert not one["cuda"]
                assert one["environment"]["RAY_RAYLET_PID"] == raylet
                assert not {SOCKET, "ONLY_WHILE_THE_SERVER_STARTS"} & one["environment"].keys()
            assert psutil.Process(int(raylet)).name() == "raylet"
            assert first["pid"] != second["pid"]
            assert first["numbers"] != second["numbers"]

            os.kill(first["pid"], signal.SIGKILL)
            await returned(actors[0], LATE_S, "the one that was killed")
            again = await looked(actors[0])
            assert again["pid"] != first["pid"]
            assert is_forked(again["pid"]), ancestors(again["pid"])
        with ray_session(Config(), tmp_path):  # of another raylet
            third = await looked(spawn(Look, "look-2"))
            assert is_forked(third["pid"])
            assert third["environment"]["RAY_RAYLET_PID"] != raylet


CODE = """
import os, signal, sys
from pathlib import Path
import psutil
import ray
from actors.forking import fork_server
from actors.ray_support import ray_session, spawn
from system.config import Config

class Look:
    def parent(self):
        return psutil.Process().parent().name()

config = Config()
config.cluster.fork = "true"
with fork_server(config, []):
    server, = psutil.Process().children()
    server.send_signal(int(sys.argv[2]))
    with ray_session(Config(), Path(sys.argv[1])):
        looks = [spawn(Look, f"look-{number}") for number in range(3)]
        print(ray.get([one.parent.remote() for one in looks]))
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_without_its_server_actors_start_by_themselves_which_is_told_once(
    tmp_path: Path, how: signal.Signals
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CODE, str(tmp_path), str(int(how))),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=lambda: die_with_parent(signal.SIGKILL),
    )
    out, err = await asyncio.wait_for(process.communicate(), 3 * LATE_S)
    assert out.decode().strip() == str(["raylet"] * 3)
    assert process.returncode == 0
    why = "does not answer" if how == signal.SIGKILL else "has not answered within"
    told = [line for line in err.decode().splitlines() if "fork server" in line]
    assert len(told) == 1, err.decode()
    assert f"the fork server {why}" in told[0]
    assert "actors start by themselves from now on" in told[0]


@contextmanager
def asking() -> Generator[socket.socket]:
    """A connection to the fork server."""
    directory = os.open(os.environ[SOCKET], os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asker:
            asker.settimeout(LATE_S)
            asker.connect(forked.address(directory))
            yield asker
    finally:
        os.close(directory)


def below_the_server() -> list[psutil.Process]:
    servers = [one for one in psutil.Process().children() if "actors.fork_server" in one.cmdline()]
    return [template for one in servers for template in one.children()]


@pytest.mark.slow
def test_a_bad_request_is_refused_and_the_next_one_served(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_RAYLET_PID", str(os.getpid()))
    good = forked.request()
    told: dict[str, Any] = json.loads(good)
    environment = told["environment"]
    bad = [
        b"\xff\x00 garbage",
        b"[]",
        b"[" * 100_000,
        b"{}",
        json.dumps(told | {"more": 1}).encode(),
        json.dumps(told | {"environment": {**environment, "RAY_RAYLET_PID": ""}}).encode(),
        json.dumps(told | {"environment": {**environment, "A": 1}}).encode(),
        json.dumps(told | {"directory": "/no/such"}).encode(),
        json.dumps(told | {"limits": {"RLIMIT_NONE": [1, 1]}}).encode(),
    ]
    with fork_server(forking(), []):
        with asking() as silent:
            for message in bad:
                with asking() as asker:
                    socket.send_fds(asker, [message], [1, 2])
                    assert asker.recv(1) == b"", message
            with asking() as asker:  # without its streams
                asker.send(good)
                assert asker.recv(1) == b""
            with asking() as asker:
                asker.close()
            with asking() as asker:
                socket.send_fds(asker, [good], [1, 2])
                assert asker.recv(1) == forked.FORKED
                (template,) = below_the_server()
                until = time.monotonic() + LATE_S
                while len(workers := template.children()) != 1:  # those of bad requests end, too
                    assert time.monotonic() < until, workers
                    time.sleep(0.05)
                (worker,) = workers
                # The asker has waited for too long: the worker must not go on beside it.
            psutil.wait_procs([worker], LATE_S)
            assert not worker.is_running()
            assert silent.recv(1) == b""
        os.kill(template.pid, signal.SIGKILL)
        template.wait(LATE_S)
        answers = []
        for _ in range(2):  # whoever finds the template gone may be refused; the next has a new one
            with asking() as asker:
                socket.send_fds(asker, [good], [1, 2])
                answers.append(asker.recv(1))
        assert answers[-1] == forked.FORKED
    assert environment.get("HOME", "no home") not in capfd.readouterr().err, "secrets are not for logs"


ASKER = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))
open("/proc/self/oom_score_adj", "w").write("321")
os.nice(3)
sys.path.insert(0, {root!r})
from actors.forked import main
sys.argv = ["forked.py", "--language=PYTHON", {script!r}]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("directory", ["short", "/".join(["a directory of a long name"] * 6)])
def test_a_worker_has_the_limits_of_who_asked_also_where_the_path_is_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: str
) -> None:
    temporary, script = tmp_path / directory, tmp_path / "script.py"
    temporary.mkdir(parents=True)
    script.write_text(
        "import os, resource\n"
        "limits = [resource.getrlimit(one) for one in (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE)]\n"
        "adjusted = int(open('/proc/self/oom_score_adj').read())\n"
        "print(limits, adjusted, os.getpriority(os.PRIO_PROCESS, 0), os.readlink('/proc/self/fd/0'))\n"
        "print([os.readlink(f'/proc/self/fd/{one}') for one in os.listdir('/proc/self/fd') if int(one) > 2 "
        "and os.path.exists(f'/proc/self/fd/{one}')])\n"
    )
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("RAY_RAYLET_PID", str(os.getpid()))
    code = ASKER.format(root=str(Path(forked.__file__).parents[1]), script=str(script))
    out = tmp_path / "out"
    with fork_server(forking(), []), out.open("w") as file:
        assert os.environ[SOCKET].startswith(str(temporary))
        asker = psutil.Popen([sys.executable, "-c", code], stdout=file)
        assert asker.wait(LATE_S) == 0
        until = time.monotonic() + LATE_S
        while out.read_text().count("\n") < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert not (Path(os.environ[SOCKET]) / forked.FAILED).exists()
    found, files = out.read_text().splitlines()
    nice = os.getpriority(os.PRIO_PROCESS, 0) + 3
    assert found == f"[(0, 0), (200, 300)] 321 {nice} /dev/null"
    assert "socket" not in files
    assert "pipe" not in files


@pytest.mark.slow
async def test_a_run_with_a_long_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "/".join(["a directory of a long name"] * 6)
    temporary.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with fork_server(forking(), []), ray_session(Config(), tmp_path):
        found = await looked(spawn(Look, "look-0"))
        assert is_forked(found["pid"])
        raylet = psutil.Process(int(found["environment"]["RAY_RAYLET_PID"]))
        assert any("/tmp/espalier-ray-" in word for word in raylet.cmdline())


def started() -> tuple[psutil.Process, psutil.Process]:
    """The server and its first template."""
    until = time.monotonic() + LATE_S
    while not (templates := below_the_server()):
        assert time.monotonic() < until
        time.sleep(0.01)
    (template,) = templates
    server = template.parent()
    assert server is not None
    return server, template


def test_the_server_and_its_template_end_with_the_block_also_while_they_import() -> None:
    with fork_server(forking(), [*TRAINING]):
        server, template = started()
        directory = Path(os.environ[SOCKET])
        assert directory.stat().st_mode & 0o777 == 0o700
    gone, alive = psutil.wait_procs([server, template], timeout=2)  # importing takes longer
    assert len(gone) == 2, alive
    assert not directory.exists()


def test_the_server_itself_imports_next_to_nothing() -> None:
    """Its memory would be there for the whole run, beside its template's."""
    with fork_server(forking(), []):
        server, _ = started()
        assert server.memory_info().rss < 30e6


DRIVER = """
import os, signal
from actors.forking import fork_server
from system.config import Config

config = Config()
config.cluster.fork = "true"
with fork_server(config, []):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_nothing_is_left_of_a_driver_that_was_killed(tmp_path: Path) -> None:
    driver = psutil.Popen([sys.executable, "-c", DRIVER], env=os.environ | {"TMPDIR": str(tmp_path)})
    assert driver.wait(LATE_S) == -signal.SIGKILL
    assert [one.name.startswith("espalier-fork-") for one in tmp_path.iterdir()] == [True]
    until = time.monotonic() + LATE_S  # it imports to the end first
    while [*tmp_path.iterdir()]:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_nothing_is_forked_on_a_cluster_with_gpus_or_where_it_is_not_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    joins, holds, will_not = forking(), forking(), Config()
    joins.cluster.address, holds.cluster.gpus_per_node, will_not.cluster.fork = "10.0.0.1:6379", 1, "false"
    for config in (joins, holds, will_not):
        with fork_server(config, [*TRAINING, *GROWING]):
            assert SOCKET not in os.environ

    usual, computes_there = Config(), Config()
    computes_there.engine.device = "cuda"
    assert usual.cluster.fork == "auto"
    assert wanted(usual, tmp_path)
    assert not wanted(computes_there, tmp_path)
    assert wanted(forking(), tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    assert not wanted(usual, tmp_path)
    assert wanted(forking(), tmp_path)

    monkeypatch.setattr(sys, "platform", "darwin")
    assert not wanted(forking(), tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with fork_server(forking(), []):
        assert SOCKET not in os.environ


@pytest.mark.parametrize(
    ("written", "read"), [("false", "false"), ("true", "true"), ("'true'", "true"), ("auto", "auto")]
)
def test_what_was_a_switch_is_still_read(tmp_path: Path, written: str, read: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"cluster: {{fork: {written}}}\n")
    assert load(recipe).cluster.fork == read
    assert load(None, [f"cluster.fork={written}"]).cluster.fork == read
    recipe.write_text(to_yaml(load(recipe)))
    assert load(recipe).cluster.fork == read


class Reached(BaseException):
    """The fork server was asked for, with these modules."""


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train", "configs/quickstart.yaml"], [*TRAINING, *GROWING]),
        (["eval", "{model}", "--config", "configs/quickstart.yaml"], [*GROWING]),
        (["sft", "examples/first.yaml"], [*TRAINING]),
        (["sft", "examples/first.yaml", "sft.choose=pass@2"], [*TRAINING, *GROWING]),
    ],
)
def test_every_command_that_starts_actors_forks_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], parts: list[str]
) -> None:
    def reached(_: Config, modules: Sequence[str]) -> None:
        raise Reached(*modules)

    (tmp_path / "config.json").touch()
    monkeypatch.setattr(forking_module, "fork_server", reached)
    monkeypatch.chdir(Path(forked.__file__).parents[1])
    with pytest.raises(Reached) as caught:
        main([word.format(model=tmp_path) for word in words])
    assert [*caught.value.args] == parts
