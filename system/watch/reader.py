"""One run, as it is read: what is new again and again; what was asked for is kept a while."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np

from system.config import Config
from system.errors import ConfigError, EspalierError
from system.learn.credit.base import assign
from system.observe.rundir import RunDir, RunDirError
from system.observe.terminal import shown, visible
from system.plugins import CREDITS
from system.tree.record import Float64, Tree
from system.tree.stats import TreeStats
from system.watch.drawing import drawing
from system.watch.index import TreeIndex, TreeRow, load
from system.watch.records import Records
from system.watch.status import Pulse, RunState, run_state
from system.watch.tail import JsonlTail
from system.watch.words import Decode, decoder, numbered, token_texts

MOST_TEXT = 2000  # tokens of an answer
_HELD_TOKENS = 4 << 20  # of trees that are kept for the texts of their nodes
_DRAWINGS = 16
_NOTES, _PHASES = 500, 20_000  # the newest


class RunReader:
    """Reads the run in ``root``, and writes nothing there.

    One thread calls :meth:`refresh`; the others may be called from any.  Who looks at ``records``, ``notes``
    or ``phases`` holds ``still`` meanwhile.
    """

    def __init__(self, root: Path) -> None:
        """Raises :class:`RunDirError` where there is no run."""
        if not (root / "config.yaml").is_file():
            what = "is not a run directory: it has no config.yaml" if root.is_dir() else "is not there"
            raise RunDirError(
                f"{root} {what}: name one that `espalier train` has made, such as runs/quickstart-s0"
            )
        self.run_dir, self.name = RunDir(root), visible(RunDir(root).name)
        self._metrics = JsonlTail(self.run_dir.metrics_path)
        self._events = JsonlTail(self.run_dir.events_path)
        self.still = threading.Lock()  # nothing is added to records, notes and phases
        self._lock = threading.Lock()  # of the trees and drawings that are kept
        self._decode: Decode | None = None
        self._trees: OrderedDict[int, Tree] = OrderedDict()
        self._drawn: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._pulse = Pulse()
        self.config: Config | None = None
        self.problem = ""  # why its settings cannot be read
        self.trouble = ""  # why nothing is read at the moment
        self._settings_of: int | None = None  # when config.yaml was written, ns
        self._settings()
        self.records = Records()
        self.index = TreeIndex(self.run_dir.tree_directories)
        self.notes: deque[dict[str, Any]] = deque(maxlen=_NOTES)
        self.phases: deque[dict[str, Any]] = deque(maxlen=_PHASES)

    @property
    def bad_lines(self) -> int:
        """Lines of its files that are not JSON."""
        return self._metrics.bad + self._events.bad

    def refresh(self, budget_s: float = float("inf")) -> None:
        """Read what is new; of trees as many as ``budget_s`` seconds allow, the newest first."""
        self._settings()
        with self.still:
            if self._metrics.restarted():
                self.records = Records()
                self._forget()  # the run was made anew
            for record in self._metrics.news():
                self.records.add(record)
            if self._events.restarted():
                self.notes.clear()
                self.phases.clear()
            for event in self._events.news():
                if "phase" in event:
                    self.phases.append(event)
                elif "note" in event:
                    self.notes.append(event)
        self.state()
        self.index.refresh(budget_s)

    def state(self) -> RunState:
        """What the run is doing.  :meth:`refresh` looks, too, so that nothing is missed in between."""
        return run_state(self.run_dir.root, self._pulse)

    def _settings(self) -> None:
        """Read ``config.yaml`` if it is new: a resumed run may have other settings."""
        if (when := self.run_dir.config_path.stat().st_mtime_ns) == self._settings_of:
            return
        self._settings_of = when
        try:
            self.config, self.problem = self.run_dir.config(), ""
        except EspalierError as error:
            self.problem = shown(f"config.yaml cannot be read, so no advantages are shown: {error}")
        self._forget()

    def _forget(self) -> None:
        with self._lock:
            self._trees.clear()
            self._drawn.clear()
            self._decode = None

    def summary(self) -> dict[str, Any]:
        """``summary.json``; empty while there is none."""
        try:
            found = json.loads(self.run_dir.summary_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def draw(self, number: int) -> dict[str, Any]:
        """The drawing of a tree.  Raises :class:`ConfigError` for one that is not kept (any more)."""
        with self._lock:
            if number in self._drawn:
                self._drawn.move_to_end(number)
                return self._drawn[number]
            tree = self._tree(number)
            drawn = {"number": number, **self.drawing(tree)}
            self._drawn[number] = drawn
            while len(self._drawn) > _DRAWINGS:
                self._drawn.popitem(last=False)
            return drawn

    def node_text(self, number: int, node: int, first: int = 0, count: int = MOST_TEXT) -> dict[str, Any]:
        """Tokens ``first`` to ``first + count`` of a node, and what a call of its is.

        Raises :class:`ConfigError` for a tree or node that is not there.
        """
        with self._lock:
            tree = self._tree(number)
            if not 0 <= node < tree.n_nodes or first < 0:
                raise ConfigError(f"tree {number} has no node {node} with a token {first}")
            return texts(tree, node, first, min(count, MOST_TEXT), self.decoder())

    def _row(self, number: int) -> TreeRow:
        if (row := self.index.rows.get(number)) is None:
            raise ConfigError(f"{self.name} keeps no tree {number}")
        return row

    def _tree(self, number: int) -> Tree:
        if number in self._trees:
            self._trees.move_to_end(number)
            return self._trees[number]
        try:
            tree = load(self._row(number))
        except FileNotFoundError:
            raise ConfigError(f"{self.name} keeps tree {number} no longer") from None
        self._trees[number] = tree
        while len(self._trees) > 1 and sum(t.n_tokens for t in self._trees.values()) > _HELD_TOKENS:
            self._trees.popitem(last=False)
        return tree

    def decoder(self) -> Decode:
        """The run's tokenizer: its trained model's, or that of the model it started from."""
        if self._decode is None:
            places = [self.run_dir.model]
            with contextlib.suppress(EspalierError):  # it is on another machine, say
                places.append(self.run_dir.start_model(self.config) if self.config else self.run_dir.start)
            self._decode = decoder(places)
        return self._decode or numbered

    def drawing(self, tree: Tree) -> dict[str, Any]:
        """As :func:`system.watch.drawing.drawing`, with the advantages of the run's credit."""
        nothing = np.full(tree.n_leaves, np.nan), np.full(tree.n_nodes, np.nan)
        if self.config is None:
            return {**drawing(tree, *nothing), "credit": "", "problem": self.problem}
        try:
            found = advantages(tree, self.config)
        except (EspalierError, ValueError) as error:
            return {**drawing(tree, *nothing), "credit": "", "problem": shown(f"no advantages: {error}")}
        return {**drawing(tree, *found), "credit": self.config.learn.credit.name, "problem": ""}


def texts(tree: Tree, node: int, first: int, count: int, decode: Decode) -> dict[str, Any]:
    """The tokens of a node from its ``first`` on, ``count`` at most, as text each, with their numbers."""
    begin, end = int(tree.start[node]), int(tree.end[node])
    part = slice(min(begin + first, end), min(begin + first + count, end))
    calls = [call for call in tree.calls if call.node == node]
    return {
        "node": node,
        "first": first,
        "total": end - begin,
        "pieces": token_texts(decode, tree.tokens[part].tolist()),
        "entropy": tree.entropy[part].astype(np.float64).round(4),
        "logprob": tree.logprob[part].astype(np.float64).round(4),
        "version": tree.version[part],
        "arguments": [visible(json.dumps(call.arguments, ensure_ascii=False), breaks=True) for call in calls],
    }


def advantages(tree: Tree, config: Config) -> tuple[Float64, Float64]:
    """([L], [J]) what the run's credit gives within this tree alone: a leaf's, and a node's; NaN where there
    is none.  A node's is, with a credit per leaf, the mean over the scored leaves at or below it.
    """
    credit = CREDITS.make(config.learn.credit.name, config.learn.credit.options)
    stats = TreeStats.of(tree)
    (values,) = assign(credit, [stats])
    values = values.astype(np.float64)
    owner = tree.episode if tree.episode.size else np.arange(tree.n_leaves)
    if credit.per == "node":
        return values[tree.leaf], values
    if credit.per == "path":
        below = (values * stats.on_path).sum(axis=0)
        count = stats.sum_below(stats.scored)
        node = np.divide(below, count, out=np.full(tree.n_nodes, np.nan), where=count > 0)
        return values[owner, tree.leaf], node
    count = stats.sum_below(stats.scored)
    total = stats.sum_below(np.where(stats.scored, values, 0.0))
    node = np.divide(total, count, out=np.full(tree.n_nodes, np.nan), where=count > 0)
    return np.where(stats.scored, values, np.nan)[owner], node
