"""The quickstart's tokenizer: one token per word, numbers in pairs of digits, and text that decodes to
itself.

Each token's text is fixed and carries its own leading space (" home:"), so decoding is concatenation, any
run of tokens decodes to text that encodes back to the same tokens, and model-written code decodes to valid
Python: ``47`` and ``1645`` are [47] and [16][45] with no space in between.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from system.tasks.quickstart.questions import OPERATORS
from system.tasks.quickstart.world import FIGURES, LINKS, NAMES, NUMBERS, TYPES

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
_SPECIAL = (PAD, EOS, UNKNOWN)


def pieces() -> list[str]:
    """Every token text in order of its id, special tokens first."""
    return list(dict.fromkeys([*_SPECIAL, *_pieces()]))


def _pieces() -> Iterator[str]:
    for tag in ("think", "search", "python", "answer"):
        yield f" <{tag}>"
        yield f" </{tag}>"
    yield from (" <result>\n", "\n</result>", "\n")
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
    yield from (f"{n:02d}" for n in range(100))
    yield from (str(n) for n in range(10))


def build() -> PreTrainedTokenizerFast:
    """The tokenizer, ready for ``save_pretrained``."""
    vocabulary = {piece: i for i, piece in enumerate(pieces())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    # Longest token first; what no token covers becomes one unknown token per word.
    ordinary = sorted((p for p in vocabulary if p not in _SPECIAL), key=len, reverse=True)
    words = [re.escape(p) + (r"(?=\d)" if p.endswith(" ") else "") for p in ordinary]
    pattern = "|".join([*words, r" ?[A-Za-z]+", r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
