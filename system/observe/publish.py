"""A run's model with its card: in its run directory, in another one, or on a hub."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from system.errors import ConfigError, naming
from system.observe import hub
from system.observe.card import CARD, model_card
from system.observe.rundir import RunDir, write_atomic


def publish(
    run: RunDir,
    step: int | None,
    target: Path | None,
    repository: str,
    *,
    public: bool = False,
    adapter: bool = False,
) -> Iterator[str]:
    """Write the model of a run into ``target``, and upload it to ``repository``; either may be none (None,
    "").  Yields a line for each thing done.

    ``step``: of the checkpoint whose model it is; None: the trained model.  ``adapter``: the adapters of a
    run by LoRA alone, in PEFT's format, not the model that they were merged into.  Raises
    :class:`ConfigError` for what cannot be, before anything is written, and
    :class:`~system.observe.hub.PushFailed`.
    """
    if repository and (why := hub.problem(repository)):
        raise ConfigError(f"--push: {why}")
    if adapter and not run.config().learn.lora.on:
        raise ConfigError(f"--adapter: {run.root} has none: its whole model was trained (learn.lora.rank=0)")
    trained = run.adapter if adapter else run.model
    source = trained if step is None else run.checkpoints / f"v{step:06d}"
    if not source.is_dir():
        raise ConfigError(_missing(run, step))
    if target is not None and target.exists():
        raise ConfigError(f"--to {target}: it is there already: name a new directory, or remove it")
    if target is None:
        with tempfile.TemporaryDirectory(dir=run.root, prefix="export-") as scratch:
            directory = Path(scratch) / "model"
            _write(run, step, source, directory, repository, adapter)
            yield _pushed(directory, repository, public)
        return
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    _write(run, step, source, target, repository, adapter)
    yield f"{target}: the {'adapters' if adapter else 'model'} of step {_version(run, step)}"
    if repository:
        yield _pushed(target, repository, public)


def write_card(run: RunDir, name: str = "") -> None:
    """Beside the trained model, once the summary is written."""
    write_atomic(run.model / CARD, _card(run, None, name))


def _write(
    run: RunDir, step: int | None, source: Path, directory: Path, repository: str, adapter: bool
) -> None:
    if step is None:
        partial = directory.with_name(directory.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)  # what an interrupted export left
        shutil.copytree(source, partial)
        partial.rename(directory)
    else:
        import torch  # a second

        from system.learn.extract import extract, extract_adapters
        from system.models.adapter import adapter_of

        config = run.config()
        began = run.start_model(config)
        dtype, adapters = getattr(torch, config.model.dtype), adapter_of(config.learn.lora)
        if adapter and adapters:
            extract_adapters(source, began, directory, dtype, adapters)
        else:
            extract(source, began, directory, dtype, adapter=adapters)
    write_atomic(directory / CARD, _card(run, step, repository))


def _pushed(directory: Path, repository: str, public: bool) -> str:
    return f"{hub.push(directory, repository, public=public)}: uploaded"


def _card(run: RunDir, step: int | None, name: str) -> str:
    return model_card(run.config(), _summary(run), name=name or run.name, version=_version(run, step))


def _version(run: RunDir, step: int | None) -> int:
    """The step of the model: of the trained one, the last, or the one that a supervised run chose."""
    if step is not None:
        return step
    summary = _summary(run)
    return int(summary.get("versions", summary.get("chosen", {}).get("step", 0)))


def _summary(run: RunDir) -> dict[str, Any]:
    """Empty while the run goes on."""
    return json.loads(run.summary_path.read_text()) if run.summary_path.is_file() else {}


def _missing(run: RunDir, step: int | None) -> str:
    there = [str(int(name[1:])) for name in sorted(os.listdir(run.checkpoints)) if name[1:].isdecimal()]
    steps = f"--step may be {', '.join(there)}" if there else "there is no checkpoint either"
    if step is None:
        return f"{run.root} has no trained model: it has not come to its end; {steps}"
    return f"{run.root} has no checkpoint of step {step}; {steps}"
