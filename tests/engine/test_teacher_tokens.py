"""A teacher reads the numbers of tokens: what they stand for there must be what they stand for here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from engine_models import VOCAB, make_tokenizer

from system.config import ConfigError, TeacherConfig
from system.engine.control import Http
from system.engine.protocol import EngineError
from system.rollout.teacher import SPELLED, Teacher, spelling
from system.serving import AppServer, serve


def teacher(url: str, spelled: dict[int, str]) -> Teacher:
    return Teacher(TeacherConfig(urls=[url]), VOCAB, 16, spelled=spelled)


def test_what_is_compared() -> None:
    """All of a small vocabulary; of a large one the first, the last, some between and all added ones."""
    tokenizer = make_tokenizer()
    known = spelling(tokenizer)
    assert len(known) == min(len(tokenizer), SPELLED)
    added = [f"<extra {i}>" for i in range(600)]
    tokenizer.add_tokens(added)
    known = spelling(tokenizer)
    assert set(added) <= set(known.values())
    assert {0, len(tokenizer) - 1} <= known.keys()
    assert len(known) < len(tokenizer)


async def test_a_teacher_with_another_tokenizer_is_refused_by_name(serve: Callable[..., Any]) -> None:
    """Of the same size, so that it scores the last token of ours."""
    url = (await serve("qwen3", True, max_context=64)).client.urls[0]
    known = spelling(make_tokenizer())
    await teacher(url, known).check()
    first, other = sorted(known)[7:9]
    with pytest.raises(
        ConfigError, match=rf"teacher\.urls\[0\]=.* has another tokenizer: token {first} is .* there"
    ):
        await teacher(url, known | {first: known[other], other: known[first]}).check()


async def test_a_teacher_of_fewer_words_than_ours_has_nothing_to_say_of_them(
    serve: Callable[..., Any],
) -> None:
    """Its model may have more numbers than its tokenizer: it scores them, and was never taught any."""
    url = (await serve("qwen3", True, max_context=64)).client.urls[0]
    size = len(make_tokenizer())
    with pytest.raises(ConfigError, match=f"token {size} is '' there, and '<new>' to the model"):
        await teacher(url, spelling(make_tokenizer()) | {size: "<new>"}).check()


async def test_a_server_that_does_not_spell_is_warned_of(
    serve: Callable[..., Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve("qwen3", True, max_context=64)
    monkeypatch.setattr(served.engine, "path", served.engine.path.parent)
    with caplog.at_level(logging.WARNING):
        await teacher(served.client.urls[0], {1: "x"}).check()
    assert "does not tell what its tokens are" in caplog.text
    assert "no tokenizer.json" in caplog.text


async def test_blanks_that_a_server_cleans_away_are_no_difference() -> None:
    async def spells(_: web.Request) -> web.Response:
        return web.json_response({"text": [".", "'s"]})

    app = web.Application()
    app.add_routes([web.post("/detokenize", spells)])
    server: AppServer = await serve(app, "127.0.0.1", 0)
    try:
        await teacher(server.url, {5: " .", 9: " 's"})._check_spelling(0, server.url)
        with pytest.raises(ConfigError, match=r"token 9 is \"'s\" there, and '\?'"):
            await teacher(server.url, {5: " .", 9: "?"})._check_spelling(0, server.url)
    finally:
        await server.close()


@pytest.mark.parametrize("tokens", [None, [1], [["a"]], [[-1]], [[True]], [[2**31]]])
async def test_the_embedded_engine_spells_lists_of_tokens(serve: Callable[..., Any], tokens: Any) -> None:
    url = (await serve("qwen3", True)).client.urls[0]
    tokenizer = make_tokenizer()
    ids: list[int] = tokenizer.encode("abc")
    async with Http([url]) as http:
        texts = (await http.call(f"{url}/detokenize", {"tokens": [ids, [], [tokenizer.eos_token_id]]}))[
            "text"
        ]
        assert texts == ["abc", "", ""]
        kept = {"tokens": [[tokenizer.eos_token_id]], "skip_special_tokens": False}
        assert (await http.call(f"{url}/detokenize", kept))["text"] == ["<eos>"]
        with pytest.raises(EngineError, match="expected lists of tokens"):
            await http.call(f"{url}/detokenize", {"tokens": tokens})
