"""Actors that are slow, that fail and that die; what their processes find and where their output goes."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from ray.exceptions import RayError

from actors import keys
from actors.heartbeat import Heartbeats, Watched
from actors.ray_support import LOGS, ActorLost, answer, answers, ray_session, returned, spawn
from actors.tree_sample import TreeSample
from system.config import Config
from system.errors import FAILED, LOST, exit_code, told
from system.flow.ledger import Ticket
from system.flow.replay import TreeInFlight
from system.observe.rundir import RunDir
from system.tree.builder import TreeBuilder
from system.tree.record import Kind, Origin, Outcome, Tree
from system.tree.stats import TreeStats
from system.tree.store import read_trees

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules


class Sleeper:
    def pid(self) -> int:
        return os.getpid()

    def check(self) -> None:
        pass

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def held(self) -> str:
        return keys.held().engines

    def fail(self) -> None:
        raise ZeroDivisionError("on purpose")

    def write(self, number: int) -> None:
        raise OSError(number, os.strerror(number), "runs/a/checkpoints")

    def own_module(self) -> str:
        import mine  # type: ignore[import-not-found]

        print("an actor's own words")
        return mine.NAME


class Grower:
    """Answers as a rollout worker does: with a tree and its statistics."""

    def pid(self) -> int:
        return os.getpid()

    async def grow(self, name: str, tokens: int) -> tuple[Tree, TreeStats]:
        builder = TreeBuilder(name, "t", [1, 2], 1)
        node = builder.node(0, Kind.MODEL)
        builder.extend(node, [3] * tokens, [-1.0] * tokens, None, 0)
        builder.leaf(node, Outcome.STOPPED, Origin.ROOT)
        tree = builder.close(1.0)
        return tree, TreeStats.of(tree)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A session begun in a directory of a user's, which holds a module ``mine``; yields its logs."""
    directory, before = tmp_path_factory.mktemp("user"), Path.cwd()
    (directory / "mine.py").write_text("NAME = 'mine'\n")
    os.chdir(directory)
    try:
        with ray_session(Config(), directory) as joined:
            assert not joined
            yield directory / "logs"
    finally:
        os.chdir(before)
    assert not {LOGS, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    assert not (directory / keys.RAY).exists()
    assert not (directory / keys.SERVERS).exists()


@pytest.mark.slow
async def test_nothing_listens_beyond_loopback_and_all_keys_are_private(cluster: Path) -> None:
    sleeper = spawn(Sleeper, "listener")
    await answer(sleeper.sleep.remote(0.0), 60, "a nap")
    here, found = psutil.Process(), list[str]()
    for process in [here, *here.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # Ray ends processes as it likes
            open_ones = process.net_connections("inet")
            found += [one.laddr.ip for one in open_ones if one.status == psutil.CONN_LISTEN]
    assert len(found) > 3, "Ray's own servers"
    assert {ip.removeprefix("::ffff:") for ip in found} == {"127.0.0.1"}
    root = cluster.parent
    token, key = root / keys.RAY, root / keys.SERVERS
    assert [path.stat().st_mode & 0o777 for path in (token, key)] == [0o600, 0o600]
    assert await answer(sleeper.held.remote(), 60, "its keys") == key.read_text() == keys.held().engines
    assert token.read_text() != key.read_text()
    for process in here.children(recursive=True):
        seen = ""
        with suppress(psutil.NoSuchProcess):
            seen = " ".join(process.cmdline()) + str(process.environ())
        assert token.read_text() not in seen
        assert key.read_text() not in seen


@pytest.mark.slow
async def test_another_process_cannot_join_without_the_token(cluster: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    intruder = f"import ray; ray.init({address!r}, logging_level='CRITICAL')"
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0" * 64,
        "RAY_NUM_REDIS_GET_RETRIES": "1",
    }
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", intruder], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "authentication token is missing or incorrect" in done.stderr.lower()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
async def test_failures_have_names() -> None:
    sleeper = spawn(Sleeper, "sleeper")
    assert await answer(sleeper.sleep.remote(0.0), 60, "a nap") == 0.0
    with pytest.raises(ActorLost, match=r"a long nap: no answer within 0 s"):
        await answer(sleeper.sleep.remote(2.0), 0.2, "a long nap")
    with pytest.raises(ZeroDivisionError):
        await answer(sleeper.fail.remote(), 60, "a failure")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
async def test_a_disk_that_an_actor_finds_full_is_told_as_one_that_the_driver_finds_full() -> None:
    writer = spawn(Sleeper, "writer")
    with pytest.raises(OSError, match="No space left") as full:
        await answer(writer.write.remote(errno.ENOSPC), 60, "a checkpoint")
    assert not isinstance(full.value, RayError)
    assert told(full.value) == "runs/a/checkpoints: No space left on device"
    assert exit_code(full.value, lost=(RayError,)) == FAILED
    with pytest.raises(ConnectionResetError) as reset:  # a peer that is gone, however, is a lost machine
        await answer(writer.write.remote(errno.ECONNRESET), 60, "a connection")
    assert exit_code(reset.value, lost=(RayError,)) == LOST


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
async def test_a_killed_actor_is_lost_once_and_then_back_if_it_may_restart() -> None:
    mortal = spawn(Sleeper, "mortal", restart=False)
    phoenix = spawn(Sleeper, "phoenix", restart=True)
    for actor in (mortal, phoenix):
        pid = await answer(actor.pid.remote(), 60, "pid")
        nap = asyncio.ensure_future(answer(actor.sleep.remote(30.0), 60, "a nap"))
        await asyncio.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ActorLost, match="a nap: the actor died"):
            await nap
    with pytest.raises(ActorLost):
        await answer(mortal.pid.remote(), 60, "pid")
    await returned(phoenix, 60, "phoenix")
    assert await answer(phoenix.pid.remote(), 60, "pid") > 0


async def heard(beats: Heartbeats, name: str) -> None:
    """Return once the actor has answered."""
    async with asyncio.timeout(60):
        while name not in beats._pulses or not beats._pulses[name].pid:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
async def test_a_frozen_actor_is_killed_and_comes_back_and_a_busy_one_is_left_alone() -> None:
    frozen, busy = spawn(Sleeper, "frozen"), spawn(Sleeper, "busy", restart=False)
    said: list[str] = []
    watched = {"frozen": Watched(frozen, {}, True), "busy": Watched(busy, {}, False)}
    beats = Heartbeats(lambda: watched, 2, 60, said.append)
    watch = asyncio.create_task(beats.watch())
    first = await answer(frozen.pid.remote(), 60, "pid")
    nap = asyncio.ensure_future(answer(busy.sleep.remote(5.0), 60, "longer than silence may be"))
    await heard(beats, "frozen")
    os.kill(first, signal.SIGSTOP)
    began = time.monotonic()
    while not said and not watch.done():  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    assert time.monotonic() - began < 30
    await returned(frozen, 60, "frozen")
    assert await answer(frozen.pid.remote(), 60, "pid") != first
    assert await nap == 5.0
    assert [line.partition(" for")[0] for line in said] == ["frozen has been silent"]
    watch.cancel()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
async def test_an_actor_that_does_not_return_ends_the_run_by_its_silence() -> None:
    rank = spawn(Sleeper, "learner-3", restart=False)
    beats = Heartbeats(lambda: {"learner-3": Watched(rank, {}, False)}, 2, 60, print)
    watch = asyncio.create_task(beats.watch())
    pid = await answer(rank.pid.remote(), 60, "pid")
    await heard(beats, "learner-3")  # before that it would have a minute
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ActorLost, match=r"learner-3"):
        await asyncio.wait_for(watch, 70)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
async def test_nobody_is_dead_because_this_process_stood_still() -> None:
    actor, said = spawn(Sleeper, "patient"), list[str]()
    pid = await answer(actor.pid.remote(), 60, "pid")
    beats = Heartbeats(lambda: {"a": Watched(actor, {}, True)}, 2, 60, said.append)
    watch = asyncio.create_task(beats.watch())
    await heard(beats, "a")
    nap = asyncio.ensure_future(answer(actor.sleep.remote(0.3), 1.0, "a short nap"))
    await asyncio.sleep(0.5)
    time.sleep(5)  # noqa: ASYNC251 -- as a suspended process does
    assert await nap == 0.3
    await asyncio.sleep(1.0)
    assert await answer(actor.pid.remote(), 60, "pid") == pid
    assert not said
    watch.cancel()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
async def test_the_first_failure_ends_a_collective_wait() -> None:
    slow, failing = spawn(Sleeper, "slow"), spawn(Sleeper, "failing")
    await answers([slow.pid.remote(), failing.pid.remote()], 60, "pids")
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        await answers([slow.sleep.remote(30.0), failing.fail.remote()], 60, "collective")
    assert time.monotonic() - began < 20


@pytest.mark.slow
async def test_the_current_directory_is_on_every_actors_path_and_its_output_in_its_log(cluster: Path) -> None:
    actor = spawn(Sleeper, "talker")
    assert await answer(actor.own_module.remote(), 60, "a module of the user's") == "mine"
    assert (cluster / "talker.log").read_text() == "an actor's own words\n"


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
async def test_closed_trees_outlive_their_worker_and_are_written_aside(tmp_path: Path) -> None:
    """The driver owns what an actor returns, wherever it lies; it asks for the statistics alone."""
    worker = spawn(Grower, "worker", restart=False, concurrency=4)
    grown = [
        worker.grow.options(num_returns=2).remote(f"p{number}", size)
        for number, size in enumerate((10, 200_000))  # a value of the second's size lies in shared memory
    ]
    sizes = [(await answer(stats, 60, "statistics")).generated for _, stats in grown]
    assert sizes == [10, 200_000]
    os.kill(await answer(worker.pid.remote(), 60, "pid"), signal.SIGKILL)
    with pytest.raises(ActorLost):
        await answer(worker.pid.remote(), 60, "pid")
    stats = [await answer(one, 60, "statistics") for _, one in grown]
    closed = [TreeInFlight(Ticket(i, 0, f"p{i}", 1), tree, stats[i]) for i, (tree, _) in enumerate(grown)]
    for keep, kept, sampled in ((-1, ["p0", "p1"], []), (1, ["p1"], ["p0", "p1"]), (0, [], [])):
        run_dir = RunDir(tmp_path / f"keep{keep}")
        sample = TreeSample(run_dir, keep, 2, pytest.fail)  # type: ignore[arg-type]
        await sample.add(closed)
        await sample.written()
        assert [tree.prompt_id for tree in read_trees(run_dir.trees)] == kept
        assert [tree.prompt_id for tree in read_trees(run_dir.tree_sample)] == sampled


async def test_what_can_be_spared_ends_no_run_by_staying_away() -> None:
    async def gone() -> int:
        raise RayError

    actor, said = SimpleNamespace(beat=SimpleNamespace(remote=gone)), list[str]()
    beats = Heartbeats(lambda: {"eval-engine-0": Watched(actor, {}, True, spare=True)}, 0.1, 0.2, said.append)
    watch = asyncio.create_task(beats.watch())
    async with asyncio.timeout(60):
        while len(said) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not watch.done()
    assert said[0] == "eval-engine-0: not back within 0 s; the run goes on without it"
    watch.cancel()


async def test_an_engine_has_its_servers_time_to_be_back() -> None:
    async def gone() -> int:
        raise RayError

    actor = SimpleNamespace(beat=SimpleNamespace(remote=gone))
    beats = Heartbeats(lambda: {"engine-0": Watched(actor, {}, True, server_s=1.0)}, 0.1, 0.2, pytest.fail)
    began = time.monotonic()
    with pytest.raises(ActorLost, match=r"not back .*cluster.start_deadline_s \+ engine.start_deadline_s"):
        await beats.watch()
    assert time.monotonic() - began > 1.2
