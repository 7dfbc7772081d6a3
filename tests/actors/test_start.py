"""What happens before a run starts: refusals that cost nothing, and no import that takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from actors.evaluate import evaluate
from actors.train import train
from system.config import ConfigError, load

ROOT = Path(__file__).parents[2]
SLOW = ("torch", "transformers", "megatron", "matplotlib", "wandb")


def test_the_driver_starts_without_slow_imports() -> None:
    code = f"import sys, actors.train, actors.evaluate; print(*(m for m in {SLOW} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("contents", "named"),
    [
        ({"model_type": "llama"}, r"model\.path=.*: .*config\.json: model_type 'llama'"),
        (None, r"model\.path=.*: .*config\.json is missing"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_before_anything_is_made(
    contents: dict[str, str] | None, named: str, tmp_path: Path
) -> None:
    if contents:
        (tmp_path / "config.json").write_text(json.dumps(contents))
    with pytest.raises(ConfigError, match=named):
        train(load(None, [f"model.path={tmp_path}", f"run.dir={tmp_path}/runs"]), config_name="", resume=None)
    assert not (tmp_path / "runs").exists()


def test_a_torn_model_is_not_evaluated(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "hid')
    with pytest.raises(ConfigError, match=r"config\.json: not the config\.json of a model"):
        evaluate(load(ROOT / "configs" / "quickstart.yaml"), tmp_path)


def test_a_task_without_a_tokenizer_needs_a_model(tmp_path: Path) -> None:
    for name in ("train", "eval"):
        row = {"question": f"a question of {name}?", "answer": "2"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    data = (f"task.path={tmp_path}/train.jsonl", f"task.eval_path={tmp_path}/eval.jsonl")
    with pytest.raises(ConfigError, match=r"model\.path is empty, and task 'jsonl' brings no tokenizer"):
        train(load(None, ["task=jsonl", *data, f"run.dir={tmp_path}/runs"]), config_name="", resume=None)
    assert not (tmp_path / "runs").exists()
