from __future__ import annotations

import dataclasses
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from system.observe.outline import View
from system.observe.rundir import RunDir
from system.tree.record import Tree
from system.tree.store import TreeWriter

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.append(str(EXAMPLES))
from tree_picture import picture  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"


def words(tokens: NDArray[np.int32]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def draw(tree: Tree, decode=words) -> ElementTree.Element:
    return ElementTree.fromstring(picture(tree, View(decode=decode, advantage=np.array([0.5, -0.5, 0.0]))))


def texts(drawn: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in drawn.iter(f"{SVG}text")]


def test_nodes_leaves_and_the_fork_are_drawn(tree: Tree) -> None:
    drawn = draw(tree)
    said = texts(drawn)
    assert {"reward 1.00  A +0.50", "reward 0.00  A -0.50", "not scored"} <= set(said)
    assert "search: ok  ΔH +0.125" in said
    width = [path.get("stroke-width") for path in drawn.iter(f"{SVG}path")]
    assert width == ["3", "3", "2", "2", "2"], "a line for each parent and child, wider where leaves share it"


def test_hostile_text_stays_text(tree: Tree) -> None:
    hostile = "</text><script>alert(1)</script>&\"'\x1b[2J\x00\ufffe\u202e<![CDATA["
    call = dataclasses.replace(tree.calls[0], tool=hostile, status="<b>")
    tree = dataclasses.replace(tree, calls=(call,), prompt_id=hostile)
    drawn = draw(tree, lambda tokens: hostile)  # it can be parsed
    assert {one.tag for one in drawn.iter()} == {
        f"{SVG}{t}" for t in ("svg", "title", "rect", "path", "text", "circle")
    }
    assert any("<script>" in text for text in texts(drawn))
    assert not any(set(text) & set("\x1b\x00\ufffe\u202e") for text in texts(drawn))


def test_the_command_draws_a_tree_of_a_run(run_dir: RunDir, tree: Tree) -> None:
    writer = TreeWriter(run_dir.trees, keep=10)
    writer.append(tree)
    writer.flush()
    command = [sys.executable, str(EXAMPLES / "tree_picture.py"), str(run_dir.root), "0"]
    done = subprocess.run(command, env={"PYTHONPATH": str(EXAMPLES.parent)}, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "⟨7⟩" in done.stdout.decode()
