"""Adapters (LoRA) in SGLang: PEFT's numbers, versions side by side, and what is refused."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_models import (
    SGLANG_KEY,
    EngineClient,
    Growing,
    TinyModel,
    assert_exact,
    collect,
    joined,
    make_model,
    prompt,
    request,
)
from safetensors.torch import load_file
from test_embedded_adapters import KIND, adapted, adapters

from system.config import LoraConfig
from system.engine.protocol import EngineError
from system.engine.sglang.server import SglangServer
from system.engine.weights.base import size
from system.engine.weights.digest import Digests
from system.engine.weights.sglang_adapters import SGLangAdapters, completed, ours
from system.models.adapter import Adapter
from system.models.shape import ModelShape

Tensors = dict[str, torch.Tensor]
LORA = LoraConfig(rank=KIND.rank, alpha=KIND.alpha, sync="adapter")
INFO = {
    "tp_size": 1,
    "device": "cuda",
    "startup_time": "1",
    "enable_lora": True,
    "max_lora_rank": 8,
    "internal_states": [{"espalier": True}],
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """One whose MLP SGLang does not pad without a GPU."""
    return make_model(tmp_path_factory.mktemp("model"), "qwen3", False, 0, intermediate_size=96)


@pytest.fixture(scope="session")
def servers(start_sglang: Callable[..., SglangServer], model: TinyModel) -> tuple[SglangServer, SglangServer]:
    """One for all cases, which the last of them ends, and a paused one to take its place."""
    return start_sglang(model, lora=LORA), start_sglang(model, lora=LORA, ESPALIER_START_PAUSED="1")


@pytest.fixture(scope="session")
def server(servers: tuple[SglangServer, SglangServer]) -> SglangServer:
    servers[0].wait_ready(400)
    return servers[0]


@pytest.fixture
async def client(server: SglangServer, model: TinyModel) -> AsyncIterator[EngineClient]:
    transport = SGLangAdapters(KIND, model.path, "float32")
    made = EngineClient([server.url], transport=transport, deadline_s=300, key=SGLANG_KEY)
    yield made
    await made.close()


async def loaded(client: EngineClient) -> list[str]:
    """Versions of the adapters that the server holds, by its own list."""
    answer = await client._http.call(f"{client.urls[0]}/v1/models")
    return sorted(str(one["id"]).partition("-")[0] for one in answer["data"] if ours(str(one["id"])))


async def slow(client: EngineClient, pass_s: float | None) -> None:
    """Make every step of the server take so long at least."""
    url = client.urls[0]
    answer = await client._http.session.post(
        f"{url}/slow_down", json={"forward_sleep_time": pass_s}, headers=client._http.authorization(url)
    )
    assert answer.status == 200


sglang = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(900)]


class TestServer:
    """With the real server, in this order."""

    pytestmark = sglang

    @pytest.mark.parametrize("parts", [KIND.parts, ("q", "down"), ("k", "up"), ("v", "out")])
    async def test_numbers_equal_peft(
        self, client: EngineClient, model: TinyModel, parts: tuple[str, ...]
    ) -> None:
        kind = replace(KIND, parts=parts)
        given = adapters(model, len(parts), kind)
        client.transport = SGLangAdapters(kind, model.path, "float32")
        names = list(given)
        report = await client.push_weights([{name: given[name] for name in names[i::2]} for i in (0, 1)], 1)
        assert (report.bytes, report.failures, report.pause_s) == (size(given), {}, {})
        with_them = adapted(model, given, kind)
        ids = [
            prompt(40),
            prompt(70, 1),
            prompt(40),
        ]  # the last finds the first one's prefix, if it comes late
        outs = await asyncio.gather(
            *(collect(client, request(f"{parts}/{i}", each)) for i, each in enumerate(ids))
        )
        for each, chunks in zip(ids, outs, strict=True):
            out = joined(chunks)
            assert set(out.version) == {1}
            assert_exact(with_them, each, out)
        again = joined(await collect(client, request("again", ids[0])))
        assert again.cached_tokens > 0  # the prefix cache works with adapters
        assert_exact(with_them, ids[0], again)

    async def test_a_running_request_keeps_its_version(self, client: EngineClient, model: TinyModel) -> None:
        old, new, newest = (adapters(model, seed) for seed in (11, 12, 13))
        await client.push_weights([old], 2)
        await slow(client, 0.2)  # so that it runs for a minute
        ids = prompt(40, 2)
        running = Growing(client, request("running", ids, 300))
        await running.begun()
        await client.push_weights([new], 3)
        beside = Growing(client, request("beside", ids, 30))  # same prompt, and none of the other's cache
        await beside.begun()
        assert not running.done
        assert await loaded(client) == ["v2", "v3"]  # the older one is in use
        assert (await client.infos())[0].weight_version == 3
        await client.push_weights([new], 3)  # as after an answer that was lost
        assert await loaded(client) == ["v2", "v3"]
        await slow(client, None)
        for version, given, one in ((2, old, running), (3, new, beside)):
            out = await one.whole()
            assert set(out.version) == {version}
            assert_exact(adapted(model, given), ids, out)
            for chunk in one.chunks:  # also while it streamed
                assert set(chunk.version) <= {version}
        await client.push_weights([newest], 4)
        assert await loaded(client) == ["v4"]

    async def test_an_aborted_request_gives_its_adapter_up(
        self, client: EngineClient, model: TinyModel
    ) -> None:
        await client.push_weights([adapters(model, 14)], 5)
        await slow(client, 0.2)
        running = Growing(client, request("aborted", prompt(30), 300))
        await running.begun()
        await client.abort("aborted")
        out = await running.whole()
        assert out.finish is not None
        assert out.finish.type == "abort"
        assert set(out.version) == {5}
        await slow(client, None)
        await client.push_weights([adapters(model, 15)], 6)
        assert await loaded(client) == ["v6"]

    async def test_adapters_of_another_base_model_are_not_sent(
        self, client: EngineClient, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        other = make_model(tmp_path_factory.mktemp("other"), "qwen3", False, 9, intermediate_size=96)
        client.transport = SGLangAdapters(KIND, other.path, "float32")
        before = await loaded(client)
        with pytest.raises(EngineError, match="its model is not the learner's base model"):
            await client.push_weights([adapters(other, 1)], 7)
        assert await loaded(client) == before

    async def test_what_is_not_what_was_sent_is_never_served_and_a_new_server_gets_the_newest(
        self,
        client: EngineClient,
        model: TinyModel,
        servers: tuple[SglangServer, SglangServer],
    ) -> None:
        server, replacement = servers
        transport = client.transport
        assert isinstance(transport, SGLangAdapters)
        await client.push_weights([adapters(model, 15)], 6)  # its base model is proved with the first
        given = adapters(model, 16)
        packed = transport._pack(given, 7)
        wrong = replace(packed, digests=dict.fromkeys(packed.digests, hashlib.sha256().hexdigest()))
        with pytest.raises(EngineError):  # SGLang ends when a digest differs
            await transport._load(await transport._look(client._http, server.url), wrong, 7)
        async with asyncio.timeout(120):
            while server.exited() is None:  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.1)
        url = await asyncio.to_thread(replacement.wait_ready, 400.0)
        both = EngineClient([url, server.url], key=SGLANG_KEY)
        fresh = EngineClient([url], deadline_s=300, key=SGLANG_KEY)
        try:
            report = await transport.push(both._http, [url, server.url], [given], 8, "recompute")
            assert set(report.failures) == {server.url}
            await fresh.resume()
            out = joined(await collect(fresh, request("fresh", prompt(30))))
            assert set(out.version) == {8}
            assert_exact(adapted(model, given), prompt(30), out)
        finally:
            await both.close()
            await fresh.close()


class StandIn:
    """A server that says this of itself, and holds ``model`` (on one rank) where it is asked for its weights;
    it takes whatever comes.
    """

    def __init__(self, model: TinyModel | None = None, **info: Any) -> None:
        self.info, self.model = INFO | info, model
        self.asked: list[str] = []

    async def call(self, url: str, body: Any = None, limit_s: float = 0) -> Any:
        path = url.removeprefix("http://e")
        self.asked.append(path)
        if path == "/server_info":
            return self.info
        assert self.model is not None, "nothing is sent"
        if path == "/weights_checker":
            digests = Digests(ModelShape.from_directory(self.model.path), 1, "cuda")
            digests.add(load_file(self.model.path / "model.safetensors"))
            return {"ranks": [{"checksums": digests.ranks[0]}]}
        return {"loaded_adapters": {}}


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ({"internal_states": [{}]}, "plug-in(?s:.*)learn.lora.sync=merged"),
        ({"enable_lora": None}, "no adapters of rank 3: start it with --enable-lora --max-lora-rank 3"),
        ({"max_lora_rank": 2}, "--lora-target-modules q_proj k_proj"),
        ({"device": "cpu"}, "multiple of 32 only; it is 80"),
        ({"dp_size": 2}, "dp_size 1 only"),
        ({"quantization": "fp8"}, "started with quantization=fp8(?s:.*)learn.lora.sync=merged"),
        ({"tp_size": 3}, "cannot be split over 3"),
    ],
)
async def test_a_server_that_cannot_take_them_is_told(
    tiny: Callable[..., TinyModel], info: dict[str, Any], says: str
) -> None:
    model = tiny()
    transport, http = SGLangAdapters(KIND, model.path, "float32"), StandIn(**info)
    report = await transport.push(http, ["http://e"], [adapters(model, 1)], 1, "recompute")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=says):
        raise EngineError(report.failures["http://e"])


LOADED = ["/load_lora_adapter_from_tensors", "/update_weight_version"]


async def test_the_base_model_is_proved_once_for_each_start_of_a_server(
    tiny: Callable[..., TinyModel], tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = tiny()
    other = make_model(tmp_path_factory.mktemp("other"), "qwen3", True, 7)  # of the same shape
    shapes = [ModelShape.from_directory(one.path).tensors() for one in (model, other)]
    assert shapes[0] == shapes[1]
    transport, server = SGLangAdapters(KIND, model.path, "float32"), StandIn(model)

    async def push(version: int) -> tuple[dict[str, str], list[str]]:
        server.asked.clear()
        http: Any = server
        given = adapters(model, version)
        report = await transport.push(http, ["http://e"], [given], version, "recompute")
        return dict(report.failures), server.asked[1:]

    assert await push(1) == ({}, ["/weights_checker", *LOADED])
    assert await push(2) == ({}, LOADED)
    server.info["startup_time"], server.model = "2", other  # somebody has started it anew, with another model
    for asked in (["/weights_checker"], []):
        failures, did = await push(3)
        assert did == asked
        told = failures["http://e"]
        assert told.startswith(
            f"http://e: its model is not the learner's base model, {model.path} in float32"
        )
        assert f"start it with --model-path {model.path} --dtype float32" in told
        assert "learn.lora.sync=merged" in told
    server.info["startup_time"], server.model = "3", model
    assert await push(4) == ({}, ["/weights_checker", *LOADED])


async def test_a_server_that_does_not_tell_what_it_holds_is_asked_again(
    tiny: Callable[..., TinyModel],
) -> None:
    model = tiny()
    transport, server = SGLangAdapters(KIND, model.path, "float32"), StandIn(model, tp_size=2)
    http: Any = server
    for _ in range(2):
        report = await transport.push(http, ["http://e"], [adapters(model, 1)], 1, "recompute")
        assert report.failures == {"http://e": "http://e: 1 ranks reported checksums, expected 2"}
        assert server.asked.pop() == "/weights_checker"


async def test_incomplete_adapters_are_not_sent(tiny: Callable[..., TinyModel]) -> None:
    model = tiny()
    given = adapters(model, 1)
    del given[next(iter(given))]
    transport: Any = SGLangAdapters(KIND, model.path, "float32")
    report = await transport.push(StandIn(), ["http://e"], [given], 1, "recompute")
    assert "not sent: " in report.failures["http://e"]
    assert "missing" in report.failures["http://e"]


def test_what_sglang_fuses_is_completed(tiny: Callable[..., TinyModel]) -> None:
    shape = ModelShape.from_directory(tiny().path)
    for parts, whole in (
        (("q",), {"q", "k", "v"}),
        (("up", "out"), {"gate", "up", "out"}),
        (("down",), {"down"}),
    ):
        assert {*completed(shape, Adapter(2, 4.0, parts)).parts} == whole


def test_only_our_names_are_ours() -> None:
    assert ours("v12-3c9e")
    assert not any(map(ours, ("v12", "vx-1", "other", "-1", "v-1")))
