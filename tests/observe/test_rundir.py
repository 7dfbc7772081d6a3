from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from system.config import Config
from system.observe.rundir import RunDir, RunDirError


def test_a_new_run_is_named_after_its_recipe_and_seed(config: Config):
    config.run.seed = 3
    run = RunDir.create(config, "quickstart")
    assert run.name == "quickstart-s3"
    assert run.config() == config
    assert run.trees.is_dir()
    assert run.checkpoints.is_dir()


def test_repeating_a_command_never_touches_an_earlier_run(config: Config):
    names = [RunDir.create(config, "quick").name for _ in range(3)]
    assert names == ["quick-s0", "quick-s0-2", "quick-s0-3"]


def test_runs_started_together_get_directories_of_their_own(config: Config):
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: RunDir.create(config, "quick").name, range(8)))
    assert len(set(names)) == 8


def test_a_chosen_name_that_is_taken_is_an_error_with_both_remedies(config: Config):
    config.run.name = "mine"
    RunDir.create(config)
    with pytest.raises(RunDirError, match=r"--resume .*mine.*another name"):
        RunDir.create(config)


def test_an_empty_directory_of_the_chosen_name_is_used(config: Config):
    config.run.name = "mine"
    (Path(config.run.dir) / "mine").mkdir(parents=True)
    assert RunDir.create(config).name == "mine"


@pytest.mark.parametrize("name", ["..", "a/b", "../x", "/tmp"])
def test_a_name_cannot_leave_the_directory_of_runs(config: Config, name: str):
    config.run.name = name
    with pytest.raises(RunDirError, match="plain directory name"):
        RunDir.create(config)


def test_opening_what_is_no_run_says_so(tmp_path: Path):
    with pytest.raises(RunDirError, match="no such run"):
        RunDir.open(tmp_path / "none")
    with pytest.raises(RunDirError, match=r"no config\.yaml"):
        RunDir.open(tmp_path)


def test_overrides_apply_over_the_stored_configuration(run_dir: RunDir):
    assert RunDir.open(run_dir.root).config(("run.steps=7",)).run.steps == 7


def test_a_changed_configuration_keeps_its_predecessor(run_dir: RunDir, config: Config):
    run_dir.write_config(config)  # unchanged
    assert list(run_dir.logs.glob("config-*.yaml")) == []
    before = run_dir.config_path.read_text()
    config.run.steps = 7
    run_dir.write_config(config)
    assert (run_dir.logs / "config-1.yaml").read_text() == before
    assert run_dir.config().run.steps == 7


def test_the_summary_is_strict_json(run_dir: RunDir):
    run_dir.write_summary({"a": float("nan"), "b": {"c": 1}})
    assert json.loads(run_dir.summary_path.read_text()) == {"a": None, "b": {"c": 1}}
    assert [path.name for path in run_dir.root.iterdir() if path.name.startswith(".")] == []


def test_a_configuration_that_was_emptied_cut_or_edited_is_not_resumed_with_defaults(run_dir: RunDir):
    run_dir.check_config()
    whole = run_dir.config_path.read_text()
    edited = whole.replace("seed: 0", "seed: 1")
    for text in ("", whole[: len(whole) // 2], edited):
        run_dir.config_path.write_text(text)
        with pytest.raises(RunDirError, match=r"config\.yaml was edited or is damaged.*--resume"):
            run_dir.check_config()
    run_dir.config_path.write_text("\n".join(edited.splitlines()[:-1]))
    run_dir.check_config()
    assert run_dir.config().run.seed == 1


def test_a_relative_model_is_found_from_anywhere(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    (there / "models" / "m").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(there)
    config.run.dir, config.run.name, config.model.path = "out/runs", "one", "models/m"
    root = RunDir.create(config).root.resolve()
    monkeypatch.chdir(elsewhere)
    run = RunDir.open(root)
    assert run.start_model(run.config()) == there / "models" / "m"
    assert RunDir.open("../there/out/runs/one").start_model(config) == there / "models" / "m"
    config.run.dir = str(there / "out" / "runs")  # which tells nothing of where it was started
    with pytest.raises(RunDirError, match=r"model.path=models/m, .* call this from the directory in which"):
        run.start_model(config)
    monkeypatch.chdir(there)
    assert run.start_model(config).is_dir()
    config.model.path = str(there / "models")
    assert run.start_model(config) == there / "models"
    config.model.path = ""
    assert run.start_model(config) == run.start
