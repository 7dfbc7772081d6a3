"""What each page shows, as JSON-able values: pure functions of what a reader has read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from system.observe.terminal import shown, visible
from system.watch.index import TreeRow
from system.watch.query import TreeFilter, thinned
from system.watch.reader import RunReader
from system.watch.records import Records
from system.watch.status import RunState

POINTS = 90  # of a curve: more would be no more than its noise
BARS = 160  # of a row of the timeline
PAGE = 100  # rows of the list of trees

_IDLE = re.compile(r"time/idle_share/([^/]+)/(.+)")
RECENT = 10  # records that a figure is the mean of: one of them may tell of no tree that closed

_FIGURES = {
    "reward": "rollout/reward",
    "accuracy": "rollout/accuracy",
    "staleness": "flow/staleness",
    "queue": "flow/queue_depth",
    "growing": "rollout/growing",
    "generated_per_s": "time/generated_per_s",
    "trained_per_s": "time/trained_per_s",
    "goodput": "flow/goodput",
    "entropy": "rollout/entropy",
    "tree_s": "rollout/tree_s",
    "cache_hit_share": "engine/cache_hit_share",
}


def overview(run: RunReader, state: RunState) -> dict[str, Any]:
    """The page *Run*, curves aside."""
    records, config = run.records, run.config
    steps = config.run.steps if config and not run.run_dir.supervised else None
    phases = [event for event in run.events if "phase" in event]
    notes = [event for event in run.events if "note" in event]
    span = records.span
    return {
        "name": run.name,
        "state": asdict(state),
        "resume": visible(run.run_dir.resume_command),
        "phase": visible(str(phases[-1]["phase"])) if phases else "",
        "step": records.step,
        "steps": steps,
        "eta_s": _eta(records, steps) if steps and state.state == "running" else None,
        "records": len(records),
        "span": span,
        "figures": {name: records.recent(key, RECENT) for name, key in _FIGURES.items()},
        "wall_s": records.latest.get("time/wall_s"),
        "idle": idle_now(records),
        "evals": [
            {"step": step, "which": visible(which), "accuracy": found.get("accuracy")}
            for step, _, which, found in records.evaluations()
        ],
        "notes": [{"time": one.get("time"), "text": shown(str(one["note"]))} for one in notes][-50:],
        "causes": _causes(run.summary()),
        "trees": {"known": len(run.index.rows), "files_left": run.index.waiting},
        "problems": _problems(run),
        "settings": _settings(run),
    }


def _eta(records: Records, steps: int) -> float | None:
    """Seconds to the last step at the pace of the last twenty; None while there is no pace."""
    step, when, _ = records.series("time/window_s")
    if step.size < 2 or (last := step[-20:])[-1] == last[0]:
        return None
    pace = (when[-20:][-1] - when[-20:][0]) / (last[-1] - last[0])
    return float(max(0, steps - int(step[-1])) * pace)


def idle_now(records: Records) -> dict[str, dict[str, float]]:
    """Actor -> cause -> the share of its time that it waited for it, in the last record that says so."""
    found: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for key, value in sorted(records.latest.items()):
        if match := _IDLE.fullmatch(key):
            found[visible(match[1])][visible(match[2])] = value
    return dict(found)


def _causes(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What went wrong by kind, how often, and the first of it: known at the end of a run."""
    causes = summary.get("causes")
    if not isinstance(causes, dict):
        return []
    return [
        {"kind": shown(str(kind)), "count": one.get("count"), "first": shown(str(one.get("first", "")))}
        for kind, one in causes.items()
        if isinstance(one, dict)
    ]


def _problems(run: RunReader) -> list[str]:
    found = [text for text in (run.trouble, run.problem) if text]
    if run.bad_lines:
        found.append(f"{run.bad_lines} lines of its files are not JSON and are left out")
    found += [f"{path.name}: {text}" for path, text in list(run.index.problems.items())]
    return found


def _settings(run: RunReader) -> dict[str, str]:
    if (config := run.config) is None:
        return {}
    return {
        "task": config.task.name,
        "model": config.model.path or f"{config.model.family}, made for this run",
        "branching": config.branching.name,
        "credit": config.learn.credit.name,
        "leaves": f"{config.rollout.leaves} from {config.rollout.roots} roots",
        "batch": f"{config.flow.batch_leaves} leaves",
        "staleness": f"at most {config.flow.staleness}",
        "seed": str(config.run.seed),
    }


def curves(records: Records, keys: Sequence[str], most: int = POINTS) -> dict[str, Any]:
    """key -> [(step, mean, lowest, highest), …] of stretches of records."""
    found: dict[str, Any] = {}
    for key in keys:
        step, _, value = records.series(key)
        found[key] = thinned(step, value, most)
    return found


def tree_list(run: RunReader, wanted: TreeFilter, offset: int = 0) -> dict[str, Any]:
    """One page of the list of trees."""
    rows = run.index.rows
    chosen = wanted.chosen(rows.values())
    return {
        "known": len(rows),
        "files_left": run.index.waiting,
        "matched": len(chosen),
        "offset": offset,
        "rows": [_listed(row) for row in chosen[offset : offset + PAGE]],
        "tasks": sorted({row.task for row in rows.values()}),
        "tools": sorted({tool for row in rows.values() for tool in row.tools}),
        "began_s": min((row.started_s for row in rows.values()), default=None),
    }


def _listed(row: TreeRow) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if name not in ("file", "row")}


def timeline(run: RunReader, bars: int = BARS) -> dict[str, Any]:
    """Who waited for what, over the time of the run: shares by cause in stretches of equal length."""
    records = run.records
    if (span := records.span) is None:
        return {"actors": [], "phases": [], "trees": [], "span": None}
    began, ended = span
    # A trained step's record tells of the time since the one before.
    _, first_when, first_window = records.series("time/window_s")
    if first_when.size:
        began = min(began, float(first_when[0] - first_window[0]))
    phases = [
        (float(event["time"]), visible(str(event["phase"])))
        for event in run.events
        if "phase" in event and isinstance(event.get("time"), int | float)
    ]
    began = min([began, *(when for when, _ in phases)])
    edges = np.linspace(began, max(ended, began + 1e-3), bars + 1)
    actors: defaultdict[str, dict[str, list[float | None]]] = defaultdict(dict)
    for key in records.names():
        if match := _IDLE.fullmatch(key):
            _, when, share = records.series(key)
            _, whole, window = records.series("time/window_s")
            length = np.interp(when, whole, window) if whole.size else np.zeros(when.size)
            actors[visible(match[1])][visible(match[2])] = spread_over(when, length, share, edges)
    trees = sorted(run.index.rows.values(), key=lambda row: row.started_s)
    return {
        "span": [began, float(edges[-1])],
        "actors": [{"name": name, "causes": causes} for name, causes in sorted(actors.items())],
        "phases": [{"time": when, "phase": name} for when, name in phases],
        "trees": [[row.number, row.started_s, row.closed_s] for row in trees[:: max(1, len(trees) // 400)]],
    }


def spread_over(
    when: np.ndarray[Any, Any], length: np.ndarray[Any, Any], share: np.ndarray[Any, Any], edges: Any
) -> list[float | None]:
    """[len(edges) - 1] the mean share in each stretch between ``edges``, weighted by time; None where no
    record tells.  A record says ``share`` of the ``length`` seconds before ``when``.
    """
    low, high = edges[:-1], edges[1:]
    told, waited = np.zeros(low.size), np.zeros(low.size)
    for end, long, value in zip(when.tolist(), length.tolist(), share.tolist(), strict=True):
        first, last = np.searchsorted(high, end - long, "right"), np.searchsorted(low, end, "left")
        part = slice(max(0, int(first)), int(last))
        overlap = np.clip(np.minimum(high[part], end) - np.maximum(low[part], end - long), 0, None)
        told[part] += overlap
        waited[part] += overlap * value
    return [w / t if t > 0 else None for w, t in zip(waited.tolist(), told.tolist(), strict=True)]


def evaluation(run: RunReader) -> dict[str, Any]:
    """Accuracy over steps, by set and kind of question.

    A set is a name and curves, each point with its interval over the questions; where none is known, ``low``
    and ``high`` are None.
    """
    sets: defaultdict[str, defaultdict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for step, when, which, found in run.records.evaluations():
        for key, value in found.items():
            kind, _, name = key.rpartition("/")
            if name != "accuracy":
                continue
            at = f"{kind}/" if kind else ""
            point = {"step": step, "time": when, "which": visible(which), "accuracy": value}
            point |= {"low": found.get(f"{at}accuracy_low"), "high": found.get(f"{at}accuracy_high")}
            point |= {one: found.get(f"{at}{one}") for one in ("questions", "reward", "tool_calls")}
            of_set = "held-out questions"
            if kind.startswith("set/"):
                of_set, _, kind = kind.removeprefix("set/").partition("/")
            sets[visible(of_set)][visible(kind) or "all"].append(point)
    return {"sets": [{"name": name, "curves": dict(curves)} for name, curves in sets.items()]}
