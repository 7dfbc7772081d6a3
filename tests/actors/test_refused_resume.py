"""A resume that is refused leaves the run as it was; one that is taken up goes by its own settings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors import sft as supervised_run
from actors import train
from actors.checkpoints import Restored
from actors.supervised import SftState, Supervised
from system.config import Config, load
from system.errors import CheckpointError, ConfigError
from system.observe.progress import Progress
from system.observe.recorder import Recorder, Status
from system.observe.rundir import RunDir
from system.sft.example import Example
from system.sft.prepare import Prepared
from system.tree.record import Kind


@pytest.fixture
def config(tmp_path: Path) -> Config:
    told = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "7"}]}
    for name, row in (("asked", {"question": "?", "answer": "7"}), ("told", told)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    words = ["task=jsonl", f"task.path={tmp_path}/asked.jsonl", f"sft.path={tmp_path}/told.jsonl"]
    words += [f"run.dir={tmp_path}", "run.name=run", "run.steps=5", "observe.wandb=disabled"]
    return load(None, [*words, "tools.names=[]", "model.path=model"])


def ended(config: Config, *, supervised: bool) -> RunDir:
    """A run of five steps that left its model, and of a supervised one none, which would be left alone."""
    run = RunDir.create(config, supervised=supervised)
    if not supervised:
        run.model.mkdir()
        (run.model / "README.md").touch()
        run.write_summary({"ended": True, "versions": 5, "config": {"run": {"steps": 5}}})
    return run


def kept(run: RunDir) -> dict[str, bytes]:
    files = (run.config_path, run.summary_path, *run.logs.glob("config-*.yaml"))
    return {path.name: path.read_bytes() for path in files if path.exists()}


def refused(monkeypatch: pytest.MonkeyPatch, command: Any) -> list[str]:
    """Lets no session place its actors; returns the commands that are told to go on with."""
    again: list[str] = []

    def session(_: Config, __: Path, work: Callable[[bool], Coroutine[Any, Any, int]], how: str, **___: Any):
        again.append(how)
        return asyncio.run(work(True))

    async def claim(*_: Any, **__: Any) -> None:
        raise ConfigError("these settings do not do")

    monkeypatch.setattr(command, "in_session", session)
    monkeypatch.setattr(command.Placement, "claim", claim)
    return again


@pytest.mark.parametrize(
    ("command", "run"), [(train, train.train), (supervised_run, supervised_run.sft)], ids=["train", "sft"]
)
def test_settings_that_are_refused_are_not_those_of_the_next_resume(
    command: Any, run: Callable[..., int], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = ended(config, supervised=command is supervised_run)
    again, before = refused(monkeypatch, command), kept(directory)
    config.run.steps = 6
    with pytest.raises(ConfigError, match="these settings do not do"):
        run(config, config_name="run", resume=directory.root)
    assert kept(directory) == before
    config.run.steps = 5
    assert again == [f"{directory.resume_command} and the same overrides"]
    assert directory.again(config) == directory.resume_command


@pytest.mark.parametrize("taken", [True, False])
async def test_they_are_the_runs_once_its_checkpoint_is_taken(
    taken: bool, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ended(config, supervised=False)
    before = kept(run)

    class Conductor:
        spare, version = None, 5

        def __init__(self, *_: Any, **__: Any) -> None:
            self.loop, self.evaluations = SimpleNamespace(), SimpleNamespace(cut=self.nothing)

        async def nothing(self) -> None: ...

        async def restore(self, _: Restored) -> None:
            raise RuntimeError("it goes on")

    async def newest(*_: Any) -> Restored:
        if not taken:
            raise CheckpointError("it does not fit")
        return Restored(run.checkpoints / "v000005", {})

    monkeypatch.setattr(train, "Conductor", Conductor)
    monkeypatch.setattr(train, "restore_newest", newest)
    config.run.steps = 6
    about: Any = SimpleNamespace(
        config=config, run_dir=run, task=None, recorder=None, asked=[],
        progress=SimpleNamespace(note=None), ending=SimpleNamespace(stops=lambda *_: None),
    )  # fmt: skip
    actors: Any = SimpleNamespace(learner=None, places=SimpleNamespace())
    with pytest.raises(RuntimeError, match="it goes on" if taken else "it does not fit"):
        await train._conduct(about, actors)  # pyright: ignore[reportPrivateUsage]
    if not taken:
        assert kept(run) == before
        return
    assert run.config().run.steps == 6
    assert (run.logs / "config-1.yaml").read_bytes() == before["config.yaml"]
    assert not run.end, "until the new end it has none"


async def test_they_are_a_supervised_runs_once_its_data_are_the_same(config: Config) -> None:
    run = ended(config, supervised=True)
    tokens = [(Kind.PROMPT, np.array([1], np.int32)), (Kind.MODEL, np.array([2], np.int32))]
    prepared = Prepared([Example.of("row 1", tokens)], [], 0, 0, 0, "digest")
    config.checkpoint.keep = 7

    async def saved(**_: Any) -> bool:
        return False

    learner: Any = SimpleNamespace(warnings=(), saved=saved)
    progress = Progress(Status, total_steps=1, interval_s=60)
    going = Supervised(config, run, SftState(), learner, [], progress, "last")
    going.stop()
    assert not await going.run(prepared)
    assert run.config().checkpoint.keep == 7


def test_the_summary_of_a_session_that_took_up_nothing_is_not_the_runs(config: Config) -> None:
    run = RunDir.create(config)
    assert Recorder(run, config, []).finish(ended=False)["versions"] == 0
    assert json.loads(run.summary_path.read_text())["versions"] == 0, "of a new run it is"
    run.write_summary({"ended": True, "versions": 5})
    before = kept(run)
    assert not Recorder(run, config, []).finish(ended=False)["ended"]
    assert kept(run) == before
