"""What a run has counted since its first step; it survives a resume and becomes ``summary.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from system.observe.metrics import Idle, engine_totals, reward_totals
from system.observe.rundir import RunDir


@dataclass
class Totals:
    """Counts over the whole run, resumes included."""

    trees: int = 0  # closed
    leaves: int = 0
    forks: int = 0
    forks_unasked: int = 0  # of these, those at results at which the policy asked for none
    top_ups: int = 0
    tool_calls: int = 0
    generated: int = 0  # MODEL tokens of closed trees
    trained: int = 0  # MODEL tokens that the learner saw with a scored leaf below, each once per tree
    unique_trained: int = 0  # tokens of any kind in trained trees, shared prefixes once
    flat_trained: int = 0  # the same once per leaf, as flattened paths would cost
    version: int = 0
    staleness: Counter[int] = field(default_factory=Counter)  # trained trees by versions of lag
    pools: dict[str, float] = field(default_factory=dict)  # of a curriculum, now: share of the questions
    guided: dict[str, float] = field(default_factory=dict)  # trees, those with a right answer, actions told
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)  # reason -> {"trees", "leaves"}
    causes: dict[str, dict[str, Any]] = field(default_factory=dict)  # kind -> {"count", "first": its text}
    beginning: dict[str, list[float]] = field(default_factory=dict)  # metric -> its first values, for alarms
    idle: Idle = field(default_factory=Idle)  # since training began
    engine: dict[str, float] = field(default_factory=dict)  # requests by routing decision, cache hits, …
    tools: dict[str, float] = field(default_factory=dict)  # "<tool>/<what>": retries, joined calls, …
    rewards: dict[str, float] = field(default_factory=dict)  # what rewards counted, by "<reward>/<what>"
    environment: dict[str, float] = field(default_factory=dict)  # "<train | eval>/<what>": steps, forks, …
    agent: dict[str, float] = field(default_factory=dict)  # episodes, turns, rewrites, retries, failed, …
    chat: dict[str, float] = field(default_factory=dict)  # turns looked at, and those that drift
    evals: dict[str, dict[str, Any]] = field(default_factory=dict)  # "before" | "after" -> scores
    evaluation: dict[str, float] = field(default_factory=dict)  # count, seconds, waited_s of all
    mismatch: dict[str, float] = field(default_factory=dict)  # see ``_mismatch``
    weights: dict[str, float] = field(default_factory=dict)  # of pushes: see ``Recorder.weights_pushed``
    model: dict[str, float] = field(default_factory=dict)  # of the model that is left: lora_kept
    chosen: dict[str, Any] = field(default_factory=dict)  # of the model by ``eval.choose``: step, by, value
    memory: dict[str, float] = field(default_factory=dict)  # of all processes of this machine: pss_mb_max
    wall_s: float = 0.0  # of earlier sessions

    def summary(self) -> dict[str, Any]:
        """The part of ``summary.json`` that these totals are."""
        lags = sum(self.staleness.values())
        return {
            "eval": dict(self.evals),
            "trees": self.trees,
            "leaves": self.leaves,
            "forks": self.forks,
            "forks_unasked": self.forks_unasked,
            "top_ups": self.top_ups,
            "tool_calls": self.tool_calls,
            "tokens": {
                "generated": self.generated,
                "trained": self.trained,
                "unique_trained": self.unique_trained,
                "flat_trained": self.flat_trained,
            },
            "staleness": {
                "max": max(self.staleness, default=0),
                "mean": sum(lag * n for lag, n in self.staleness.items()) / lags if lags else 0.0,
            },
            "versions": self.version,
            "pools": dict(self.pools),
            "guided": dict(self.guided),
            "engine": engine_totals(self.engine),
            "tools": dict(sorted(self.tools.items())),
            "rewards": dict(sorted(reward_totals(self.rewards).items())),
            "environment": dict(sorted(self.environment.items())),
            "agent": dict(sorted(self.agent.items())),
            "chat": dict(sorted(self.chat.items())),
            "evaluation": dict(self.evaluation),
            "mismatch": _mismatch(self.mismatch),
            "weights": dict(self.weights),
            "model": dict(self.model),
            **({"chosen": dict(self.chosen)} if self.chosen else {}),
            **({"memory": dict(self.memory)} if self.memory else {}),
            "dropped": {reason: dict(entry) for reason, entry in sorted(self.dropped.items())},
            "causes": {kind: dict(entry) for kind, entry in sorted(self.causes.items())},
            "idle": self.idle.shares(),
            "idle_s": {actor: dict(causes) for actor, causes in sorted(self.idle.seconds.items())},
        }

    def state(self) -> dict[str, Any]:
        """As JSON-able values."""
        staleness = {str(lag): n for lag, n in self.staleness.items()}
        return {**vars(self), "staleness": staleness, "idle": asdict(self.idle)}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Totals:
        """From what :meth:`state` returned, perhaps by an earlier version that counted fewer things."""
        values = dict(state)
        idle = values.pop("idle", {})
        if idle.keys() == {"seconds", "spans"}:  # an earlier version's counted the warm start, too
            values["idle"] = Idle(**idle)
        values["staleness"] = Counter({int(lag): int(n) for lag, n in state["staleness"].items()})
        return cls(**values)


def report(summary: Mapping[str, Any], run_dir: RunDir) -> list[str]:
    """What a run says last, in lines for the console; ``summary`` is what ``summary.json`` holds."""
    tokens = summary["tokens"]
    lines = [
        f"held-out questions{of}, {which} training: accuracy {scores['accuracy']:.3f}, "
        f"reward {scores['reward']:.3f}, {scores['tool_calls']:.2f} tool calls per answer"
        for which, one in summary["eval"].items()
        for of, scores in [("", one), *((f" of {name}", it) for name, it in one.get("sets", {}).items())]
        if scores["questions"]
    ]
    memory = f", at most {summary['memory']['pss_mb_max']:.0f} MB" if "memory" in summary else ""
    sharing = tokens["flat_trained"] / max(tokens["unique_trained"], 1)
    return [
        *lines,
        f"{summary['trees']} trees, {summary['leaves']} leaves, {summary['forks']} forks, "
        f"{tokens['generated']} tokens generated, {tokens['trained']} trained on, "
        f"{sharing:.2f} flat tokens per packed one, {summary['wall_s']:.0f} s{memory}",
        f"see {run_dir.summary_path}, {run_dir.curves}/overview.png, and: espalier tree {run_dir.root}",
    ]


def add(totals: dict[str, float], /, **values: float) -> None:
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value


def highest(totals: dict[str, float], /, **values: float) -> None:
    for name, value in values.items():
        totals[name] = max(totals.get(name, 0.0), value)


def _mismatch(totals: Mapping[str, float]) -> dict[str, float]:
    """Engines against learner, as means per token of a step; empty before the first step.

    KL(μ‖π) in nats, over all trained tokens (``kl``, staleness included) and over those sampled from the very
    weights that were trained (``engine_kl``), where only numerics differ.
    """
    if not totals:
        return {}
    return {
        "kl": totals["kl"] / totals["steps"],
        "fresh_share": totals["fresh"] / totals["steps"],
        "engine_kl": totals["engine_kl"] / totals["fresh"] if totals["fresh"] else 0.0,
        "engine_logprob_diff_max": totals["engine_logprob_diff_max"],
    }
