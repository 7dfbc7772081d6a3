"""A model card says what the run says, and nothing of its machine; a model goes to a hub, whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_in_hub import TOKEN, Hub

from system.config import Config, PartConfig
from system.evals.table import share
from system.observe import hub
from system.observe.card import base_name, model_card
from system.observe.publish import rounded_away
from system.observe.rundir import RunDir

SUMMARY: dict[str, Any] = {
    "versions": 20,
    "eval": {
        "before": {"accuracy": 0.25, "questions": 8, "kinds": {"a|b": {"accuracy": 0.5, "questions": 4}}},
        "after": {
            "accuracy": 0.75,
            "questions": 8,
            "kinds": {
                "a|b": {"accuracy": 1.0, "questions": 4},
                "<script>": {"accuracy": None, "questions": 4},
            },
        },
    },
    "trees": 80,
    "forks": 1234,
    "tokens": {"generated": 5, "trained": 4},
    "wall_s": 5400.0,
}


@pytest.mark.parametrize(("right", "questions"), [(0, 8), (3, 8), (8, 8), (150, 200)])
def test_an_interval_holds_the_shares_that_would_not_surprise(right: int, questions: int) -> None:
    """Wilson's: those of which the share found is at most 1.96 standard deviations away."""
    found = right / questions
    shares = np.linspace(0, 1, 100_001)
    near = shares[abs(found - shares) <= 1.959964 * np.sqrt(shares * (1 - shares) / questions)]
    assert share(found, questions) == f"{found:.1%} ({near.min():.1%} to {near.max():.1%})"


def test_a_card_has_the_figures_of_its_run(config: Config, tmp_path: Path) -> None:
    model = tmp_path / "Qwen" / "Qwen3-8B"
    model.mkdir(parents=True)
    (model / "README.md").write_text('model_name = "Qwen/Qwen3-8B"\n')
    config.model.path, config.learn.lr = str(model), 3e-6
    config.learn.credit = PartConfig("group", {"key": "v"})
    card = model_card(config, SUMMARY, name="me/it", version=20)
    head = card.split("---\n")[1]
    assert 'base_model: "Qwen/Qwen3-8B"\n' in head
    assert "| all: 8 | 25.0% (7.1% to 59.1%) | 75.0% (40.9% to 92.9%) |" in card
    assert "| a\\|b: 4 | 50.0% (15.0% to 85.0%) | 100.0% (51.0% to 100.0%) |" in card
    assert "| forks | 1,234 |" in card
    assert "| hours | 1.5 |" in card
    assert "    learn.lr=3e-06\n" in card
    assert "<script>" not in card


def test_a_card_of_an_earlier_step_has_no_later_figures(config: Config) -> None:
    card = model_card(config, SUMMARY, name="it", version=10)
    assert "25.0%" in card
    assert "75.0%" not in card
    assert "1,234" not in card
    assert "10 steps" in card
    assert "Held-out" not in model_card(config, {}, name="it", version=10)


def test_a_card_says_why_it_is_not_the_last_model(config: Config) -> None:
    summary = SUMMARY | {"chosen": {"step": 10, "by": "aime/pass@8", "value": 0.5}}
    card = model_card(config, summary, name="it", version=10)
    assert "It is the model of step 10 of 20, whose evaluation had the highest aime/pass@8: 0.500." in card
    assert "It is the model" not in model_card(config, summary, name="it", version=20)


def test_the_card_of_a_supervised_run(config: Config) -> None:
    summary = {
        "steps": 30,
        "data": {"conversations": 1200, "learned_tokens": 34_567},
        "held_out": [{"step": 10, "loss": 1.25}, {"step": 20, "loss": 0.5}, {"step": 30, "loss": 0.75}],
        "chosen": {"step": 20},
    }
    card = model_card(config, summary, name="it", version=20)
    assert "on 1,200 conversations (34,567 tokens of the model's)" in card
    assert "step 20 of 30." in card
    assert "| 20 | 0.5000 |" in card
    assert "0.7500" not in card
    assert "reinforcement" not in card.split("---")[2].split("## Settings")[0]


def test_a_card_tells_of_no_machine_and_no_secret(config: Config) -> None:
    config.model.path = "/data/of/ours/model-x"
    config.task.path = "/data/of/ours/questions.jsonl"
    config.reward = type(config.reward)(name="judge", options={"api_key": "sk-123", "file": "/data/x.yaml"})
    config.cluster.address = "10.0.0.1:6379"
    card = model_card(config, SUMMARY, name="it", version=20)
    for secret in ("/data", "sk-123", "10.0.0.1", config.run.dir):
        assert secret not in card
    assert "model.path=model-x" in card
    assert "base_model" not in card


@pytest.mark.parametrize(
    ("path", "card", "base"),
    [
        ("models/mine", None, ""),
        ("models/mine", "# a model of ours, see models/mine-2 and old/models/mine", ""),
        ("Qwen/Qwen3-8B", "see https://hub.example/Qwen/Qwen3-8B/blob", ""),  # a part of a path
        ("Qwen/Qwen3-8B", 'base_model: "Qwen/Qwen3-8B"', "Qwen/Qwen3-8B"),
        ("hub/models--Qwen--Qwen3-8B/snapshots/0a1b", None, "Qwen/Qwen3-8B"),
    ],
)
def test_the_base_model_is_named_where_its_directory_tells_its_name_on_the_hub(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, card: str | None, base: str
) -> None:
    (tmp_path / path).mkdir(parents=True)
    if card is not None:
        (tmp_path / path / "README.md").write_text(card)
    monkeypatch.chdir(tmp_path)
    for written in (path, str(tmp_path / path)):
        config.model.path = written
        head = model_card(config, SUMMARY, name="it", version=20).split("---\n")[1]
        assert [line for line in head.splitlines() if "base_model" in line] == (
            [f'base_model: "{base}"'] if base else []
        )
        assert base_name(config) == (base or Path(path).name)  # what adapters say: no path of this machine


def test_a_run_s_model_is_called_as_the_run(config: Config, tmp_path: Path) -> None:
    """All of them are called ``model``: whose it is, adapters would not say."""
    (tmp_path / "my-sft-s0" / "model").mkdir(parents=True)
    config.model.path = str(tmp_path / "my-sft-s0" / "model")
    assert base_name(config) == "model"
    (tmp_path / "my-sft-s0" / "config.yaml").touch()
    assert base_name(config) == "my-sft-s0"
    assert "from my-sft-s0" in model_card(config, SUMMARY, name="it", version=20)


def test_the_card_of_adapters_and_of_what_they_were_merged_into(config: Config) -> None:
    config.model.path, config.learn.lora.rank = "m", 4
    alone = model_card(config, SUMMARY, name="it", version=20, adapter=True)
    assert "library_name: peft\n" in alone
    assert "of rank 4 alone, in PEFT's format" in alone
    merged = model_card(config, SUMMARY, name="it", version=20, merged=("bfloat16", 0.2433))
    assert "library_name: transformers\n" in merged
    assert "in bfloat16, which keeps 24.3% of what they change" in merged


@pytest.fixture
def finished(run_dir: RunDir) -> RunDir:
    """A run that has come to its end."""
    run_dir.model.mkdir()
    (run_dir.model / "config.json").write_text("{}")
    (run_dir.model / "model.safetensors").write_bytes(os.urandom(100_000))
    run_dir.write_summary(SUMMARY)
    return run_dir


@pytest.fixture
def stand_in() -> Iterator[Hub]:
    one = Hub()
    yield one
    one.close()


def export(run: RunDir, *words: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of ``espalier export``, in a process: the library reads its environment once."""
    done = subprocess.run(
        [sys.executable, "-m", "actors.cli.main", "export", str(run.root), *words],
        env={**os.environ, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", **environment},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


def test_a_model_goes_to_a_hub_with_its_card(finished: RunDir, stand_in: Hub) -> None:
    code, output = export(finished, "--push", "me/it", HF_ENDPOINT=stand_in.url)
    assert code == 0, output
    assert f"{stand_in.url}/me/it: uploaded" in output
    assert stand_in.repository == "me/it"
    assert stand_in.private
    for file in finished.model.iterdir():
        assert stand_in.files[file.name] == file.read_bytes()
    assert "75.0%" in stand_in.files["README.md"].decode()
    assert not [*finished.root.glob("export-*")]


def test_what_a_hub_says_is_told(finished: RunDir, stand_in: Hub) -> None:
    stand_in.full = True
    code, output = export(finished, "--push", "me/it", HF_ENDPOINT=stand_in.url)
    assert code == 1
    assert "espalier: me/it did not take the model" in output
    assert "Storage limit reached" in output
    code, output = export(finished, "--push", "me/it", HF_ENDPOINT=stand_in.url, HF_TOKEN="hf_other")
    assert (code, "401" in output, "hf_other" in output) == (1, True, False)
    stand_in.close()
    code, output = export(finished, "--push", "me/it", HF_ENDPOINT=stand_in.url)
    assert (code, "did not take the model" in output, "Traceback" in output) == (1, True, False)


def test_what_cannot_be_exported_is_told(finished: RunDir, tmp_path: Path) -> None:
    there = str(tmp_path)
    for words, says in (
        (["--push", "it"], "--push: 'it' is no repository: write it as owner/name"),
        ([], "say where to"),
        (["--public", "--to", there + "/x"], "--public goes with --push"),
        (["--to", there], "it is there already"),
        (["--to", there + "/x", "--step", "7"], "no checkpoint of step 7; there is no checkpoint either"),
    ):
        code, output = export(finished, *words)
        assert (code, says in output) == (2, True), output


def test_without_a_token_nothing_is_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "set HF_TOKEN" in hub.problem("me/it")


def test_a_finished_model_is_copied_with_its_card(finished: RunDir, tmp_path: Path) -> None:
    code, output = export(finished, "--to", str(tmp_path / "models" / "it"))
    assert (code, "the model of step 20" in output) == (0, True)
    assert (tmp_path / "models" / "it" / "README.md").read_text().count("75.0%") == 1


def test_a_model_that_lost_what_its_adapters_change_says_so(finished: RunDir, tmp_path: Path) -> None:
    assert rounded_away(finished) == ""
    for kept, told in ((0.999, ""), (0.2433, "holds 24% of what the adapters change")):
        finished.write_summary(SUMMARY | {"model": {"lora_kept": kept}})
        assert told in rounded_away(finished)
        assert bool(rounded_away(finished)) == bool(told)
    assert f"espalier export {finished.root} --dtype float32 --to DIR" in rounded_away(finished)
    code, output = export(finished, "--to", str(tmp_path / "it"))
    assert (code, "holds 24% of what the adapters change" in output) == (0, True), output
    assert "which keeps 24.3% of what they change" in (tmp_path / "it" / "README.md").read_text()


def test_other_numbers_are_made_of_a_checkpoint_or_of_adapters(finished: RunDir, tmp_path: Path) -> None:
    to = ["--to", str(tmp_path / "it")]
    code, output = export(finished, "--dtype", "bfloat16", *to)
    assert (code, "model is in float32: name a checkpoint, whose numbers are float32" in output) == (2, True)
    code, output = export(finished, "--dtype", "float32", *to)  # as it is
    assert code == 0, output
    config = finished.config()
    config.model.path, config.learn.lora.rank = "m", 4
    finished.write_config(config)
    for words in (["--adapter"], ["--dtype", "bfloat16"]):
        code, output = export(finished, *words, "--to", str(tmp_path / "other"))
        assert (code, "has a trained model, and no adapter/ beside it" in output) == (2, True), output
    assert not (tmp_path / "other").exists()


def test_adapters_alone(finished: RunDir, tmp_path: Path) -> None:
    code, output = export(finished, "--adapter", "--to", str(tmp_path / "a"))
    assert (code, "its whole model was trained (learn.lora.rank=0)" in output) == (2, True)
    config = finished.config()
    config.model.path, config.learn.lora.rank = "m", 4
    finished.write_config(config)
    finished.adapter.mkdir()
    (finished.adapter / "adapter_config.json").write_text("{}")
    code, output = export(finished, "--adapter", "--to", str(tmp_path / "a"))
    assert (code, "the adapters of step 20" in output) == (0, True), output
    assert sorted(one.name for one in (tmp_path / "a").iterdir()) == ["README.md", "adapter_config.json"]
