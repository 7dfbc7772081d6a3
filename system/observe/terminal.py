"""Text of others on a terminal: what a model, a tool, a data file or a server wrote must not drive it.

Whatever is printed goes through :func:`visible`, or through :func:`shown` where it may hold a secret too;
``rich`` gets it as ``Text``, never as markup.  On pages (:mod:`system.bench.report`) it is ``html.escape``.
"""

from __future__ import annotations

from system.redact import redact

_REPLACED = {
    **{code: chr(0x2400 + code) for code in range(32)},
    **{127: "␡", ord("\t"): "  "},
    **dict.fromkeys((0x2028, 0x2029), "␤"),
    **dict.fromkeys(
        (
            *range(0x80, 0xA0),  # control characters of 8 bits: 0x9b begins an escape sequence
            *(0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),  # of direction
            *(0xAD, 0x200B, *range(0x2060, 0x2065), 0xFEFF),  # nothing is seen of them
            *range(0xD800, 0xE000),  # lone surrogates, which cannot be printed
            *range(0xE0000, 0xE0080),  # tags: text that nobody sees
            # Not the joiners (U+200C, U+200D), of which words and emoji are made.
        ),
        "␦",
    ),
}
_LINES = {code: to for code, to in _REPLACED.items() if code != ord("\n")}


def visible(text: str, breaks: bool = False) -> str:
    """``text`` without what acts on a terminal; line breaks become ``↵`` or, with ``breaks``, stay."""
    text = text.replace("\r\n", "\n")
    return text.translate(_LINES) if breaks else text.replace("\n", "↵").translate(_REPLACED)


def shown(text: str) -> str:
    """Lines to print: without secrets, and without what acts on a terminal."""
    return visible(str(redact(text)), breaks=True)
