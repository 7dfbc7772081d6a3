"""A closed tree as a readable outline, and several as a table.

Consecutive nodes without a fork stand under each other; the outline goes one level deeper only where the tree
forks.  Everything a model or a tool wrote is shown as plain text: control characters become visible symbols,
so that no output can drive the reader's terminal.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree as Guide

from system.observe.terminal import visible
from system.rollout.encode import OPENING_TOKENS, opening
from system.text import one_line
from system.tree.record import ForkDecision, Kind, Origin, Outcome, ToolCall, Tree
from system.tree.stats import TreeStats

Decode = Callable[[NDArray[np.int32]], str]
"""Token ids [k] to text, special tokens included."""

T = TypeVar("T")

_STYLE = {Kind.PROMPT: "bold", Kind.MODEL: "", Kind.TOOL: "cyan", Kind.EXPERT: "magenta"}
_HEAT = ("", "yellow", "dark_orange", "bold red")  # token entropy up to 0.5, 1, 2 nats, and above
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class View:
    """How to show a tree."""

    decode: Decode
    advantage: NDArray[np.floating]  # [L]; of a credit per node or path, that of the leaf's node
    credit: str = ""  # the estimator's name
    full: bool = False  # whole texts, with their line breaks
    entropy: bool = False  # colour by token entropy, and a bar per token
    text_limit: int = 240  # characters of a node's text unless ``full``


def outline(tree: Tree, view: View) -> RenderableType:
    """The tree, ready for ``rich.console.Console.print``."""
    children = _by_node((parent, node) for node, parent in enumerate(tree.parent.tolist()))
    leaves = _by_node((node, leaf) for leaf, node in enumerate(tree.leaf.tolist()))
    calls = _by_node((call.node, call) for call in tree.calls)
    forks = _by_node((fork.node, fork) for fork in tree.forks)

    def lines(node: int) -> list[Text]:
        shown = [_node_line(tree, node, calls[node], view)]
        if view.entropy and tree.kind[node] == Kind.MODEL:
            shown.append(_entropy_line(tree, node))
        shown += [_fork_line(fork) for fork in forks[node]]
        return shown

    def chain(node: int) -> tuple[Group, int]:
        """Nodes from ``node`` down to the first that forks, holds a leaf, or ends."""
        shown = lines(node)
        while len(children[node]) == 1 and not leaves[node]:
            node = children[node][0]
            shown += lines(node)
        if not children[node]:
            shown += [_leaf_line(tree, leaf, view) for leaf in leaves[node]]
        return Group(*shown), node

    def grow(guide: Guide, node: int) -> None:
        if children[node]:
            for leaf in leaves[node]:  # a branch that ended where a sibling went on
                guide.add(_leaf_line(tree, leaf, view))
        for child in children[node]:
            label, last = chain(child)
            grow(guide.add(label), last)

    label, last = chain(0)
    root = Guide(label, guide_style="dim")
    grow(root, last)
    return Group(_head(tree, view), Text(), root)


def table(trees: Iterable[tuple[int, Tree]]) -> Table:
    """One row per tree, in the order given; the first column is its number, which ``--number`` takes."""
    grid = Table(box=None, header_style="bold", padding=(0, 1))
    for name in ("#", "prompt", "kind"):
        grid.add_column(name, justify="right" if name == "#" else "left", overflow="fold")
    numbers = ("leaves", "nodes", "forks", "top-ups", "calls", "tokens", "uniq/flat", "reward", "correct")
    for name in (*numbers, "version"):
        grid.add_column(name, justify="right")
    for number, tree in trees:
        stats = TreeStats.of(tree)
        grid.add_row(
            str(number),
            Text(visible(tree.prompt_id)),
            Text(visible(tree.task)),
            str(stats.leaves),
            str(stats.nodes),
            str(stats.forks),
            str(stats.top_ups),
            str(len(tree.calls)),
            str(tree.n_tokens),
            f"{stats.unique / stats.flat:.2f}" if stats.flat else "–",
            f"{stats.rewards.mean():.2f}±{stats.rewards.std():.2f}" if stats.rewards.size else "–",
            f"{int(stats.correct.sum())}/{stats.correct.size}",
            _span(stats.version_min, stats.version_max),
        )
    return grid


def sparkline(values: Sequence[float], top: float, width: int = 64) -> str:
    """A bar per value, NaN a space; of more than ``width`` values, the maximum of each stretch."""
    if len(values) > width:
        values = [max(part.tolist()) for part in np.array_split(np.asarray(values, np.float64), width)]
    return "".join(
        _BARS[min(len(_BARS) - 1, int(max(value, 0.0) / max(top, 1e-9) * len(_BARS)))]
        if math.isfinite(value)
        else " "
        for value in values
    )


def pieces(decode: Decode, tokens: NDArray[np.int32]) -> list[str]:
    """[k] the text each token adds; a character spread over several tokens belongs to the last of them."""
    shown, done = [], ""
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[:end])
        if text.endswith("\ufffd") and end < len(tokens):
            shown.append("")
            continue
        shown.append(text[len(done) :])
        done = text
    return shown


def _head(tree: Tree, view: View) -> Text:
    stats = TreeStats.of(tree)
    first = [f"{visible(tree.prompt_id)}  {visible(tree.task)}"]
    if stats.rewards.size:
        first.append(f"reward {stats.rewards.mean():.3f} ± {stats.rewards.std():.3f}")
    origins = ((stats.roots, "root"), (stats.forks, "fork"), (stats.top_ups, "top-up"))
    budget = tree.budget or stats.leaves
    leaves = f"episodes in {_count(tree.n_leaves, 'chain')}" if tree.episode.size else "leaves"
    first.append(f"{stats.leaves} of {budget} {leaves}: " + ", ".join(_count(*origin) for origin in origins))
    second = [_count(len(tree.calls), "tool call"), _count(tree.n_tokens, "token")]
    if stats.flat:
        second[-1] += f", {stats.unique / stats.flat:.0%} of the flattened paths'"
    second.append(f"{stats.seconds:.1f} s")
    if view.credit:
        second.append(f"advantages: {view.credit}, within this tree")
    head = Text.assemble(("  ·  ".join(first), "bold"), "\n", ("  ·  ".join(second), "dim"))
    if tree.guided:
        head.append(f"\nguided by {_count(tree.guide, 'action')}, sampled from: ", "dim")
        head.append(_shorten(visible(view.decode(tree.sampled_prompt), view.full), view))
    for key in ("question", "answer", "answers", "gold"):
        if key in tree.meta:
            value: Any = tree.meta[key]
            value = " | ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            head.append(f"\n{key}: ", "dim")
            head.append(visible(value))
    return head


def _node_line(tree: Tree, node: int, calls: Sequence[ToolCall], view: View) -> Text:
    kind = Kind(int(tree.kind[node]))
    begin, end = int(tree.start[node]), int(tree.end[node])
    line = Text.assemble((f"{kind.name.lower():<6}", "bold"), (f"{end - begin:>4} tok", "dim"))
    if kind == Kind.MODEL and end > begin:
        versions = tree.version[begin:end]
        entropy = tree.entropy[begin:end]
        known = entropy[np.isfinite(entropy)]
        line.append(f"  v{_span(versions.min(), versions.max())}", "magenta")
        line.append(f"  H {known.mean():.2f}" if known.size else "  H ?", "dim")
    for call in calls:
        status = visible(str(call.status))
        line.append(f"  {visible(call.tool)} ", "bold cyan")
        line.append(status, "green" if status == "ok" else "bold red")
        line.append(f" {latency(call.latency_s)}", "dim")
        line.append(" cached" if call.cached else "", "dim")
        line.append(f" {call.attempts} attempts" if call.attempts > 1 else "", "yellow")
    line.append("\n" if view.full else "  ")
    return line.append_text(_body(tree, node, kind, view))


def _body(tree: Tree, node: int, kind: Kind, view: View) -> Text:
    """A node's text; the model's begins with what the chat template opened for it."""
    body = _written(tree, int(tree.start[node]), int(tree.end[node]), kind, view)
    above = int(tree.parent[node])
    if kind != Kind.MODEL or above < 0 or tree.kind[above] == Kind.MODEL:
        return body
    before = tree.tokens[int(tree.start[above]) : int(tree.end[above])][-OPENING_TOKENS:]
    return Text().append(visible(opening(view.decode(before)), view.full), "dim").append_text(body)


def _written(tree: Tree, begin: int, end: int, kind: Kind, view: View) -> Text:
    """The text of tokens of one author."""
    if not (view.entropy and kind == Kind.MODEL):
        return Text(_shorten(visible(view.decode(tree.tokens[begin:end]), view.full), view), _STYLE[kind])
    body, length = Text(), 0
    for text, entropy in zip(
        pieces(view.decode, tree.tokens[begin:end]), tree.entropy[begin:end].tolist(), strict=True
    ):
        text = visible(text, view.full)
        length += len(text)
        if length > view.text_limit and not view.full:
            return body.append(" …")
        heat = int(np.searchsorted((0.5, 1.0, 2.0), entropy)) if math.isfinite(entropy) else 0
        body.append(text, _HEAT[heat])
    return body


def _entropy_line(tree: Tree, node: int) -> Text:
    entropy = tree.entropy[int(tree.start[node]) : int(tree.end[node])]
    top = float(np.nanmax(tree.entropy, initial=0.0))
    here = entropy[np.isfinite(entropy)]
    peak = f"  peak {here.max():.2f} nats" if here.size else ""
    return Text.assemble(
        ("       entropy ", "dim"), (sparkline(entropy.tolist(), top), "yellow"), (peak, "dim")
    )


def _fork_line(fork: ForkDecision) -> Text:
    line = Text.assemble(
        ("       fork?  ", "dim"), f"ΔH {_number(fork.delta_h, '+.3f')}  P {_number(fork.probability)}"
    )
    if math.isfinite(fork.draw):
        line.append(f"  draw {fork.draw:.3f}")
    verdict = f"  → {_count(fork.forks, 'fork')}" if fork.forks else "  → no"
    if fork.scheduled:
        verdict += f", {fork.scheduled} by the schedule"
    return line.append(verdict, "bold green" if fork.forks else "dim")


def _leaf_line(tree: Tree, leaf: int, view: View) -> Text:
    reward, correct = float(tree.reward[leaf]), int(tree.correct[leaf])
    mark, style = {1: ("✓", "bold green"), 0: ("✗", "bold red")}.get(correct, ("?", "bold yellow"))
    line = Text.assemble((f"{mark} leaf {leaf}", style))
    line.append(f" of episode {tree.episode[leaf]}" if tree.episode.size else "", style)
    line.append(f"  reward {reward:.3f}" if math.isfinite(reward) else "  not scored")
    line.append(f"  A {_number(float(view.advantage[leaf]), '+.3f')}", "bold")
    outcome, origin = Outcome(int(tree.outcome[leaf])), Origin(int(tree.origin[leaf]))
    line.append(f"  {_words(outcome.name)}, {_words(origin.name)}", "dim")
    return line.append(f"  ({told})", "dim") if (told := told_of(tree, leaf)) else line


def told_of(tree: Tree, leaf: int) -> str:
    """What the rewards said of a leaf, by name; or why it has no score."""
    number = int(tree.episode[leaf]) if tree.episode.size else leaf
    if why := tree.meta.get("unscored", {}).get(str(number)):
        return one_line(why)
    parts = tree.meta.get("parts", ())
    said = (parts[number] if number < len(parts) else None) or {}
    return ", ".join(f"{name} {said[name]:.3g}" for name in tree.meta.get("measured", ()) if name in said)


def _shorten(text: str, view: View) -> str:
    """The head and the tail: a call and an answer stand at the end of what a model writes."""
    if view.full or len(text) <= view.text_limit:
        return text
    tail = view.text_limit // 3
    return f"{text[: view.text_limit - tail].rstrip()} … {text[-tail:].lstrip()}"


def _by_node(pairs: Iterable[tuple[int, T]]) -> dict[int, list[T]]:
    found: dict[int, list[T]] = defaultdict(list)
    for node, item in pairs:
        found[node].append(item)
    return found


def latency(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"


def _words(name: str) -> str:
    return name.lower().replace("_", " ")


def _number(value: float, style: str = ".3f") -> str:
    return format(value, style) if math.isfinite(value) else "?"
