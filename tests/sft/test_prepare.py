"""From files to examples: what is counted, what is refused, and before anything is started."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from actors.cli.main import main
from system.cluster.placement import paper_nodes, place
from system.config import Config, ConfigError, load
from system.doctor.supervised import require
from system.plan.memory import besides
from system.sft.data import read
from system.sft.prepare import learner_config, prepare
from system.tasks.files import DataError
from system.tasks.quickstart import vocabulary
from system.tasks.tiny_model import create_model

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
CALL = " <think> a </think> <search> person Halwin </search>"
SAID = f"{CALL} <result>\nperson Halwin\n</result> <answer> </answer>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    create_model(path, vocabulary.build(), Config().model, seed=0)
    return path


def recipe(model: Path, path: Path, *said: str, **sft: Any) -> Config:
    rows = [{"prompt": f"Q: {i}", "completion": one} for i, one in enumerate(said)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config()
    config.model.path, config.sft.path, config.run.dir = str(model), str(path), str(path.parent / "runs")
    config.task.tools_in_prompt = "none"
    for name, value in sft.items():
        setattr(config.sft, name, value)
    return config


def test_what_became_of_the_rows(model: Path, tmp_path: Path) -> None:
    long = SAID.replace(" <answer> </answer>", " home" * 60)
    config = recipe(model, tmp_path / "a.jsonl", SAID, SAID, "a </result>", long, max_tokens=40, skip=0.3)
    found = prepare(config, read(config.sft, 0), model)
    assert (len(found.train), found.unusable, found.too_long, found.cut) == (2, 1, 1, 0)
    assert "1 unusable rows left out; 1 too long" in found.told()
    config.sft.too_long = "cut"
    cut = prepare(config, read(config.sft, 0), model)
    assert (len(cut.train), cut.too_long, cut.cut) == (3, 0, 1)
    assert cut.digest != found.digest
    assert cut.facts()["learned_tokens"] < cut.facts()["tokens"]
    assert prepare(config, read(config.sft, 0), model).digest == cut.digest


def test_rows_that_cannot_be_put_are_told_by_line(model: Path, tmp_path: Path) -> None:
    config = recipe(model, tmp_path / "a.jsonl", SAID, "a </result>", SAID)
    with pytest.raises(DataError) as caught:
        prepare(config, read(config.sft, 0), model)
    first, last = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path}/a.jsonl, line 2: '</result>' ends a result that has not begun")
    assert "1 of 3 rows (33.33%)" in last


def test_none_that_fits_is_an_error(model: Path, tmp_path: Path) -> None:
    config = recipe(model, tmp_path / "a.jsonl", SAID, max_tokens=5)
    with pytest.raises(DataError, match=r"no conversation that is trained on has 5 tokens or fewer"):
        prepare(config, read(config.sft, 0), model)


def test_all_that_is_wrong_is_told_at_once(model: Path, tmp_path: Path) -> None:
    require(recipe(model, tmp_path / "a.jsonl", SAID))
    config = recipe(model, tmp_path / "a.jsonl", SAID, eval_path=str(tmp_path / "b.jsonl"))
    config.cluster.gpus_per_node, config.learn.tp = 1, 2
    with pytest.raises(ConfigError) as caught:
        require(config)
    told = str(caught.value)
    assert "sft.eval_path: no such data file" in told
    assert "the learner needs 2 GPUs" in told
    with pytest.raises(ConfigError, match=r"sft.path: empty; name the conversations"):
        require(Config())


def test_a_choice_by_questions_needs_some(model: Path, tmp_path: Path) -> None:
    config = recipe(model, tmp_path / "a.jsonl", SAID, choose="pass@2")
    config.task.name, config.task.path = "jsonl", str(tmp_path / "a.jsonl")
    config.tools.names = ["python"]
    with pytest.raises(ConfigError, match=r"sft.choose=pass@2: task 'jsonl' has no held-out questions"):
        require(config)


def test_arpo_s_recipe_has_its_figures_and_fits(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "configs" / "sft" / "arpo-8b.yaml"
    config = load(path)
    sft = config.sft
    assert (sft.epochs, sft.batch, sft.lr, sft.lr_decay, sft.warmup) == (3, 16, 7e-6, "cosine", 0.1)
    assert (sft.max_tokens, config.model.dtype) == (15000, "bfloat16")
    assert len(place(config, paper_nodes(config), "learner")) == 8
    assert main(["plan", str(path), "--sft"]) == 0
    told = capsys.readouterr().out
    assert "8 GPUs (h100)" in told
    assert "no engines beside it" in told
    assert main(["plan", str(path), "--sft", "learn.tp=1", "learn.recompute=none"]) == 1
    assert "PROBLEM: a learner rank does not fit" in capsys.readouterr().out


def test_what_is_learned_is_shown(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(model, tmp_path / "a.jsonl", SAID, SAID)
    words = [f"model.path={model}", f"sft.path={tmp_path}/a.jsonl", "task.tools_in_prompt=none"]
    assert main(["sft", "--show", "1", str(QUICKSTART), *words]) == 0
    told = capsys.readouterr().out
    assert told.count("--- ") == 1
    assert "tokens] <result>" not in told
    assert re.search(
        r"\[LEARNED, \d+ tokens\]  <think>.*</search>\n\[read only, \d+ tokens\]  <result>\n", told
    )
    assert re.search(r"\[LEARNED, \d+ tokens\]  <answer> </answer><eos>\n", told)


def test_rows_that_cannot_be_used_do_not_end_the_show(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "a.jsonl"
    recipe(model, data, "a </result>", SAID)
    data.write_text(data.read_text() + '{"prompt": "Q: 3"}\n')
    words = [f"model.path={model}", f"sft.path={data}", "task.tools_in_prompt=none"]
    assert main(["sft", "--show", "2", str(QUICKSTART), *words]) == 0
    told = capsys.readouterr().out
    assert f"--- UNUSABLE: {data}, line 1: '</result>' ends a result that has not begun" in told
    assert f"--- {data}, line 2: " in told
    assert told.index(f"--- UNUSABLE: {data}, line 3: ") > told.index("[LEARNED")
    assert f"{data}: 2 of 3 rows are unusable so far" in told


def test_the_learner_keeps_no_model_beside_the_one_it_trains() -> None:
    config = load(QUICKSTART, ["learn.teacher=average", "learn.kl_coef=0.1", "learn.proximal=average"])
    assert len(besides(config.learn, "float32")) == 3
    assert not besides(learner_config(config).learn, "float32")
    assert config.learn.teacher == "average"  # a copy was told
