from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from observe_trees import NAN, make_tree
from rich.console import Console

from system.config import Config
from system.observe.outline import View, outline, pieces, sparkline, table
from system.observe.rundir import RunDir
from system.observe.show import view
from system.observe.terminal import visible
from system.tree.record import ForkDecision, ToolCall, Tree

ADVANTAGE = np.array([0.7, -0.7, 0.0], np.float32)


def words(tokens: NDArray[np.int32]) -> str:
    return "".join(f"t{token} " for token in tokens.tolist())


def shown(tree: Tree, colour: bool = False, **options: object) -> str:
    out = io.StringIO()
    view = View(**{"decode": words, "advantage": ADVANTAGE, "credit": "arpo-soft", **options})  # type: ignore[arg-type]
    Console(file=out, width=160, force_terminal=colour, highlight=False).print(outline(tree, view))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def test_the_whole_outline(tree: Tree):
    assert shown(tree) == (
        "q1  lookup  ·  reward 0.500 ± 0.500  ·  3 of 3 leaves: 2 roots, 1 fork, 0 top-ups\n"
        "1 tool call  ·  22 tokens, 64% of the flattened paths'  ·  2.5 s  "
        "·  advantages: arpo-soft, within this tree\n"
        "question: Who wrote it?\n"
        "answers: Ada | A. Lovelace\n"
        "\n"
        "prompt   4 tok  t0 t1 t2 t3\n"
        "├── model    3 tok  v3  H 0.50  t4 t5 t6\n"
        "│   tool     2 tok  search ok 250 ms cached 2 attempts  t7 t8\n"
        "│          fork?  ΔH +0.125  P 0.525  draw 0.310  → 1 fork\n"
        "│   ├── model    2 tok  v3  H 0.95  t9 t10\n"
        "│   │   ✓ leaf 0  reward 1.000  A +0.700  stopped, root\n"
        "│   └── model    5 tok  v3  H 1.30  t11 t12 t13 t14 t15\n"
        "│       ✗ leaf 1  reward 0.000  A -0.700  length, fork\n"
        "└── model    6 tok  v3  H 1.85  t16 t17 t18 t19 t20 t21\n"
        "    ? leaf 2  not scored  A +0.000  deadline, root"
    )


def test_a_leaf_shows_what_each_reward_said_or_why_it_has_no_score(tree: Tree):
    parts = [{"arpo": 1.1, "judge": 0.25, "other": 3.0}, {"arpo": 0.0}, None]
    why = {"2": "reward judge: HTTP 500\n\x1b[2J"}
    told = replace(tree, meta={**tree.meta, "parts": parts, "measured": ["arpo", "judge"], "unscored": why})
    ends = [line.rpartition("  (")[2] for line in shown(told).splitlines() if "leaf" in line and "A " in line]
    assert ends == ["arpo 1.1, judge 0.25)", "arpo 0)", "reward judge: HTTP 500 [2J)"]


def test_chains_of_one_episode_say_whose_they_are(tree: Tree):
    text = shown(replace(tree, episode=np.array([0, 1, 1], np.int32)))
    assert "2 of 3 episodes in 3 chains" in text
    assert [line.partition("leaf ")[2][:14] for line in text.splitlines() if " leaf " in line] == [
        "0 of episode 0",
        "1 of episode 1",
        "2 of episode 1",
    ]


@pytest.mark.parametrize("credit", ["grpo", "vineppo", "gigpo"])
def test_a_chain_shows_the_advantage_of_its_episode(tree: Tree, tmp_path: Path, credit: str):
    config = Config()
    config.learn.credit.name = credit
    one = replace(
        tree,
        episode=np.array([0, 0, 1], np.int32),
        reward=np.array([1, 1, 0], np.float32),
        correct=np.array([1, 1, 0], np.int8),
        outcome=np.zeros(3, np.int8),
        origin=np.zeros(3, np.int8),
    )
    first, second, other = view(RunDir(tmp_path), config, one).advantage.tolist()
    assert first == pytest.approx(second) or credit == "gigpo"  # whose steps differ
    assert second > 0 > other


def test_a_leaf_where_a_sibling_went_on_is_shown_beside_it():
    text = shown(replace(make_tree(), leaf=np.array([2, 4, 5], np.int32)))
    lines = [line for line in text.splitlines() if "leaf 0" in line]
    assert len(lines) == 1
    assert lines[0].startswith("│   ├── ✓ leaf 0")


def test_versions_within_a_node_and_unknown_entropies(tree: Tree):
    version = tree.version.copy()
    version[4] = 2
    text = shown(replace(tree, version=version, entropy=np.full_like(tree.entropy, NAN)), entropy=True)
    assert "v2–3  H ?" in text


def test_declined_forks_and_failed_calls(tree: Tree):
    text = shown(
        replace(
            tree,
            forks=(ForkDecision(2, -0.5, 0.4, NAN, 0),),
            calls=(ToolCall(2, "python", {}, "timeout", 12.0),),
        )
    )
    assert "ΔH -0.500  P 0.400  → no" in text
    assert "python timeout 12.0 s" in text


def test_what_the_template_opened_is_shown_with_what_the_model_wrote(tree: Tree):
    def decode(tokens: NDArray[np.int32]) -> str:
        return words(tokens) + "\n<think>\n" * (tokens[-1] in (3, 8))  # the prompt's last, the tool's last

    text = shown(tree, decode=decode)
    assert "model    3 tok  v3  H 0.50  <think>↵t4 t5 t6" in text
    assert "model    2 tok  v3  H 0.95  <think>↵t9 t10" in text


def test_colour_on_terminals_only(tree: Tree):
    assert "\x1b" not in shown(tree, entropy=True)
    assert "\x1b[" in shown(tree, colour=True)


def test_hostile_text_cannot_drive_the_terminal_nor_the_markup(tree: Tree):
    evil = "\x1b]0;owned\x07\x9b31m[red]x[/red]\u202eabc\r\nnext\x7f"
    text = shown(tree, decode=lambda tokens: evil)
    assert not any(ord(char) < 32 and char != "\n" for char in text)
    assert not set("\x7f\x9b\u202e") & set(text)
    assert "[red]x[/red]" in text
    assert "\x1b[" not in shown(
        replace(tree, prompt_id="\x1b[31m", task="\x1b[0m", meta={"question": "\x1b[1m"})
    )


def test_long_texts_keep_head_and_tail_unless_full(tree: Tree):
    long = "START " + "x" * 2000 + "\nEND"
    text = shown(tree, decode=lambda tokens: long)
    assert "START" in text
    assert " … " in text
    assert text.count("x") < 6 * 250
    full = shown(tree, decode=lambda tokens: long, full=True)
    assert full.count("x") == 6 * 2000
    assert "↵" not in full


def test_entropy_bars_span_the_tree(tree: Tree):
    bars = [
        line.split("entropy ")[1].split()[0]
        for line in shown(tree, entropy=True).splitlines()
        if "peak" in line
    ]
    assert [len(bar) for bar in bars] == [3, 2, 5, 6]
    assert bars[-1][-1] == "█"


def test_sparkline():
    assert sparkline([0.0, 1.0, 2.0, NAN], 2.0) == "▁▅█ "
    assert sparkline([0.0] * 100 + [2.0], 2.0, width=10) == "▁" * 9 + "█"
    assert sparkline([0.0], 0.0) == "▁"


@pytest.mark.parametrize("text", ["plain", "née", "日本", "a🙂b"])
def test_pieces_join_to_the_text_even_across_bytes(text: str):
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(part: NDArray[np.int32]) -> str:
        return bytes(part.tolist()).decode("utf-8", "replace")

    parts = pieces(decode, tokens)
    assert len(parts) == len(tokens)
    assert "".join(parts) == text


def test_visible_keeps_breaks_only_when_asked():
    assert visible("a\r\nb\nc\td") == "a↵b↵c  d"
    assert visible("a\nb", breaks=True) == "a\nb"


def test_table_has_a_row_per_tree(tree: Tree):
    out = io.StringIO()
    Console(file=out, width=140).print(
        table([(3, tree), (17, make_tree("q2", (1.0, 1.0, 1.0), task="calc"))])
    )
    header, first, second = (line.split() for line in out.getvalue().splitlines())
    assert header[0] == "#"
    assert first == ["3", "q1", "lookup", "3", "6", "1", "0", "1", "22", "0.64", "0.50±0.50", "1/2", "3"]
    assert second[:3] == ["17", "q2", "calc"]
    assert "3/3" in second


def test_a_guided_tree_shows_what_it_was_sampled_from(tree: Tree):
    text = shown(replace(tree, sampled_prompt=np.array([90, 91], np.int32), guide=2))
    assert "\nguided by 2 actions, sampled from: t90 t91\n" in text
    assert "\nprompt   4 tok  t0 t1 t2 t3\n" in text
