"""Whether servers answer, all asked at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from socket import create_connection
from typing import TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
ANSWER_S = 2.0  # for a server


def unanswered(asked: Mapping[str, str]) -> dict[str, str]:
    """Field -> why it does not answer, of those that do not; all at once, and none for longer than
    :data:`ANSWER_S`, looking up names included.
    """
    found = at_once({field: partial(_fault, address) for field, address in asked.items()})
    faults = {field: found.get(field, f"nothing within {ANSWER_S:g} s") for field in asked}
    return {field: fault for field, fault in faults.items() if fault}


def at_once(calls: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """What each of the calls returns, in threads; nothing for one that takes longer than :data:`ANSWER_S`."""
    found: dict[str, T] = {}

    def one(name: str, call: Callable[[], T]) -> None:
        found[name] = call()

    threads = [threading.Thread(target=one, args=item, daemon=True) for item in calls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ANSWER_S + 0.5)
    return found.copy()


def _fault(address: str) -> str:
    """Why nobody answers at a URL or HOST:PORT.  Any answer of HTTP will do; a redirect is not followed."""
    try:
        url = urlsplit(address if "://" in address else f"//{address}")
        if not url.scheme:
            create_connection((url.hostname or "", url.port), timeout=ANSWER_S).close()
            return ""
        kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
        with closing(kind(url.hostname or "", url.port, timeout=ANSWER_S)) as connection:
            connection.request("GET", f"{url.path.rstrip('/')}/health")
            connection.getresponse()
    except (OSError, ValueError, OverflowError, HTTPException) as error:
        return str(error) or type(error).__name__
    return ""
