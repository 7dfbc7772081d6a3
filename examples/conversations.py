"""Writes what `examples/first.yaml` learns from: conversations, documents to search, and a tiny new model.

    python examples/conversations.py [DIRECTORY]        (first)

`conversations.jsonl` is in the form of ARPO-SFT-54K: the tools' results stand within what the assistant says.
Each row has its gold answer as well, so that reinforcement learning asks the same file; `held-out.jsonl`
has questions that are not in it.  A model of one's own needs none of the rest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from system.config import Config
from system.tasks.quickstart.task import QuickstartTask
from system.tasks.tiny_model import create_model
from system.tree.prompt import Prompt

SYSTEM = ""  # the words that tell a real model of its tools and tags; the tiny one learns them


def conversation(prompt: Prompt, segments: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """A row: the question, all that was said and answered in one text, and the gold answer."""
    said = "".join(text for _, text in segments)
    asked = prompt.messages[-1]["content"]
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    return {"conversations": turns, "system": SYSTEM, "answer": prompt.answers[0], "kind": prompt.kind}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main(directory: Path, rows: int = 2048, held_out: int = 200) -> None:
    config = Config()
    config.task.eval_size, config.tools.search_top_k = held_out, 2
    task = QuickstartTask(config)
    directory.mkdir(parents=True, exist_ok=True)
    shown = [(one.prompt, one.segments) for one in task.demonstrations(rows, seed=0)]
    write(directory / "conversations.jsonl", (conversation(*one) for one in shown))
    asked = ((prompt, [("model", prompt.answers[0])]) for prompt in task.eval())
    write(directory / "held-out.jsonl", (conversation(*one) for one in asked))
    write(directory / "documents.jsonl", task.corpus())
    create_model(directory / "model", task.tokenizer(), config.model, seed=0)
    print(f"{directory}: {rows} conversations, {held_out} held-out questions, a tiny model")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "first"))
