"""What is done with the model of a run that has come to its end."""

from __future__ import annotations

import sys

from system.config import Config
from system.errors import DONE, FAILED
from system.observe.hub import PushFailed, push
from system.observe.publish import rounded_away, write_card
from system.observe.rundir import RunDir
from system.observe.terminal import shown


def deliver(config: Config, run_dir: RunDir) -> int:
    """The trained model's card, and the upload that was asked for; returns the process's exit code."""
    write_card(run_dir, config.run.push)
    if loss := rounded_away(run_dir):
        print(shown(loss), flush=True)
    if config.run.push:
        try:
            print(f"{shown(push(run_dir.model, config.run.push))}: uploaded", flush=True)
        except PushFailed as error:
            again = f"espalier export {run_dir.root} --push {config.run.push}"
            print(f"espalier: {shown(str(error))}; try again with {again}", file=sys.stderr)
            return FAILED
    return DONE
