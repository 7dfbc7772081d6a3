from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from actors.cli.main import main
from actors.cli.train import unsafe_on_resume
from system.config import Config, settings
from system.config.explain import markdown
from system.config.schema_eval import EvalConfig
from system.evals.result import EvalResult, EvalScores
from system.observe.rundir import RunDir
from system.tree.record import Kind, Origin, Outcome, Tree
from system.tree.store import TreeWriter

COMMANDS = ("train", "eval", "prompt", "bench", "plan", "tree", "config")


class Launched:
    """Stands in for ``actors.train`` and ``actors.evaluate`` and remembers how it was called."""

    def __init__(self) -> None:
        self.train_calls: list[tuple[Config, str, Path | None]] = []
        self.eval_calls: list[tuple[Config, Path]] = []

    def train(self, config: Config, *, config_name: str, resume: Path | None) -> int:
        self.train_calls.append((config, config_name, resume))
        return 0

    def evaluate(self, config: Config, model_dir: Path, answers: object) -> EvalResult:
        assert answers is None
        self.eval_calls.append((config, model_dir))
        return EvalResult(EvalScores(questions=4, accuracy=np.float32(0.5)))  # type: ignore[arg-type]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    fake = Launched()
    for module in ("actors.train", "actors.evaluate"):
        monkeypatch.setitem(sys.modules, module, fake)  # type: ignore[arg-type]
    return fake


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(f"run: {{dir: {tmp_path / 'runs'}, steps: 5}}\n")
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    config = Config()
    config.run.dir = str(tmp_path / "runs")
    return RunDir.create(config, "small")


def tiny_tree(prompt_id: str, reward: tuple[float, float]) -> Tree:
    return Tree(
        prompt_id=prompt_id,
        task="calc",
        tokens=np.array([1, 2, 3, 4], np.int32),
        logprob=np.zeros(4, np.float32),
        entropy=np.array([np.nan, np.nan, 0.5, 1.0], np.float32),
        version=np.array([-1, -1, 0, 0], np.int32),
        start=np.array([0, 2, 3], np.int32),
        parent=np.array([-1, 0, 0], np.int32),
        kind=np.array([Kind.PROMPT, Kind.MODEL, Kind.MODEL], np.int8),
        leaf=np.array([1, 2], np.int32),
        reward=np.array(reward, np.float32),
        correct=(np.array(reward) > 0.5).astype(np.int8),
        outcome=np.full(2, Outcome.STOPPED, np.int8),
        origin=np.full(2, Origin.ROOT, np.int8),
        budget=2,
    )


@pytest.fixture
def run_with_trees(run_dir: RunDir) -> RunDir:
    with TreeWriter(run_dir.trees, flush_trees=2) as writer:
        for name, reward in (("a", (0.0, 0.0)), ("b", (1.0, 1.0)), ("c", (1.0, 0.0)), ("a", (1.0, 0.0))):
            writer.append(tiny_tree(name, reward))
    return run_dir


def test_help_needs_no_heavy_library():
    code = (
        "import sys\nfrom actors.cli.main import main\ncode = main(sys.argv[1:])\n"
        "heavy = {'torch', 'ray', 'transformers', 'megatron', 'numpy', 'omegaconf', 'rich', 'wandb'}\n"
        "loaded = heavy & set(sys.modules)\nassert not loaded, loaded\nsys.exit(code)"
    )
    for words in (["--help"], ["train", "--help"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_by_example(command: str, capsys: pytest.CaptureFixture[str]):
    assert main([command, "--help"]) == 0
    help_text = capsys.readouterr().out
    assert "examples:" in help_text
    assert f"espalier {command} " in help_text


def test_no_command_prints_the_help_and_fails(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train"], "name a recipe"),
        (["train", "no/such.yaml"], "no such configuration file"),
        (["train", "a.yaml", "b.yaml"], "one file at a time"),
        (["train", "--resume", "no/such/run"], "no such run directory"),
        (["eval", "no/such/run"], "is no run directory"),
        (["eval", "--endpoint", "http://a/v1"], "--endpoint asks the questions of a recipe"),
        (
            [
                "eval",
                "--endpoint",
                "http://a/v1",
                "--parameter",
                "a=b",
                "--config",
                "configs/quickstart.yaml",
            ],
            "--parameter a=b: KEY=JSON",
        ),
        (["tree", "no/such/run"], "no such run directory"),
        (["config", "flow.stalenes=1"], "did you mean flow.staleness?"),
        (["prompt"], "name a recipe"),
        (["prompt", "3"], "name a recipe"),
        (["prompt", "no/such.yaml"], "no such configuration file"),
        (["prompt", "configs/quickstart.yaml", "1", "2"], "one number of questions at a time: 1 or 2?"),
        (["prompt", "configs/qwen3-14b-2x8.yaml"], "no such data file: data/train.parquet"),
        (["prompt", "configs/quickstart.yaml", "model.path=no/model"], "there is no directory no/model"),
        (["train", "configs/quickstrat.yaml"], "configs/quickstrat.yaml; did you mean quickstart.yaml?"),
        (["plan", "configs/quickstart.yaml", "model.path=Qwen3-14"], "did you mean Qwen3-14B?"),
        (["logs", "no/such/run"], "no such run directory"),
        (["cancel", "no/such/run"], "no such run directory"),
        (["trian"], "invalid choice"),
        (["trian"], "did you mean espalier train?"),
        (["train", "--bogus"], "unrecognized arguments"),
        (["bench", "everything"], "invalid choice"),
    ],
)
def test_wrong_use_is_one_clear_message_and_code_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_config_prints_what_loads_back(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["config", str(recipe), "branching=none"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert main(["config", str(printed), "flow.staleness=0"]) == 0
    out = capsys.readouterr().out
    assert "name: none" in out
    assert "staleness: 0" in out


def test_train_passes_the_recipe_and_overrides_around_options(recipe: Path, launched: Launched):
    assert main(["train", "run.seed=3", str(recipe), "branching=none"]) == 0
    ((config, name, resume),) = launched.train_calls
    assert (config.run.seed, config.run.steps, config.branching.name) == (3, 5, "none")
    assert (name, resume) == ("small", None)


def test_train_returns_the_conductors_exit_code(
    recipe: Path, launched: Launched, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launched, "train", lambda *_, **__: 130)
    assert main(["train", str(recipe)]) == 130


def test_resume_takes_the_stored_configuration(
    run_dir: RunDir, launched: Launched, capsys: pytest.CaptureFixture[str]
):
    words = ["train", "run.steps=9", "--resume", str(run_dir.root), "learn.lr=0.5", "observe.wandb=disabled"]
    assert main(words) == 0
    ((config, _, resume),) = launched.train_calls
    assert resume == run_dir.root
    assert (config.run.steps, config.learn.lr, config.observe.wandb) == (9, 0.5, "disabled")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "learn.lr" in warnings[0]


def test_resume_with_a_recipe_is_refused(
    run_dir: RunDir, recipe: Path, launched: Launched, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", str(recipe), "--resume", str(run_dir.root)]) == 2
    assert "leave" in capsys.readouterr().err
    assert launched.train_calls == []


def test_what_a_resumed_run_may_change_is_said_by_the_schema():
    assert settings()["run.steps"].safe_on_resume
    assert settings()["rollout.concurrency"].safe_on_resume
    assert not settings()["learn.credit"].safe_on_resume
    assert unsafe_on_resume(["learn.credit.name=grpo", "slurm.env.A=1"]) == ["learn.credit.name"]
    assert unsafe_on_resume(["learn.lora.sync=merged", "learn.lora.rank=4"]) == ["learn.lora.rank"]
    assert unsafe_on_resume(["branching=none", "teacher.urls=[http://a]"]) == ["branching"]
    assert unsafe_on_resume(["eval.every=3", "run.stepsize=1", "model.layers=2"]) == [
        "run.stepsize",
        "model.layers",
    ]


def test_eval_of_a_run(
    run_dir: RunDir, launched: Launched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["eval", str(run_dir.root)]) == 2
    assert "no model" in capsys.readouterr().err
    run_dir.model.mkdir()
    (run_dir.model / "config.json").write_text("{}")
    out = tmp_path / "result.json"
    assert main(["eval", str(run_dir.root), "eval.questions=7", "--out", str(out)]) == 0
    ((config, model),) = launched.eval_calls
    assert (config.eval.questions, model) == (7, run_dir.model)
    written = json.loads(out.read_text())
    assert (written["questions"], written["accuracy"], written["reward"]) == (4, 0.5, None)
    assert json.loads(capsys.readouterr().out) == written


def test_eval_of_a_model_needs_a_recipe(tmp_path: Path, recipe: Path, launched: Launched):
    (tmp_path / "config.json").write_text("{}")
    assert main(["eval", str(tmp_path)]) == 2
    assert main(["eval", str(tmp_path), "--config", str(recipe)]) == 0
    assert launched.eval_calls[0][1] == tmp_path


@pytest.mark.parametrize("what", ["engine", "learner"])
def test_bench_runs_by_name(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    called: list[tuple[Path, bool]] = []
    module = types.ModuleType(f"system.bench.{what}")
    module.run = lambda out_dir, quick: called.append((out_dir, quick))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"system.bench.{what}", module)
    out = tmp_path / "deep" / "out"
    assert main(["bench", what, "--quick", "--out", str(out)]) == 0
    assert called == [(out, True)]
    assert out.is_dir()


def test_bench_hands_on_the_options_that_a_benchmark_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    called: list[dict[str, object]] = []

    def run(out_dir: Path, quick: bool, words: list[str] = [], rounds: int = 5, latency: str = "") -> None:  # noqa: B006
        called.append({"words": words, "rounds": rounds, "latency": latency})

    module = types.ModuleType("system.bench.trl")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "system.bench.trl", module)
    out = ["--out", str(tmp_path / "out")]
    assert main(["bench", "trl", "--rounds", "2", "--latency", "0,0.1", "arpo", *out]) == 0
    assert main(["bench", "trl", *out]) == 0
    assert called == [
        {"words": ["arpo"], "rounds": 2, "latency": "0,0.1"},
        {"words": [], "rounds": 5, "latency": ""},
    ]
    assert main(["bench", "trl", "--steps", "4", *out]) == 2
    assert "bench trl takes no --steps" in capsys.readouterr().err


def test_ctrl_c_outside_the_conductor_is_quiet(
    recipe: Path, launched: Launched, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupt(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(launched, "train", interrupt)
    assert main(["train", str(recipe)]) == 130
    assert capsys.readouterr().err == "espalier: interrupted\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ("a", "0.500")),
        (["--number", "0"], ("a", "0.000")),
        (["--number", "2"], ("c", "0.500")),
        (["--number", "-3"], ("b", "1.000")),
        (["--best"], ("b", "1.000")),
        (["--worst"], ("a", "0.000")),
        (["--prompt", "a"], ("a", "0.500")),
        (["--prompt", "b"], ("b", "1.000")),
    ],
)
def test_tree_shows_the_one_asked_for(
    run_with_trees: RunDir, options: list[str], expected: tuple[str, str], capsys: pytest.CaptureFixture[str]
):
    assert main(["tree", str(run_with_trees.root), *options]) == 0
    captured = capsys.readouterr()
    name, reward = expected
    assert captured.out.startswith(f"{name}  calc")
    assert f"reward {reward} ±" in captured.out
    assert "⟨1⟩⟨2⟩" in captured.out  # no tokenizer in this run, and that is said
    assert "WARNING: no tokenizer" in captured.err


@pytest.mark.parametrize("options", [["--number", "4"], ["--number", "-5"], ["--prompt", "z"]])
def test_tree_that_is_not_there(
    run_with_trees: RunDir, options: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main(["tree", str(run_with_trees.root), *options]) == 2
    assert "keeps no tree" in capsys.readouterr().err


def test_tree_of_a_run_without_trees(run_dir: RunDir, capsys: pytest.CaptureFixture[str]):
    assert main(["tree", str(run_dir.root)]) == 2
    assert "keeps no tree yet" in capsys.readouterr().err
    assert main(["tree", str(run_dir.root), "--best"]) == 2


def test_a_damaged_tree_file_is_one_line(run_with_trees: RunDir, capsys: pytest.CaptureFixture[str]):
    next(iter(run_with_trees.trees.glob("trees-*.parquet"))).write_bytes(b"not parquet")
    assert main(["tree", str(run_with_trees.root), "--list"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_tree_list(run_with_trees: RunDir, capsys: pytest.CaptureFixture[str]):
    assert main(["tree", str(run_with_trees.root), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["0", "a"], ["1", "b"], ["2", "c"], ["3", "a"]]


def test_tree_uses_the_runs_tokenizer(run_with_trees: RunDir, capsys: pytest.CaptureFixture[str]):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "Who": 1, "wrote": 2, "Ada": 3, "Bob": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(
        run_with_trees.model
    )
    assert main(["tree", str(run_with_trees.root), "--entropy"]) == 0
    captured = capsys.readouterr()
    assert "Who wrote" in captured.out
    assert "leaf 0" in captured.out
    assert "WARNING" not in captured.err


def test_advantages_are_those_of_the_configured_estimator(
    run_dir: RunDir, capsys: pytest.CaptureFixture[str]
):
    config = run_dir.config(("learn.credit=dr-grpo",))
    run_dir.write_config(config)
    with TreeWriter(run_dir.trees) as writer:
        writer.append(replace(tiny_tree("a", (1.0, 0.0)), correct=np.array([1, 0], np.int8)))
    assert main(["tree", str(run_dir.root)]) == 0
    out = capsys.readouterr().out
    assert "advantages: dr-grpo" in out
    assert "A +0.500" in out
    assert "A -0.500" in out


def test_a_closed_pipe_is_no_error(run_with_trees: RunDir):
    """``espalier tree RUN | head -1`` with a reader that leaves at once."""
    process = subprocess.Popen(
        [sys.executable, "-m", "actors.cli.main", "tree", str(run_with_trees.root), "--list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    try:
        assert process.wait(timeout=120) == 0
        error = process.stderr.read()
    finally:
        process.kill()
    assert "Traceback" not in error
    assert "BrokenPipe" not in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["config", "latin.yaml"], "latin.yaml: not readable as YAML"),
        (["config", "broken.yaml"], "broken.yaml: not readable as YAML"),
        (["config", "deep.yaml"], "deep.yaml: not readable as YAML"),
        (["config", "."], "is a directory; name a recipe"),
        (
            ["config", "tools.mcp=[npx]"],
            "tools.mcp: 'npx' must be a dictionary; see: espalier config --explain",
        ),
        (["config", "tools.names={}"], "override 'tools.names={}'"),
        (["config", "engine.urls=[[[]]]"], "engine.urls: [[]] must be a text"),
        (["config", "slurm.env={A: {B: c}}"], "slurm.env: {'B': 'c'} must be a text"),
        (["config", "learn.lr=.nan"], "learn.lr=nan must be a finite number"),
        (["config", "rollout.tree_deadline_s=-1"], "rollout.tree_deadline_s=-1.0 must be above 0"),
        (["config", "--explain", "flow.stalenes"], "did you mean flow.staleness?"),
        (["config", "--explain", "algoritm"], "did you mean algorithm?"),
        (["train", "plain.yaml", "run.dir=plain.yaml"], "run.dir=plain.yaml"),
        (["train", "plain.yaml", "run.dir=/proc/here"], "run.dir=/proc/here"),
        (["train", "plain.yaml", "run.dir=/sys/kernel"], "run.dir=/sys/kernel"),  # nobody can write there
        (["plan", "plain.yaml", "model.path=torn"], "torn/config.json: not the config.json of a model"),
        (["plan", "plain.yaml", "model.path=list"], "list/config.json: not the config.json of a model"),
        (
            ["train", "plain.yaml", "reward=nowhere:Reward"],
            "reward.name='nowhere:Reward': ModuleNotFoundError",
        ),
        (["eval", "model", "--config", "plain.yaml", "--out", "no/where.json"], "no/.where.json"),
        (["tree", "plain.yaml"], "no such run directory"),
        (["status", "plain.yaml"], "no such run directory"),
    ],
)
def test_what_a_user_can_break_is_one_line(
    words: list[str],
    says: str,
    tmp_path: Path,
    launched: Launched,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("run: {name: é}".encode("latin-1"))
    (tmp_path / "broken.yaml").write_text("run: {name: [")
    (tmp_path / "deep.yaml").write_text("run: " + "[" * 5000)
    (tmp_path / "plain.yaml").write_text("run: {seed: 1}\n")
    for name, text in (("model", "{}"), ("torn", '{"model_type": '), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    monkeypatch.setattr(
        launched, "train", lambda config, config_name, resume: RunDir.create(config, config_name) and 0
    )
    assert main(words) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("espalier: ")
    assert says in line


def test_every_wrong_part_is_told_before_anything_is_made(
    recipe: Path, launched: Launched, capsys: pytest.CaptureFixture[str]
):
    words = ["reward=no.such:Reward", "task.options={rigth: 0.5}", "tools.options={python: {color: red}}"]
    words += ["rollout.syntax=collections:missing", "tools.options.serch={top_k: 3}"]
    assert main(["train", str(recipe), *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1].rstrip(":") for line in lines] == [
        "task.options.rigth",
        "rollout.syntax='collections:missing'",
        "reward.name='no.such:Reward'",
        "tools.options.python.color",
        "tools.options.serch",
    ]
    assert "did you mean right?" in lines[0]
    assert launched.train_calls == []


def test_a_bug_says_that_it_is_one(
    recipe: Path, launched: Launched, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*_: object, **__: object) -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(launched, "train", fail)
    assert main(["train", str(recipe)]) == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError: a bug" in error
    assert "this is a bug of Espalier" in error


def test_explain_tells_one_setting_or_a_section(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "--explain", "learn.credit"]) == 0
    one = capsys.readouterr().out
    assert one.startswith("learn.credit\n    part, default arpo-soft; grpo, arpo-soft,")
    assert main(["config", "--explain", "eval"]) == 0
    section = capsys.readouterr().out
    assert section.count("safe on resume") == len(fields(EvalConfig))
    assert main(["config", "--explain"]) == 0
    everything = capsys.readouterr().out
    assert all(f"\n{key}\n" in everything for key in settings())


def test_the_settings_reference_is_current(capsys: pytest.CaptureFixture[str]):
    """Made by: espalier config --explain --markdown > docs/settings.md"""
    assert main(["config", "--explain", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown()
    assert (Path(__file__).parents[1] / "docs" / "settings.md").read_text(encoding="utf-8") == markdown()


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize(
    ("environment", "words", "shows"),
    [
        (ASCII, ["study", "--help"], b"espalier study branching configs"),
        (ASCII, ["config", "--explain", "flow.staleness"], b"\\u03b7: versions"),
        ({"PYTHONOPTIMIZE": "2"}, ["--help"], b"start here: espalier train"),
        ({"PYTHONOPTIMIZE": "2"}, ["config", "--explain", "flow.staleness"], b"integer, default 1"),
    ],
)
def test_an_ascii_terminal_and_a_python_without_docstrings_will_do(
    environment: dict[str, str], words: list[str], shows: bytes
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "actors.cli.main", *words],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert shows in done.stdout + done.stderr
    assert b"Traceback" not in done.stderr
