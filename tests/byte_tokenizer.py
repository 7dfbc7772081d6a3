"""The smallest tokenizer that knows every text."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel


def byte_tokenizer(**level: bool) -> Tokenizer:
    """A token for each byte.  ``level``: of ``ByteLevel``."""
    made = Tokenizer(BPE({byte: number for number, byte in enumerate(sorted(ByteLevel.alphabet()))}, []))
    made.pre_tokenizer = ByteLevel(**level)
    return made
