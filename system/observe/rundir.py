"""The run directory: everything a run leaves behind, and where each part lies.

::

    runs/quickstart-s0/
      config.yaml      the merged configuration; `--resume` reads it (of mode 0600 where it holds a secret)
      lease            who writes here now
      metrics.jsonl    one record per training step and per evaluation
      alarms.jsonl     a line when an alarm begins, and one when it ends
      events.jsonl     its phases (warm start, training, …) and what it said of lasting interest
      ledger.jsonl     what happened to every prompt
      trees/           the newest closed trees
      trees-sample/    some of the whole run: the first of every stretch, and the one with the most to teach
      evals/           the answers of each evaluation, one file for each, by the training step
      checkpoints/     learner, optimizer, ledger and random state, for `--resume`
      curves/          PNG curves
      start/           the start weights, when the run made its own model
      model/           the trained model in Hugging Face format
      adapter/         of a run by LoRA: the adapters that are merged into it, in PEFT's format
      sft.json         of a supervised run, and what tells one: what its data were ({} until they are known)
      candidates/      the models that one is chosen of, by `sft.choose` or `eval.choose`
      logs/            logs of the parts
      judge/           verdicts of `reward=judge`, which a resumed run does not ask for again
      wandb/           Weights & Biases files (offline by default)
      tensorboard/     with observe.tensorboard=true: its event files
      trackio/         with observe.trackio=true: the run's name there
      summary.json     the run in one page
      upload-due       while the model is yet to be uploaded (run.push): the name of the repository
      key, ray-token   while it runs: what its servers and Ray want to be shown (of mode 0600)
      attempts.jsonl   of a SLURM job: a line for the start and the end of every attempt
      attempts/        of a SLURM job: NNN/logs, one log per node and component
      slurm/           the job script, what was submitted, the jobs' own output
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from system.config import Config, ConfigError, load, to_dict, to_yaml
from system.errors import naming
from system.observe.jsonl import jsonable
from system.redact import redact

_SEAL = "# sha256 of the lines above: "
_LAST_SECTION = "\nslurm:"


class RunDirError(ConfigError):
    """A run directory that cannot be used; the message says what to do instead."""


class RunDir:
    """Paths of one run.  ``create`` starts a new one, ``open`` finds an old one."""

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, root.resolve().name
        self.config_path, self.summary_path = root / "config.yaml", root / "summary.json"
        self.metrics_path, self.ledger_path = root / "metrics.jsonl", root / "ledger.jsonl"
        self.events_path = root / "events.jsonl"
        self.trees, self.checkpoints, self.curves = root / "trees", root / "checkpoints", root / "curves"
        self.tree_sample = root / "trees-sample"
        self.start, self.model, self.adapter = root / "start", root / "model", root / "adapter"
        self.logs, self.wandb = root / "logs", root / "wandb"
        self.evals = root / "evals"
        self.tensorboard, self.trackio = root / "tensorboard", root / "trackio"
        self.alarms_path = root / "alarms.jsonl"
        self.sft_path, self.candidates = root / "sft.json", root / "candidates"
        self.upload_due = root / "upload-due"

    @property
    def supervised(self) -> bool:
        """Whether it is a run of ``espalier sft``; else it is one of ``espalier train``."""
        return self.sft_path.is_file()

    @property
    def resume_command(self) -> str:
        """What goes on with it, for people."""
        return f"espalier {'sft' if self.supervised else 'train'} --resume {self.root}"

    @property
    def due_repository(self) -> str:
        """Where the model is yet to be uploaded; empty: nowhere."""
        return self.upload_due.read_text(encoding="utf-8").strip() if self.upload_due.is_file() else ""

    @property
    def end(self) -> dict[str, Any]:
        """The summary of a run that came to its end and left its model; empty of any other.

        One that stopped has a summary, too, and the model of an earlier end where it was gone on with.
        """
        if not (self.model.is_dir() and self.summary_path.is_file()):
            return {}
        summary: dict[str, Any] = json.loads(self.summary_path.read_text(encoding="utf-8"))
        return summary if summary.get("ended", True) else {}  # an older version of Espalier did not say

    @property
    def tree_directories(self) -> tuple[Path, Path]:
        """Where closed trees lie; one may lie in both, under the same number."""
        return self.trees, self.tree_sample

    @classmethod
    def create(cls, config: Config, config_name: str = "run", *, supervised: bool = False) -> RunDir:
        """Make a fresh directory and write ``config.yaml`` into it.  ``supervised``: mark it as such a run's.

        ``config.run.name`` names it.  An empty name becomes ``<config_name>-s<seed>``, or the next free of
        ``…-2``, ``…-3`` so that repeating a command never touches an earlier run.  A name that was chosen by
        hand and is taken raises :class:`RunDirError`.
        """
        name, parent = config.run.name, Path(config.run.dir)
        if name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise RunDirError(f"run.name={name!r} must be a plain directory name; run.dir sets where it lies")
        try:
            parent.mkdir(parents=True, exist_ok=True)
            stem = name or f"{config_name}-s{config.run.seed}"
            root, number = parent / stem, 2
            while not _claim(root):
                if name:
                    again = cls(root).resume_command
                    raise RunDirError(f"{root} exists: continue it with `{again}` or choose another name")
                root, number = parent / f"{stem}-{number}", number + 1
        except OSError as error:
            raise RunDirError(
                f"run.dir={parent}: {error.strerror}: name a directory that can be written"
            ) from error
        run = cls(root)
        run._make_parts()
        if supervised:  # before the configuration, without which it is no run directory
            write_atomic(run.sft_path, "{}\n")
        run.write_config(config)
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """An existing run.  Raises :class:`RunDirError` when ``path`` is not a run directory."""
        run = cls(Path(path))
        if not run.root.is_dir():
            raise RunDirError(f"no such run directory: {run.root}")
        if not run.config_path.is_file():
            raise RunDirError(f"{run.root} is not a run directory: it has no config.yaml")
        run._make_parts()
        return run

    def config(self, overrides: tuple[str, ...] = ()) -> Config:
        """The configuration the run was started with, with overrides applied."""
        return load(self.config_path, overrides)

    def start_model(self, config: Config) -> Path:
        """The model that the run began with; ``config``: its own.

        A relative path is of the directory in which the run was started: the one that ``run.dir`` leads from
        to the run, or else the current one.  Raises :class:`RunDirError` where it is in neither.
        """
        if not config.model.path:
            return self.start
        path, runs = Path(config.model.path), Path(config.run.dir).parts
        here = self.root.resolve().parent.parts
        before, after = here[: len(here) - len(runs)], here[len(here) - len(runs) :]
        for place in (Path(*before), Path()) if before and after == runs else (Path(),):
            if (place / path).is_dir():
                return place / path
        raise RunDirError(
            f"model.path={path}, which {self.root} began with, is no directory here: call this from the "
            "directory in which the run was started"
        )

    def check_config(self) -> None:
        """Raise :class:`RunDirError` for a ``config.yaml`` that is not what this run wrote.

        A part of it would be read as the defaults for the rest.
        """
        whole = self.config_path.read_text(encoding="utf-8")
        text, sealed, seal = whole.rpartition(_SEAL)
        if seal.strip() != _digest(text) if sealed else _LAST_SECTION not in whole:
            raise RunDirError(
                f"{self.config_path} was edited or is damaged: a resumed run is changed by overrides "
                f"({self.resume_command} key=value); if the file is right and whole, remove its last line"
            )

    def again(self, config: Config) -> str:
        """What goes on with it by the settings of a resume, for people, wherever that one ends."""
        held = self.config_path.read_text(encoding="utf-8") == _sealed(config)
        return self.resume_command if held else f"{self.resume_command} and the same overrides"

    def write_config(self, config: Config) -> None:
        """Write ``config.yaml``; a different earlier one stays as ``logs/config-<n>.yaml``.

        Of a resume that is once its checkpoint is taken: one that is refused leaves the run as it was.
        """
        text = _sealed(config)
        if self.config_path.is_file():
            before = self.config_path.read_text(encoding="utf-8")
            if before == text:
                return
            number = 1
            while (self.logs / f"config-{number}.yaml").exists():
                number += 1
            write_atomic(self.logs / f"config-{number}.yaml", before, private=True)
        values = to_dict(config)
        write_atomic(self.config_path, text, private=redact(values) != values)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        text = json.dumps(jsonable(summary), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomic(self.summary_path, text + "\n")

    def _make_parts(self) -> None:
        for part in (self.trees, self.checkpoints, self.curves, self.logs):
            part.mkdir(exist_ok=True)


def _sealed(config: Config) -> str:
    """The text of ``config.yaml``."""
    text = to_yaml(config)
    return f"{text}{_SEAL}{_digest(text)}\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomic(path: Path, text: str, *, private: bool = False) -> None:
    """Replace a file so that a reader, or a restart, sees the old text or the new one but never a part.

    ``private``: only this user may read it.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    number = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
    with naming(path), open(number, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _claim(root: Path) -> bool:
    """Make ``root`` ours: true when it is new or empty.

    Two runs may start together and both find the directory empty: the one whose ``mkdir`` makes the first
    part has it.
    """
    try:
        root.mkdir(exist_ok=True)
        if any(root.iterdir()):
            return False
        (root / "trees").mkdir()
    except FileExistsError:
        return False
    return True
