"""Of verifiers, what serve.py asks of it, where the real package cannot be: a task says what happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar


@dataclass
class EvalClientConfig:
    base_url: str
    api_key_var: str


@dataclass
class ModelContext:
    model: str
    client: EvalClientConfig


class Panic(BaseException):
    """As extensions in Rust raise, and pytest.fail."""


async def exits() -> None:
    sys.exit("not authenticated: log in")


class Data(SimpleNamespace):
    model_fields: ClassVar[dict[str, Any]] = {}

    @classmethod
    def model_validate(cls, data: dict[str, Any]) -> Data:
        return cls(**data)

    def model_dump(self, mode: str) -> dict[str, Any]:
        return vars(self)


class Task:
    key = "k"

    def __init__(self, data: Data, config: Any = None) -> None:
        self.data = data

    @classmethod
    def data_type(cls) -> type[Data]:
        return Data


class Taskset:
    def __init__(self, name: str) -> None:
        self.name = name

    def __iter__(self):
        print("an environment may print")
        tasks = 0 if self.name == "empty" else 6
        return (Task(Data(prompt=f"question {number}", does="right")) for number in range(tasks))

    @classmethod
    def task_type(cls) -> type[Task]:
        return Task


class Env:
    def __init__(self, config: Any) -> None:
        self.config, self.taskset, self.runs = config, Taskset(config.taskset.id), 0

    async def setup(self, agents: Any) -> None:
        pass

    @contextlib.asynccontextmanager
    async def serving(self):
        yield

    def slots(self, task: Task) -> list[Task]:
        return [task]

    async def run_slot(self, task: Task, context: ModelContext) -> Any:
        self.runs += 1
        match task.data.does:
            case "raise":
                raise ValueError(f"no luck with {context.client.base_url}")
            case "panic":
                raise Panic("at src/lib.rs:7")
            case "secret":
                raise ValueError("Incorrect API key provided: sk-abcdefghijklmnop")
            case "exit":
                sys.exit(4)
            case "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)  # noqa: ASYNC251 -- for it to arrive
                await asyncio.sleep(600)
            case "exit beside":
                asyncio.create_task(exits())  # noqa: RUF006
                await asyncio.sleep(600)
            case "linger":
                asyncio.get_running_loop().run_in_executor(None, time.sleep, 600)
                sys.modules["__main__"].CLOSE_S = 1
            case "die":
                print("its last words", flush=True)
                os._exit(3)
            case "hang":
                time.sleep(600)  # noqa: ASYNC251 -- what it does wrong
            case "wait":
                await asyncio.sleep(600)
            case "print":
                os.write(1, b'{"reward": 7}\n' * 1000)
                print(input.__name__, sys.stdin.read())
        draw = numpy.random.random() if (numpy := sys.modules.get("numpy")) else 0.0
        reward = {"nan": float("nan"), "right": 1.0}.get(task.data.does, 0.25)
        trace = SimpleNamespace(
            agent=SimpleNamespace(trainable=True, name="agent"),
            rewards={"right": SimpleNamespace(value=reward), "late": None},
            metrics={"judge/how wéll?": 2.0, "process": os.getpid(), "runs": self.runs, "draw": draw},
            reward=reward,
            ok=True,
        )
        error = SimpleNamespace(type="TaskError", message="its reward raised")
        return SimpleNamespace(
            ok=task.data.does != "fail",
            errors=[error],
            traces=[trace] * (2 if task.data.does == "two" else 1),
            is_timeout=False,
        )
