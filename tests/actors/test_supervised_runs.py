"""Which checkpoint a resumed supervised run goes on from, and what ends one."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors import sft as supervised_run
from actors.cli.main import main
from actors.delivery import delivered
from actors.supervised import NeverFinite, SftState, Supervised
from system.config import Config
from system.errors import CheckpointError, ConfigError
from system.observe.progress import Progress
from system.observe.recorder import Status
from system.observe.rundir import RunDir
from system.sft.example import Example
from system.sft.prepare import Prepared
from system.tree.record import Kind

ALL = {"v000001", "v000002"}


class Learner:
    """Loads what is not in ``damaged``; its gradients have the norms that come."""

    warnings = ()

    def __init__(self, *damaged: str, norms: Sequence[float] = ()) -> None:
        self.damaged, self.norms = damaged, [*norms]

    async def supervise(self, trees: Sequence[Any], lr: float) -> dict[str, float]:
        norm = self.norms.pop(0)
        skipped = float(not math.isfinite(norm))
        stats = {"loss": 2.0, "grad_norm": norm, "weight_norm": 1.0, "lr": lr, "skipped_steps": skipped}
        return {**stats, "tokens_computed": float(len(trees))}

    async def save(self, path: str, extra: dict[str, Any]) -> None:
        os.mkdir(path)

    async def saved(self, *, wait: bool) -> bool:
        return True

    async def save_hf(self, path: str) -> None:
        os.makedirs(path)

    async def load(self, path: str) -> dict[str, Any]:
        if Path(path).name in self.damaged:
            raise CheckpointError(f"{path}: it does not hold the adapters")
        return {"sft": {"step": int(path[-6:])}}


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    config = Config()
    config.run.dir = str(tmp_path)
    made = RunDir.create(config)
    for name in ALL:
        (made.checkpoints / name).mkdir()
    return made


def supervised(config: Config, run_dir: RunDir, state: SftState, learner: Any) -> Supervised:
    progress = Progress(Status, total_steps=2, interval_s=60)
    return Supervised(config, run_dir, state, learner, [], progress, "last")


async def restored(run_dir: RunDir, *damaged: str) -> int:
    state = SftState()
    run = supervised(Config(), run_dir, state, Learner(*damaged))
    await run._restore(2)  # pyright: ignore[reportPrivateUsage]
    return state.step


async def test_one_that_cannot_be_read_is_set_aside_for_an_older_one(run_dir: RunDir) -> None:
    assert await restored(run_dir, "v000002") == 1
    assert {path.name for path in run_dir.checkpoints.iterdir()} == {"v000001", "v000002.unused"}


async def test_where_none_is_of_use_all_stay_for_the_next_try(run_dir: RunDir) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* can be used"):
        await restored(run_dir, *ALL)
    assert {path.name for path in run_dir.checkpoints.iterdir()} == ALL
    assert await restored(run_dir) == 2


async def test_a_resume_that_is_refused_changes_nothing(run_dir: RunDir) -> None:
    run_dir.sft_path.write_text("{}")
    config, state = Config(), SftState()
    tokens = [(Kind.PROMPT, np.array([1], np.int32)), (Kind.MODEL, np.array([2], np.int32))]
    prepared = Prepared([Example.of("row 1", tokens)], [], 0, 0, 0, "other data")
    with pytest.raises(ConfigError, match="was trained on other conversations"):
        await supervised(config, run_dir, state, Learner()).run(prepared)
    assert run_dir.sft_path.read_text() == "{}"


async def trained(run_dir: RunDir, norms: Sequence[float], epochs: int) -> SftState:
    """After so many steps of one conversation each, with gradients of these norms."""
    for old in run_dir.checkpoints.iterdir():
        old.rmdir()
    config, state = Config(), SftState()
    config.sft.batch, config.sft.epochs = 1, epochs
    tokens = [(Kind.PROMPT, np.array([1], np.int32)), (Kind.MODEL, np.array([2], np.int32))]
    prepared = Prepared([Example.of("row 1", tokens)], [], 0, 0, 0, "digest")
    assert await supervised(config, run_dir, state, Learner(norms=norms)).run(prepared)
    return state


async def test_gradients_that_are_never_finite_end_a_run(run_dir: RunDir) -> None:
    nan = math.nan
    with pytest.raises(
        NeverFinite, match=r"step 10: the gradients of the last 10 .*gradient norm nan, loss 2"
    ):
        await trained(run_dir, [nan] * 20, epochs=20)
    with pytest.raises(NeverFinite, match=r"step 3: the gradients of the last 3 steps"):
        await trained(run_dir, [nan] * 3, epochs=3)
    state = await trained(run_dir, [nan, nan, 1.0, nan, 1.0], epochs=5)  # some are: it goes on
    assert (state.step, state.skipped) == (5, 0)


def test_a_run_is_known_for_a_supervised_one_before_its_data_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config()
    config.run.dir, config.run.name, config.warmstart.steps = str(tmp_path), "one", 0
    made = RunDir.create(config, supervised=True)
    assert made.supervised
    assert made.resume_command == f"espalier sft --resume {tmp_path}/one"
    with pytest.raises(ConfigError, match="continue it with `espalier sft --resume"):
        RunDir.create(config)
    assert main(["train", "--resume", str(made.root)]) == 2
    assert f"is a supervised run: go on with {made.resume_command}" in capsys.readouterr().err


def test_what_was_ended_between_its_model_and_the_card_is_finished(
    run_dir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_dir.config()
    run_dir.sft_path.write_text("{}")
    run_dir.write_summary({"chosen": {"step": 2}})
    run_dir.model.mkdir()
    (run_dir.candidates / "step-000001").mkdir(parents=True)
    assert not delivered(run_dir)
    assert supervised_run.sft(config, config_name="run", resume=run_dir.root) == 0
    assert "has ended" not in capsys.readouterr().out
    assert (run_dir.model / "README.md").is_file()
    assert not run_dir.candidates.exists()
    assert supervised_run.sft(config, config_name="run", resume=run_dir.root) == 0
    assert "has ended" in capsys.readouterr().out
