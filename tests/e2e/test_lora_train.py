"""A whole run by LoRA: what travels, what stands still, what is left; stopped and resumed."""

import json
import shutil
import signal
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from actors.cli.main import main
from system.models.adapter import Adapter, read_adapter
from system.models.shape import ModelShape
from system.observe.jsonl import read_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WAIT_S = 400.0
KIND = Adapter(4, 8.0, ("q", "k", "v", "out", "gate", "up", "down"))


def test_a_run_by_lora_sends_adapters_alone_and_goes_on(start: Callable[..., Any], tmp_path: Path) -> None:
    first = start("run.steps=0", "run.name=base")
    assert first.wait(WAIT_S) == 0, first.output()
    base = tmp_path / "base" / "model"
    weights = load_file(base / "model.safetensors")
    init, shape = tmp_path / "init", ModelShape.from_directory(base)
    tensors = {name: torch.full(size, 0.01) for name, size in KIND.tensors(shape).items()}
    KIND.write(init, tensors, str(base), base)
    start_from = f"learn.lora.init={init}"
    settings = (
        start_from,
        "warmstart.steps=0",
        "learn.lora.rank=4",
        "learn.lora.alpha=8",
        "checkpoint.every=1",
        "checkpoint.keep=9",
        "eval.every=1",
        "eval.choose=accuracy",
    )
    run = start(f"model.path={base}", *settings, "run.steps=4", "learn.lr=1e-2", "learn.kl_coef=0.01")
    run.wait_for(lambda: run.steps() >= 2, WAIT_S, "two steps")
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(WAIT_S) in (0, 3), run.output()
    shutil.rmtree(init)  # what a run has started from is in its checkpoints
    run = start(resume=run.directory)
    assert run.wait(WAIT_S) == 0, run.output()

    adapters = read_adapter(run.directory / "adapter", shape, KIND)
    size = sum(4 * prod(one) for one in KIND.tensors(shape).values())
    records = [*read_jsonl(run.directory / "metrics.jsonl")]
    sent = [record["weights/bytes"] for record in records if "weights/bytes" in record]
    assert sent
    assert {*sent} == {size}
    assert size < sum(tensor.nbytes for tensor in weights.values()) / 4
    assert max(record.get("train/reference_kl", 0.0) for record in records) > 0

    config = json.loads((run.directory / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"  # a model of a run is called as the run
    merged = load_file(run.directory / "model" / "model.safetensors")
    moved = {name for name, tensor in merged.items() if (tensor != weights[name]).any()}
    assert moved == {shape.tensor(part, layer) for part in KIND.parts for layer in range(shape.layers)}
    evaluated = {one["step"]: one["eval/accuracy"] for one in records if "eval/which" in one and one["step"]}
    chosen = run.summary()["chosen"]
    assert chosen["value"] == max(evaluated.values())
    assert chosen["step"] == max(step for step, value in evaluated.items() if value == chosen["value"])
    assert f"model of step {chosen['step']} of 4" in (run.directory / "model" / "README.md").read_text()
    step = ("--step", str(chosen["step"]))
    for words, kind in ((("--adapter",), "adapter"), ((), "model")):
        assert main(["export", str(run.directory), *step, "--to", str(tmp_path / kind), *words]) == 0
    ours = read_adapter(tmp_path / "adapter", shape, KIND)
    files = load_file(tmp_path / "model" / "model.safetensors")
    assert all((tensor == adapters[name]).all() for name, tensor in ours.items())
    assert all((tensor == merged[name]).all() for name, tensor in files.items())
