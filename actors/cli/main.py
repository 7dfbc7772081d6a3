"""``espalier``: the command line.

Only the standard library is imported here and at the top of the commands; each command imports what it needs
when it runs, so ``--help`` answers at once and a command never waits for a library of another.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
import traceback
from collections.abc import Sequence

from actors.cli.chaos import chaos
from actors.cli.cluster import cancel, logs, status, submit
from actors.cli.export import dequantise, export
from actors.cli.prompt import prompt
from actors.cli.reports import bench, config, doctor, metrics, plan, tree
from actors.cli.sft import sft
from actors.cli.study import study
from actors.cli.train import evaluate, train
from actors.cli.watch import watch
from system import errors

COMMANDS = (
    train, sft, evaluate, export, prompt, watch, tree, bench, study, plan, dequantise, submit, status, cancel,
    logs, doctor, config, metrics, chaos,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 2 wrong usage or configuration, 130 interrupted, and
    those of :mod:`system.errors`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what an ASCII terminal cannot show must not end a command
            stream.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, commands = build_parser()
    if not argv:
        parser.print_help()
        return errors.USAGE
    if argv[0] == "--version":
        from importlib.metadata import version  # slow for a `--help`

        print(f"espalier {version('espalier')}")
        return errors.DONE
    try:
        if argv[0] in commands:  # intermixed: overrides may stand before and after options
            args = commands[argv[0]].parse_intermixed_args(argv[1:])
        else:
            if close := difflib.get_close_matches(argv[0], commands, n=1):
                print(f"espalier: did you mean espalier {close[0]}?", file=sys.stderr)
            args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has said what is wrong, or printed the help
        return stop.code if isinstance(stop.code, int) else errors.USAGE
    try:
        return args.run_command(args)
    except KeyboardInterrupt:
        print("espalier: interrupted", file=sys.stderr)
        return errors.INTERRUPTED
    except BrokenPipeError:  # `espalier tree RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # the last place to tell it
        return _tell(error)


def _tell(error: Exception) -> int:
    """Say what went wrong, in a line each for what is expected to; returns the exit code."""
    from system.observe.terminal import shown

    causes = list(errors.leaves(error))
    if not all(isinstance(cause, errors.EXPECTED) for cause in causes):
        print(shown("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        print("espalier: this is a bug of Espalier: please report it with the lines above", file=sys.stderr)
        return errors.FAILED
    for line in (line for cause in causes for line in errors.told(cause).splitlines()):
        print(f"espalier: {shown(line)}", file=sys.stderr)
    return errors.exit_code(error)


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole parser, and the parser of each command."""
    parser = argparse.ArgumentParser(
        prog="espalier",
        description="Asynchronous reinforcement learning of tool-using agents on trajectory trees (ARPO).",
        epilog="start here: espalier train configs/quickstart.yaml",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    adder = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    return parser, {command.name: command.parser(adder) for command in COMMANDS}


if __name__ == "__main__":
    sys.exit(main())
