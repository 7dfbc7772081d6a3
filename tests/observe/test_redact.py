from __future__ import annotations

import pytest

from system.config import Config, to_dict
from system.observe.redact import HIDDEN, redact


@pytest.mark.parametrize(
    "key",
    [
        "api_key",
        "apiKey",
        "token",
        "hf_token",
        "access-token",
        "password",
        "clientSecret",
        "AUTH",
        "AUTHORIZATION",
    ],
)
def test_secrets_by_the_name_of_their_key(key: str):
    assert redact({key: "hunter2"}) == {key: HIDDEN}
    assert redact({key: ["hunter2", "hunter3"]}) == {key: [HIDDEN, HIDDEN]}
    assert redact({key: {"value": "hunter2"}}) == {key: {"value": HIDDEN}}


@pytest.mark.parametrize(
    "value",
    [
        "sk-proj-abcdefghijklmnop",
        "hf_abcdefghijklmnopqrst",
        "ghp_abcdefghijklmnopqrst",
        "AKIAABCDEFGHIJKLMNOP",
        "Bearer abcdefghijklmnop",
        "0123456789abcdef0123456789abcdef01234567",
        "eyJhbGciOiJI.eyJzdWIiOiIx.c2ln",
    ],
)
def test_secrets_by_their_look(value: str):
    assert redact({"note": value}) == {"note": HIDDEN}


def test_urls_lose_their_credentials_and_nothing_else():
    assert redact({"url": "http://me:pw@host:1/a"}) == {"url": f"http://{HIDDEN}@host:1/a"}
    assert redact({"url": "https://host/a?q=1&api_key=xyz&k=2#f"}) == {
        "url": f"https://host/a?q=1&api_key={HIDDEN}&k=2#f"
    }
    assert redact({"url": "https://host/a@b?q=key"}) == {"url": "https://host/a@b?q=key"}


def test_a_configuration_without_secrets_is_unchanged():
    """Keys such as ``max_response_tokens`` and ``task`` are no secrets."""
    config = to_dict(Config())
    config["model"]["path"] = "models/Qwen3-0.6B"
    assert redact(config) == config
    assert redact({"token": 3, "key": None, "password": ""}) == {"token": 3, "key": None, "password": ""}
