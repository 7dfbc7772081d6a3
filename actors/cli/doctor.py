"""``espalier doctor``: what on this machine or in this allocation would stop a recipe, and what to do."""

from __future__ import annotations

import argparse

from actors.cli.words import split, takes_recipe

WHAT = "check this machine, or the allocation it runs in, against a recipe"
EPILOG = """\
examples:
  espalier doctor                                      against the defaults
  espalier doctor configs/quickstart.yaml engine=sglang
  srun --ntasks-per-node=1 espalier doctor recipe.yaml --json     on every node of an allocation

Exit code 1: a problem stops the recipe from running here.  Warnings do not.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    takes_recipe(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    import dataclasses
    import json

    from system.config import load
    from system.doctor.checks import examine, stops
    from system.doctor.facts import gather

    config = load(*split(args.words))
    findings = examine(gather(config), config)
    if args.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
        return int(stops(findings))
    width = max(len(finding.topic) for finding in findings)
    for finding in findings:
        print(f"{finding.level:8} {finding.topic:{width}}  {finding.found}")
        if finding.remedy:
            print(f"{'':8} {'':{width}}  → {finding.remedy}")
    problems = sum(finding.level == "problem" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    print(f"\n{problems} problems, {warnings} warnings")
    return int(stops(findings))
