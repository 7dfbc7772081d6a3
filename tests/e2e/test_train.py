"""Whole small runs: asynchronous, with parts of them killed, stopped and resumed.

A synchronous one, with parts of one's own, is in tests/test_examples.py.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load
from summary_keys import unexplained

from actors.cli.main import main
from system import config as configuration
from system.chaos import run as chaos
from system.chaos.account import account
from system.observe.catalogue import find
from system.observe.jsonl import read_jsonl
from system.rollout import in_flight
from system.rollout.in_flight import SavedTree
from system.tasks.base import make_task
from system.tasks.tiny_model import create_model
from system.tree.record import Kind, Tree, validate
from system.tree.stats import TreeStats
from system.tree.store import read_trees

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
WAIT_S = 400.0


def assert_nothing_lost(directory: Path, summary: dict[str, Any]) -> None:
    """The final weights were trained on each prompt once; what else was issued was in flight at the end."""
    flow, leaves = summary["config"]["flow"], summary["config"]["rollout"]["leaves"]
    batch_trees = flow["batch_leaves"] // leaves
    found = account(
        list(read_jsonl(directory / "ledger.jsonl")), batch_trees, flow["staleness"], flow["window"]
    )
    assert found.versions == summary["versions"]
    assert found.trained == summary["versions"] * batch_trees
    assert (found.twice, found.lost) == (0, 0)


def scraped(port: int) -> str:
    """What the run tells Prometheus; empty while nothing listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def test_asynchronous_run_leaves_what_it_promises(start: Callable[..., Any]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    evaluations = ("eval.engines=1", "eval.every=1")
    run = start("run.steps=4", f"observe.prometheus={port}", *evaluations)
    run.wait_for(lambda: "espalier_train_loss " in scraped(port), WAIT_S, "a step that Prometheus can read")
    assert run.wait(WAIT_S) == 0, run.output()
    records = list(read_jsonl(run.directory / "metrics.jsonl"))
    assert [key for record in records for key in record if find(key) is None] == []
    assert list(read_jsonl(run.directory / "alarms.jsonl")) == []
    summary = run.summary()
    assert set(summary) >= {
        "eval", "trees", "leaves", "forks", "top_ups", "tool_calls", "tokens", "staleness", "versions",
        "dropped", "wall_s", "idle", "idle_s", "seed", "config",
    }  # fmt: skip
    assert unexplained(summary) == []
    assert {"accuracy", "reward", "tool_calls", "kinds"} <= set(summary["eval"]["before"])
    assert summary["eval"]["after"]["questions"] == 12
    assert summary["versions"] == 4
    tokens = summary["tokens"]
    assert 0 < tokens["trained"] <= tokens["generated"]
    assert tokens["unique_trained"] < tokens["flat_trained"]
    config = summary["config"]
    leaves = config["rollout"]["leaves"]
    batch_trees = config["flow"]["batch_leaves"] // leaves
    assert summary["staleness"]["max"] <= config["flow"]["staleness"] + config["flow"]["window"]
    trees = list(read_trees(run.directory / "trees"))
    assert len(trees) == 4 * batch_trees
    for tree in trees:
        validate(tree)
        assert tree.n_leaves == leaves == tree.budget
    # Weights arrived in flight: tokens of more than one version were trained on.
    assert len({int(v) for tree in trees for v in tree.version if v >= 0}) > 1
    assert (run.directory / "model" / "model.safetensors").is_file()
    assert "after training" in (run.directory / "model" / "README.md").read_text()
    extracted = run.directory.parent / "extracted"
    assert main(["export", str(run.directory), "--step", "4", "--to", str(extracted)]) == 0
    files = [(one / "model.safetensors").read_bytes() for one in (extracted, run.directory / "model")]
    assert files[0] == files[1], "the last checkpoint's model is the trained one"
    assert (run.directory / "curves" / "overview.png").stat().st_size > 10_000
    logs = {path.name for path in (run.directory / "logs").iterdir()}
    parts = ("learner-0", "engine-0", "rollout-0", "tool-search", "eval-engine-0", "eval-rollout-0")
    assert logs >= {f"{name}.log" for name in parts}
    steps = [record for record in read_jsonl(run.directory / "metrics.jsonl") if "train/loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    evaluated = {record["step"]: record for record in records if "eval/which" in record}
    assert {0, 4} <= evaluated.keys()
    for step, record in evaluated.items():
        answers = list(read_jsonl(run.directory / "evals" / f"v{step:06d}.jsonl"))[1:]
        right = sum(bool(answer["correct"]) for answer in answers)
        assert (len(answers), right / 12) == (12, pytest.approx(record["eval/accuracy"]))
        alone = record["eval/which"] != "after"  # on engines of its own, beside training
        assert (record["eval/waited_s"] < record["eval/seconds"]) == alone
    assert summary["evaluation"]["count"] == len(evaluated)
    assert all(math.isfinite(record["train/loss"]) for record in steps)
    # Behaviour and learner agree on the tokens the engine sampled from the very weights that are trained.
    assert steps[0]["train/mismatch_kl"] < 1e-3
    assert_nothing_lost(run.directory, summary)


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[str]:
    """The address of an engine that serves a model with the quickstart's tokenizer, to whom every token is
    about equally likely.
    """
    config = configuration.load(ROOT / "configs" / "quickstart.yaml")
    tokenizer = make_task(config).tokenizer()
    create_model(tmp_path / "teacher", tokenizer, config.model, seed=5)
    words = [sys.executable, "-m", "system.engine.embedded", "--model", str(tmp_path / "teacher")]
    words += ["--port", "0", "--max-context", "256", "--max-running", "32", "--threads", "1"]
    server = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().split()[-1]
    finally:
        server.kill()
        server.wait(30)


def test_a_run_that_scores_its_turns_and_its_answers(start: Callable[..., Any], teacher: str) -> None:
    """A²TGPO's credit, decoupled against what the engine found when each turn ended, and a teacher."""
    run = start(
        f"teacher.urls=[{teacher}]",
        "learn.teacher=server",
        "learn.teacher_coef=0.1",
        "run.steps=3",
        "rollout.rescore=true",
        "learn.proximal=closed",
        "rollout.score_answer=true",
        "rollout.answer_opening=<answer> \\boxed{ ",
        "learn.credit=a2tgpo",
    )
    assert run.wait(WAIT_S) == 0, run.output()
    assert "has no effect" not in run.output()
    trees = list(read_trees(run.directory / "trees"))
    assert len(trees) > 6
    for tree in trees:
        validate(tree)
        stats = TreeStats.of(tree)
        assert not stats.mishaps
        assert stats.rescored == stats.generated
        known = tree.closed_version >= 0
        assert (tree.closed_version[known] >= tree.version[known]).all()
        same = known & (tree.closed_version == tree.version)
        assert np.abs(tree.closed_logprob - tree.logprob)[same].max() < 1e-4
        assert np.isfinite(stats.answer[tree.kind != Kind.MODEL]).all()
        assert (np.isfinite(tree.teacher_logprob) == (tree.version >= 0)).all()
    steps = [record for record in read_jsonl(run.directory / "metrics.jsonl") if "train/loss" in record]
    grown = [record for record in steps if "rollout/rescored_share" in record]  # since the last, trees closed
    assert grown
    assert {record["rollout/rescored_share"] for record in grown} == {1}
    assert all(0 < record["rollout/answer_probability"] < 1 for record in grown)
    assert all(math.isfinite(record["train/loss"]) for record in steps)
    assert {record["train/teacher_scored"] for record in steps} == {1}
    assert all(record["train/teacher_kl"] > 1 for record in steps), "it has learned nothing"
    assert steps[0]["train/ratio_mean"] == pytest.approx(1, abs=1e-3)
    assert max(record["train/ratio_max"] for record in steps[1:]) > 1.001, "what the learner has moved since"


@pytest.mark.timeout(900)
def test_ten_faults_cost_no_prompt(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """``espalier chaos``: seed 263 draws kills of most parts, a freeze, damaged files, a full disk.

    One learner rank, so that a session starts sooner; what two of them do is in the tests of the learner.
    """
    quickstart = ROOT / "configs" / "quickstart.yaml"
    findings = chaos.run(tmp_path / "chaos", quickstart, count=10, seed=263, overrides=["learn.tp=1"])
    assert findings.sound, capfd.readouterr().out
    assert len(findings.recoveries) + len(findings.left_out) == 10
    assert all("fill disk" in reason for reason in findings.left_out), "only mounting may be forbidden"


def assert_goes_on(held: Sequence[SavedTree], trained: list[Tree]) -> None:
    """Trees of a checkpoint were trained on with every token they had: the very same sampled numbers."""
    assert sum(isinstance(one.tree, Tree) for one in held) < len(held), "some were still growing"
    by_prompt = {tree.prompt_id: tree for tree in trained}
    for one in held:
        tree = by_prompt[one.prompt_id]
        if isinstance(one.tree, Tree):
            assert tree.tokens.tolist() == one.tree.tokens.tolist()
            assert tree.logprob.tolist() == one.tree.logprob.tolist()
        else:
            arrays = load(one.tree)
            sampled = arrays["logprob"][arrays["version"] >= 0]
            assert not Counter(sampled.tolist()) - Counter(tree.logprob.tolist())


def name(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):  # some end before the run does
        return process.name()
    return ""


def newest_checkpoint(directory: Path) -> int:
    """The version of the newest complete checkpoint, 0 without one."""
    return max((int(path.name[1:]) for path in (directory / "checkpoints").glob("v??????")), default=0)


def test_a_stopped_run_goes_on(start: Callable[..., Any], search_gate: Any) -> None:
    search = (f"tools.search_url={search_gate.url}", "tools.deadline_s=300")
    run = start("run.steps=8", "checkpoint.every=1", "learn.tp=2", *search)
    run.wait_for(lambda: run.steps() >= 2, WAIT_S, "step 2")
    search_gate.hold_next()
    run.wait_for(lambda: search_gate.held, WAIT_S, "a search, whose tree grows on from here to the end")
    later = run.steps() + 2
    run.wait_for(lambda: newest_checkpoint(run.directory) >= later, WAIT_S, "a checkpoint with that tree")
    # Ray's own agents notice the end of their cluster later, by themselves.
    below = [process for process in run.descendants() if not name(process).endswith("Agent")]
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait(60) == 3
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not alive, f"outlived the run: {alive}"
    reached = run.steps()
    kept_trees = run.directory / "checkpoints" / f"v{newest_checkpoint(run.directory):06d}.trees"
    held = in_flight.read(kept_trees).trees
    assert held, "trees were in flight"
    # The learner may come back in another layout: tensor parallel before, two pipeline stages after.
    again = start("learn.tp=1", "learn.pp=2", resume=run.directory)
    assert again.wait(WAIT_S) == 0, again.output()
    summary = again.summary()
    assert_goes_on(held, list(read_trees(run.directory / "trees")))
    assert not [reason for reason in summary["dropped"] if reason.startswith("kept")]
    assert summary["versions"] == 8
    assert summary["config"]["learn"]["pp"] == 2
    assert reached < 8
    assert_nothing_lost(again.directory, summary)
