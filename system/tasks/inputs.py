"""What a run starts from: model, documents.

Whether they are to be had has been asked before (:mod:`system.doctor.preflight`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from system.config import Config
from system.tasks.base import HasCorpus, Task
from system.text import as_text
from system.whole import appearing

if TYPE_CHECKING:  # a slow import
    from transformers import PreTrainedTokenizerBase


def make_model(path: Path, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tiny new model, unless it is there."""
    if (path / "config.json").is_file():
        return
    from transformers.utils.logging import disable_progress_bar

    from system.tasks.tiny_model import create_model  # slow imports

    disable_progress_bar()  # of saving weights, which would break into our own
    with appearing(path) as partial:  # a run killed meanwhile must not find half a model
        create_model(partial, tokenizer, config.model, config.run.seed)


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
    partial = path.with_name(
        f".{path.name}.{os.getpid()}"
    )  # the search of another run of a study may be reading
    with partial.open("w", encoding="utf-8") as file:
        for document in task.corpus():
            file.write(as_text(json.dumps(document, ensure_ascii=False)) + "\n")
    return partial.replace(path)
