"""What is done with the model of a run that has come to its end, of ``espalier train`` or ``espalier sft``.

A run may be ended in the midst of it: a resume does the rest.  To do any of it twice does no harm.
"""

from __future__ import annotations

import shutil
import sys

from system.config import Config
from system.errors import DONE, FAILED
from system.observe import lease
from system.observe.card import CARD
from system.observe.hub import PushFailed, push
from system.observe.publish import rounded_away, write_card
from system.observe.rundir import RunDir, write_atomic
from system.observe.terminal import shown


def delivered(run_dir: RunDir) -> bool:
    """Whether nothing is left to do with the model that is there."""
    return (run_dir.model / CARD).is_file() and not run_dir.upload_due.exists()


def deliver_rest(config: Config, run_dir: RunDir, told: str) -> int:
    """Of a run that ended before: what was not done then; where that is nothing, ``told`` is told."""
    if delivered(run_dir):
        print(told)
        return DONE
    with lease.held(run_dir.root):
        return deliver(config, run_dir)


def deliver(config: Config, run_dir: RunDir) -> int:
    """The trained model's card, and the upload that was asked for; returns the process's exit code."""
    if config.sft.keep == "chosen":
        shutil.rmtree(run_dir.candidates, ignore_errors=True)
    if repository := config.run.push:  # before the card, with which all else is done
        write_atomic(run_dir.upload_due, repository + "\n")
    write_card(run_dir, repository)
    if loss := rounded_away(run_dir):
        print(shown(loss), flush=True)
    if repository:
        try:
            print(f"{shown(push(run_dir.model, repository))}: uploaded", flush=True)
        except PushFailed as error:
            again = f"{run_dir.resume_command}, or espalier export {run_dir.root} --push {repository}"
            print(f"espalier: {shown(str(error))}; try again with {again}", file=sys.stderr)
            return FAILED
    run_dir.upload_due.unlink(missing_ok=True)  # also where a resume asks for none any more
    return DONE
