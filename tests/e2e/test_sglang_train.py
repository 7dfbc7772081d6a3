"""Training through real SGLang servers on a CPU, one of which is killed on the way."""

import json
import os
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_train import assert_nothing_lost

from system.config import EngineConfig
from system.engine.sglang.command import SglangMissing, interpreter
from system.observe.jsonl import read_jsonl
from system.tree.store import read_trees

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(900)]
WAIT_S = 400.0  # a server of a busy machine needs minutes to start
SETTINGS = (
    "engine=sglang",
    "engine.replicas=2",
    "engine.weights=distributed",
    "engine.max_running=16",
    f"engine.start_deadline_s={WAIT_S}",
    "warmstart.steps=10",
    "warmstart.demos=100",
    "eval.questions=2",
    "rollout.leaves=4",
    "rollout.roots=2",
    "rollout.concurrency=8",
    "flow.batch_leaves=16",
    "checkpoint.every=0",
    "reward.name=varied_reward:VariedReward",  # the model knows nothing, and each step shall move it
)


@pytest.fixture(autouse=True)
def sglang() -> None:
    try:
        interpreter(EngineConfig(name="sglang"))
    except SglangMissing as error:
        missing = pytest.fail if os.environ.get("ESPALIER_REQUIRE_SGLANG") else pytest.skip
        missing(f"SGLang is not installed: {error}")


def is_server(process: psutil.Process) -> bool:
    return "sglang.launch_server" in process.cmdline()


def serves(port: int, key: str) -> int | None:
    """The weight version of a server that generates; None while it is dead, starting or paused."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
            pass
        ask = urllib.request.Request(f"http://127.0.0.1:{port}/model_info")
        ask.add_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(ask, timeout=5) as answer:
            return int(json.load(answer)["weight_version"])
    except (urllib.error.URLError, OSError, ValueError):
        return None


def test_training_goes_on_when_one_of_two_servers_is_killed(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    run = start("run.steps=5000", *SETTINGS)
    run.wait_for(lambda: run.steps() >= 3, 2 * WAIT_S, "step 3")
    victim = run.find(is_server)
    words = victim.cmdline()
    port = int(words[words.index("--port") + 1])
    key = (run.directory / "key").read_text()
    assert serves(port, key) is not None
    family = [victim, *victim.children(recursive=True)]
    victim.kill()
    _, left = psutil.wait_procs(family, timeout=60)
    assert not left, f"outlived their server: {left}"
    killed_at = run.steps()
    run.wait_for(lambda: run.steps() >= killed_at + 3, WAIT_S, "three steps with the other server alone")
    assert serves(port, key) is None, "it cannot be back so soon: the steps must have been without it"
    run.wait_for(
        lambda: (serves(port, key) or 0) > killed_at, WAIT_S, "the killed server with current weights"
    )
    back_at = run.steps()
    run.wait_for(lambda: run.steps() >= back_at + 3, WAIT_S, "three steps with both servers again")
    assert abs((serves(port, key) or 0) - run.steps()) <= 1, "it takes every update again"
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait(120) == 3, run.output()

    summary = run.summary()
    assert_nothing_lost(run.directory, summary)
    assert summary["versions"] >= back_at + 3
    # Engine and learner agree, token by token, about the weights each token was sampled from.
    assert summary["mismatch"]["fresh_share"] > 0
    assert summary["mismatch"]["engine_kl"] < 1e-8
    assert summary["mismatch"]["engine_logprob_diff_max"] < 1e-4
    steps = [record for record in read_jsonl(run.directory / "metrics.jsonl") if "train/loss" in record]
    assert all(record["train/engine_logprob_diff_max"] < 1e-4 for record in steps)
    assert any(record["train/mismatch_kl"] > record["train/engine_kl"] for record in steps)  # stale tokens
    # Weights came in flight: there are branches of more than one version, and pauses were short.
    assert len({int(v) for tree in read_trees(run.directory / "trees") for v in tree.version if v >= 0}) > 3
    assert summary["weights"]["pushes"] >= summary["versions"]
    assert summary["weights"]["pause_s_max"] < 30
    # Both servers and the learner were one group, and the one that was left a group without the other.
    logs = [(run.directory / "logs" / f"sglang-{number}.log").read_text() for number in (0, 1)]
    groups = [re.findall(r"world_size=(\d+), group_name=(espalier-\S+),", log) for log in logs]
    both = {group for size, group in groups[0] if size == "3"}
    assert len(both & {group for size, group in groups[1] if size == "3"}) >= 2, "before the kill, and after"
    assert {size for group in groups for size, _ in group} == {"2", "3"}
