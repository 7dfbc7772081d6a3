"""What each page shows, as JSON-able values: pure functions of what a reader has read."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from system.config import to_dict
from system.observe.terminal import shown, visible
from system.redact import redact
from system.watch.index import TreeRow
from system.watch.query import TreeFilter, thinned
from system.watch.reader import RunReader
from system.watch.records import Records, number
from system.watch.status import RunState

POINTS = 90  # of a curve: more would be no more than its noise
BARS = 160  # of a row of the timeline
PHASES = 400  # of the timeline, at most
PAGE = 100  # rows of the list of trees
LONG = 60  # characters of a setting

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
    phases, notes = run.phases, run.notes
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
        "notes": [{"time": number(one.get("time")), "text": shown(str(one["note"]))} for one in notes][-50:],
        "causes": _causes(run.summary()),
        "trees": {"known": len(run.index.rows), "files_left": run.index.waiting},
        "problems": _problems(run),
        "settings": _some_settings(run),
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
        {
            "kind": shown(str(kind)),
            "count": number(one.get("count")),
            "first": shown(str(one.get("first", ""))),
        }
        for kind, one in causes.items()
        if isinstance(one, dict)
    ]


def _problems(run: RunReader) -> list[str]:
    found = [text for text in (run.trouble, run.problem) if text]
    if run.bad_lines:
        found.append(f"{run.bad_lines} lines of its files are not JSON and are left out")
    found += [f"{path.name}: {text}" for path, text in list(run.index.problems.items())]
    return found


def settings(run: RunReader) -> dict[str, str]:
    """Every setting but those that name the run, as text, cut where it is long; secrets are left out."""
    if run.config is None:
        return {}
    whole = redact(to_dict(run.config))
    given = {f"{section}.{key}": value for section, keys in whole.items() for key, value in keys.items()}
    told = {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}
    return {key: shown(text)[:LONG] for key, text in told.items() if key not in ("run.name", "run.dir")}


def _some_settings(run: RunReader) -> dict[str, str]:
    if (config := run.config) is None:
        return {}
    return {
        "task": config.task.name,
        "model": config.model.path or f"{config.model.family}, made for this run",
        "branching": config.branching.name,
        "credit": config.learn.credit.name,
        "leaves": f"{config.rollout.leaves} from {config.rollout.roots} roots",
        "batch": f"{config.flow.batch_leaves} leaves",
        "staleness": f"η = {config.flow.staleness}",
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
    """Who waited for what, over the time of the run: shares by cause in stretches of equal length.

    Times are those of the driver's clock; a tree's are of the machine where it grew.  ``outside``: trees that
    lie before or after all records.
    """
    records = run.records
    if (span := records.span) is None:
        return {"actors": [], "phases": [], "trees": [], "span": None, "outside": 0}
    began, ended = span
    # A trained step's record tells of the time since the one before.
    _, whole, window = records.series("time/window_s")
    if whole.size:
        began = min(began, float(whole[0] - window[0]))
    phases = [
        (when, visible(str(event["phase"])))
        for event in run.phases
        if (when := number(event.get("time"))) is not None
    ]
    began, ended = min([began, *(t for t, _ in phases)]), max([ended, *(t for t, _ in phases)])
    edges = np.linspace(began, max(ended, began + 1e-3), bars + 1)
    actors: defaultdict[str, dict[str, list[float | None]]] = defaultdict(dict)
    for key in records.names():
        if match := _IDLE.fullmatch(key):
            _, when, share = records.series(key)
            length = np.interp(when, whole, window) if whole.size else np.zeros(when.size)
            actors[visible(match[1])][visible(match[2])] = spread_over(when, length, share, edges)
    rows = sorted(run.index.rows.values(), key=lambda row: row.started_s)
    trees = [row for row in rows if row.closed_s >= began and row.started_s <= ended]
    return {
        "span": [began, float(edges[-1])],
        "actors": [{"name": name, "causes": causes} for name, causes in sorted(actors.items())],
        "phases": [
            {"time": when, "phase": name} for when, name in merged(phases, ended, (ended - began) / PHASES)
        ],
        "trees": [[row.number, row.started_s, row.closed_s] for row in trees[:: max(1, len(trees) // 400)]],
        "outside": len(rows) - len(trees),
    }


def merged(phases: Sequence[tuple[float, str]], ended: float, least: float) -> list[tuple[float, str]]:
    """(begin, name) of phases, each up to the next one's begin or ``ended``; neighbours that take less than
    ``least`` seconds become one that names them all, until it takes as long.
    """
    found: list[tuple[float, str]] = []
    names: dict[str, None] = {}  # of those that are being put together, in order
    begin = 0.0
    for i, (when, name) in enumerate(phases):
        begin = when if not names else begin
        names[name] = None
        until = phases[i + 1][0] if i + 1 < len(phases) else ended
        if until - begin >= least or i + 1 == len(phases):
            found.append((begin, ", ".join(names)))
            names = {}
    return found


def spread_over(
    when: np.ndarray[Any, Any], length: np.ndarray[Any, Any], share: np.ndarray[Any, Any], edges: Any
) -> list[float | None]:
    """[len(edges) - 1] the mean share in each stretch between ``edges``, weighted by time; None where no
    record tells.  A record says ``share`` of the ``length`` seconds before ``when``.

    In time of about n log n for n records, by what lies below each edge.
    """
    known = np.isfinite(share) & np.isfinite(length)
    when, length, share = when[known], length[known], share[known]
    end, at = when - edges[0], edges - edges[0]  # small numbers: the sums lose no digits that are seen
    begin = end - length
    told = np.diff(_below(at, begin, np.ones(begin.size)) - _below(at, end, np.ones(end.size)))
    waited = np.diff(_below(at, begin, share) - _below(at, end, share))
    least = 1e-6 * np.diff(at)  # less is what the sums lose
    return [
        max(0.0, w) / t if t > some else None
        for w, t, some in zip(waited.tolist(), told.tolist(), least.tolist(), strict=True)
    ]


def _below(edges: Any, since: np.ndarray[Any, Any], weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[e] the sum of weight·(edge - since) over all ``since`` [n] below each edge."""
    order = np.argsort(since)
    count = np.searchsorted(since[order], edges, "left")
    weights = np.concatenate([[0.0], np.cumsum(weight[order])])
    moments = np.concatenate([[0.0], np.cumsum((weight * since)[order])])
    return edges * weights[count] - moments[count]


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
