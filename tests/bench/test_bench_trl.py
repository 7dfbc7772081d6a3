"""The benchmark against TRL: its plan, the check that both sides do the same work, figures and report."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from system.bench import trl as bench
from system.bench.trl import SETTINGS, figures, told, trl_settings
from system.bench.trl_plan import CONTESTANTS, Plan
from system.bench.trl_report import ratio_text, rival, summary, write_report
from system.bench.trl_work import BenchQuestion, WorkDone, of_espalier, of_trl, steady
from system.bench.usage import Usage
from system.config import load
from system.errors import ConfigError
from system.tree.record import Kind, Origin, Outcome, Tree

ASKED = [BenchQuestion(f"q{i}", [{"role": "user", "content": "?"}], ["1"], [7, i]) for i in range(6)]
QUIET = Usage(20.0, 0.2, 30.0, 1200.0, 0, 0.0, 0.01)


def row(way: str, round_: int, step_s: float, latency: float = 0.0, **more: Any) -> dict[str, Any]:
    made = figures(WorkDone([10.0, 11.0, 11.0 + step_s, 20.0], 64, 1.9), QUIET, began=4.0)
    return {
        **made,
        "way": way,
        "round": round_,
        "latency": latency,
        "accuracy": None,
        "repeated": False,
        **more,
    }


def test_every_way_is_a_valid_configuration_and_names_the_tensor_parallelism() -> None:
    ways = {name: one.way for name, one in CONTESTANTS.items() if one.way}
    for way in ways.values():
        config = way.config(*SETTINGS)
        assert config.tools.cache_size == 0
        assert config.flow.batch_leaves == 64
        assert config.rollout.max_response_tokens == 160
    tp = {name: way.config().learn.tp for name, way in ways.items()}
    assert tp == {"linear-sync": 1, "linear-async": 1, "arpo": 1, "arpo-tp2": 2}
    sync = ways["linear-sync"].config()
    assert (sync.flow.staleness, sync.branching.name) == (0, "none")
    assert ways["linear-async"].config().branching.name == "none"
    assert ways["linear-async"].config().flow.staleness == 1
    assert ways["arpo"].config().branching.name != "none"


def test_trl_is_given_what_the_configuration_says() -> None:
    config = load(CONTESTANTS["linear-sync"].way.path)  # type: ignore[union-attr]
    given = trl_settings(config)
    assert (given["leaves"], given["batch_leaves"], given["tokens"], given["calls"]) == (8, 64, 160, 4)
    assert given["learn"]["lr"] == config.learn.lr
    assert given["learn"]["beta2"] == config.learn.beta2


def test_ways_take_turns_within_a_round_and_shift_by_one_each_round() -> None:
    plan = Plan.of(words=["trl", "trl-continuous", "arpo"], rounds=2)
    assert plan.turns() == [
        (1, 0.0, "trl"),
        (1, 0.0, "trl-continuous"),
        (1, 0.0, "arpo"),
        (1, 0.1, "trl"),
        (1, 0.1, "arpo"),
        (2, 0.0, "trl-continuous"),
        (2, 0.0, "arpo"),
        (2, 0.0, "trl"),
        (2, 0.1, "arpo"),
        (2, 0.1, "trl"),
    ]
    assert Plan.of(quick=True).ways == ("trl", "linear-sync", "arpo")
    assert Plan.of(latency="0.05,0", steps=6).latencies == (0.05, 0.0)
    assert Plan.of(steps=6).slow_steps == 6


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"words": ["grpo"]}, "bench trl grpo: the ways are trl, trl-1-thread"),
        ({"rounds": 0}, "--rounds 0: 1 or more"),
        ({"steps": 3}, "--steps 3: 4 or more"),
        ({"latency": "fast"}, "--latency fast: seconds"),
        ({"latency": "-1"}, "--latency -1: seconds"),
    ],
)
def test_what_cannot_be_run_is_told(words: Mapping[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        Plan.of(**words)


def test_without_the_environment_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PYTHON", tmp_path / "python")
    with pytest.raises(ConfigError, match=r"there is no interpreter .*python: make bench-trl"):
        bench.run(tmp_path, words=["trl"])
    assert not list(tmp_path.iterdir())


def lines(**more: Any) -> list[dict[str, Any]]:
    asked = [["q0", "q1"], ["q2", "q3"]]
    return [
        {"step": i + 1, "time": 5.0 + i, "questions": names, "completions": 16, "calls": 32, **more}
        for i, names in enumerate(asked)
    ]


def test_trl_does_the_same_work_or_is_told_how_not() -> None:
    work = of_trl(lines(), {"other_tokens": []}, ASKED, 8)
    assert work == WorkDone([5.0, 6.0], 16, 2.0, [])
    assert of_trl(lines(questions=["q1", "q0"]), {"other_tokens": []}, ASKED, 8).problems == [
        "step 1: other questions, or in another order",
        "step 2: other questions, or in another order",
    ]
    assert (
        "step 1: 15 completions, not 16"
        in of_trl(lines(completions=15), {"other_tokens": []}, ASKED, 8).problems
    )
    (problem,) = of_trl(lines(), {"other_tokens": ["q3"]}, ASKED, 8).problems
    assert problem == "other token ids of 1 prompts, q3 among them"


def tree(prompt_id: str, *ids: int) -> Tree:
    tokens = np.array([*ids, 9], np.int32)
    return Tree(
        prompt_id,
        "lookup",
        tokens,
        np.zeros(tokens.size, np.float32),
        np.zeros(tokens.size, np.float32),
        np.zeros(tokens.size, np.int32),
        np.array([0, len(ids)], np.int32),
        np.array([-1, 0], np.int32),
        np.array([Kind.PROMPT, Kind.MODEL], np.int8),
        np.array([1], np.int32),
        np.zeros(1, np.float32),
        np.zeros(1, np.int8),
        np.array([Outcome.STOPPED], np.int8),
        np.array([Origin.ROOT], np.int8),
    )


def espalier(
    order: str = "012345",
    trained: str = "01 23",
    leaves: int = 16,
    ids: tuple[int, ...] = (7, 3),
    sync: bool = True,
) -> WorkDone:
    ledger = [{"event": "open"}, *({"event": "issue", "prompt": f"q{i}"} for i in order)]
    for version, numbers in enumerate(trained.split(), 1):
        ledger.append({"event": "train", "version": version, "numbers": [int(i) for i in numbers]})
    record = {"train/leaves": leaves, "rollout/leaves": 16.0, "rollout/calls_per_leaf": 1.5}
    records = [{**record, "time": 3.0}, {"train/leaves": leaves, "time": 4.0}]  # no tree closed in the second
    return of_espalier(records, ledger, [tree("q3", *ids), tree("unknown", 1)], ASKED, 16, sync)


def test_espalier_does_the_same_work_or_is_told_how_not() -> None:
    assert espalier() == WorkDone([3.0, 4.0], 16, 1.5, [])
    assert espalier(trained="10 32").problems == []  # within a step the order does not count
    assert espalier(order="102").problems == ["other questions, or issued in another order"]
    assert espalier(trained="02 13").problems == [
        "step 1: other questions than the next ones",
        "step 2: other questions than the next ones",
    ]
    assert espalier(trained="02 13", sync=False).problems == []
    assert espalier(leaves=15).problems[0] == "step 1: 15 completions, not 16"
    assert espalier(ids=(7, 4)).problems == ["q3: other token ids of the prompt"]


def test_steady_steps_are_those_between_the_first_and_the_last() -> None:
    assert steady([10.0, 15.0, 16.0, 18.0, 18.1]) == [1.0, 2.0]
    with pytest.raises(ValueError, match="3 training steps: four at least"):
        steady([1.0, 2.0, 3.0])


def test_a_row_holds_what_was_measured_and_is_told_in_a_line() -> None:
    made = row("trl", 1, 0.5)
    assert made["launch_s"] == 6.0
    assert made["step_s"] == 0.5
    assert told(made) == "0.500 s per step, first step after 6.0 s, 1,200 MB; load 0.2 before"
    noisy = row("trl", 1, 0.5, noise="others used 0.50 cores", repeated=True, accuracy=0.5)
    assert told(noisy).endswith("accuracy 0.500; load 0.2 before — others used 0.50 cores: again")


def test_ratios_are_within_a_round_and_over_the_faster_of_trls() -> None:
    rows = [
        row("trl", 1, 1.0),
        row("trl-1-thread", 1, 0.8),
        row("trl-in-process", 1, 0.1),
        row("arpo", 1, 0.4),
        row("trl", 2, 1.1),
        row("trl-1-thread", 2, 0.9),
        row("arpo", 2, 0.9, noise="others used 1.00 cores", repeated=True),
        row("arpo", 2, 0.3),
    ]
    assert rival(rows, 0.0) == "trl-1-thread"
    assert rival(rows[2:4], 0.0) == "trl-in-process"
    assert rival([rows[3]], 0.0) == ""
    found = {one["way"]: one for one in summary(rows)}
    assert found["arpo"]["ratios"] == pytest.approx([0.4 / 0.8, 0.3 / 0.9])
    assert (found["arpo"]["rounds"], found["arpo"]["noisy"]) == (2, 0)
    assert found["arpo"]["step_s"] == pytest.approx(0.35)
    assert ratio_text(found["arpo"]["ratios"]) == "0.42 (0.33 to 0.50)"
    assert ratio_text([]) == "–"


def test_a_run_that_was_never_quiet_counts_only_where_no_other_of_its_way_was() -> None:
    noise = {"noise": "others used 0.50 cores"}
    rows = [
        row("trl", 1, 1.0),
        row("trl", 2, 9.0, **noise),
        row("arpo", 1, 0.5, **noise),
        row("arpo", 2, 0.7, **noise),
    ]
    found = {one["way"]: one for one in summary(rows)}
    assert (found["trl"]["step_s"], found["trl"]["noisy"], found["trl"]["quoted_noise"]) == (1.0, 1, False)
    assert found["arpo"]["ratios"] == pytest.approx(
        [0.5]
    )  # of round 1 alone: in round 2 TRL's does not count
    assert (found["arpo"]["noisy"], found["arpo"]["quoted_noise"]) == (2, True)


def test_the_report_is_a_page_a_plot_json_and_markdown(tmp_path: Path) -> None:
    rows = [
        row(
            way,
            number,
            seconds + latency * 10,
            latency,
            accuracy=0.6 + number / 100 if latency == 0 else None,
        )
        for number in (1, 2)
        for latency in (0.0, 0.1)
        for way, seconds in (("trl", 0.6), ("arpo", 0.3))
    ]
    rows.append(row("arpo", 2, 0.5, 0.1, noise="others used 0.50 cores"))
    result = {
        "runs": rows,
        "complete": False,
        "plan": {"rounds": 2},
        "ways": {"trl": "TRL", "arpo": "ARPO"},
        "settings": list(SETTINGS),
        "accuracy_before": 0.35,
    }
    write_report(result, tmp_path)
    kept = json.loads((tmp_path / "trl.json").read_text())
    assert kept["summary"][1]["ratios"] == pytest.approx([0.5, 0.5])
    text = (tmp_path / "trl.md").read_text()
    assert "| arpo | 0.300 | 0.50 (0.50 to 0.50) | 6.0 | 1,200 | 0.615 (0.610 to 0.620) | 2 | 0 |" in text
    assert "Held-out accuracy before training: 0.350." in text
    page = (tmp_path / "trl.html").read_text()
    assert "INTERRUPTED" in page
    assert "not quiet" in page
    assert (tmp_path / "trl.png").read_bytes().startswith(b"\x89PNG")
