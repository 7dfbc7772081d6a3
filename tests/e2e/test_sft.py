"""Supervised runs through the command line: broken off, gone on with, their model chosen and trained on."""

from __future__ import annotations

import json
import runpy
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import Run
from safetensors.torch import load_file

from actors.cli.main import main
from system.observe.catalogue import find
from system.observe.sinks import history

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # several runs, each with sessions of its own
ROOT = Path(__file__).parents[2]
WAIT_S = 240.0

Begin = Callable[..., Run]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples/conversations.py writes, in small."""
    directory = tmp_path_factory.mktemp("data") / "first"
    runpy.run_path(str(ROOT / "examples" / "conversations.py"))["main"](directory, rows=100, held_out=6)
    return directory


@pytest.fixture
def begin(tmp_path: Path, data: Path) -> Iterator[Begin]:
    """Start a small run of examples/first.yaml under a name, or go on with it."""
    runs: list[Run] = []

    def start(name: str, *overrides: str, command: str = "sft", resume: bool = False) -> Run:
        fresh = [
            "examples/first.yaml", f"run.dir={tmp_path}", f"run.name={name}",
            f"sft.path={data}/conversations.jsonl", f"task.path={data}/conversations.jsonl",
            f"task.eval_path={data}/held-out.jsonl", f"tools.corpus={data}/documents.jsonl",
            "observe.wandb=disabled", "observe.progress_s=1", "sft.batch=8", "sft.epochs=2",
        ]  # fmt: skip
        if not any(word.startswith("model.path=") for word in overrides):
            fresh.append(f"model.path={data}/model")
        start = ["--resume", str(tmp_path / name)] if resume else fresh
        runs.append(Run(tmp_path / name, [*start, *overrides], command))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


def losses(run: Run) -> list[tuple[int, str, float]]:
    """Every loss that counts, with its step."""
    kept = history(run.directory / "metrics.jsonl")
    keys = ("sft/loss", "sft/held_out_loss")
    return [(one["step"], key, one[key]) for one in kept for key in keys if key in one]


def steps(run: Run) -> int:
    path = run.directory / "metrics.jsonl"
    return path.read_text().count("sft/loss") if path.exists() else 0


def test_a_run_that_was_killed_and_stopped_has_the_same_losses(begin: Begin) -> None:
    whole = begin("whole")
    assert whole.wait(WAIT_S) == 0, whole.output()
    records = history(whole.directory / "metrics.jsonl")
    assert [key for record in records for key in record if find(key) is None] == []
    broken = begin("broken", "checkpoint.every=4")
    broken.wait_for(lambda: steps(broken) >= 6, WAIT_S, "six steps")
    broken.kill()  # SIGKILL, to all of its processes
    before = steps(broken)
    broken = begin("broken", resume=True)
    broken.wait_for(lambda: steps(broken) >= before + 3, WAIT_S, "three steps more")
    broken.process.send_signal(signal.SIGINT)
    assert broken.wait(WAIT_S) == 3, broken.output()
    assert "go on with espalier sft --resume" in broken.output()
    broken = begin("broken", resume=True)
    assert broken.wait(WAIT_S) == 0, broken.output()
    assert losses(broken) == losses(whole)
    assert [step for step, key, _ in losses(whole) if key == "sft/loss"] == list(range(1, 25))
    models = [load_file(run.directory / "model" / "model.safetensors") for run in (whole, broken)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    summary, other = whole.summary(), broken.summary()
    assert summary["candidates"] == other["candidates"]
    assert summary["chosen"] == other["chosen"]
    assert "resumed at step" in broken.output()
    again = begin("broken", resume=True)
    assert again.wait(WAIT_S) == 0
    assert "has ended" in again.output()
    wrong = begin("broken", command="train", resume=True)
    assert wrong.wait(WAIT_S) == 2
    assert "is a supervised run: go on with espalier sft --resume" in wrong.output()


def test_a_model_is_chosen_by_what_it_solves_and_trained_on(begin: Begin) -> None:
    run = begin("chosen", "sft.choose=pass@2", "eval.questions=3", "sft.keep=all")
    assert run.wait(2 * WAIT_S) == 0, run.output()
    summary: dict[str, Any] = run.summary()
    found = summary["candidates"]
    assert [one["step"] for one in found] == [12, 24]
    assert all(0 <= one["accuracy"] <= one["solved"] <= 1 for one in found)
    best = max(found, key=lambda one: (one["solved"], one["accuracy"], one["step"]))
    assert summary["chosen"]["step"] == best["step"]
    assert summary["chosen"]["by"] == "pass@2"
    assert "the highest pass@2" in summary["chosen"]["why"]
    facts = json.loads((run.directory / "sft.json").read_text())
    assert summary["data"] == facts
    assert 0 < facts["learned_tokens"] < facts["tokens"]
    curves = {path.stem for path in (run.directory / "curves").iterdir()}
    assert curves == {"overview", "supervised", "supervised_rate"}
    assert [path.name for path in (run.directory / "candidates").iterdir()] == [
        f"step-{step:06d}" for step in (12, 24) if step != best["step"]
    ]
    trained = begin(
        "arpo", f"model.path={run.directory}/model", "run.steps=1", "eval.questions=2", command="train"
    )
    assert trained.wait(WAIT_S) == 0, trained.output()


def test_adapters_learn_from_conversations(begin: Begin) -> None:
    """By LoRA: the loss falls, the result is merged, and the adapters of a step can be had."""
    run = begin("lora", "learn.lora.rank=8", "sft.lr=1e-2")
    assert run.wait(WAIT_S) == 0, run.output()
    found = [loss for _, key, loss in losses(run) if key == "sft/loss"]
    assert sum(found[-4:]) < 0.9 * sum(found[:4]), found
    step = run.summary()["chosen"]["step"]
    assert run.summary()["model"]["lora_kept"] > 0.999  # in float32
    trained = run.directory.parent / "trained"
    assert main(["export", str(run.directory), "--adapter", "--to", str(trained)]) == 0
    assert "library_name: peft" in (trained / "README.md").read_text()
    config = json.loads((run.directory / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == began(run).name
    target = run.directory.parent / "adapters"
    assert main(["export", str(run.directory), "--adapter", "--step", str(step), "--to", str(target)]) == 0
    assert json.loads((target / "adapter_config.json").read_text())["r"] == 8
    ours, theirs = (load_file(one / "adapter_model.safetensors") for one in (trained, target))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(one, theirs[name]) for name, one in ours.items())
    assert not (run.directory / "candidates").exists()
    weights = [load_file(path / "model.safetensors") for path in (run.directory / "model", began(run))]
    moved = {name.split(".")[-2] for name, one in weights[0].items() if (one != weights[1][name]).any()}
    assert moved == {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}


def began(run: Run) -> Path:
    return Path(run.summary()["config"]["model"]["path"])
