"""A run's model with its card: in its run directory, in another one, or on a hub."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from system.config.lora import WELL_KEPT
from system.errors import ConfigError, naming
from system.observe import hub
from system.observe.card import CARD, base_name, model_card
from system.observe.rundir import RunDir, write_atomic
from system.whole import appearing


@dataclass(frozen=True, slots=True)
class _Export:
    """What is written.  ``source``: a directory of the run; ``made``: of which files are made, not copied."""

    run: RunDir
    step: int | None
    source: Path
    repository: str
    adapter: bool
    dtype: str
    made: bool


def publish(
    run: RunDir,
    step: int | None,
    target: Path | None,
    repository: str,
    *,
    public: bool = False,
    adapter: bool = False,
    dtype: str = "",
) -> Iterator[str]:
    """Write the model of a run into ``target``, and upload it to ``repository``; either may be none (None,
    "").  Yields a line for each thing done.

    ``step``: of the checkpoint whose model it is; None: the trained model.  ``adapter``: the adapters of a
    run by LoRA alone, in PEFT's format, not the model that they were merged into.  ``dtype``: of what is
    written; empty: the run's.  Raises :class:`ConfigError` for what cannot be, before anything is written,
    and :class:`~system.observe.hub.PushFailed`.
    """
    if repository and (why := hub.problem(repository)):
        raise ConfigError(f"--push: {why}")
    config = run.config()
    lora, written = config.learn.lora.on, dtype or config.model.dtype
    if adapter and not lora:
        raise ConfigError(f"--adapter: {run.root} has none: its whole model was trained (learn.lora.rank=0)")
    other = step is None and written != config.model.dtype
    if other and (adapter or not lora):
        there = run.adapter if adapter else run.model
        raise ConfigError(
            f"--dtype {dtype}: {there} is in {config.model.dtype}: name a checkpoint, whose numbers are "
            f"float32; {_steps(run)}"
        )
    # A model of other numbers is made of the adapters, which lost nothing by being merged.
    trained = run.adapter if adapter or other else run.model
    source = trained if step is None else run.checkpoints / f"v{step:06d}"
    if not source.is_dir():
        raise ConfigError(_missing(run, step, source))
    what = _Export(run, step, source, repository, adapter, written, made=step is not None or other)
    if target is not None and target.exists():
        raise ConfigError(f"--to {target}: it is there already: name a new directory, or remove it")
    if target is None:
        with tempfile.TemporaryDirectory(dir=run.root, prefix="export-") as scratch:
            directory = Path(scratch) / "model"
            _write(what, directory)
            yield _pushed(what, directory, public)
        return
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    kept = _write(what, target)
    yield f"{target}: the {'adapters' if adapter else 'model'} of step {_version(run, step)}"
    if kept is not None and kept < WELL_KEPT:
        yield (
            f"{target} holds {kept:.0%} of what the adapters change (of its squared norm): rounding to "
            f"{written} lost the rest; --dtype float32 keeps it, and --adapter"
        )
    if repository:
        yield _pushed(what, target, public)


def write_card(run: RunDir, name: str = "") -> None:
    """Beside the trained model, once the summary is written."""
    write_atomic(run.model / CARD, _card(run, None, name, kept=_kept(run)))


def rounded_away(run: RunDir) -> str:
    """What to tell of a trained model into which adapters were merged with loss; empty: of no such one."""
    if (kept := _kept(run)) is None or kept >= WELL_KEPT:
        return ""
    return (
        f"{run.model} holds {kept:.0%} of what the adapters change (of its squared norm), rounding lost the "
        f"rest: espalier export {run.root} --dtype float32 --to DIR keeps it, and --adapter"
    )


def _write(what: _Export, directory: Path) -> float | None:
    """Into ``directory``, with its card; returns the share of what adapters change that a merged model holds,
    where it is known.
    """
    kept = _kept(what.run) if what.step is None and not what.adapter else None
    if not what.made:
        with appearing(directory) as partial:
            shutil.copytree(what.source, partial, dirs_exist_ok=True)
    else:
        import torch  # a second

        from system.learn.extract import extract, extract_adapters, merge
        from system.models.adapter import adapter_of
        from system.models.shape import ModelShape

        config = what.run.config()
        began = what.run.start_model(config)
        dtype = getattr(torch, what.dtype)
        adapters = adapter_of(config.learn.lora, ModelShape.from_directory(began))
        if what.adapter and adapters:
            extract_adapters(what.source, began, directory, dtype, adapters, base_name(config))
        elif what.step is None and adapters:
            kept = merge(what.source, began, directory, dtype, adapters)
        else:
            kept = extract(what.source, began, directory, dtype, adapter=adapters)
    card = _card(what.run, what.step, what.repository, adapter=what.adapter, dtype=what.dtype, kept=kept)
    write_atomic(directory / CARD, card)
    return kept


def _pushed(what: _Export, directory: Path, public: bool) -> str:
    """Upload; where it is the very one that the run was to make at its end, that is done with."""
    run = what.run
    address = hub.push(directory, what.repository, public=public)
    if what.source == run.model and run.due_repository == what.repository:
        run.upload_due.unlink()
    return f"{address}: uploaded"


def _card(
    run: RunDir,
    step: int | None,
    name: str,
    *,
    adapter: bool = False,
    dtype: str = "",
    kept: float | None = None,
) -> str:
    config = run.config()
    return model_card(
        config,
        _summary(run),
        name=name or run.name,
        version=_version(run, step),
        adapter=adapter,
        merged=None if kept is None else (dtype or config.model.dtype, kept),
    )


def _kept(run: RunDir) -> float | None:
    """Of the trained model: the share of what adapters change that it holds, where the run has said so."""
    return _summary(run).get("model", {}).get("lora_kept")


def _version(run: RunDir, step: int | None) -> int:
    """The step of the model: of the trained one, the last, or the one that the run chose."""
    if step is not None:
        return step
    summary = _summary(run)
    return int(summary.get("chosen", {}).get("step", summary.get("versions", 0)))


def _summary(run: RunDir) -> dict[str, Any]:
    """Empty while the run goes on."""
    return json.loads(run.summary_path.read_text()) if run.summary_path.is_file() else {}


def _steps(run: RunDir) -> str:
    there = [str(int(name[1:])) for name in sorted(os.listdir(run.checkpoints)) if name[1:].isdecimal()]
    return f"--step may be {', '.join(there)}" if there else "there is no checkpoint either"


def _missing(run: RunDir, step: int | None, source: Path) -> str:
    if step is not None:
        return f"{run.root} has no checkpoint of step {step}; {_steps(run)}"
    if run.model.is_dir():
        return f"{run.root} has a trained model, and no {source.name}/ beside it; {_steps(run)}"
    return f"{run.root} has no trained model: it has not come to its end; {_steps(run)}"
