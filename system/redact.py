"""Keep secrets out of what is shown, logged or sent away: a configuration may hold an API key or a password.

A secret is known by the name it has (a key of a dictionary, ``NAME=…`` in a command, ``Name: …`` in a header,
``--name …``), by its look, or by its place in a URL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<redacted>"

_SECRET_WORDS = frozenset(
    {"key", "apikey", "apikeys", "secret", "secrets", "token", "password", "passwords", "passwd"}
    | {"passphrase", "credential", "credentials", "auth", "authorization", "bearer", "cookie", "cookies"}
)
_SECRET_ENDS = ("password", "passwd", "passphrase", "secret", "token", "apikey", "accesskey", "accountkey")
# A number is a secret by these ends of its name alone: most are limits and counts (max_token, key: 3).
_NUMBERS = re.compile(
    r"(?:password|passwd|passphrase|secret|(?:api|access|account|secret|private)_?key|_pass|_pwd)$"
)
_SAID_OF_KEYS = frozenset(  # in prose, too
    {"key", "token", "auth", "bearer", "credential", "credentials", "cookie", "cookies"}
)
# A word of the shell, or JSON that stands in a JSON text.
_VALUE = re.compile(r"""(?:\\{1,9}"[^"]*"|"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^\s;&"'\\])+""")

_LOOKS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:sk|pk|hf|gh[opsur]|glpat|xox[abeprs]|github_pat|gsk|xai|r8|nvapi|npm|dckr_pat|wandb_v\d"
    r"|tvly|jina|pplx)"
    r"[-_][A-Za-z0-9_-]{10,}"  # vendors' prefixes
    r"|SG\.[\w-]{16,}\.[\w-]{16,}|hooks\.slack\.com/services/[\w/]+"  # SendGrid, Slack
    r"|AIza[\w-]{30,}|ya29\.[\w-]+"  # Google
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}"  # AWS access keys
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # JSON web token
    r"|(?i:bearer|basic)\s+[A-Za-z0-9._~+/=-]{10,})"
    r"|^[0-9a-f]{40}$"  # Weights & Biases, when nothing else stands there
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*-----|\Z)"
)
_URL_USER = re.compile(
    r"(?<![a-zA-Z0-9+.-])(?P<before>[a-zA-Z][a-zA-Z0-9+.-]*://)(?:[^/\s]+|[^/\s@:]{1,99}:[^\s@]{1,99})@"
)
_URL_QUERY = re.compile(
    r"(?P<before>[?&][\w.-]*(?:key|token|secret|password|auth|sig|signature)[\w.-]*=)[^&\s#]+", re.I
)
_NAMED = re.compile(r"""(?<![\w.-])(?P<name>-{0,2}[A-Za-z_][\w.-]*)\\*["']?\s*(?P<sign>[=:])\s*""")
_FLAG = re.compile(r"--(?P<name>[A-Za-z][\w-]*)(?P<sign>\s)\s*")
_HEADER = re.compile(  # of a cookie only where it is name=value: in prose, too, something is said of cookies
    r"""(?P<before>(?:authorization\\*["']?\s*[:=]|cookie\\*["']?\s*:(?=[ ]?\\*["']?[^\s=;,"'\\]{1,99}=))"""
    r"""\s*(?:\\*["'])?)[^\n"']+""",
    re.I,
)
# Options of commands that take a secret; the same letter means something else to others.
_FURTHER = r"\b(?:[^\n;|&]|(?<=\\)\n){0,120}?\s"  # … on in the command
_WORD = r"""(?:\\{0,9}"[^"\n]*"|\\{0,9}'[^'\n]*'|[^\s;|"']+)"""
_USER_FLAG = r"(?:(?<=\s)-u|--(?:proxy-)?user)[\s=]+(?!\d+:\d)"
_USER = r"""(?P<quote>["'])?[^\s:"']{1,200}:"""
_OF_USER = r"(?(quote)(?:(?!(?P=quote)).)+|\S+)"
# The same behind a quote that is quoted itself, as in a message that repeats a setting.
_USER_WITHIN = r"""\\{1,9}["'][^\s:"']{1,200}:"""
_OF_USER_WITHIN = r"""(?:\\(?!\\{0,8}["'])|[^\n"'\\])+"""
_COMMANDS = [
    re.compile(f"(?P<before>{before}){secret}")
    for before, secret in (
        (rf"\b(?:docker|podman|nerdctl|skopeo|registry|oras|az|oc)\s+login{_FURTHER}-p[ =]*", _WORD),
        (r"\bsshpass\s+-p\s*", _WORD),
        (rf"\b(?:mysql|mariadb)[\w-]*{_FURTHER}-p", _WORD),
        (rf"\bredis-cli{_FURTHER}-a\s+", _WORD),
        (rf"{_USER_FLAG}{_USER_WITHIN}", _OF_USER_WITHIN),
        (rf"\bcurl{_FURTHER}-\w{{0,8}}[uU][ ]*{_USER_WITHIN}", _OF_USER_WITHIN),
        (rf"{_USER_FLAG}{_USER}", _OF_USER),
        (rf"\bcurl{_FURTHER}-\w{{0,8}}[uU][ ]*{_USER}", _OF_USER),
        (rf"\bcurl{_FURTHER}(?:-b[ ]*|--cookie[ =]+)(?=[^\s;|=]*=)", _WORD),
        (r"\blogin\s+(?:-\S{1,200}\s+){0,20}", r"[A-Za-z0-9_-]{20,}"),  # wandb login 0123…
        (r"\blogin\s+\S+\s+password\s+", r"\S+"),  # of a .netrc
    )
]


def redact(value: Any, name: str = "") -> Any:
    """``value`` with secrets hidden; ``name``: of what holds it."""
    if isinstance(value, Mapping):
        return {key: redact(item, f"{name}_{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, name) for item in value]
    words = _words(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return HIDDEN if _NUMBERS.search("_".join(words)) else value
    if not isinstance(value, str) or not value:
        return value
    return HIDDEN if _is_secret(words) else _in_text(value)


def _in_text(text: str) -> str:
    """``text`` without the secrets in it."""
    text = _LOOKS.sub(HIDDEN, text)
    text = _URL_USER.sub(rf"\g<before>{HIDDEN}@", text)
    text = _URL_QUERY.sub(rf"\g<before>{HIDDEN}", text)
    text = _HEADER.sub(rf"\g<before>{HIDDEN}", text)
    for pattern in (_NAMED, _FLAG):
        text = _sub_named(pattern, text)
    for pattern in _COMMANDS:
        text = pattern.sub(rf"\g<before>{HIDDEN}", text)
    return text


def _sub_named(pattern: re.Pattern[str], text: str) -> str:
    """Hide the word after each name that is a secret's."""
    parts: list[str] = []
    at = 0
    for match in pattern.finditer(text):
        words = _words(match["name"])
        prose = words == ["key"] or (match["sign"] == ":" and len(words) == 1 and words[0] in _SAID_OF_KEYS)
        if match.start() < at or prose or not _is_secret(words):
            continue
        if value := _VALUE.match(text, match.end()):
            parts += [text[at : match.end()], HIDDEN]
            at = value.end()
    return "".join([*parts, text[at:]])


def _is_secret(words: list[str]) -> bool:
    if words[-1] in ("env", "error", "policy", "stdin"):  # a variable that holds one; a KeyError; a flag
        return False
    named = any(word in _SECRET_WORDS or word.endswith(_SECRET_ENDS) for word in words)
    ends = words[-1] in ("pass", "pat") or "pwd" in words or {"api", "keys"} <= set(words)
    return named or (len(words) > 1 and ends) or words[-1] in ("sshpass", "pgpass")


def _words(name: str) -> list[str]:
    """``searchApi_key`` -> search, api, key."""
    return re.split(r"[-_.]", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
