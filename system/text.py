"""Text from outside: made valid where it comes in, short and plain where it is shown."""

from __future__ import annotations

import traceback
from pathlib import Path

MOST = 300  # characters of a line


def as_text(value: object) -> str:
    """``value`` as text that UTF-8 can hold.

    A lone surrogate becomes U+FFFD, bytes are read as UTF-8, None is empty, and anything else is what
    ``str`` makes of it.
    """
    if value is None:
        return ""
    text = value.decode(errors="replace") if isinstance(value, bytes | bytearray) else str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def one_line(value: object) -> str:
    """``value`` for a terminal or a log: one line of printable characters, of at most ``MOST``."""
    printable = (char if char.isprintable() else " " for char in as_text(value)[: 8 * MOST])
    line = " ".join("".join(printable).split())
    return line if len(line) <= MOST else f"{line[: MOST - 1]}…"


def shown(value: object, most: int = 200) -> str:
    """``value`` in an error's message, cut to ``most`` characters; of one that cannot be shown, its class."""
    try:
        return as_text(repr(value))[:most]
    except Exception:  # of somebody else's class; or a number that is too long, or nested too deeply
        return f"<{type(value).__name__}>"


def named(error: BaseException) -> str:
    """The kind of an error and its message."""
    try:
        message = as_text(error)
    except Exception:  # an error of somebody else's class may fail at this, too
        message = ""
    kind = type(error).__name__
    return f"{kind}: {message}" if message else kind


def described(error: BaseException) -> str:
    """An error that nobody expected, and where it was raised, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return one_line(named(error)) + where
