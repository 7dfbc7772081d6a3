"""What happens before a run starts: nothing is left of one that does not, and no import takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from actors.evaluate import evaluate
from actors.ray_support import StartFailed
from actors.train import train
from system.config import ConfigError, load
from system.observe.rundir import RunDir

ROOT = Path(__file__).parents[2]
SLOW = ("torch", "transformers", "megatron", "matplotlib", "wandb")


def test_the_driver_starts_without_slow_imports() -> None:
    code = f"import sys, actors.train, actors.evaluate; print(*(m for m in {SLOW} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_a_torn_model_is_not_evaluated(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "hid')
    with pytest.raises(ConfigError, match=r"config\.json: not the config\.json of a model"):
        evaluate(load(ROOT / "configs" / "quickstart.yaml"), tmp_path)


def test_ray_that_does_not_start_leaves_no_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("no room for the object store")

    monkeypatch.setattr("ray.init", fail)
    (tmp_path / "data.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    words = ["task=jsonl", f"task.path={tmp_path}/data.jsonl", f"run.dir={tmp_path}/runs"]
    told = r"Ray does not start here: no room.*; cluster\.ray_agents=true starts it"
    with pytest.raises(StartFailed, match=told):
        train(load(None, words), config_name="", resume=None)
    assert not list((tmp_path / "runs").iterdir())


def test_a_run_that_came_to_its_end_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another try would grow trees for nothing, and write other settings over those that made it."""

    def fail(**_: object) -> None:
        raise RuntimeError("it would start")

    monkeypatch.setattr("ray.init", fail)
    config = load(ROOT / "configs" / "quickstart.yaml", [f"run.dir={tmp_path}", "run.steps=5"])
    run = RunDir.create(config, "small")
    (run.checkpoints / "v000005").mkdir()
    run.model.mkdir()
    (run.model / "README.md").touch()
    run.write_summary({"ended": True, "versions": 5, "config": {"run": {"steps": 5}}})
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    config.learn.lr = 1.0
    assert train(config, config_name="", resume=run.root) == 0
    assert "ended at step 5, and is left as it is; to go on, set run.steps above" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()} == before
    config.run.steps = 6
    with pytest.raises(StartFailed, match="it would start"):
        train(config, config_name="", resume=run.root)
    assert {path: path.read_bytes() for path in before} == before, "nor by one that is refused"
