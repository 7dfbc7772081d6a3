"""The quickstart's words, a token each; numbers are pairs of digits."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerFast

from system.tasks import tiny_tokenizer
from system.tasks.quickstart.questions import OPERATORS
from system.tasks.quickstart.world import FIGURES, LINKS, NAMES, NUMBERS, TYPES


def build() -> PreTrainedTokenizerFast:
    """The tokenizer, ready for ``save_pretrained``."""
    return tiny_tokenizer.build(_pieces())


def _pieces() -> Iterator[str]:
    yield from tiny_tokenizer.syntax("search", "python")
    yield from ("Q:", " 's", " ?", " \\boxed{", " }", " print(", ")", ":", " done")
    for word, sign in OPERATORS.items():
        yield f" {word}"
        yield f" {word} "  # before a number, which has no space of its own
        yield sign
    yield "Q: "
    for kind in (*TYPES, FIGURES):
        yield f" {kind}"  # in a query
        yield kind  # at the start of a document
    for kind in TYPES:
        for relation in (*LINKS[kind], *NUMBERS[kind]):
            yield f" {relation.word}"
            yield f" {relation.field}:"
        yield from (f" {name}" for name in NAMES[kind])
    yield from tiny_tokenizer.numbers()
