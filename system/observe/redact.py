"""Keep secrets out of what is logged or sent away: a configuration may hold an API key or a password."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<redacted>"

_SECRET_WORDS = frozenset(
    {"key", "apikey", "secret", "token", "password", "passwd", "passphrase"}
    | {"credential", "credentials", "auth", "authorization", "bearer"}
)
_SECRET_VALUE = re.compile(
    r"(sk|pk|hf|ghp|gho|ghs|glpat|xox[abprs]|github_pat)[-_][A-Za-z0-9_-]{10,}"  # vendors' prefixes
    r"|AKIA[0-9A-Z]{16}"  # AWS access key
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # JSON web token
    r"|(?i:bearer|basic)\s+[A-Za-z0-9._~+/=-]{10,}"
    r"|^[0-9a-f]{40}$"  # Weights & Biases
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_URL_USER = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/@\s]+@")
_URL_QUERY = re.compile(
    r"(?P<name>[?&][\w.-]*(?:key|token|secret|password|auth|sig|signature)[\w.-]*=)[^&\s#]+", re.I
)


def redact(value: Any, name: str = "") -> Any:
    """``value`` with secrets hidden, found by the name of their key, by their look, or as part of a URL."""
    if isinstance(value, Mapping):
        return {key: redact(item, f"{name}_{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, name) for item in value]
    if not isinstance(value, str) or not value:
        return value  # a number is a limit or a count (max_response_tokens), not a secret
    if _SECRET_WORDS & set(_words(name)) or _SECRET_VALUE.search(value):
        return HIDDEN
    value = _URL_USER.sub(rf"\g<scheme>{HIDDEN}@", value)
    return _URL_QUERY.sub(rf"\g<name>{HIDDEN}", value)


def _words(name: str) -> list[str]:
    """``searchApi_key`` -> search, api, key."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_").split("_")
