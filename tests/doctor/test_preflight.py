"""What is told before a run starts: each fault by name, with a remedy, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from safetensors.numpy import save_file
from tiny_shape import tiny_shape
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from actors.cli.main import main
from system.config import load
from system.doctor import answering, machine_checks, preflight
from system.doctor.adapters import chosen_targets
from system.doctor.facts import left_out
from system.doctor.preflight import look, require
from system.models.adapter import Adapter
from system.models.directory import INDEX, SINGLE, faults
from system.models.shape import ModelShape

ROOT = Path(__file__).parents[2]
DEAD = "http://127.0.0.1:9"
SOUND = (
    "{model: {path: model}, task: {name: jsonl, path: data.jsonl}, learn: {tp: 1}, tools: {names: [python]}}"
)
SHAPE = tiny_shape(8)


def make_model(path: Path) -> Path:
    """A whole model in two weight files."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SHAPE))
    tensors = {n: np.zeros(s, np.float32) for n, s in ModelShape.from_config(SHAPE).tensors().items()}
    names = sorted(tensors)
    where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in ("model-0.safetensors", "model-1.safetensors"):
        save_file({name: tensors[name] for name in names if where[name] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"weight_map": where}))
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


def edited(name: str, **changes: Any) -> Callable[[Path], object]:
    """Changes keys of a JSON file."""

    def edit(model: Path) -> None:
        (model / name).write_text(json.dumps({**json.loads((model / name).read_text()), **changes}))

    return edit


def only_bin(model: Path) -> None:
    (model / INDEX).unlink()
    for file in model.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


def cut(model: Path) -> None:
    file = model / "model-0.safetensors"
    os.truncate(file, file.stat().st_size - 4)


def lfs(model: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (model / "model-1.safetensors").write_text(text)


def codes(model: Path) -> None:
    tensors = {n: np.zeros(s, np.int8) for n, s in ModelShape.from_config(SHAPE).tensors().items()}
    (model / INDEX).unlink()
    save_file(tensors, model / SINGLE)


def fewer(model: Path) -> None:
    (model / INDEX).unlink()
    (model / "model-0.safetensors").rename(model / SINGLE)


def quantised(method: str) -> Callable[[Path], object]:
    return edited("config.json", quantization_config={"quant_method": method})


MODELS: list[tuple[str, Callable[[Path], object]]] = [
    (r"no safetensors weights .*model-0\.bin is another format: save .* safetensors", only_bin),
    (r"model-1\.safetensors is missing.*download", lambda m: (m / "model-1.safetensors").unlink()),
    (r"model-1\.safetensors is a Git LFS pointer.*git lfs pull", lfs),
    (r"model-0\.safetensors is cut off", cut),
    (r"model-0\.safetensors is damaged", lambda m: (m / "model-0.safetensors").write_bytes(b"x" * 99)),
    (r"model-0\.safetensors is damaged", lambda m: (m / "model-0.safetensors").write_bytes(b"")),
    (r"tensors are missing, first model\.", fewer),
    (r"index\.json is damaged", lambda m: (m / INDEX).write_text("{")),
    (r"index\.json is damaged", lambda m: (m / INDEX).write_text('{"weight_map": {"a": "../../secret"}}')),
    (r"has no tokenizer; copy it", lambda m: (m / "tokenizer.json").unlink()),
    (r"tokenizer\.json cannot be loaded", lambda m: (m / "tokenizer.json").write_text("{}")),
    (r"tokenizer_config\.json is not JSON", lambda m: (m / "tokenizer_config.json").write_bytes(b"\xff")),
    (r"model_type 'olmo'; supported: llama, mistral, qwen2, qwen3", edited("config.json", model_type="olmo")),
    (r"config\.json: not the config\.json of a model", lambda m: (m / "config.json").write_text("{")),
    (r"config\.json: not the config\.json of a", lambda m: (m / "config.json").write_bytes(b'{"a": "\xe9"}')),
    (r"config\.json: not the config\.json", lambda m: (m / "config.json").write_text("[" * 100_000)),
    (r"quantization_config\.quant_method 'gptq': .*bfloat16 or float32 weights", quantised("gptq")),
    (r"quantization_config\.quant_method 'mxfp4': .*bfloat16 or float32 weights", quantised("mxfp4")),
    (r"holds I8, which config\.json does not explain", codes),
    (r"has shape \[8, 8\], config\.json says \[9, 8\]", edited("config.json", vocab_size=9)),
    (r"config\.json says 1000000000 layers", edited("config.json", num_hidden_layers=10**9)),
]


@pytest.mark.parametrize(("says", "harm"), MODELS)
def test_a_model_that_cannot_be_trained_is_refused_by_name(
    says: str, harm: Callable[[Path], object], tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model")
    assert list(faults(model)) == []
    harm(model)
    (line,) = faults(model)
    assert re.search(says, line), line


JUDGE = f"reward=judge reward.options.base_url={DEAD}/v1 reward.options.model=m"
RECIPES: list[tuple[str, str]] = [
    ("model.path=nowhere", r"model\.path: there is no directory nowhere; give a directory"),
    ("model.path=data.jsonl", r"model\.path: there is no directory data\.jsonl"),
    ("model.path=", r"model\.path: empty, and task 'jsonl' brings no tokenizer"),
    (
        "model.path=wordy",
        r"model\.path: 4 of the first 5 tokens of questions .* unknown .*'1'.*; take a",
    ),
    ("learn.tp=4", r"learn\.tp=4 must divide model's heads=2, model's kv_heads=2"),
    (
        "engine.max_context=32769",
        r"engine\.max_context=32769: model knows 32768 positions .*; lower it, name a model",
    ),
    (
        "learn.cp=4 learn.micro_tokens=63",
        r"learn\.micro_tokens=63: .* no block for each of the learn\.cp=4 ranks; raise it to 64 or more",
    ),
    ("task.path=none.jsonl", r"task\.path: no such data file: none\.jsonl \(looked in /.*\)"),
    ("task.path=dta.jsonl", r"task\.path: no such data file: dta\.jsonl .*; did you mean data\.jsonl\?"),
    ("task.path=latin.jsonl", r"latin\.jsonl, line 1: not UTF-8 \(byte 0x\w\w at \d+\): convert"),
    ("task.path=deep.jsonl", r"deep\.jsonl, line 1: not JSON"),
    ("task.eval_path=latin.jsonl", r"task\.eval_path: latin\.jsonl, line 1: not UTF-8"),
    ("task.columns.question=q", r"data\.jsonl: none of \d+ rows can be used; .* task\.columns\.question"),
    ("task.columns.anwser=q", r"task\.columns\.anwser: it may name .*; did you mean answer"),
    ("task.template.enable_thinking=false", r"task\.template\.enable_thinking: .* no chat template"),
    ("warmstart.steps=5", r"warmstart\.steps: 5, but task 'jsonl' has no demonstrations; set warmstart"),
    ("guide.others=0.5", r"guide: none of the first questions of jsonl has a demonstration.*columns\.demon"),
    ("task=plain:Raises", r"task\.name='plain:Raises': ZeroDivisionError"),
    ("task=plain:Empty", r"task: empty has no training questions"),
    ("task=plain:Texts", r"task: a training question is a str; a task yields"),
    ("reward=foo:Bar", r"reward\.name='foo:Bar': ModuleNotFoundError"),
    ("reward=[arpo,foo:Bar]", r"reward\.parts\[1\]\.name='foo:Bar': ModuleNotFoundError"),
    ("reward=judge", r"reward\.options: judge needs base_url, model"),
    (JUDGE, r"reward\.options\.base_url=http://127\.0\.0\.1:9/v1: does not answer"),
    ("reward=task", r"reward\.name=task, but the task 'jsonl' has no score"),
    ("learn.credit=foo:Bar", r"learn\.credit='foo:Bar'"),
    ("learn.credit.options.x=1", r"learn\.credit\.options\.x: .* no such option"),
    ("branching=foo:Bar", r"branching\.name='foo:Bar'"),
    ("rollout.syntax=foo:Bar", r"rollout\.syntax='foo:Bar'"),
    ("tools.options.python.colour=red", r"tools\.options\.python\.colour: python has no such option"),
    ("tools.names=[search]", r"search has nothing to search: .* no corpus; set tools\.corpus"),
    ("tools.names=[search] tools.corpus=none.jsonl", r"no such corpus: none\.jsonl"),
    ("tools.names=[search] tools.corpus=data.jsonl", r"data\.jsonl:1: expected"),
    (f"tools.names=[search] tools.search_url={DEAD}", r"tools\.search_url=.*:9: does not answer .*refused"),
    (
        f"tools.names=[browse] tools.browse_allow=[{DEAD}/wiki/]",
        r"tools\.browse_allow=http://127\.0\.0\.1:9: does not answer .*refused",
    ),
    (f"engine=sglang engine.urls=[{DEAD}]", r"engine\.urls=http://127\.0\.0\.1:9: does not answer"),
    ("engine=sglang engine.urls=['http://[']", r"engine\.urls=http://\[: does not answer"),
    ("engine=sglang engine.python=/none", r"no SGLang for /none: run `make sglang`"),
    ("engine.host=1.2.3.4", r"engine\.host=1\.2\.3\.4: no server can listen there"),
    ("cluster.nodes=2", r"cluster\.nodes=2: no Ray cluster is named.*submit"),
    ("cluster.address=127.0.0.1:9", r"cluster\.address=127\.0\.0\.1:9: does not answer"),
    ("run.dir=data.jsonl", r"run\.dir=data\.jsonl: .* is no directory; name"),
    ("run.dir=/proc/here", r"run\.dir=/proc/here: it cannot be written"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model, data and a user's module, which the process stands in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "plain", raising=False)
    make_model(tmp_path / "model")
    words = Tokenizer(WordLevel({"<unk>": 0, "+": 1}, unk_token="<unk>"))
    words.pre_tokenizer = Split("", "isolated")
    words.save(str(make_model(tmp_path / "wordy") / "tokenizer.json"))
    (tmp_path / "data.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    (tmp_path / "latin.jsonl").write_bytes('{"question": "é", "answer": "2"}\n'.encode("latin-1"))
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "plain.yaml").write_text(SOUND)
    (tmp_path / "plain.py").write_text(
        "class Empty:\n    name = 'empty'\n    rows = []\n    def __init__(self, config): pass\n"
        "    def train(self): return self.rows\n    def eval(self): return []\n"
        "class Texts(Empty):\n    rows = ['x']\n"
        "class Raises(Empty):\n    def train(self): return 1 / 0\n"
    )
    return tmp_path


LISTENS = "agent.listen=127.0.0.1:8200 branching=none tools.names=[]"


@pytest.mark.parametrize(
    ("words", "named"),
    [(JUDGE, "reward.options.api_key_env=SOME_KEY"), (LISTENS, "agent.token_env=SOME_KEY")],
)
def test_a_key_must_be_in_the_environment(
    words: str, named: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load("plain.yaml", [*words.split(), named])
    told = f"{named}: this environment variable is not set, or empty; export it"
    assert told in [str(one) for one in look(config)["servers"]]
    monkeypatch.setenv("SOME_KEY", "sk-1")
    assert told not in [str(one) for one in look(config)["servers"]]


def test_a_model_stretched_by_yarn_reaches_further(place: Path) -> None:
    """And SGLang, which does not read all factors as transformers does, is refused then."""

    def problems(*words: str, **rope: float) -> list[str]:
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768, **rope}
        edited("config.json", rope_scaling=yarn)(place / "model")
        return [str(one) for one in look(load("plain.yaml", list(words)))["model"]]

    assert problems("engine.max_context=131072") == []
    (told,) = problems("engine.max_context=131073")
    assert "model knows 131072 positions" in told
    assert problems("engine.max_context=131072", attention_factor=1.2) == []
    (told,) = problems("engine=sglang", attention_factor=1.2)
    assert "attention_factor of its rotary embedding, which SGLang does not read" in told
    (told,) = problems("engine=sglang", attn_factor=1.2)
    assert "attn_factor of its rotary embedding, which SGLang reads otherwise" in told
    assert problems("engine=sglang", mscale=0.7, mscale_all_dim=1.0, truncate=False) == []


def test_sglang_starts_from_no_float8_model_and_makes_float8_of_some(place: Path) -> None:
    def problems(words: str, **changes: Any) -> list[str]:
        edited("config.json", **changes)(place / "model")
        return [str(one) for one in look(load("plain.yaml", words.split(" & ")))["model"]]

    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert problems("engine=embedded", quantization_config=block) == []
    (told,) = problems("engine=sglang")
    assert "has float8 weights with scales" in told
    assert "`espalier dequantise MODEL DIR`" in told
    online = "engine=sglang & model.dtype=bfloat16 & engine.sglang={quantization: fp8, load_format: flash_rl}"
    assert problems(online, quantization_config=None) == []
    norms, told = problems(online, model_type="llama", head_dim=4)
    assert (
        "4 tensors have no place in the llama of config.json, first model.layers.0.self_attn.k_norm" in norms
    )
    assert "loader quantises qwen2 and qwen3 anew, and not llama" in told


@pytest.mark.parametrize(("words", "says"), RECIPES)
def test_a_recipe_that_cannot_run_is_one_line_and_leaves_nothing(
    words: str, says: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    assert main(["train", "plain.yaml", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("espalier: ")
    assert re.search(says, line), line
    assert [path for path in sorted(place.rglob("*")) if "__pycache__" not in path.parts] == before


def test_within_an_allocation_several_nodes_need_no_ray_yet(place: Path) -> None:
    config = load("plain.yaml", ["cluster.nodes=2"])
    assert any(look(config, without=left_out({})).values())
    assert not any(look(config, without=left_out({"SLURM_JOB_ID": "7"})).values())


def test_a_sound_recipe_has_no_problems(place: Path) -> None:
    before = sorted(place.rglob("*"))
    found = look(load("plain.yaml"))
    assert list(found) == [*preflight.ANYWHERE, *preflight.ON_THE_SPOT, *preflight.OF_TRAINING]
    assert not any(found.values())
    assert sorted(place.rglob("*")) == before


def test_all_problems_are_told_at_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.path=nowhere", "task.path=no.jsonl", "task.eval_path=neither.jsonl"]
    words += ["reward=foo:Bar", "run.dir=data.jsonl", "engine.host=1.2.3.4"]
    assert main(["train", "plain.yaml", *words]) == 2
    told = capsys.readouterr().err
    lines = told.splitlines()
    assert all(word.split("=")[0] in told for word in words)
    assert len(lines) == len(set(lines)) == len(words)


def test_doctor_says_the_same(place: Path) -> None:
    config = load("plain.yaml", ["model.path=nowhere", "engine=sglang", f"engine.urls=[{DEAD}]"])
    found = look(config)
    assert [topic for topic, problems in found.items() if problems] == ["model", "servers"]
    assert set(look(config, without=("model",))) == set(found) - {"model"}


def test_a_login_node_is_not_asked_what_only_the_job_can_tell(place: Path) -> None:
    config = load("plain.yaml", ["engine.host=1.2.3.4", "cluster.nodes=2", "model.path=nowhere"])
    assert [topic for topic, problems in look(config, login=True).items() if problems] == ["model"]
    config.slurm.container, config.slurm.image = "pyxis", "image"  # whose paths are its own
    require(config, login=True)


def test_a_submitted_run_is_looked_at_first(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["submit", "plain.yaml", "model.path=nowhere", "run.dir=runs"]
    assert main(words) == 2
    assert "there is no directory nowhere" in capsys.readouterr().err
    assert main([*words, "--dry-run"]) == 0
    assert "WARNING: model.path: there is no directory nowhere" in capsys.readouterr().err
    assert not (place / "runs").exists()


def test_a_submitted_run_is_told_what_does_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("system.cluster.submit.submit_run", lambda *_, **__: 0)
    assert main(["submit", "plain.yaml", "learn.teacher_coef=0.5", "run.dir=runs"]) == 0
    assert "learn.teacher_coef=0.5 will do nothing" in capsys.readouterr().out


def test_any_answer_of_a_server_will_do_and_no_redirect_is_followed(place: Path) -> None:
    asked: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(307)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Elsewhere)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        config = load(
            "plain.yaml", ["tools.names=[search]", f"tools.search_url=http://127.0.0.1:{server.server_port}/"]
        )
        assert look(config)["servers"] == []
    finally:
        server.shutdown()
        server.server_close()
    assert asked == ["/health"]


def test_a_silent_server_is_told_in_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "ANSWER_S", 0.2)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # accepts, and never answers
        config = load(
            "plain.yaml", ["tools.names=[search]", f"tools.search_url=http://127.0.0.1:{server.server_port}"]
        )
        (problem,) = look(config)["servers"]
    assert "timed out" in str(problem)


def test_a_disk_that_is_full_or_holds_no_checkpoint(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(_: object) -> Any:
        return type("Usage", (), {"free": 1 << 20})

    monkeypatch.setattr(machine_checks, "disk_usage", usage)
    found = look(load("plain.yaml"))
    assert "make room" in str(found["run directory"][0])
    assert "TMPDIR" in str(found["scratch"][0])


def test_a_checkpoint_is_as_large_as_what_it_keeps(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, besides = ModelShape.from_config(SHAPE).parameters, ["learn.kl_coef=0.1"]
    for more, each in (([], 12), (besides, 16), ([*besides, "learn.proximal=average"], 20)):
        needed = machine_checks.SLACK + each * parameters
        for free, problems in ((needed - 1, 1), (needed, 0)):
            told = type("Usage", (), {"free": free})
            monkeypatch.setattr(machine_checks, "disk_usage", lambda _, told=told: told)
            assert len(look(load("plain.yaml", more))["run directory"]) == problems, more


def test_a_run_by_lora_keeps_adapters_and_leaves_a_model(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = ModelShape.from_config(SHAPE)
    lora = ["learn.lora.rank=2", "learn.lora.targets=[q, down]", "learn.kl_coef=0.1"]
    numbers = sum(2 * 2 * (8 + 8) for _ in range(2))  # rank 2, two projections of 8 and 8 in two layers
    for free, problems in ((-1, 1), (0, 0)):
        needed = machine_checks.SLACK + 16 * numbers + 4 * shape.parameters + free
        told = type("Usage", (), {"free": needed})
        monkeypatch.setattr(machine_checks, "disk_usage", lambda _, told=told: told)
        assert len(look(load("plain.yaml", lora))["run directory"]) == problems


def test_adapters_to_start_from_are_looked_at(place: Path) -> None:
    def found(*more: str) -> list[str]:
        return [str(one) for one in look(load("plain.yaml", ["learn.lora.init=adapters", *more]))["model"]]

    (line,) = found("learn.lora.rank=2")
    assert line == "learn.lora.init=adapters: adapters: no adapters in PEFT's format: " + (
        "adapter_config.json is missing"
    )
    shape = ModelShape.from_config(SHAPE)
    kind = Adapter(2, 32.0, ("q", "k", "v", "out", "gate", "up", "down"))
    tensors = {name: torch.zeros(size) for name, size in kind.tensors(shape).items()}
    kind.write(place / "adapters", tensors, "model", place / "model")
    assert found("learn.lora.rank=2") == []
    (line,) = found("learn.lora.rank=4")
    assert "learn.lora.rank of these adapters is 2, not 4: set it so" in line


def test_sets_of_questions_are_looked_at_where_a_run_is_submitted(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = "{name: good, path: data.jsonl}, {name: made, task: {name: quickstart}}"
    assert look(load("plain.yaml", [f"eval.sets=[{good}]"]), login=True)["evaluation sets"] == []
    bad = "{name: bad, path: daat.jsonl}, {name: odd, task: {name: nowhere:X}}"
    words = ["plain.yaml", "run.dir=runs", f"eval.sets=[{good}, {bad}]"]
    assert main(["submit", *words]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert re.search(r"eval\.sets\[bad\]: .*daat\.jsonl", first)
    assert re.search(r"eval\.sets\[odd\]: .*nowhere", second)


def test_a_large_set_is_not_read_as_a_whole(place: Path) -> None:
    (place / "large.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n' * 64 + "torn")
    assert look(load("plain.yaml", ["eval.sets=[{name: a, path: large.jsonl}]"]))["evaluation sets"] == []


def test_a_run_that_has_a_checkpoint_needs_no_adapters_to_start_from(place: Path) -> None:
    config = load("plain.yaml", ["learn.lora.rank=2", "learn.lora.init=gone"])
    run = place / "runs" / "mine"
    (run / "checkpoints" / "v000001.partial").mkdir(parents=True)
    assert "learn.lora.init=gone" in str(look(config, resume=run)["model"][0])
    (run / "checkpoints" / "v000001").mkdir()
    assert look(config, resume=run)["model"] == []
    assert config.learn.lora.init == "gone"


def test_the_directory_for_weights_is_looked_at(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(where: str) -> list[str]:
        settings = ["engine=sglang", "engine.weights=disk", f"engine.weights_dir={where}"]
        return [str(one) for one in look(load("plain.yaml", settings))["run directory"]]

    assert found("weights/of/all") == []
    (line,) = found("data.jsonl")
    assert line.startswith("engine.weights_dir=data.jsonl: ")
    assert "is no directory" in line
    assert "cannot be written" in found("/proc/here")[0]
    monkeypatch.setattr(machine_checks, "disk_usage", lambda _: type("Usage", (), {"free": 1}))
    assert "two updates take" in found("weights")[1]


def test_a_machine_that_does_not_hold_an_offloaded_optimizer(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def little() -> Any:
        return type("Memory", (), {"available": 1 << 10})

    monkeypatch.setattr(machine_checks, "virtual_memory", little)
    assert not look(load("plain.yaml"))["memory"]
    config = load("plain.yaml", ["learn.offload=true"])
    assert "spread the learner" in str(look(config)["memory"][0])


def test_a_resumed_run_needs_its_own_directory_only(place: Path) -> None:
    config = load("plain.yaml")
    config.run.dir = "/proc/gone"
    assert look(config)["run directory"]
    assert not look(config, resume=place)["run directory"]


def test_ray_is_not_imported_before_problems_are_told(place: Path) -> None:
    program = (
        "import sys; from actors.cli.main import main; code = main(sys.argv[1:]); "
        "print(code, [name for name in ('ray', 'torch') if name in sys.modules])"
    )
    words, environment = (
        ["train", "plain.yaml", "model.path=nowhere"],
        {**os.environ, "PYTHONPATH": str(ROOT)},
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "2 []\n", done.stderr
    assert "there is no directory nowhere" in done.stderr
    assert not (place / "runs").exists()


def test_what_a_mixture_of_experts_needs(place: Path) -> None:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    edited("config.json", model_type="qwen3_moe", **experts)(place / "model")

    def told(*words: str) -> str:
        return "\n".join(str(one) for one in look(load("plain.yaml", list(words)))["model"])

    assert "tensors are missing, first model.layers.0.mlp.experts.0.down_proj.weight" in told()
    assert "engine." not in told()
    assert "learn.tp=2 with a mixture of experts: every rank" in told("learn.tp=2")
    assert "learn.ep=4 does not divide the model's 2 experts" in told("learn.ep=4", "learn.dp=4")
    adapters = "learn.lora.rank=2", "learn.lora.targets=[q, up]"
    assert "targets: up: in a mixture of experts these are the experts' own" in told(*adapters)
    (line,) = chosen_targets(load("plain.yaml", ["learn.lora.rank=2"]))
    assert "learn.lora.targets: adapters on q, k, v, o, which every token goes through" in line
    assert [*chosen_targets(load("plain.yaml", [*adapters[:1], "learn.lora.targets=[q]"]))] == []
    made = "model.path=", "model.family=qwen3_moe", "task=quickstart", "learn.tp=2"
    assert "set learn.sequence_parallel=true" in told(*made)
    assert "learn." not in told(*made, "learn.sequence_parallel=true")
    made_so = (*made, "learn.sequence_parallel=true")
    assert "experts' width over 2 ranks is 15: grouped products of float32" in told(
        *made_so, "model.expert_size=30"
    )
    assert "learn." not in told(*made_so, "model.expert_size=32")
    assert "hidden size is 36: grouped products of bfloat16" in told(
        *made_so, "model.hidden_size=36", "model.dtype=bfloat16"
    )
    agent = ("agent.run=my:agent", "branching=none", "tools.names=[]", "learn.sequence_parallel=true")
    assert "rollout.replay_routes: of what an agent's model says" in told(*made, *agent)
    assert "rollout.replay_routes: of what an agent's model says" in told(*agent)
    assert "replay_routes" not in told(*made, *agent, "rollout.replay_routes=false")
    assert "replay_routes" not in told(*made)


def test_experts_of_a_model_without_any_are_refused(place: Path) -> None:
    for words in ("learn.ep=2 learn.dp=2", "learn.aux_loss=0.01"):
        (told,) = look(load("plain.yaml", words.split()))["model"]
        assert f"{words.split()[0]}: the model has no experts; take it out" in str(told)
