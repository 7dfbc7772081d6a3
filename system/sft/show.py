"""Conversations as the learner gets them, for people: what is learned of them and what is read only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from system.config import Config, ConfigError
from system.rollout.encode import local_tokenizer
from system.sft.data import TOLD, read
from system.sft.prepare import make_encoder
from system.tasks.columns import RowUnusable
from system.tree.record import Kind

_NAMES = {Kind.PROMPT: "prompt", Kind.MODEL: "LEARNED", Kind.TOOL: "read only"}


def shown_examples(config: Config, count: int) -> Iterator[str]:
    """The first ``count`` conversations that are trained on, in lines, special tokens included; rows that
    cannot be used with the reason, and how many they are.

    Raises ConfigError as a run would, but for single rows, and where there is no tokenizer yet.
    """
    if not config.model.path:
        raise ConfigError("model.path is empty: name the model whose tokenizer and template are used")
    model = Path(config.model.path)
    tokenizer, encoder = local_tokenizer(str(model)), make_encoder(config, model)
    most = config.sft.max_tokens or config.engine.max_context
    data = read(replace(config.sft, skip=1.0), config.run.seed)  # a run would end for unusable rows
    unusable = len(data.faults)
    for one in data.train[:count]:
        try:
            found = encoder.example(one)
        except RowUnusable as error:
            unusable += 1
            yield f"--- UNUSABLE: {error}"
            continue
        size = found.tokens.size
        long = f", longer than {most}: {config.sft.too_long}" if size > most else ""
        yield f"--- {one.where}: {size} tokens, {found.learned} of them learned{long}"
        for kind, start, end in zip(found.kind, found.start, found.end, strict=True):
            text = tokenizer.decode(found.tokens[start:end].tolist(), clean_up_tokenization_spaces=False)
            yield f"[{_NAMES[Kind(kind)]}, {end - start} tokens] {text}"
    yield from (f"--- UNUSABLE: {fault}" for fault in data.faults[:TOLD])
    if unusable:
        rows = len(data.train) + len(data.held_out) + len(data.faults)
        lets = int(config.sft.skip * rows)
        yield (
            f"{config.sft.path}: {unusable} of {rows} rows are unusable so far (only those shown were "
            f"encoded); sft.skip={config.sft.skip:g} lets {lets} be left out"
        )
