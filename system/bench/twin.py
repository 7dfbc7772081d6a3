"""``espalier bench twin RUN OTHER…``: calibrate the twin on one run, predict others, set both side by side.

With ``engine.json`` or ``learner.json`` of ``espalier bench`` among the arguments, that part's speed is what
the benchmark measured, and the first run is predicted, too.

What a prediction may know of the other run is what one would know before starting it: its configuration, and
how long its tools take.  Engine, learner, agent and host are the first run's.  The first run is shown, too:
there the figures are a fit, not a prediction.

On a machine that others use, the same work takes longer at one time than at another, which no model of ours
foresees.  So a second column shows the prediction at the other run's speed: engine and learner slowed by what
that run's own counters say.  Where the two columns differ, it was the machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from system.bench.report import Report
from system.config import ConfigError
from system.observe.rundir import RunDir
from system.tree.store import read_trees
from system.twin.calibrate import SAME_SPEED, Calibration, Drift, fit_engine, fit_line, fit_tools
from system.twin.records import SKIP, Figures, mean_over_engines, steps_of
from system.twin.world import simulate

WITHIN = 0.10  # of a throughput, relative; of an idle share, in points


# What is compared, and what it is called.
THROUGHPUT = {
    "step_s": "seconds per training step",
    "trees_per_hour": "trees per hour",
    "trained_per_s": "trained tokens per second",
    "generated_per_s": "generated tokens per second",
}
SHARES = {  # of all time
    "learner_no_batch": "learner idle: no batch",
    "learner_publishing": "learner idle: publishing weights",
    "engine_waiting": "engine idle: waiting for requests",
    "rollout_bound": "rollout idle: staleness bound",
}
LABELS = {**THROUGHPUT, "tree_s": "seconds per tree, mean", "staleness": "staleness, mean", **SHARES}

Compared = Mapping[str, float]  # the keys are those of LABELS


def compared(figures: Figures) -> Compared:
    learner, rollout = figures.idle.get("learner", {}), figures.idle.get("rollout", {})
    return {
        **{name: getattr(figures, name) for name in THROUGHPUT},
        "tree_s": figures.tree_mean_s,
        "staleness": figures.staleness_mean,
        "learner_no_batch": learner.get("no batch", 0.0),
        "learner_publishing": learner.get("publishing weights", 0.0),
        "engine_waiting": mean_over_engines(figures.idle, "waiting"),
        "rollout_bound": rollout.get("staleness bound", 0.0),
    }


def measured_in(run: RunDir) -> Compared:
    """From the records of the run's training steps, without the first ones."""
    records = steps_of(run)
    if not records:
        raise ConfigError(f"{run.root}: not enough training steps to measure anything")
    return compared(Figures.of(records))


def error(name: str, predicted: Compared, measured: Compared) -> float:
    """How far off: in points for a share of time, in versions for staleness, else relative."""
    ours, theirs = predicted[name], measured[name]
    if name in SHARES or name == "staleness":
        return ours - theirs
    return ours / theirs - 1 if theirs else float("nan")


def holds(predicted: Compared, measured: Compared) -> bool:
    """Throughput within 10 % and idle shares within 10 points of the measured ones."""
    return all(abs(error(name, predicted, measured)) <= WITHIN for name in (*THROUGHPUT, *SHARES))


def predict(
    calibration: Calibration, run: RunDir, drift: Drift = SAME_SPEED, *, simulations: int = 3
) -> Compared:
    """``run`` as the calibrated twin sees it: its configuration and its tools, all else as calibrated.

    ``drift``: with engine and learner slowed by that much.  Averaged over ``simulations`` seeds.
    """
    config = run.config()
    models = replace(
        calibration.models,
        tools=fit_tools(list(read_trees(run.trees)), calibration.models.agent.tools),
        engine=calibration.engine.slowed(drift.engine),
        learner=calibration.learner.slowed(drift.learner),
    )
    steps = len(steps_of(run)) + SKIP
    results: list[Compared] = []
    for seed in range(simulations):
        config.run.seed = seed
        results.append(compared(simulate(config, models, steps=steps, skip=SKIP)))
    return {name: float(np.mean([one[name] for one in results])) for name in LABELS}


def with_figures(calibration: Calibration, files: Sequence[Path]) -> Calibration:
    """``calibration`` with the speeds that ``files`` hold: ``engine.json`` or ``learner.json``, as ``espalier
    bench`` writes them, which are what is known of a machine before anything has been trained on it.

    The engine's are fitted to its own sums over every step; the learner's to training steps on trees of
    several sizes, without the hand-over of weights.  Raises ConfigError for a file that is not one of these.
    """
    engine, learner = calibration.engine, calibration.learner
    for file in files:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if file.stem == "engine":
                engine = fit_engine([{f"engine/server/{k}": v for k, v in data["engine_sums"].items()}])
            elif file.stem == "learner":
                steps = data["results"]
                learner = fit_line([one["tree_s"] for one in steps], [one["tree_tokens"] for one in steps])
            else:
                raise ConfigError(f"{file}: expected engine.json or learner.json, of espalier bench")
        except (OSError, json.JSONDecodeError, KeyError) as error:
            what = f"espalier bench {file.stem}"
            raise ConfigError(f"{file}: no figures of {what} ({error!r}); write it with: {what}") from error
    models = replace(calibration.models, engine=engine, learner=learner)
    return replace(calibration, engine=engine, learner=learner, models=models)


def run(out_dir: Path, quick: bool = False, words: Sequence[str] = ()) -> dict[str, Any]:
    """Print and write the comparison; ``words`` are run directories, the one to calibrate on first, and files
    of figures."""
    runs = [RunDir.open(Path(word)) for word in words if not word.endswith(".json")]
    files = [Path(word) for word in words if word.endswith(".json")]
    if not runs:
        raise ConfigError("name run directories: espalier bench twin CALIBRATE_ON [PREDICT …]")
    calibration = with_figures(Calibration.from_run(runs[0]), files)
    if not files:
        calibration = calibration.with_host(rounds=2 if quick else 6)
    simulations = 1 if quick else 3
    report = Report(
        out_dir,
        "twin",
        "The digital twin against real runs",
        f"Models fitted to {runs[0].name}; the other runs are predicted from their configuration and their "
        "tools' latencies. It holds where throughput is within 10 % and idle shares within 10 points.",
    )
    models = calibration.models
    report.section("Calibration")
    report.facts(
        {
            "run": str(runs[0].root),
            "speeds from": ", ".join(map(str, files)) or "the run",
            "training steps": calibration.steps,
            "engine": models.engine,
            "learner": models.learner,
            "publishing weights, s": models.publish_s,
            "engine pause per update, s": models.update_s,
            "request through the host, s": models.request_s,
            "tools, mean s": {name: round(tool.latency.mean, 4) for name, tool in models.tools.items()},
        }
    )
    found: dict[str, dict[str, Any]] = {}
    for number, one in enumerate(runs):
        measured, drift = measured_in(one), Drift.between(calibration, one)
        twin, slowed = (
            predict(calibration, one, speed, simulations=simulations) for speed in (SAME_SPEED, drift)
        )
        found[one.name] = {
            "kind": "prediction" if number or files else "fit",
            "simulations": simulations,
            "measured": measured,
            "twin": twin,
            "twin_at_its_speed": slowed,
            "drift": asdict(drift),
            "holds": holds(twin, measured),
            "holds_at_its_speed": holds(slowed, measured),
        }
        _table(report, one, found[one.name])
    report.figure("twin", _plot(found), "Measured (full) and twin (light)")
    data = {"calibrated_on": [str(runs[0].root), *map(str, files)], "runs": found}
    return report.finish(data)


def _table(report: Report, run: RunDir, found: Mapping[str, Any]) -> None:
    config, verdict, drift = run.config(), {True: "holds", False: "does not hold"}, found["drift"]
    measured, twin, slowed = found["measured"], found["twin"], found["twin_at_its_speed"]
    report.section(f"{run.name} ({found['kind']})")
    report.table(
        f"{run.name}, {found['kind']}: {verdict[found['holds']]}; "
        f"at its speed: {verdict[found['holds_at_its_speed']]}",
        ["", "measured", "twin", "error", "at its speed", "error "],
        [
            [
                *(label, measured[name]),
                *(twin[name], _percent(name, twin, measured)),
                *(slowed[name], _percent(name, slowed, measured)),
            ]
            for name, label in LABELS.items()
        ],
        f"η={config.flow.staleness}, n={config.rollout.leaves}, concurrency={config.rollout.concurrency}; "
        f"{len(steps_of(run))} training steps, {found['simulations']} simulation(s). In this run the engine "
        f"took {drift['engine']:.2f} and the learner {drift['learner']:.2f} times as long for the same work.",
    )


def _percent(name: str, predicted: Compared, measured: Compared) -> str:
    off = error(name, predicted, measured)
    if name == "staleness":
        return f"{off:+.2f}"
    return f"{off * 100:+.1f} {'points' if name in SHARES else '%'}"


def _plot(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    names = {"step_s": "seconds per step", **SHARES}
    titles = [f"{name} ({one['kind']})" for name, one in found.items()]
    figure = Figure(figsize=(2.6 * len(names), 3.4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(names)), names.items(), strict=True):
        places = np.arange(len(found))
        for key, shift, color in (("measured", -0.2, "tab:blue"), ("twin", 0.2, "lightblue")):
            axes.bar(places + shift, [one[key][name] for one in found.values()], 0.4, color=color)
        axes.set_xticks(places, titles, rotation=30, ha="right", fontsize=8)
        axes.set_title(label, fontsize=9)
    return figure
