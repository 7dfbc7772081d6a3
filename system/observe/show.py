"""What ``espalier tree`` prints: one tree as an outline, or the table of all."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path

import numpy as np
from rich.console import Console

from system.config import Config, ConfigError
from system.learn.credit.base import assign
from system.observe.outline import Decode, View, outline, table
from system.observe.rundir import RunDir
from system.plugins import CREDITS
from system.rollout.encode import local_tokenizer
from system.tree.record import Tree
from system.tree.stats import TreeStats
from system.tree.store import StoreError, numbered_trees, read_tree

_PLAIN_WIDTH = 160  # columns when the output is no terminal and COLUMNS is not set


def run(args: argparse.Namespace) -> int:
    """Print one tree, or the table of all."""
    run_dir = RunDir.open(args.run)
    config, trees = run_dir.config(), numbered_trees(*run_dir.tree_directories)
    console = _Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)
    try:
        if args.list:
            console.print(table(trees))
        else:
            tree = select(trees, args, run_dir)
            console.print(outline(tree, view(run_dir, config, tree, full=args.full, entropy=args.entropy)))
    except StoreError as error:
        raise ConfigError(str(error)) from error
    return 0


def view(
    run_dir: RunDir,
    config: Config,
    tree: Tree,
    *,
    full: bool = False,
    entropy: bool = False,
    decode: Decode | None = None,
) -> View:
    """How to show ``tree`` of a run: with its tokenizer and its credit.  ``decode``: an earlier tree's."""
    credit = CREDITS.make(config.learn.credit.name, config.learn.credit.options)
    (advantage,) = assign(credit, [TreeStats.of(tree)])
    episode = tree.episode if tree.episode.size else np.arange(tree.n_leaves)
    read = {"leaf": (episode,), "node": (tree.leaf,), "path": (episode, tree.leaf)}[credit.per]
    return View(
        decode=decode or decoder(run_dir, config),
        advantage=advantage[read],
        credit=config.learn.credit.name,
        full=full,
        entropy=entropy,
    )


class _Console(Console):
    """Leaves a closed pipe (``espalier tree RUN | head``) to the command line; rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def select(numbered: Iterable[tuple[int, Tree]], args: argparse.Namespace, run_dir: RunDir) -> Tree:
    """The tree the options name; the newest without any.  Raises :class:`ConfigError` for none."""
    trees = (tree for _, tree in numbered)
    if args.prompt is not None:
        wanted = f"of prompt {args.prompt!r}"
        found = next(iter(deque((tree for tree in trees if tree.prompt_id == args.prompt), maxlen=1)), None)
    elif args.best or args.worst:
        wanted = "with a scored leaf"
        found = _best(trees, 1 if args.best else -1)
    elif args.number >= 0:
        wanted = f"number {args.number}"
        found = read_tree(run_dir.tree_directories, args.number)
    else:
        wanted = f"number {args.number}" if args.number != -1 else "yet"
        last = deque(trees, maxlen=-args.number)
        found = last[0] if len(last) == -args.number else None
    if found is None:
        raise ConfigError(
            f"{run_dir.root} keeps no tree {wanted}; `espalier tree {run_dir.root} --list` shows all"
        )
    return found


def _best(trees: Iterable[Tree], sign: int) -> Tree | None:
    """The tree of the highest (``sign`` 1) or lowest (-1) mean reward; of equals, for a better view, one that
    forked most.
    """
    ranked = (
        (sign * float(stats.rewards.mean()), stats.forks, tree)
        for tree in trees
        if (stats := TreeStats.of(tree)).rewards.size
    )
    best = max(ranked, key=itemgetter(0, 1), default=None)
    return best[2] if best else None


def decoder(run_dir: RunDir, config: Config) -> Decode:
    """The run's tokenizer: its trained model's, or that of the model it started from."""
    places = [run_dir.model, Path(config.model.path) if config.model.path else run_dir.start]
    for place in places:
        if (place / "tokenizer_config.json").is_file() or (place / "tokenizer.json").is_file():
            tokenizer = local_tokenizer(str(place))
            return lambda tokens: tokenizer.decode(
                tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
    looked = " or ".join(map(str, places))
    print(f"WARNING: no tokenizer in {looked}: showing token ids instead of text", file=sys.stderr)
    return lambda tokens: "".join(f"⟨{token}⟩" for token in tokens.tolist())
