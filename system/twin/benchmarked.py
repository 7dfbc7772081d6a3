"""Speeds from the files that ``espalier bench engine`` and ``espalier bench learner`` write, not from a run.

They are what is known of a machine before anything has been trained on it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from system.config import ConfigError
from system.twin.calibrate import Calibration, fit_engine, fit_line
from system.twin.speeds import LinearEngine, LinearLearner


def with_figures(calibration: Calibration, files: Sequence[Path]) -> Calibration:
    """``calibration`` with the speeds that ``files`` (engine.json, learner.json) hold.

    Raises ConfigError for a file that is not one of these.
    """
    engine, learner = calibration.engine, calibration.learner
    for file in files:
        if file.stem == "engine":
            engine = engine_speed(file)
        elif file.stem == "learner":
            learner = learner_speed(file)
        else:
            raise ConfigError(f"{file}: expected engine.json or learner.json, as espalier bench writes them")
    models = replace(calibration.models, engine=engine, learner=learner)
    return replace(calibration, engine=engine, learner=learner, models=models)


def engine_speed(file: Path) -> LinearEngine:
    """From the engine's own sums over every step that it made in ``espalier bench engine``."""
    sums = _read(file, "engine_sums", "engine")
    return fit_engine([{f"engine/server/{name}": value for name, value in sums.items()}])


def learner_speed(file: Path) -> LinearLearner:
    """From the seconds of training steps on trees of several sizes; hand-over of weights is not in them."""
    results = _read(file, "results", "learner")
    return fit_line([one["tree_s"] for one in results], [one["tree_tokens"] for one in results])


def _read(file: Path, key: str, name: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{file}: no figures of espalier bench {name} ({error!r}); write it with: espalier bench {name}"
        ) from error
