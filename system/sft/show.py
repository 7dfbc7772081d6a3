"""Conversations as the learner gets them, for people: what is learned of them and what is read only."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from system.config import Config, ConfigError
from system.rollout.encode import local_tokenizer
from system.sft.data import read
from system.sft.prepare import make_encoder
from system.tree.record import Kind

_NAMES = {Kind.PROMPT: "prompt", Kind.MODEL: "LEARNED", Kind.TOOL: "read only"}


def shown_examples(config: Config, count: int) -> Iterator[str]:
    """The first ``count`` conversations that are trained on, in lines, special tokens included.

    Raises ConfigError as a run would, and where there is no tokenizer yet.
    """
    if not config.model.path:
        raise ConfigError("model.path is empty: name the model whose tokenizer and template are used")
    model = Path(config.model.path)
    tokenizer, encoder = local_tokenizer(str(model)), make_encoder(config, model)
    most = config.sft.max_tokens or config.engine.max_context
    for one in islice(read(config.sft, config.run.seed).train, count):
        found = encoder.example(one)
        size = found.tokens.size
        long = f", longer than {most}: {config.sft.too_long}" if size > most else ""
        yield f"--- {one.where}: {size} tokens, {found.learned} of them learned{long}"
        for kind, start, end in zip(found.kind, found.start, found.end, strict=True):
            text = tokenizer.decode(found.tokens[start:end].tolist(), clean_up_tokenization_spaces=False)
            yield f"[{_NAMES[Kind(kind)]}, {end - start} tokens] {text}"
