"""The table of ``docs/summary.md`` against all that a summary can hold; ``test_train.py`` has a real one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from summary_keys import explained, superfluous, unexplained

from system.engine.protocol import SPEED_COUNTERS
from system.engine.router import Routed
from system.evals.result import EvalResult, EvalScores
from system.observe.metrics import Idle
from system.observe.totals import Totals
from system.rollout.reward import REASONS

OF_THE_POOL = (
    *("prompt_tokens", "cached_tokens", "resumed", "retried", "turn_waits", "turn_wait_s"),
    *("entropy_estimates", "entropy_error_nats"),
)
OF_A_TOOL = ("retries", "joins", "cache_hits", "breaker_opened", "breaker_rejected")
OF_A_JUDGE = (
    *("requests", "answers", "retries", "refused", "asked_again", "cache_hits", "joins", "answer_s"),
    *("prompt_tokens", "completion_tokens", "cost"),
)
OF_AN_ENVIRONMENT = (
    *("worlds", "steps", "rebuilt", "timeouts", "retries", "left_running", "close_failed"),
    *("forks_native", "forks_refused", "replay_diverged"),
)
OF_AGENTS = (
    *("episodes", "turns", "frozen_turns", "rewrites", "retries", "failed", "late", "diverged"),
    *("engine_lost", "given_up", "malformed", "tool_choice"),
)
SCORES = EvalScores(
    samples=2, pass_at={2: 1.0}, majority=1.0, productivity=1.0, reward_low=0.0, reward_high=1.0
)
OF_A_SET = EvalResult(SCORES, kinds={"a.b": SCORES})
FULL = Totals(
    evals=dict.fromkeys(("before", "after"), replace(OF_A_SET, sets={"aime": OF_A_SET}).to_dict()),
    staleness=Counter({1: 2}),
    pools={"solved": 0.5},
    guided={"trees": 2, "with_success": 1, "actions": 3},
    dropped={"worker lost. Again": {"trees": 1, "leaves": 8}},
    causes={"tool": {"count": 1, "first": "x"}},
    idle=Idle({"learner": {"no batch": 1.0}}, {"learner": 2.0}),
    engine=dict.fromkeys(
        (*(f"route/{why}" for why in Routed), *(f"server/{name}" for name in SPEED_COUNTERS), *OF_THE_POOL),
        1.0,
    ),
    tools={f"my.tool/{what}": 1.0 for what in OF_A_TOOL},
    rewards={f"judge/{what}": 1.0 for what in OF_A_JUDGE}
    | {"close_wait_s": 1.0}
    | {f"{at}failed/{reason}": 1.0 for reason in REASONS for at in ("", "eval/aime/")}
    | {"eval/aime/close_wait_s": 1.0, "eval/aime/judge/requests": 1.0},
    environment={f"train/{what}": 1.0 for what in OF_AN_ENVIRONMENT},
    agent=dict.fromkeys(OF_AGENTS, 1.0),
    chat={"turns": 2.0, "drift": 1.0},
    mismatch=dict.fromkeys(("steps", "kl", "fresh", "engine_kl", "engine_logprob_diff_max"), 1.0),
    weights=dict.fromkeys(("pushes", "bytes", "stage_s", "pause_s", "pause_s_max", "lora_kept"), 1.0),
    model={"lora_kept": 1.0},
    evaluation=dict.fromkeys(("count", "seconds", "waited_s"), 1.0),
    memory={"pss_mb_max": 1.0},
    chosen={"step": 1, "by": "accuracy", "value": 1.0},
)
SUMMARY = {**FULL.summary(), "wall_s": 1.0, "ended": True, "seed": 0, "config": {"run": {"seed": 0}}}


def test_all_that_a_summary_can_hold_is_explained_and_nothing_else() -> None:
    assert unexplained(SUMMARY) == []
    assert superfluous(SUMMARY) == []
    assert len(explained()) == len(set(explained())) > 40


@pytest.mark.parametrize(
    ("more", "path"),
    [
        ({"novelty": 1}, ("novelty",)),
        ({"trees": {"closed": 1}}, ("trees", "closed")),
        ({"tokens": {"lost": 1}}, ("tokens", "lost")),
        ({"eval": {"before": 0.5}}, ("eval", "before")),
        ({"novelties": {}}, ("novelties", "")),
    ],
)
def test_a_key_without_a_row_is_found(more: dict[str, object], path: tuple[str, ...]) -> None:
    assert unexplained(SUMMARY | more) == [path]
