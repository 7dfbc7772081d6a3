"""How the interpreter that has verifiers is started, and what it is told."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

from system.agents.process import inherited
from system.config import AgentConfig
from system.errors import ConfigError
from system.redact import redact

CHECKOUT = Path(__file__).resolve().parents[3]
SERVE = str(Path(__file__).with_name("serve.py"))
REMEDY = "make verifiers, or set agent.options.python to an interpreter that has verifiers 0.4"
Environment = Mapping[str, Any]


def interpreter(python: str) -> str:
    """The Python that has verifiers: ``python``, or what ``make verifiers`` made.

    Raises :class:`ConfigError` where there is none.
    """
    wanted = python or str(CHECKOUT / ".venv-verifiers" / "bin" / "python")
    if not os.access(wanted, os.X_OK) or not Path(wanted).is_file():
        raise ConfigError(f"agent.options.python: there is no interpreter {wanted}: {REMEDY}")
    return os.path.abspath(wanted)  # not resolved: a link's place is what makes it a virtual environment


def specification(environment: Any, held_out: Any, turns: int) -> dict[str, Any]:
    """What :mod:`.serve` loads: verifiers' own ``env`` blocks, by split.

    ``environment``: the block, or the id of its taskset alone; ``held_out``: settings of the taskset for the
    held-out questions, if they are not of the same.  Raises :class:`ConfigError`.
    """
    if isinstance(environment, str) and environment:
        environment = {"taskset": {"id": environment}}
    block = cast("dict[str, Any]", environment) if isinstance(environment, dict) else {}
    given = block.get("taskset")
    taskset = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
    if not taskset.get("id"):
        raise ConfigError(
            f"agent.options.environment={environment!r:.100}: name a taskset: my_taskset, or "
            "{taskset: {id: my_taskset, …}, agent: {…}} as verifiers has it"
        )
    other = {**block, "taskset": {**taskset, **held_out}} if held_out else None
    return {"train": block, "eval": other, "turns": turns}


def surroundings(python: str, settings: AgentConfig) -> dict[str, str]:
    """The environment variables that it is started in: the worker's without secrets, what ``agent.env`` says,
    and its own programs first on the path.
    """
    made = {**inherited(settings.env_from), **settings.env}
    made["PATH"] = os.pathsep.join([str(Path(python).parent), made["PATH"]])
    return made


def questions(
    python: str, spec: Mapping[str, Any], most: Mapping[str, int], settings: AgentConfig, within_s: float
) -> dict[str, list[dict[str, Any]]]:
    """By split, the first ``most[split]`` tasks, {"key", "data"} each.

    Raises :class:`ConfigError` naming the field, for whatever goes wrong over there.
    """
    asked = json.dumps({**spec, "most": dict(most)}).encode() + b"\n"
    # Files, not pipes: the end of a pipe is not seen while a program that the environment started holds it.
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                [python, "-P", SERVE, "questions"],
                stdin=subprocess.PIPE,
                stdout=answer,
                stderr=errors,
                env=surroundings(python, settings),
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(f"agent.options.python={python}: {error}: {REMEDY}") from error
        try:
            process.communicate(asked, timeout=within_s)
        except subprocess.TimeoutExpired as error:
            raise ConfigError(
                f"agent.options.environment: it did not load within {within_s:g} s (its last line: "
                f"{_last_line(errors)}): raise agent.options.start_s, or make it quicker"
            ) from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever it has started and left
            process.wait()
        answer.seek(0)
        try:
            found: dict[str, Any] = json.load(answer)
        except ValueError as error:
            raise ConfigError(
                f"agent.options.python={python}: it ended with code {process.returncode} "
                f"({_last_line(errors)}): {REMEDY}"
            ) from error
    if "error" in found:
        raise told_wrong(python, found)
    return found["questions"]


def _last_line(output: IO[bytes]) -> str:
    """The last that was put out, without secrets."""
    output.seek(max(0, output.seek(0, os.SEEK_END) - 2000))
    lines = output.read().decode("utf-8", "replace").strip().splitlines()
    return redact(lines[-1]) if lines else "it said nothing"


def told_wrong(python: str, message: Mapping[str, Any]) -> ConfigError:
    """What :mod:`.serve` says is wrong, with the field and the remedy."""
    text = " ".join(redact(str(message["error"])).split())
    if message.get("field") == "python":
        return ConfigError(f"agent.options.python={python}: {text}: {REMEDY}")
    return ConfigError(
        f"agent.options.environment: {text}; correct it as verifiers says (modules are looked for in "
        f"{os.getcwd()}, too)"
    )
