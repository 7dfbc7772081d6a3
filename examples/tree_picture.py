"""A run's trees in your own code: one of them as a picture (SVG), from left to right, one row per leaf.

    python examples/tree_picture.py runs/quickstart-s0 17 > tree.svg

17 is the number in `espalier tree runs/quickstart-s0 --list`.  A line is as wide as the leaves are many that
share what it leads to.  Whatever a model or a tool wrote is escaped: it can neither add an element nor end
one.
"""

from __future__ import annotations

import math
import re
import sys
import textwrap
from html import escape
from itertools import islice

import numpy as np

from system.observe.outline import View, visible
from system.observe.rundir import RunDir
from system.observe.show import view
from system.tree.record import ForkDecision, Kind, ToolCall, Tree
from system.tree.store import read_trees

COLUMN, ROW, HEAD = 200, 58, 62  # px between columns and rows, px above the first row
WIDTH, HEIGHT = 170, 48  # px of a box
LINES, CHARACTERS = 3, 27  # of the text in a box
_FILL = {Kind.PROMPT: "#E8EAED", Kind.MODEL: "#DCEBFA", Kind.TOOL: "#FDF0D2", Kind.EXPERT: "#E3F4E1"}
_LEGEND = {"question": _FILL[Kind.PROMPT], "model": _FILL[Kind.MODEL], "tool": _FILL[Kind.TOOL]}
_GREEN, _RED, _GREY, _BLACK = "#00794F", "#C2410C", "#5F6368", "#202124"
_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def picture(tree: Tree, how: View) -> str:
    """The tree as the text of an SVG file."""
    parent, end = tree.parent.tolist(), tree.leaf.tolist()  # end: leaf -> its node
    leaves = sorted(range(len(end)), key=lambda leaf: end[leaf])  # from top to bottom
    depth = [0] * len(parent)
    for node in range(1, len(parent)):  # depth first: a parent stands before its children
        depth[node] = depth[parent[node]] + 1
    rows: list[list[int]] = [[] for _ in parent]  # of the leaves at or below a node
    for row, leaf in enumerate(leaves):
        node = end[leaf]
        while node >= 0:
            rows[node].append(row)
            node = parent[node]
    place = [
        (12 + COLUMN * d, HEAD + ROW * sum(r) / max(len(r), 1)) for d, r in zip(depth, rows, strict=True)
    ]
    calls, forks = {call.node: call for call in tree.calls}, {fork.node: fork for fork in tree.forks}
    drawn = [_edge(place[parent[n]], place[n], len(rows[n])) for n in range(1, len(parent))]
    for node, (x, y) in enumerate(place):
        drawn += _box(tree, node, x, y, how, calls.get(node), forks.get(node))
    for row, leaf in enumerate(leaves):
        drawn += _leaf(tree, leaf, place[end[leaf]][0], HEAD + ROW * row, how)
    for number, (word, fill) in enumerate(_LEGEND.items()):
        drawn.append(f'<rect x="{12 + 80 * number}" y="34" width="10" height="10" fill="{fill}"/>')
        drawn.append(_text(26 + 80 * number, 43, word, _GREY))
    drawn.append(f'<circle cx="257" cy="39" r="4" fill="{_GREEN}"/>')
    drawn.append(_text(266, 43, "forked here; H is the mean entropy of the tokens, ΔH its rise", _GREY))
    width, height = COLUMN * (max(depth) + 1) + 170, HEAD + ROW * max(len(leaves), 1) + 4
    title = f"{tree.prompt_id}: {how.decode(tree.tokens[: int(tree.end[0])])}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
            ' font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="10">',
            f"<title>{_safe(title)}</title>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#FFFFFF"/>',
            _text(12, 22, title, _BLACK, size=13),
            *drawn,
            "</svg>",
            "",
        ]
    )


def _box(
    tree: Tree, node: int, x: float, y: float, how: View, call: ToolCall | None, fork: ForkDecision | None
) -> list[str]:
    kind, begin, end = Kind(int(tree.kind[node])), int(tree.start[node]), int(tree.end[node])
    text = visible(how.decode(tree.tokens[begin:end])).strip("↵ ")
    lines = textwrap.wrap(text, CHARACTERS, max_lines=LINES, placeholder=" …")
    notes = [f"{call.tool}: {call.status}" if call else f"{end - begin} tokens"]
    entropy = tree.entropy[begin:end]
    if kind == Kind.MODEL and np.isfinite(entropy).any():
        notes.append(f"H {np.nanmean(entropy):.2f}")
    if fork is not None:
        notes.append(f"ΔH {fork.delta_h:+.3f}")
    drawn = [f'<rect x="{x}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="4" fill="{_FILL[kind]}"/>']
    drawn += [_text(x + 5, y + 11 + 11 * i, line, _BLACK) for i, line in enumerate(lines)]
    drawn.append(_text(x + 5, y + HEIGHT - 4, "  ".join(notes), _GREY, size=8))
    if fork is not None and fork.forks:
        drawn.append(f'<circle cx="{x + WIDTH}" cy="{y + HEIGHT / 2:g}" r="4" fill="{_GREEN}"/>')
    return drawn


def _leaf(tree: Tree, leaf: int, x: float, y: float, how: View) -> list[str]:
    """Beside the box at ``x`` that the branch ends with, in the leaf's own row at ``y``."""
    reward, advantage = float(tree.reward[leaf]), float(how.advantage[leaf])
    colour = {1: _GREEN, 0: _RED}.get(int(tree.correct[leaf]), _GREY)
    scored = f"reward {reward:.2f}  A {advantage:+.2f}" if math.isfinite(reward) else "not scored"
    x, y = x + WIDTH + 14, y + HEIGHT / 2
    return [
        f'<circle cx="{x}" cy="{y:g}" r="5" fill="{colour}"/>',
        _text(x + 10, y + 4, scored, colour, size=11),
    ]


def _edge(start: tuple[float, float], end: tuple[float, float], leaves: int) -> str:
    (x0, y0), (x1, y1) = start, end
    x0, y0, y1 = x0 + WIDTH, y0 + HEIGHT / 2, y1 + HEIGHT / 2
    middle = (x0 + x1) / 2
    curve = f"M{x0:g} {y0:g}C{middle:g} {y0:g} {middle:g} {y1:g} {x1:g} {y1:g}"
    return f'<path d="{curve}" fill="none" stroke="#9AA0A6" stroke-width="{1 + leaves}"/>'


def _text(x: float, y: float, text: str, colour: str, size: int = 10) -> str:
    place = f'x="{x:g}" y="{y:g}" fill="{colour}" font-size="{size}" xml:space="preserve"'
    return f"<text {place}>{_safe(text)}</text>"


def _safe(text: str) -> str:
    """``text`` as XML text: nothing that acts on a reader, nothing that XML forbids, markup escaped."""
    return escape(_NOT_XML.sub("\ufffd", visible(text)))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/tree_picture.py RUN NUMBER > tree.svg")
    run, number = RunDir.open(sys.argv[1]), int(sys.argv[2])
    for tree in islice(read_trees(run.trees), number, number + 1):
        print(picture(tree, view(run, run.config(), tree)), end="")
        sys.exit()
    sys.exit(f"{sys.argv[1]} keeps no tree of number {number}")
