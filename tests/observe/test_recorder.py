from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import pytest
from observe_trees import NAN, evaluated, make_tree, single

from system.config import Config
from system.flow.loop import FinishedStep
from system.observe.jsonl import read_jsonl
from system.observe.recorder import GROWING, QUEUE_DEPTH, Recorder
from system.observe.rundir import RunDir
from system.observe.sinks import Alarm, RunFiles, history, raised, series
from system.observe.spans import PhaseSpan
from system.tree.stats import TreeStats


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class MemorySink:
    """Keeps the records."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.alarms: list[Alarm] = []
        self.spans: list[PhaseSpan] = []
        self.closed = False

    def write(self, record: Mapping[str, Any]) -> None:
        self.records.append(dict(record))

    def alarm(self, alarm: Alarm) -> None:
        self.alarms.append(alarm)

    def span(self, span: PhaseSpan) -> None:
        self.spans.append(span)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sink() -> MemorySink:
    return MemorySink()


@pytest.fixture
def recorder(run_dir: RunDir, config: Config, sink: MemorySink, clock: Clock) -> Recorder:
    return Recorder(run_dir, config, [sink], clock=clock, now=lambda: 5.0)


def run_two_steps(recorder: Recorder, clock: Clock) -> None:
    recorder.evaluated(0, evaluated(single("a", 0), single("b", 1)), "before", 3.0, 1.0)
    for step in (1, 2):
        trees = [TreeStats.of(make_tree(f"{step}-{i}", (1.0, 0.0, 0.5), version=step - i)) for i in range(2)]
        for tree in trees:
            recorder.tree_closed(tree, version_now=step)
        clock.now += 10
        recorder.idle_total("learner", "trees", 1.5 * step)
        recorder.idle_total("engine", "weights", 0.5 * step)
        recorder.train_step(FinishedStep(step, trees, {"loss": 1.0 / step}, [0, step]))
        recorder.flush(step)
    for client, prompt, cached in (("rollout-0", 100, 20), ("rollout-1", 100, 60), ("rollout-0", 150, 70)):
        recorder.running_total(client, "prompt_tokens", prompt)  # running totals, over both clients
        recorder.running_total(client, "cached_tokens", cached)
    recorder.running_total("rollout-1", "prompt_tokens", 50)  # its worker was restarted
    recorder.tree_dropped("stale", 3)
    recorder.tree_dropped("deadline", 2)


def test_summary_has_what_the_issue_asks(recorder: Recorder, clock: Clock, run_dir: RunDir, sink: MemorySink):
    recorder.training_began()
    run_two_steps(recorder, clock)
    recorder.evaluated(2, evaluated(single("a", 1), single("b", 1)), "after", 3.0, 1.0)
    recorder.finish(ended=True)
    summary = json.loads(run_dir.summary_path.read_text())
    assert set(summary) == {
        *(
            "eval",
            "trees",
            "leaves",
            "forks",
            "forks_unasked",
            "top_ups",
            "tool_calls",
            "tokens",
            "staleness",
            "versions",
            "pools",
            "guided",
        ),
        *(
            "evaluation",
            "mismatch",
            "weights",
            "model",
            "dropped",
            "causes",
            "engine",
            "tools",
            "rewards",
            "environment",
            "agent",
            "chat",
            "wall_s",
            "idle",
            "idle_s",
            "seed",
            "config",
            "ended",
        ),
    }
    assert summary["eval"]["before"]["accuracy"] == 0.5
    assert summary["eval"]["after"]["accuracy"] == 1.0
    assert summary["evaluation"] == {"count": 2, "seconds": 6.0, "waited_s": 2.0}
    assert {"reward", "tool_calls"} <= set(summary["eval"]["after"])
    assert summary["eval"]["after"]["kinds"]["calc"]["accuracy"] == 1.0
    assert (summary["trees"], summary["leaves"], summary["forks"], summary["tool_calls"]) == (4, 12, 4, 4)
    assert summary["tokens"] == {
        "generated": 4 * 16,
        "trained": 4 * 16,
        "unique_trained": 4 * 22,
        "flat_trained": 4 * (11 + 14 + 10),
    }
    assert summary["staleness"] == {"max": 2, "mean": 0.75}
    assert summary["engine"] == {"prompt_tokens": 300, "cached_tokens": 130, "cache_hit_share": 130 / 300}
    assert summary["versions"] == 2
    assert summary["dropped"] == {"stale": {"trees": 1, "leaves": 3}, "deadline": {"trees": 1, "leaves": 2}}
    assert summary["wall_s"] == 20
    assert summary["idle_s"] == {"learner": {"trees": 3.0}, "engine": {"weights": 1.0}}
    assert summary["idle"] == {"learner": 0.15, "engine": 0.05}
    assert summary["seed"] == 0
    assert summary["config"]["branching"]["name"] == "arpo-calibrated"
    assert sink.closed


def test_what_merged_adapters_lose_is_told_once_and_kept(
    recorder: Recorder, config: Config, clock: Clock, sink: MemorySink, run_dir: RunDir
) -> None:
    told: list[str] = []
    recorder.tell = told.append
    config.model.dtype, config.learn.lora.rank = "bfloat16", 4
    for kept in (0.25, 0.75):
        recorder.merged(kept)
    record = recorder.flush(1)
    assert record["weights/lora_kept"] == 0.5
    recorder.model_merged(0.8)
    again = Recorder(run_dir, config, [sink], clock=clock, now=lambda: 6.0)
    again.restore(json.loads(json.dumps(recorder.state())))
    summary = again.summary()
    assert (summary["weights"], summary["model"]) == ({"lora_kept": 0.75}, {"lora_kept": 0.8})
    (line,) = told
    assert "keep 25% of what the adapters change" in line
    recorder.merged(1.0)
    assert len(told) == 1


def test_engine_mismatch_and_pauses_add_up_over_a_resume(
    recorder: Recorder, clock: Clock, run_dir: RunDir, config: Config, sink: MemorySink
):
    """Means per token of a step; those over fresh tokens are weighted by how many of them there were."""
    steps = [
        {"mismatch_kl": 0.2, "fresh": 1.0, "engine_kl": 1e-9, "engine_logprob_diff_max": 1e-5},
        {"mismatch_kl": 0.4, "fresh": 0.25, "engine_kl": 6e-9, "engine_logprob_diff_max": 3e-6},
    ]
    recorder.weights_pushed(0.5, [0.1, 0.3], 100)
    recorder.train_step(FinishedStep(1, [], steps[0], []))
    second = Recorder(run_dir, config, [sink], clock=clock, now=lambda: 6.0)
    second.restore(json.loads(json.dumps(recorder.state())))
    second.weights_pushed(0.7, [0.2, 0.2], 100)
    second.train_step(FinishedStep(2, [], steps[1], []))
    record = second.flush(2)
    assert (record["weights/stage_s"], record["weights/pause_s"]) == (0.7, 0.2)
    summary = second.summary()
    assert summary["mismatch"] == pytest.approx(
        {"kl": 0.3, "fresh_share": 0.625, "engine_kl": 2e-9, "engine_logprob_diff_max": 1e-5}
    )
    assert summary["weights"] == pytest.approx(
        {"pushes": 2, "bytes": 200, "stage_s": 1.2, "pause_s": 0.8, "pause_s_max": 0.3}
    )


def test_one_record_per_flush_holds_only_its_window(recorder: Recorder, clock: Clock, sink: MemorySink):
    recorder.training_began()
    recorder.gauge(QUEUE_DEPTH, 2)
    recorder.gauge(QUEUE_DEPTH, 4)
    run_two_steps(recorder, clock)
    before, first, second = sink.records
    assert (before["step"], before["eval/accuracy"], before["eval/which"]) == (0, 0.5, "before")
    assert first[QUEUE_DEPTH] == 3
    assert QUEUE_DEPTH not in second
    assert (first["rollout/trees"], second["rollout/trees"]) == (2, 2)
    assert (first["train/loss"], second["train/loss"]) == (1.0, 0.5)
    assert second["time/idle_s/learner/trees"] == 1.5
    assert second["time/idle_share/learner/trees"] == 0.15
    assert second["time/generated_per_s"] == 3.2
    assert first["flow/lag_at_close"] == 0.5
    assert second["flow/goodput"] == 1.0
    assert recorder.flush(3)["flow/dropped/stale"] == 1


def test_two_training_steps_in_one_record_are_averaged(recorder: Recorder):
    recorder.train_step(FinishedStep(1, [], {"loss": 1.0, "first": 7.0}, []))
    recorder.train_step(FinishedStep(2, [], {"loss": 3.0}, []))
    record = recorder.flush(2)
    assert (record["train/loss"], record["train/first"]) == (2.0, 7.0)


def test_totals_survive_a_resume_through_json(
    recorder: Recorder, clock: Clock, run_dir: RunDir, config: Config
):
    recorder.training_began()
    run_two_steps(recorder, clock)
    state = json.loads(json.dumps(recorder.state()))
    second = Recorder(run_dir, config, [], clock=clock)
    second.restore(state)
    assert second.summary() == recorder.summary()
    clock.now += 5
    second.train_step(FinishedStep(3, [TreeStats.of(make_tree(reward=(1.0, 0.0, 0.5)))], {}, [4]))
    summary = second.summary()
    assert (summary["wall_s"], summary["versions"], summary["staleness"]["max"]) == (25, 3, 4)
    assert summary["tokens"]["trained"] == 5 * 16
    assert second.status().evals == {"before": 0.5}


def test_a_resume_takes_back_records_past_the_checkpoint(run_dir: RunDir, config: Config, clock: Clock):
    first = Recorder(run_dir, config, [RunFiles(run_dir)], clock=clock)
    for step in (1, 2, 3):
        first.train_step(FinishedStep(step, [], {"loss": float(step)}, []))
        first.flush(step)
        if step == 2:
            state = first.state()
    second = Recorder(run_dir, config, [RunFiles(run_dir)], clock=clock)
    second.restore(state)
    second.train_step(FinishedStep(3, [], {"loss": 30.0}, []))
    second.flush(3)
    records = history(run_dir.metrics_path)
    assert list(series(records, "train/loss")) == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_status_for_the_progress_display(recorder: Recorder, clock: Clock):
    assert math.isnan(recorder.status().reward)
    recorder.training_began()
    recorder.gauge(GROWING, 5)
    recorder.gauge(QUEUE_DEPTH, 2)
    run_two_steps(recorder, clock)
    status = recorder.status()
    assert (status.step, status.version, status.dropped) == (2, 2, 2)
    assert (status.growing, status.queue_depth) == (5, 2)
    assert status.reward == 0.5
    assert status.accuracy == pytest.approx(1 / 3)
    assert status.forks_per_tree == 1
    assert status.steps_per_s == 0.1
    assert status.generated_per_s == pytest.approx(64 / 20)
    assert status.trained_per_s == pytest.approx(64 / 20)
    assert status.idle == {"learner": 0.15, "engine": 0.05}
    clock.now += 1000
    assert recorder.status().generated_per_s == 0


def test_rates_and_shares_count_since_training_began(recorder: Recorder, clock: Clock):
    clock.now += 100  # start, warm start, evaluation
    recorder.idle_total("engine", "waiting", 90.0)
    recorder.training_began()
    clock.now += 10
    recorder.idle_total("engine", "waiting", 92.0)
    recorder.idle_total("learner", "no batch", 4.0)
    recorder.tree_closed(TreeStats.of(make_tree()), 0)
    status, generated = recorder.status(), recorder.summary()["tokens"]["generated"]
    assert status.generated_per_s == generated / 10
    assert status.idle == {"engine": 0.2, "learner": 0.4}
    record = recorder.flush(1)
    assert record["time/window_s"] == 10
    assert record["time/generated_per_s"] == generated / 10
    assert record["time/idle_share/engine/waiting"] == 0.2
    assert record["time/wall_s"] == 110
    assert recorder.summary()["idle_s"] == {"engine": {"waiting": 2.0}, "learner": {"no batch": 4.0}}
    assert recorder.summary()["idle"] == status.idle


def test_idle_shares_are_one_thing_in_records_progress_and_summary_over_a_resume(
    recorder: Recorder, clock: Clock, run_dir: RunDir, config: Config
):
    recorder.training_began()
    clock.now += 10
    recorder.idle_total("engine", "waiting", 5.0)
    assert recorder.flush(1)["time/idle_share/engine/waiting"] == 0.5
    second = Recorder(run_dir, config, [], clock=clock)
    second.restore(json.loads(json.dumps(recorder.state())))
    clock.now += 60  # its start
    second.idle_total("engine", "waiting", 50.0)
    second.training_began()
    clock.now += 30
    second.idle_total("engine", "waiting", 53.0)
    assert second.flush(2)["time/idle_share/engine/waiting"] == 0.1
    assert second.summary()["idle_s"] == {"engine": {"waiting": 8.0}}
    assert second.summary()["idle"] == second.status().idle == {"engine": 0.2}


def test_a_checkpoint_that_counted_the_warm_start_is_read_without_its_idle_time(
    recorder: Recorder, run_dir: RunDir, config: Config
):
    second = Recorder(run_dir, config, [])
    second.restore(recorder.state() | {"idle": {"engine": {"waiting": 90.0}}})
    assert second.summary()["idle_s"] == {}


def test_no_idle_share_is_above_one(recorder: Recorder, clock: Clock):
    """An engine that only waits is asked every second, and steps shorter than that are recorded."""
    recorder.training_began()
    waited, shares = 0.0, []
    for step in range(1, 9):
        clock.now += 0.7
        if step % 3 == 0:  # what it says covers three windows
            waited = 0.7 * step
            recorder.idle_total("engine", "waiting", waited)
        shares.append(recorder.flush(step).get("time/idle_share/engine/waiting"))
        assert recorder.status().idle.get("engine", 0.0) <= 1.0
    assert [one for one in shares if one is not None] == pytest.approx([1.0, 1.0])
    assert recorder.status().idle["engine"] == pytest.approx(1.0)


def test_a_resume_counts_its_start_as_the_first_session_did(
    recorder: Recorder, clock: Clock, run_dir: RunDir, config: Config
):
    clock.now += 30
    second = Recorder(run_dir, config, [], clock=clock)
    clock.now += 20  # its actors start
    second.restore(recorder.state() | {"wall_s": 30.0})
    assert second.wall_s == 50
    second.training_began()
    assert second.wall_s == 50


def test_the_tools_totals_reach_record_and_summary(recorder: Recorder):
    for client, retries in (("rollout-0", 2), ("rollout-1", 3)):
        recorder.running_total(client, "tools/search/retries", retries)
        recorder.running_total(client, "agent/turns", 5)
        recorder.running_total(client, "requests", 10)
    record = recorder.flush(1)
    assert (record["tools/search/retries"], record["engine/requests"]) == (5, 20)
    assert recorder.summary()["tools"] == {"search/retries": 5}
    assert recorder.summary()["engine"] == {"requests": 20}
    assert (record["agent/turns"], recorder.summary()["agent"]) == (10, {"turns": 10})
    assert "tools/search/retries" not in recorder.flush(2)


def test_settled_accuracy_waits_for_a_full_window(run_dir: RunDir, config: Config):
    config.flow.batch_leaves = 2 * config.rollout.leaves  # a window of 4 batches of 2 trees
    recorder = Recorder(run_dir, config, [])
    for i in range(8):
        assert math.isnan(recorder.settled_accuracy)
        recorder.tree_closed(TreeStats.of(make_tree(str(i), (1.0, 0.0, NAN))), 3)
    assert recorder.settled_accuracy == 0.5


def test_an_evaluation_during_training_stays_out_of_the_summary(recorder: Recorder, sink: MemorySink):
    recorder.evaluated(5, evaluated(single("a", 1)), "during", 3.0, 1.0)
    assert recorder.summary()["eval"] == {}
    assert sink.records[0]["eval/accuracy"] == 1.0


def test_the_summary_hides_secrets(run_dir: RunDir, config: Config):
    config.tools.search_url = "http://user:hunter2@host:80/search?api_key=abc123&k=3"
    config.task.options = {"api_key": "hunter2"}
    text = json.dumps(Recorder(run_dir, config, []).summary())
    assert "hunter2" not in text
    assert "abc123" not in text
    assert "@host:80/search" in text
    assert '"max_response_tokens": 256' in text


def test_the_first_cause_of_each_kind_is_told_and_all_are_counted(
    recorder: Recorder, run_dir: RunDir, config: Config, sink: MemorySink
) -> None:
    said: list[str] = []
    recorder.tell = said.append
    tree = make_tree("q1")
    tree.meta["mishaps"] = [["engine", "entropy: \x1b[2Jnan"], ["engine", "a second"], ["tool", "x" * 999]]
    recorder.tree_closed(TreeStats.of(tree), version_now=3)
    recorder.tree_dropped("KeyError", 4, "KeyError: 'gold' (mine.py:3)")
    recorder.tree_dropped("KeyError", 4, "KeyError: 'other' (mine.py:3)")
    recorder.tree_dropped("stale", 4)
    recorder.mishap("tool", "a second")
    summary = json.loads(json.dumps(recorder.summary()))
    assert summary["dropped"] == {"KeyError": {"trees": 2, "leaves": 8}, "stale": {"trees": 1, "leaves": 4}}
    assert summary["causes"] == {
        "KeyError": {"count": 2, "first": "KeyError: 'gold' (mine.py:3)"},
        "engine": {"count": 2, "first": "entropy: [2Jnan"},
        "tool": {"count": 2, "first": "x" * 299 + "…"},
    }
    assert [line.split(" (more")[0] for line in said] == [
        *("engine: entropy: [2Jnan", f"tool: {'x' * 299}…", "KeyError: KeyError: 'gold' (mine.py:3)"),
    ]
    resumed = Recorder(run_dir, config, [sink])
    resumed.restore(json.loads(json.dumps(recorder.state())))
    resumed.mishap("engine", "of another session")
    assert resumed.summary()["causes"]["engine"] == {"count": 3, "first": "entropy: [2Jnan"}


def test_a_cause_tells_no_secret(recorder: Recorder) -> None:
    recorder.mishap("tool", "no answer from https://user:hunter2@host/x")
    assert "hunter2" not in json.dumps(recorder.summary()["causes"])


def test_what_guided_trees_earn_is_counted_apart(recorder: Recorder, clock: Clock):
    """The accuracy that is shown, and that may end a run, is of what the model finds alone."""
    plain = TreeStats.of(make_tree("a", (0.0, 0.0, 0.0)))
    helped, helpless = (
        replace(TreeStats.of(make_tree("b", (reward, 0.0, 0.0))), guide=2) for reward in (1.0, 0.0)
    )
    for tree in (plain, helped, helpless):
        recorder.tree_closed(tree, version_now=3)
    assert recorder.status().accuracy == 0
    assert recorder.summary()["guided"] == {"trees": 2, "with_success": 1, "actions": 4}
    assert recorder.summary()["trees"] == 3
    state = json.loads(json.dumps(recorder.state()))
    del state["guided"]  # of an earlier version
    recorder.restore(state)
    assert recorder.summary()["guided"] == {}


def fill(recorder: Recorder, clock: Clock, first: int, loss: float = 1.0, seconds: float = 10.0) -> None:
    """Ten steps, each of which takes so long."""
    for step in range(first, first + 10):
        recorder.stall.began()
        clock.now += seconds
        recorder.stall.ended()
        recorder.train_step(FinishedStep(step, [], {"loss": loss}, []))
        recorder.flush(step)


def test_an_alarm_is_told_where_it_begins_and_where_it_ends(
    run_dir: RunDir, config: Config, sink: MemorySink, clock: Clock
):
    recorder = Recorder(run_dir, config, [RunFiles(run_dir), sink], clock=clock, now=lambda: 5.0)
    fill(recorder, clock, 1)
    fill(recorder, clock, 11, loss=NAN)
    fill(recorder, clock, 21)
    fill(recorder, clock, 31, loss=math.inf)
    assert [(one.step, one.name, one.on) for one in sink.alarms] == [
        (11, "loss not finite", True),
        (21, "loss not finite", False),
        (31, "loss not finite", True),
    ]
    assert "train/loss is nan" in sink.alarms[0].text
    lines = list(read_jsonl(run_dir.alarms_path))
    assert lines == [asdict(one) for one in sink.alarms]
    assert raised(run_dir.alarms_path).keys() == {"loss not finite"}
    # A session that goes on looks anew, and what was raised past its checkpoint never was.
    again = Recorder(run_dir, config, [RunFiles(run_dir)], clock=clock, now=lambda: 6.0)
    again.restore(recorder.state() | {"step": 35})
    assert raised(run_dir.alarms_path) == {}
    assert [one["step"] for one in history(run_dir.alarms_path)] == [11, 21, 31, 35]
    again.restore(recorder.state() | {"step": 25})
    assert [one["step"] for one in history(run_dir.alarms_path)] == [11, 21]


def test_a_step_that_does_not_come_is_an_alarm(recorder: Recorder, clock: Clock, sink: MemorySink):
    said: list[str] = []
    recorder.tell = said.append
    fill(recorder, clock, 1, seconds=40.0)
    clock.now += 5000.0  # nobody waits for a step: an evaluation, say
    recorder.look_for_stall()
    recorder.stall.began()
    recorder.gauge(QUEUE_DEPTH, 3)
    for seconds in (0.0, 350.0, 49.0):
        clock.now += seconds
        recorder.look_for_stall()
    assert (sink.alarms, said) == ([], [])
    for _ in range(3):
        clock.now += 60.0
        recorder.look_for_stall()
    recorder.stall.ended()
    recorder.look_for_stall()
    assert [(one.name, one.on) for one in sink.alarms] == [("stalled", True), ("stalled", False)]
    (told,) = said
    assert "no training step for 459 s; 3 closed trees wait for the learner" in told
    recorder.actor_silent("rollout-1 has been silent for 60 s: killed")
    assert [(one.name, one.on) for one in sink.alarms[2:]] == [
        ("stalled actor", True),
        ("stalled actor", False),
    ]
    assert recorder.summary()["causes"]["warning, stalled actor"]["count"] == 1


def test_phases_become_spans(recorder: Recorder, sink: MemorySink):
    tree = replace(TreeStats.of(make_tree()), seconds=3.0)
    recorder.tree_closed(tree, version_now=3)
    recorder.weights_pushed(1.5, [0.25, 0.5], 100)
    recorder.train_step(FinishedStep(4, [tree], {"loss": 1.0, "seconds": 2.0}, [0]))
    spans = [(one.name, one.start, one.seconds) for one in sink.spans]
    assert spans == [("generate", 2.0, 3.0), ("publish", 3.0, 2.0), ("train", 1.0, 2.0)]  # at 5, before which
    generate, publish, train = (dict(one.attributes) for one in sink.spans)
    assert (generate["tool.calls"], generate["tree.leaves"], generate["reward.mean"]) == (1, 3, 0.5)
    assert publish == {"weights.bytes": 100}
    assert train == {"step": 4, "train.tokens": tree.trainable}


def test_calls_and_rewards_are_spans_of_their_tree(recorder: Recorder, sink: MemorySink):
    tree = replace(TreeStats.of(make_tree()), seconds=3.0, scoring=((2.0, 2.5), None, (1.0, 3.0)))
    (call,) = tree.calls
    recorder.tree_closed(replace(tree, calls=(replace(call, began_s=0.5), call)), version_now=3)
    (generate,) = sink.spans
    tool, *rewards = generate.within  # one is of a version that did not say when it began
    assert (tool.name, tool.start, tool.seconds) == ("tool", generate.start + 0.5, call.latency_s)
    assert tool.attributes["tool.name"] == call.tool
    assert [(one.name, one.start - generate.start, one.seconds) for one in rewards] == [
        ("reward", 2.0, 0.5),
        ("reward", 1.0, 2.0),
    ]
    assert [one.attributes["tree.leaf"] for one in rewards] == [0, 2]
