"""What a run starts from: model, documents, demonstrations.

Whether they are to be had has been asked before (:mod:`system.doctor.preflight`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from system.config import Config
from system.learn.schedule import warm_start_lr
from system.rollout.chat import make_chat, planned_syntax
from system.tasks.base import HasCorpus, HasDemonstrations, HasTokenizer, Task
from system.tasks.demos import demonstration_tree
from system.text import as_text
from system.tree.record import Tree


def make_model(path: Path, config: Config, task: Task) -> None:
    """Make the tiny new model, unless it is there."""
    if (path / "config.json").is_file():
        return
    from transformers.utils.logging import disable_progress_bar

    from system.tasks.tiny_model import create_model  # slow imports

    assert isinstance(task, HasTokenizer)
    disable_progress_bar()  # of saving weights, which would break into our own
    partial = path.with_name(path.name + ".partial")  # a run killed meanwhile must not find half a model
    create_model(partial, task.tokenizer(), config.model, config.run.seed)
    partial.rename(path)


def corpus_file(config: Config, task: Task, directory: Path) -> Path | None:
    """What the search server indexes: the configured file, or the task's own documents written to
    ``directory``; None where no search server is started.
    """
    if "search" not in config.tools.names or config.tools.search_url:
        return None
    if config.tools.corpus:
        return Path(config.tools.corpus)
    assert isinstance(task, HasCorpus)
    path = directory / "corpus.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for document in task.corpus():
            file.write(as_text(json.dumps(document, ensure_ascii=False)) + "\n")
    return path


def demonstrations(config: Config, task: Task, model: Path) -> list[Tree]:
    """The task's demonstrations as single-leaf trees."""
    assert isinstance(task, HasDemonstrations)
    from transformers import AutoTokenizer  # slow import

    tokenizer = AutoTokenizer.from_pretrained(model)
    chat = make_chat(config, tokenizer, str(model), planned_syntax(config))
    made = task.demonstrations(config.warmstart.demos, config.run.seed)
    return [demonstration_tree(one, chat) for one in made]


def warm_start(config: Config, demonstrations: Sequence[Tree]) -> Iterator[tuple[list[Tree], float]]:
    """The batches of the warm start and the learning rate of each, in an order by the run's seed."""
    settings, rng = config.warmstart, np.random.default_rng(config.run.seed)
    passes = -(-settings.steps * settings.batch // len(demonstrations))
    order = np.concatenate([rng.permutation(len(demonstrations)) for _ in range(passes)])
    for step in range(settings.steps):
        rows = order[step * settings.batch : (step + 1) * settings.batch]
        yield [demonstrations[i] for i in rows], warm_start_lr(step, settings.steps, settings.lr)
