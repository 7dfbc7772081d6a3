"""A tokenizer of a task's own words for a new tiny model: a token per word, and text that decodes to itself.

Each token's text is fixed and carries its own leading space (" home:"), so decoding is concatenation, any
run of tokens decodes to text that encodes back to the same tokens, and model-written code decodes to valid
Python: with two digits to a token ``47`` and ``1645`` are [47] and [16][45], with no space in between.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
_SPECIAL = (PAD, EOS, UNKNOWN)


def numbers() -> Iterator[str]:
    """Digits in pairs, then single ones."""
    yield from (f"{n:02d}" for n in range(100))
    yield from (str(n) for n in range(10))


def syntax(*tools: str) -> Iterator[str]:
    """What ARPO's tags are written with (:mod:`system.rollout.syntax.tags`), with a tag for each tool."""
    for tag in ("think", *tools, "answer"):
        yield f" <{tag}>"
        yield f" </{tag}>"
    yield from (" <result>\n", "\n</result>", "\n")


def build(pieces: Iterable[str]) -> PreTrainedTokenizerFast:
    """The tokenizer, ready for ``save_pretrained``: special tokens first, then ``pieces`` in their order.

    A piece that ends with a space stands before a digit only, for a number has no space of its own.
    """
    ids = {piece: i for i, piece in enumerate(dict.fromkeys([*_SPECIAL, *pieces]))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    # Longest token first; what no token covers becomes one unknown token per word.
    ordinary = sorted((p for p in ids if p not in _SPECIAL), key=len, reverse=True)
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
