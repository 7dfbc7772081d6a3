"""Text from outside, made valid and made short."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from system.text import MOST, as_text, described, named, one_line


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("fox \ud83d", "fox \ufffd"),
        ("\ud83d\ude00", "😀"),  # the two halves of one character
        (b"caf\xc3\xa9 \xff", "café \ufffd"),
        (None, ""),
        (42, "42"),
        ("é 狐狸 😀", "é 狐狸 😀"),
    ],
)
def test_a_text_that_utf8_can_hold(value: object, text: str) -> None:
    assert as_text(value) == text


@given(st.text(st.characters(), max_size=2 * MOST) | st.text(st.characters(categories=["Cs", "Cc"])))
def test_whatever_comes_in(text: str) -> None:
    as_text(text).encode()
    line = one_line(text)
    assert line.isprintable()
    assert len(line) <= MOST
    assert one_line(line) == line


def test_a_terminal_is_told_no_commands() -> None:
    assert one_line("a\x1b[2J\r\nb\u202ec\t d") == "a [2J b c d"
    assert one_line("x" * 1000) == "x" * (MOST - 1) + "…"


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def test_an_error_has_a_name_in_any_case() -> None:
    assert named(KeyError("a")) == "KeyError: 'a'"
    assert named(Mute()) == "Mute"
    with pytest.raises(TypeError) as raised:
        raise TypeError("bad\ntype")
    assert described(raised.value).startswith("TypeError: bad type (test_text.py:")
