"""A run that is ended between the end of its training and the end of all is gone on with there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors import delivery
from actors.ray_support import StartFailed
from actors.train import train
from system.config import Config, load
from system.observe import publish
from system.observe.hub import PushFailed
from system.observe.rundir import RunDir

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("training goes on")

    monkeypatch.setattr("ray.init", fail)


class Hub:
    """Takes models but while it is ``full``."""

    def __init__(self) -> None:
        self.full, self.taken = True, list[str]()

    def push(self, directory: Path, repository: str, **_: Any) -> str:
        if self.full:
            raise PushFailed(f"{repository} did not take the model")
        self.taken.append(repository)
        return f"https://hub/{repository}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(delivery, "push", made.push)
    monkeypatch.setattr("system.observe.hub.push", made.push)
    monkeypatch.setattr("system.observe.hub.problem", lambda repository: "")
    return made


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load(ROOT / "configs" / "quickstart.yaml", [f"run.dir={tmp_path}", "run.steps=5"])


@pytest.fixture
def run(config: Config) -> RunDir:
    """Ended at step 5, and killed before the model's card was written."""
    made = RunDir.create(config, "small")
    (made.checkpoints / "v000005").mkdir()
    made.model.mkdir()
    tell(made, ended=True, versions=5)
    return made


def tell(run: RunDir, *, ended: bool, versions: int, steps: int = 5) -> None:
    run.write_summary(
        {"ended": ended, "versions": versions, "config": {"run": {"steps": steps}}, "eval": {}, "tokens": {}}
    )


def resume(config: Config, run: RunDir) -> int:
    return train(config, config_name="", resume=run.root)


def test_a_run_killed_before_the_card_gets_it(
    config: Config, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(config, run) == 0
    assert (run.model / "README.md").is_file()
    assert "ended at" not in capsys.readouterr().out
    assert resume(config, run) == 0
    assert "ended at step 5" in capsys.readouterr().out


@pytest.mark.parametrize("before", [None, (False, 5), (True, 3)])
def test_one_killed_before_its_summary_ends_once_more(
    config: Config, run: RunDir, before: tuple[bool, int] | None
) -> None:
    """What is known of it is of an earlier session, that stopped, or ended at fewer steps, or there is
    nothing: no card can be written of that.
    """
    run.summary_path.unlink()
    if before:
        tell(run, ended=before[0], versions=before[1], steps=before[1])
    with pytest.raises(StartFailed, match="training goes on"):
        resume(config, run)
    assert not (run.model / "README.md").exists()


@pytest.mark.parametrize("versions", [5, 4])
def test_an_upload_that_broke_off_is_made_by_a_resume(
    config: Config, run: RunDir, hub: Hub, capsys: pytest.CaptureFixture[str], versions: int
) -> None:
    """Also where the run had ended early, for run.stop_at_accuracy."""
    tell(run, ended=True, versions=versions)
    config.run.push = "me/it"
    assert resume(config, run) == 1
    assert f"try again with espalier train --resume {run.root}, or espalier export" in capsys.readouterr().err
    assert run.due_repository == "me/it"
    assert resume(config, run) == 1
    hub.full = False
    assert resume(config, run) == 0
    assert hub.taken == ["me/it"]
    assert not run.due_repository
    if versions == 5:
        assert resume(config, run) == 0
        assert hub.taken == ["me/it"]


def test_an_upload_may_be_called_off_or_made_by_hand(config: Config, run: RunDir, hub: Hub) -> None:
    config.run.push = "me/it"
    assert resume(config, run) == 1
    config.run.push = ""
    assert resume(config, run) == 0
    assert not run.due_repository
    config.run.push = "me/it"
    delivery.deliver(config, run)
    hub.full = False
    list(publish.publish(run, None, None, "me/other"))
    assert run.due_repository == "me/it"
    list(publish.publish(run, None, None, "me/it"))
    assert not run.due_repository
