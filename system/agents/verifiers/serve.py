"""Runs environments of ``verifiers`` in the interpreter that has that package; Espalier's own has it not.

``python serve.py questions``: a specification (JSON) on stdin, the tasks of a taskset on stdout.

``python serve.py serve SOCKET``: a server of episodes.  It imports verifiers and loads the environments once,
which takes seconds, and then only forks: each child runs one episode at a time, in a loop and with resources
of its own, so that one that hangs or dies is one episode.  All connect to SOCKET and speak JSON lines.

Only the standard library and verifiers are imported here.  Whatever an environment prints goes to stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import traceback
from typing import Any

FROZEN = "espalier-frozen"  # the model's name for seats that are not trained
SHOWN = 2000  # characters of an error that are told
CLOSE_S = 30  # for a child to give back what it holds, then a signal ends it: a thread of its may hang
MOST_PARTS, LONGEST_NAME = 32, 64  # of a reward
_PR_SET_PDEATHSIG = 1
Spec = dict[str, Any]  # {"train": environment, "eval": environment or None, "turns": int}


class _Wrong(Exception):
    """What a user has to mend.  ``field``: python or environment."""

    def __init__(self, field: str, text: str) -> None:
        super().__init__(text)
        self.field = field


def main(words: list[str]) -> None:
    """Does what the words say, and exits with 0; what is wrong is told in JSON."""
    mode = words[0]
    if mode == "questions":
        _die_with_parent()
        spec = json.loads(sys.stdin.buffer.readline())
        answer = _own_stdout()
        try:
            found: dict[str, Any] = {"questions": questions(spec)}
        except _Wrong as wrong:
            found = {"error": str(wrong), "field": wrong.field}
        with answer:
            answer.write(json.dumps(found).encode() + b"\n")
        sys.stdout.flush()
        os._exit(0)  # whatever threads an environment has left
    _own_stdout().close()
    if mode == "serve":
        serve(words[1])
    else:
        _child(words[1], None)


def _own_stdout() -> Any:
    """The standard output, for us alone: the environment's prints go to stderr, and its input is empty."""
    ours = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return ours


# --- the environments ---------------------------------------------------------------------------------------


class Loaded:
    """The environments of a run, by split, and verifiers itself."""

    def __init__(self, spec: Spec) -> None:
        """Raises :class:`_Wrong`."""
        try:
            # The first is what the first episode would import otherwise, in each child.
            import openai.resources.chat  # pyright: ignore[reportUnusedImport]  # noqa: F401
            import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]
            from verifiers.v1.configs.agent import (  # pyright: ignore[reportMissingImports]
                agent_config_fields,
            )
            from verifiers.v1.utils import loaders  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise _Wrong("python", f"{sys.executable} has no verifiers 0.4 ({error})") from error
        self.vf: Any = vf
        self.envs: dict[str, Any] = {}
        for split in ("train", "eval"):
            if spec[split] is None:
                self.envs[split] = self.envs["train"]
                continue
            try:
                config = loaders.resolve_env_config(spec[split])
                for name, seat in agent_config_fields(config).items():
                    turns = [most for most in (spec["turns"], seat.max_turns) if most]
                    setattr(config, name, seat.model_copy(update={"max_turns": min(turns, default=None)}))
                self.envs[split] = env = loaders.load_environment(config)
            except BaseException as error:  # the user's code, or settings that it refuses
                raise _Wrong("environment", _text(error)) from error
            _look_at_runtimes(config, agent_config_fields(config))
            _freeze_fixed_seats(env)
            data = type(env.taskset).task_type().data_type()
            if hidden := [name for name, field in data.model_fields.items() if field.exclude]:
                raise _Wrong(
                    "environment",
                    f"{data.__name__} is written down without {', '.join(hidden)} (exclude=True), and tasks "
                    "are sent to where episodes run: take exclude out",
                )

    def task(self, split: str, data: dict[str, Any]) -> Any:
        """The task of these data, as verifiers' own server builds it."""
        env = self.envs[split]
        kind = type(env.taskset).task_type()
        return kind(kind.data_type().model_validate(data), env.config.taskset.task)


def _look_at_runtimes(config: Any, seats: dict[str, Any]) -> None:
    """Prime's sandboxes, where programs of agents run by default, ask for an account: without one each
    episode would end in its beginning.  Raises :class:`_Wrong`.
    """
    remote = [name for name, seat in seats.items() if seat.runtime.type == "prime"]
    if not remote:
        return
    from verifiers.v1.utils.prime import ensure_prime_auth  # pyright: ignore[reportMissingImports]

    try:
        ensure_prime_auth()
    except SystemExit as error:
        raise _Wrong(
            "environment",
            f"{remote[0]} plays in Prime's sandboxes, and verifiers is {error}; pass the key on with "
            f"agent.env_from=[PRIME_API_KEY], or have it play on this machine: {{taskset: {{id: "
            f"{config.taskset.id}}}, {remote[0]}: {{runtime: {{type: subprocess}}}}}}",
        ) from error


def _freeze_fixed_seats(env: Any) -> None:
    """A seat that ``env.setup`` says is not trained, and that has no model of its own, plays with the frozen
    one.
    """
    setup = env.setup

    async def setup_and_freeze(agents: Any) -> None:
        import dataclasses

        await setup(agents)
        for name, agent in agents._agents.items():
            if not agent.trainable and getattr(env.config, name).model is None:
                agent.ctx = dataclasses.replace(agent.ctx, model=FROZEN)
                agent.config = agent.config.model_copy(update={"model": FROZEN})

    env.setup = setup_and_freeze


def questions(spec: Spec) -> dict[str, list[dict[str, Any]]]:
    """By split, the first ``spec["most"][split]`` tasks: {"key", "data"} each, data as JSON holds them.

    Raises :class:`_Wrong`.
    """
    loaded = Loaded(spec)
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for split, most in spec["most"].items():
            tasks = itertools.islice(iter(loaded.envs[split].taskset), most)
            found[split] = [{"key": task.key, "data": task.data.model_dump(mode="json")} for task in tasks]
    except BaseException as error:
        raise _Wrong("environment", f"its tasks cannot be read: {_text(error)}") from error
    return found


# --- the server ---------------------------------------------------------------------------------------------


def serve(path: str) -> None:
    """Load what is asked for, then fork a child for each line that is sent."""
    line = socket.socket(socket.AF_UNIX)
    line.connect(path)
    _say(line, {"server": os.getpid()})
    with line.makefile("rb") as asked:
        spec = json.loads(asked.readline())
        try:
            loaded = Loaded(spec)
        except _Wrong as wrong:
            _say(line, {"error": str(wrong), "field": wrong.field})
            return
        # A process with threads cannot be forked and go on: locks that they hold would never be released.
        threads = threading.active_count() > 1
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
        gc.freeze()  # what is shared with children stays shared when they collect
        _say(line, {"loads": "each child" if threads else "once"})
        while asked.readline():
            if os.fork() == 0:
                _die_with_parent()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                if threads:
                    os.environ["ESPALIER_SPEC"] = json.dumps(spec)
                    os.execv(sys.executable, [sys.executable, "-P", __file__, "child", path])
                os.close(line.detach())
                try:
                    _child(path, loaded)
                except BaseException:  # told, as the interpreter would have: nothing else says why it died
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _say(line: socket.socket, message: dict[str, Any]) -> None:
    line.sendall(json.dumps(message).encode() + b"\n")


# --- a child ------------------------------------------------------------------------------------------------


def _child(path: str, loaded: Loaded | None) -> None:
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # as Python does with its own: else all forks draw the same numbers
    if loaded is None:
        loaded = Loaded(json.loads(os.environ.pop("ESPALIER_SPEC")))
    with contextlib.suppress(ConnectionError, KeyboardInterrupt):
        asyncio.run(_episodes(path, loaded))


async def _episodes(path: str, loaded: Loaded) -> None:
    """Run what is asked for, until the line is closed."""
    reader, writer = await asyncio.open_unix_connection(path, limit=1 << 30)
    writer.write(json.dumps({"child": os.getpid()}).encode() + b"\n")
    running: asyncio.Task[dict[str, Any]] | None = None
    main = asyncio.current_task()
    assert main is not None
    async with contextlib.AsyncExitStack() as served:
        open_envs: set[str] = set()

        async def answer(asked: dict[str, Any]) -> dict[str, Any]:
            try:
                env = loaded.envs[asked["split"]]
                if asked["split"] not in open_envs:
                    await served.enter_async_context(env.serving())
                    open_envs.update(split for split, one in loaded.envs.items() if one is env)
                return await _episode(loaded, env, asked)
            except asyncio.CancelledError:
                return {"error": "cancelled"}
            except BaseException as error:  # data for the other side, not the child's end
                return {"error": _text(error)}

        def tell(done: asyncio.Task[dict[str, Any]]) -> None:
            if main.done() or main.cancelling():  # all ends, by an exit or a signal: told where it ends
                return
            told = {"error": "cancelled"} if done.cancelled() else done.result()
            writer.write(json.dumps(told).encode() + b"\n")

        while line := await reader.readline():
            asked = json.loads(line)
            if "cancel" in asked:
                if running is not None and not running.done():
                    running.cancel()
                continue
            running = asyncio.create_task(answer(asked))
            running.add_done_callback(tell)
        signal.alarm(CLOSE_S)
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def _episode(loaded: Loaded, env: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """One episode: {"reward", "parts"}, or {"error"}."""
    vf = loaded.vf
    client = vf.EvalClientConfig(base_url=asked["base_url"], api_key_var="ESPALIER_NO_KEY")
    context = vf.ModelContext(model=asked["model"], client=client)
    (slot,) = env.slots(loaded.task(asked["split"], asked["task"]))
    episode = await env.run_slot(slot, context)
    if not episode.ok:
        errors = [trace.errors[-1] for trace in episode.traces if not trace.ok and trace.errors]
        told = [f"{error.type}: {error.message}" for error in (*episode.errors[-1:], *errors)]
        late = "a stage's deadline was over" if episode.is_timeout else "it failed without an error"
        return {"error": (told[0] if told else late)[:SHOWN]}
    trained = [trace for trace in episode.traces if trace.agent.trainable]
    if len(trained) != 1:
        names = ", ".join(trace.agent.name for trace in trained) or "none"
        return {"error": f"{len(trained)} trained agents played ({names}): one can be trained"}
    (trace,) = trained
    parts = {name: reward.value for name, reward in trace.rewards.items() if reward is not None}
    parts |= {name: value for name, value in trace.metrics.items() if value is not None}
    shown = {
        re.sub(r"[^\w.-]", "_", name)[:LONGEST_NAME] or "_": float(parts[name])
        for name in list(parts)[:MOST_PARTS]
    }
    return {"reward": float(trace.reward), "parts": shown}


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:SHOWN]


if __name__ == "__main__":
    main(sys.argv[1:])
