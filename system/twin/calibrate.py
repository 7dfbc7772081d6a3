"""From the records of a run to the twin's models: what a run directory tells about its parts.

Everything is fitted to totals of ``metrics.jsonl`` and to the trees kept; nothing is tuned by hand.  Times
are those of the machine and the load that the run had.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from system.config import Config, ConfigError
from system.models.shape import ModelShape
from system.observe.rundir import RunDir
from system.tools.http_tools import SearchTool
from system.tree.record import Kind, Outcome, ToolCall, Tree
from system.tree.store import read_trees
from system.twin.agent import MOST_RECORDED, Recorded, RecordedAgent, RecordedTree
from system.twin.dist import Constant, Empirical
from system.twin.records import SKIP, Records, idle_s, mean_over_engines, steps_of, total
from system.twin.speeds import LinearEngine, LinearLearner
from system.twin.tools import ToolModel
from system.twin.world import Models, simulate

_TAGS = 2  # tokens that the twin's syntax puts around a tool's answer
NO_TOOL = "none"  # calls that name no tool: answered at once


@dataclass(frozen=True)
class Calibration:
    """Models of one run's parts, under the configuration that it ran with."""

    config: Config
    models: Models
    engine: LinearEngine  # of the models, with their types
    learner: LinearLearner
    steps: int  # training steps it was fitted to
    tree_s: float  # mean duration of a tree in the run

    @classmethod
    def from_run(cls, run: RunDir) -> Calibration:
        """Fit to ``run``.  Raises ConfigError when it holds too little."""
        config = run.config()
        records = steps_of(run)
        trees = list(read_trees(run.trees))
        if len(records) < 8 or len(trees) < 8:
            raise ConfigError(
                f"{run.root}: {len(records)} training steps after the first {SKIP} and {len(trees)} trees; "
                "a calibration needs at least 8 of each"
            )
        agent = fit_agent(trees, config.branching.probe_tokens)
        idle = idle_s(records)  # of it the learner's while it publishes, and the engines' as they take over
        publishing = idle.get("learner", {}).get("publishing weights", 0.0) / len(records)
        update = mean_over_engines(idle, "updating", "paused") / len(records)
        engine, learner = fit_engine(records), fit_learner(records)
        models = Models(
            engine=engine,
            learner=learner,
            agent=agent,
            tools=fit_tools(trees, agent.tools),
            publish_s=max(0.0, publishing - update),
            update_s=update,
            vocab=_vocab(run),
            mixed=True,
        )
        tree_s = float(np.mean([tree.closed_s - tree.started_s for tree in trees]))
        return cls(config, models, engine, learner, len(records), tree_s)

    def with_host(self, rounds: int = 6) -> Calibration:
        """Fit the one time that no counter shows, ``request_s``: a request's way through host and network.

        By secants, until the twin's trees take as long as the run's under the run's own configuration.
        """
        low, high = 0.0, 0.02
        steps = min(self.steps, 40)

        def error(request_s: float) -> float:
            models = replace(self.models, request_s=request_s)
            return simulate(self.config, models, steps=steps, skip=SKIP).tree_s["mean"] - self.tree_s

        below, above = error(low), error(high)
        if below >= 0:
            return self
        best = high
        for _ in range(rounds):
            if abs(above - below) < 1e-9:
                break
            best = max(0.0, low - below * (high - low) / (above - below))
            low, below, high, above = high, above, best, error(best)
            if abs(above) < 0.01 * self.tree_s:
                break
        return replace(self, models=replace(self.models, request_s=best))


@dataclass(frozen=True, slots=True)
class Drift:
    """How many times as long the same work took in another run: another machine, or other load on it."""

    engine: float
    learner: float

    @classmethod
    def between(cls, calibration: Calibration, run: RunDir) -> Drift:
        """From what ``run`` counted and what the calibrated speeds say such counts take; 1 where unknown."""
        records = steps_of(run)
        busy, *counts = _engine_sums(records, "busy_s", "steps", "row_steps", "prefill_tokens")
        expected = calibration.engine.busy_s(*counts)
        learner = fit_learner(records)
        tokens = total(records, "train/unique_tokens") / len(records)
        return cls(
            busy / expected if expected else 1.0,
            learner.train_s(tokens) / calibration.learner.train_s(tokens),
        )


SAME_SPEED = Drift(1.0, 1.0)


def fit_engine(records: Records) -> LinearEngine:
    """A step's seconds = fixed + per row + per prefilled token, by least squares over every step of the run.

    The normal equations come from the engine's own sums (``system.engine.embedded.scheduler.Counters``).
    """

    steps, rows, prefill, busy = _engine_sums(records, "steps", "row_steps", "prefill_tokens", "busy_s")
    moment = {name: total(records, f"engine/server/moment_{name}") for name in ("rr", "rp", "pp", "rt", "pt")}
    gram = np.array(
        [[steps, rows, prefill], [rows, moment["rr"], moment["rp"]], [prefill, moment["rp"], moment["pp"]]]
    )
    if not gram[1, 1]:
        raise ConfigError(
            "the run's metrics hold no sums over the engine's steps (engine/server/moment_…): only runs with "
            "the embedded engine of this version can be calibrated on"
        )
    fixed, row, token = nonnegative(gram, np.array([busy, moment["rt"], moment["pt"]]))
    return LinearEngine(step_fixed_s=fixed, per_sequence_s=row, per_prefill_s=token)


def _engine_sums(records: Records, *counters: str) -> list[float]:
    return [total(records, f"engine/server/{name}") for name in counters]


def fit_learner(records: Records) -> LinearLearner:
    """seconds = fixed + per token; what else a step takes (hand-over, records) counts as fixed."""
    seconds = [float(one["train/seconds"]) for one in records]
    line = fit_line(seconds, [float(one["train/unique_tokens"]) for one in records])
    busy = total(records, "time/window_s") - sum(idle_s(records).get("learner", {}).values())
    rest = max(0.0, (busy - sum(seconds)) / len(records))
    return LinearLearner(line.fixed_s + rest, line.per_token_s)


def fit_line(seconds: Sequence[float], tokens: Sequence[float]) -> LinearLearner:
    """seconds = fixed + per token, neither negative, by least squares over training steps."""
    table = np.column_stack([np.ones(len(tokens)), np.asarray(tokens, np.float64)])
    fixed, per_token = nonnegative(table.T @ table, table.T @ np.asarray(seconds, np.float64))
    return LinearLearner(fixed, per_token)


def fit_agent(trees: Sequence[Tree], window: int) -> RecordedAgent:
    """The trees' segments and what followed them (of very many trees the newest).

    ``window``: tokens that the entropy probe looks at.
    """
    tools = sorted({call.tool or NO_TOOL for tree in trees for call in tree.calls}) or [NO_TOOL]
    segments: list[Recorded] = []
    known: list[RecordedTree] = []
    for tree in reversed(trees):
        if len(segments) + tree.n_nodes > MOST_RECORDED:
            break
        known.append(_recorded(tree, window, tools, segments))
    return RecordedAgent(known, segments, tools, fit_variety(known, segments))


def fit_variety(trees: Sequence[RecordedTree], segments: Sequence[Recorded]) -> float:
    """How various a tree's branches are, by the method of moments on what segments call.

    Of a Dirichlet process with concentration v, two draws are one value with probability 1 / (1 + v), else
    independent.  So if two segments of a tree agree (both call the same tool, or both end) with probability
    s, and two of the run after as many calls with probability g, then v = (1 - s) / (s - g).
    """
    same = pairs = by_chance = 0.0
    for calls in range(max(len(tree.levels) for tree in trees)):
        groups = [tree.levels[calls] for tree in trees if len(tree.levels) > calls]
        agree, count = np.sum([_agreeing(group, segments) for group in groups], axis=0)
        overall = _agreeing([number for group in groups for number in group], segments)
        same, pairs = same + agree, pairs + count
        by_chance += count * overall[0] / max(overall[1], 1)
    return float((pairs - same) / (same - by_chance)) if same > by_chance else math.inf


def _agreeing(numbers: Sequence[int], segments: Sequence[Recorded]) -> tuple[int, int]:
    """(Pairs that call the same or both end, all pairs.)"""
    counts = Counter(segments[number].tool for number in numbers).values()
    return sum(n * (n - 1) for n in counts), len(numbers) * (len(numbers) - 1)


def _recorded(tree: Tree, window: int, tools: Sequence[str], segments: list[Recorded]) -> RecordedTree:
    """``tree`` without its words.  Appends its segments to ``segments``, which numbers them."""
    called = {int(tree.parent[call.node]): call for call in tree.calls}
    asked: dict[str, int] = {}  # number of the first segment that asked it
    ended = dict(zip(tree.leaf.tolist(), range(tree.n_leaves), strict=True))
    depth, above = np.zeros(tree.n_nodes, np.int64), np.zeros(tree.n_nodes, np.int64)
    for node in range(1, tree.n_nodes):  # calls on the path, and the segment that a node comes after
        parent = int(tree.parent[node])
        depth[node] = depth[parent] + (tree.kind[node] == Kind.TOOL)
        above[node] = parent if tree.kind[parent] == Kind.MODEL else above[parent]
    followers: defaultdict[int, list[int]] = defaultdict(list)  # of a segment, their numbers
    levels: list[list[int]] = [[] for _ in range(int(depth.max()) + 1)]
    for node in range(tree.n_nodes - 1, 0, -1):  # children come after their parents
        if tree.kind[node] != Kind.MODEL:
            continue
        begin, end = int(tree.start[node]), int(tree.end[node])
        tool, query, leaf = -1, 0, ended.get(node)
        if (call := called.get(node)) is not None:
            tool, query = tools.index(call.tool or NO_TOOL), asked.setdefault(_asked(call), len(segments))
        elif leaf is not None and tree.outcome[leaf] == Outcome.CALL_LIMIT:
            tool = 0  # it asked for one more call; which tool is no matter
        first = tree.entropy[begin : min(end, begin + window)]
        finite = first[np.isfinite(first)]
        entropy = float(finite.mean()) if finite.size else 0.0
        right = leaf is not None and tree.correct[leaf] == 1
        levels[depth[node]].append(len(segments))
        followers[int(above[node])].append(len(segments))
        segments.append(Recorded(end - begin, tool, query, right, entropy, followers[node]))
    return RecordedTree(int(tree.start[1]) if tree.n_nodes > 1 else tree.n_tokens, levels)


def _asked(call: ToolCall) -> str:
    return json.dumps([call.tool, call.arguments], sort_keys=True)


def fit_tools(trees: Sequence[Tree], names: Sequence[str]) -> dict[str, ToolModel]:
    """Latencies and lengths of answers as they were measured, by tool, a tree's repeated calls left out.

    The twin's own tool service answers repeated calls of a prompt together or from its cache.  What the run's
    cache knew from other prompts is an answer in no time, as often as the run had one.

    What tells that equal calls may share an answer is the tool's spec, of which trees know nothing: of our
    own tools search is such a one; a tool of the user's is taken not to be.
    """
    models: dict[str, ToolModel] = {}
    first = [(t, call) for t in trees for call in {_asked(c): c for c in reversed(t.calls)}.values()]
    for name in names:
        calls = [(tree, call) for tree, call in first if (call.tool or NO_TOOL) == name]
        if not calls:
            models[name] = ToolModel(Constant(0.0), Constant(1.0))
            continue
        sizes = [max(1.0, float(tree.end[call.node] - tree.start[call.node]) - _TAGS) for tree, call in calls]
        latency = Empirical([call.latency_s for _, call in calls])
        models[name] = ToolModel(latency, Empirical(sizes), pure=name == SearchTool.spec.name)
    return models


def nonnegative(gram: NDArray[np.float64], right: NDArray[np.float64]) -> list[float]:
    """Least squares with coefficients ≥ 0 from its normal equations, ``gram`` · x = ``right``.

    The variable with the most negative coefficient is left out until none is negative.
    """
    kept = list(range(right.size))
    result = [0.0] * right.size
    while kept:
        scale = np.sqrt(np.maximum(np.diag(gram)[kept], 1e-300))
        scaled = gram[np.ix_(kept, kept)] / np.outer(scale, scale)
        solution = np.linalg.lstsq(scaled, right[kept] / scale, rcond=None)[0] / scale
        if solution.min() >= 0:
            for place, value in zip(kept, solution, strict=True):
                result[place] = float(value)
            break
        kept.pop(int(solution.argmin()))
    return result


def _vocab(run: RunDir) -> int:
    """Of the model that the run started from."""
    config = run.config()
    places = (Path(config.model.path), run.model) if config.model.path else (run.start, run.model)
    for place in places:
        if (place / "config.json").is_file():
            return ModelShape.from_directory(place).vocab
    raise ConfigError(f"{run.root}: no config.json of the model in {' or '.join(map(str, places))}")
