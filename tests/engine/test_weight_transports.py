"""What weight transports do without a server: layouts, digests, shared memory, refusals, files."""

from __future__ import annotations

import base64
import gc
import json
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from safetensors.torch import load_file

from system.config import ConfigError, EngineConfig, load
from system.engine.control import Http
from system.engine.protocol import EngineError
from system.engine.weights import choose, distributed, make
from system.engine.weights.base import Kv, PushReport
from system.engine.weights.digest import Digests, sha256_hash, word_hash
from system.engine.weights.disk import STRIPES, Disk, deadline_s, stripe
from system.engine.weights.distributed import Distributed
from system.engine.weights.layout import Fuser, ShardError
from system.engine.weights.sglang import PushTarget, SGLangTransport
from system.engine.weights.tensor import SharedTensors, flatten, handles
from system.models.directory import INDEX
from system.models.shape import ModelShape

SHAPE: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "tie_word_embeddings": True,
}


def shape(tmp_path: Path, **changes: Any) -> ModelShape:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | changes))
    return ModelShape.from_directory(tmp_path)


def counted(model: ModelShape) -> dict[str, torch.Tensor]:
    """Weights that any machine makes alike: small whole numbers over 64."""
    return {
        name: ((torch.arange(torch.Size(size).numel()) * 37 + number) % 1009).div(64).view(size)
        for number, (name, size) in enumerate(model.tensors().items())
    }


# Digests ----------------------------------------------------------------------------------------


def test_digests_are_those_of_a_real_server(tmp_path: Path) -> None:
    """Recorded from SGLang 0.5.23's /weights_checker on CPU with two tensor-parallel ranks."""
    model = shape(tmp_path)
    digests = Digests(model, 2, "cpu")
    digests.add(counted(model))
    recorded = json.loads((Path(__file__).parent / "sglang_digests.json").read_text())
    assert digests.ranks == recorded


@pytest.mark.parametrize(
    ("count", "dtype", "expected"),
    [
        (1, torch.float32, 0x3D93A6540B54EF2A),
        (7, torch.bfloat16, 0x846CA49358791A67),  # half a word over
        (8191, torch.float32, 0xA08A9EB33BB6A334),
        (8192, torch.float32, 0x9BF2CF39B81B099E),  # one tile
        (8193, torch.float32, 0x11FE2F56101D5EC9),
        (50001, torch.bfloat16, 0x292EE21A23ACBAEC),
    ],
)
def test_word_hash_is_sglangs(count: int, dtype: torch.dtype, expected: int) -> None:
    """Recorded from SGLang 0.5.23's gpu_tensor_hash kernels, run by Triton's interpreter."""
    values = ((torch.arange(count) * 37) % 1009).to(torch.float32).div(64).to(dtype)
    assert word_hash(values) == expected


@pytest.mark.gpu
def test_word_hash_is_the_same_on_a_gpu() -> None:
    values = torch.randn(3_000_001, dtype=torch.bfloat16)
    assert word_hash(values.cuda()) == word_hash(values)


def test_digests_see_every_bit_and_place() -> None:
    values = torch.randn(100, 7)
    for digest in (sha256_hash, word_hash):
        assert digest(values) == digest(values.clone())
        changed = values.clone()
        changed.view(torch.int32)[99, 6] ^= 1
        assert digest(changed) != digest(values)
        assert digest(values.flip(0)) != digest(values)


@pytest.mark.parametrize(("tp", "device"), [(1, "cpu"), (2, "cpu"), (2, "cuda"), (4, "cuda")])
def test_shards_hold_every_row_once(tmp_path: Path, tp: int, device: str) -> None:
    """Put together again they are the tensors; what is beyond is zero; key/value heads may be copies."""
    model = shape(tmp_path, tie_word_embeddings=False)
    weights = counted(model)
    fuser, held = Fuser(model, tp, device), dict[str, list[torch.Tensor]]()
    for name, tensor in reversed(weights.items()):  # in any order
        held.update(fuser.add(name, tensor))
    fused = {"qkv_proj": 36 + 36 if tp < 4 else 0, "gate_up_proj": 0}
    assert len(held) == 2 * (4 + 1 + 1 + 2) + 3 == len({*held})
    for name, shards in held.items():
        assert len(shards) == tp
        assert len({tuple(shard.shape) for shard in shards}) == 1
        assert all(shard.is_contiguous() for shard in shards)
        if name in weights and "norm" in name:
            assert all(torch.equal(shard, weights[name]) for shard in shards)
        elif name in weights:
            dim = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
            whole = torch.cat(shards, dim)
            length = weights[name].shape[dim]
            assert torch.equal(whole.narrow(dim, 0, length), weights[name])
            assert not whole.narrow(dim, length, whole.shape[dim] - length).any()
        else:
            assert any(part in name for part in fused)
    q, k = (weights[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qk")
    shards = held["model.layers.0.self_attn.qkv_proj.weight"]
    rows = q.shape[0] // tp
    assert torch.equal(torch.cat([shard[:rows] for shard in shards]), q)
    heads = [shard[rows : rows + 12 * max(1, 2 // tp)] for shard in shards]
    assert torch.equal(
        torch.cat(heads), k if tp <= 2 else k.view(2, 12, -1).repeat_interleave(2, 0).flatten(0, 1)
    )


@pytest.mark.parametrize(("tp", "device"), [(1, "cpu"), (2, "cpu"), (2, "cuda")])
def test_the_experts_of_a_layer_are_stacked(tmp_path: Path, tp: int, device: str) -> None:
    """Of each its gate and up rows (w13) and down columns (w2) of a rank, as ``FusedMoE`` loads them."""
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    model = shape(tmp_path, model_type="qwen3_moe", mlp_only_layers=[0], **experts)
    weights = counted(model)
    fuser, held = Fuser(model, tp, device), dict[str, list[torch.Tensor]]()
    for name, tensor in reversed(weights.items()):
        held.update(fuser.add(name, tensor))
    layer = "model.layers.1.mlp."
    assert {name for name in held if name.startswith(layer)} == {
        f"{layer}{part}" for part in ("gate.weight", "experts.w13_weight", "experts.w2_weight")
    }
    assert all(torch.equal(shard, weights[f"{layer}gate.weight"]) for shard in held[f"{layer}gate.weight"])
    assert "model.layers.0.mlp.gate_up_proj.weight" in held
    rows = 64 // tp if device == "cpu" else 40 // tp
    for rank, (w13, w2) in enumerate(
        zip(held[f"{layer}experts.w13_weight"], held[f"{layer}experts.w2_weight"], strict=True)
    ):
        assert (w13.shape, w2.shape) == ((3, 2 * rows, 48), (3, 48, rows))
        mine = slice(rank * rows, min((rank + 1) * rows, 40))
        count = mine.stop - mine.start
        for expert in range(3):
            gate, up, down = (
                weights[f"{layer}experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")
            )
            assert torch.equal(w13[expert, :count], gate[mine])
            assert torch.equal(w13[expert, rows : rows + count], up[mine])
            assert torch.equal(w2[expert, :, :count], down[:, mine])
            padding = (w13[expert, count:rows], w13[expert, rows + count :], w2[expert, :, count:])
            assert not any(part.any() for part in padding)
    with pytest.raises(ShardError, match="size of 40 cannot"):
        Fuser(shape(tmp_path, model_type="qwen3_moe", num_attention_heads=16, **experts), 16, "cuda")


def test_a_split_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="4 heads"):
        Fuser(shape(tmp_path), 3, "cuda")
    with pytest.raises(ShardError, match="2 key/value heads"):
        Fuser(shape(tmp_path), 4, "cpu")


# Ways -------------------------------------------------------------------------------------------


def test_the_way_follows_the_configuration(tmp_path: Path) -> None:
    shape(tmp_path)
    here, there = ["http://127.0.0.1:1"], ["http://127.0.0.1:1", "http://10.0.0.7:1"]
    assert choose(EngineConfig(), here, gpu=True) == "http"
    assert choose(EngineConfig(name="sglang"), here, gpu=False) == "tensor"
    assert choose(EngineConfig(name="sglang"), here, gpu=True) == "distributed"
    assert choose(EngineConfig(name="sglang"), there, gpu=False) == "distributed"
    for way, carrier in (("disk", Disk), ("tensor", SharedTensors), ("distributed", Distributed)):
        transport = make(EngineConfig(name="sglang", weights=way), here, tmp_path, "float32")
        assert isinstance(transport, SGLangTransport)
        assert isinstance(transport.carrier, carrier)
    with pytest.raises(ConfigError, match=r"engine\.weights_dir"):
        make(EngineConfig(name="sglang", weights="disk"), there, tmp_path, "float32")
    with pytest.raises(ConfigError, match=r"engine\.weights=http: the sglang engine takes"):
        load(None, ["engine=sglang", "engine.weights=http"])
    with pytest.raises(ConfigError, match=r"engine\.weights=disk: the embedded engine takes"):
        load(None, ["engine.weights=disk"])


def test_cuda_ipc_is_refused_where_ray_hides_the_learners_gpu() -> None:
    on_gpus = ["engine=sglang", "engine.weights=tensor", "cluster.gpus_per_node=2"]
    with pytest.raises(ConfigError, match=r"device_uuid.*set engine\.weights=distributed"):
        load(None, on_gpus)
    attached = "engine.urls=[http://127.0.0.1:30000]"  # started by somebody who may show them all GPUs
    assert load(None, [*on_gpus, attached]).engine.weights == "tensor"
    assert load(None, ["engine=sglang", "engine.weights=tensor"]).cluster.gpus_per_node == 0


def test_what_cannot_carry_weights_is_refused_before_anything_starts() -> None:
    nodes = ["engine=sglang", "cluster.nodes=2", "engine.weights=disk"]
    with pytest.raises(ConfigError, match=r"engine\.weights=disk.*set engine\.weights_dir"):
        load(None, nodes)
    assert load(None, [*nodes, "engine.weights_dir=/shared"]).engine.weights == "disk"
    symmetric = ["engine=sglang", "engine.sglang={enable-symm-mem: true}"]
    with pytest.raises(ConfigError, match=r"enable_symm_mem.*NCCL_CUMEM_ENABLE"):
        load(None, symmetric)
    assert load(None, [*symmetric, "engine.weights=disk"]).engine.sglang


def test_shared_tensors_are_opened_by_another_process() -> None:
    """One segment per bucket, whatever the dtypes, and nothing of ours in the pickle."""
    bucket = {"a": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.bfloat16), "c": torch.randn(2, 2)}
    carrier = SharedTensors()
    carrier.stage(bucket)
    (staged,) = carrier._staged
    assert len({tensor.untyped_storage().data_ptr() for tensor in staged.values()}) == 1
    program = """
import base64, io, json, pickle, sys, torch
modules = set()
class Reader(pickle.Unpickler):
    def find_class(self, module, name):
        modules.add(module.split(".")[0])
        return super().find_class(module, name)
tensors = dict(Reader(io.BytesIO(base64.b64decode(sys.stdin.read()))).load())
values = {name: tensor.double().flatten().tolist() for name, tensor in tensors.items()}
print(json.dumps([sorted(modules), values]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=handles(staged),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    modules, values = json.loads(done.stdout)
    assert values == {name: tensor.double().flatten().tolist() for name, tensor in bucket.items()}
    assert set(modules) <= {"torch", "builtins", "collections"}  # what SGLang's reader admits
    carrier.clear()


@pytest.mark.gpu
def test_buckets_stay_on_the_gpu_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = {
        "a": torch.randn(3, 5, device="cuda"),
        "b": torch.arange(7, dtype=torch.bfloat16, device="cuda"),
    }
    carrier = Distributed("127.0.0.1")
    carrier.stage(bucket)
    monkeypatch.setattr(distributed, "ROOM_BYTES", 1 << 60)
    carrier.stage(bucket)
    there, here = (staged.flat for staged in carrier._staged)
    assert there.is_cuda
    assert here.is_pinned()
    assert torch.equal(there.cpu(), here)


def test_flattened_tensors_are_aligned_copies() -> None:
    bucket = {"a": torch.randn(3), "b": torch.randn(5).bfloat16(), "c": torch.randn(4, 2)}
    flat = flatten(bucket, torch.device("cpu"))
    for name, tensor in bucket.items():
        assert torch.equal(flat[name], tensor)
        assert flat[name].data_ptr() != tensor.data_ptr()
        assert flat[name].storage_offset() * flat[name].element_size() % 64 == 0


@pytest.mark.gpu
def test_cuda_handles_name_the_device_by_its_uuid() -> None:
    bucket = flatten({"a": torch.randn(1000)}, torch.device("cuda", 0))
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    assert uuid.encode() in base64.b64decode(handles(bucket))


def answering(monkeypatch: pytest.MonkeyPatch, *urls: str, deaf: Collection[str] = ()) -> list[PushTarget]:
    """Servers that take whatever they are told, but those that are ``deaf`` while they are in it."""
    http = Http()

    async def call(url: str, body: Any = None, limit_s: float = 0) -> dict[str, Any]:
        if any(url.startswith(one) for one in deaf):
            raise EngineError(f"{url}: deaf")
        return {}

    monkeypatch.setattr(http, "call", call)
    return [PushTarget(url, http, 1, "cpu", "") for url in urls]


async def test_disk_leaves_a_complete_directory_and_no_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shape(tmp_path)
    weights = counted(model)
    names = list(weights)
    disk = Disk(tmp_path / "out")
    servers = answering(monkeypatch, "http://127.0.0.1:1")
    for _ in range(3):
        for i in range(2):
            disk.stage({name: weights[name] for name in names[i::2]})
        directory = disk.directory
        await disk.connect(servers)
        assert not await disk.deliver(servers, flush_cache=True)
        disk.clear()
        index = json.loads((directory / INDEX).read_text())
        assert set(index["weight_map"]) == set(weights)
        read = {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}
        assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())
        assert len(set(index["weight_map"].values())) == 2 * STRIPES
        assert [*(tmp_path / "out").glob("*/*")] == [directory]


def updates(root: Path) -> set[Path]:
    return {*root.glob("*/update-*")}


async def test_disk_keeps_what_each_server_has_loaded_until_it_has_loaded_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang goes back to it where a load fails."""
    deaf = set[str]()
    one, other = answering(monkeypatch, "http://127.0.0.1:1", "http://127.0.0.1:2", deaf=deaf)
    disk = Disk(tmp_path)

    async def update(*servers: PushTarget, sent: bool = True) -> Path:
        disk.stage({"a": torch.ones(3)})
        directory = disk.directory
        if sent:
            await disk.connect(servers)
            await disk.deliver(servers, flush_cache=True)
        disk.clear()
        return directory

    first = await update(one, other)
    assert updates(tmp_path) == {first}
    deaf.add(one.url)
    await update(one)
    assert updates(tmp_path) == {first}
    deaf.clear()
    alone = await update(other)  # one that was restarted is brought up by itself
    assert updates(tmp_path) == {first, alone}
    await update(one, other, sent=False)  # refused before it was sent
    assert updates(tmp_path) == {first, alone}
    last = await update(one, other)
    assert updates(tmp_path) == {last}


def test_runs_may_share_a_directory_for_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine, theirs = (Disk(Path("weights"), Path(run)) for run in ("runs/s0", "runs/s0-2"))
    assert mine.directory.is_absolute()  # servers may stand elsewhere
    for disk, value in ((mine, 1.0), (theirs, 2.0)):
        disk.stage({"a": torch.full((3,), value)})
    theirs.clear()
    (file,) = mine.directory.glob("*.safetensors")
    assert load_file(file)["a"].tolist() == [1.0] * 3
    del mine, disk
    gc.collect()
    assert not file.exists()  # what was the run's goes with it


async def test_a_run_that_is_resumed_takes_over_what_it_left_when_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, (server,) = Disk(tmp_path, Path("run")), answering(monkeypatch, "http://127.0.0.1:1")
    for disk in (killed, killed, Disk(tmp_path, Path("run"))):
        disk.stage({"a": torch.ones(3)})
        directory = disk.directory
        await disk.connect([server])
        await disk.deliver([server], flush_cache=True)
        disk.clear()
    assert updates(tmp_path) == {directory}


def test_stripes_are_of_like_size_and_readers_have_time_by_size() -> None:
    sizes = [9, 1, 1, 1, 8, 5, 2, 7]
    parts = stripe({str(n): torch.zeros(size, dtype=torch.uint8) for n, size in enumerate(sizes)})
    assert sorted(name for part in parts for name in part) == [str(n) for n in range(len(sizes))]
    assert sorted(sum(t.numel() for t in part.values()) for part in parts) == [8, 8, 9, 9]
    assert len(stripe({"a": torch.zeros(3)})) == 1
    forty_14b = deadline_s(29_500_000_000, 40)
    assert 1180 <= forty_14b - deadline_s(0, 40) < 1181


async def test_disk_waits_as_long_as_the_size_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, asked = Disk(tmp_path), list[float]()
    disk.stage({"a": torch.zeros(1000)})

    async def call(url: str, body: Any = None, limit_s: float = 0) -> dict[str, Any]:
        asked.append(limit_s)
        return {}

    http = Http()
    monkeypatch.setattr(http, "call", call)
    servers = [PushTarget(f"http://127.0.0.1:{n}", http, 1, "cpu", "") for n in range(3)]
    await disk.connect(servers)
    assert not await disk.deliver(servers, flush_cache=True)
    assert asked == [deadline_s(4000, 3)] * 3


# Servers that misbehave --------------------------------------------------------------------------


class FakeServer:
    """As much of SGLang as a push talks to; ``answers`` replaces the answer of a path."""

    def __init__(self, digests: Digests, **answers: Any) -> None:
        self.calls: list[str] = []
        self._digests, self._answers = digests, answers
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path}", self._handle)
        self._runner = web.AppRunner(app)

    async def __aenter__(self) -> FakeServer:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.Response:
        path = request.match_info["path"]
        self.calls.append(path)
        if path in self._answers:
            status, body = self._answers[path]
            return web.json_response(body, status=status)
        body: dict[str, Any] = {"success": True}
        if path == "server_info":
            body = {"tp_size": len(self._digests.ranks), "dp_size": 1, "device": "cpu", "startup_time": 1}
        elif path == "weights_checker":
            body["ranks"] = [{"checksums": rank} for rank in self._digests.ranks]
        return web.json_response(body)


async def push(tmp_path: Path, server: FakeServer, *others: str, kv: Kv = "recompute") -> PushReport:
    model = ModelShape.from_directory(tmp_path)
    transport = SGLangTransport(SharedTensors(), tmp_path, "float32")
    weights = counted(model)
    async with Http() as http:
        buckets = [{name: weights[name]} for name in weights]
        return await transport.push(http, [server.url, *others], buckets, 3, kv)


def held(model: ModelShape, tp: int = 1) -> Digests:
    digests = Digests(model, tp, "cpu")
    digests.add(counted(model))
    return digests


async def test_a_push_pauses_loads_proves_and_goes_on(tmp_path: Path) -> None:
    async with FakeServer(held(shape(tmp_path), 2)) as server:
        assert not (await push(tmp_path, server)).failures
    buckets = server.calls.count("update_weights_from_tensor")
    assert buckets == len(counted(ModelShape.from_directory(tmp_path)))
    order = list(dict.fromkeys(server.calls))
    assert order == [
        "server_info", "pause_generation", "begin_weight_update", "update_weights_from_tensor",
        "end_weight_update", "weights_checker", "update_weight_version", "continue_generation",
    ]  # fmt: skip


async def test_a_dead_server_does_not_keep_the_others_from_their_weights(tmp_path: Path) -> None:
    async with FakeServer(held(shape(tmp_path))) as server:
        report = await push(tmp_path, server, "http://127.0.0.1:9")
    assert list(report.failures) == ["http://127.0.0.1:9"]
    assert list(report.pause_s) == [server.url]
    assert server.calls[-1] == "continue_generation"


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("update_weights_from_tensor", 400, {"success": False, "message": "no"}),
        ("update_weights_from_tensor", 200, {"success": False, "message": "no"}),
        ("weights_checker", 200, {"success": True, "ranks": []}),
        ("weights_checker", 200, {"success": True, "ranks": [{"checksums": {}}]}),
    ],
)
async def test_a_server_that_may_hold_a_mixture_stays_paused(
    tmp_path: Path, path: str, status: int, body: dict[str, Any]
) -> None:
    async with FakeServer(held(shape(tmp_path)), **{path: (status, body)}) as server:
        assert list((await push(tmp_path, server)).failures) == [server.url]
    assert "pause_generation" in server.calls
    assert not {"update_weight_version", "continue_generation"} & set(server.calls)


async def test_several_data_parallel_ranks_are_refused_before_any_pause(tmp_path: Path) -> None:
    info = {"tp_size": 1, "dp_size": 2, "device": "cpu", "startup_time": 1}
    async with FakeServer(held(shape(tmp_path)), server_info=(200, info)) as server:
        assert "dp_size 1" in (await push(tmp_path, server)).failures[server.url]
    assert server.calls == ["server_info"]


async def test_keep_needs_a_cache_that_is_keyed_by_version(tmp_path: Path) -> None:
    """A server without the plug-in would serve stale prefixes: refused before any pause."""
    async with FakeServer(held(shape(tmp_path))) as server:
        assert "plug-in" in (await push(tmp_path, server, kv="keep")).failures[server.url]
        assert server.calls == ["server_info"]
        assert not (await push(tmp_path, server)).failures
    assert server.calls[-1] == "continue_generation"


def float8_server(model: ModelShape, tp: int = 1, **given: str) -> dict[str, Any]:
    """Answers of a server that makes float8 of what it is sent; ``given``: other digests of what it was."""
    digests = Digests(model, tp, "cpu", quantised=True)
    digests.add(counted(model))
    info = {"tp_size": tp, "dp_size": 1, "device": "cpu", "startup_time": 1, "quantization": "fp8"}
    info |= {"load_format": "flash_rl", "internal_states": [{"espalier": True}]}
    held = [{"checksums": rank | given} for rank in digests.ranks]
    return {"server_info": (200, info), "weights_checker": (200, {"success": True, "ranks": held})}


async def test_float8_is_proved_by_what_it_was_made_of(tmp_path: Path) -> None:
    """Of matrices what came to each rank, whole; of all else what it holds, as ever."""
    model = shape(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    answers = float8_server(model, 2)
    sums = answers["weights_checker"][1]["ranks"][0]["checksums"]
    assert sums[name] == f"{sha256_hash(counted(model)[name]):016x}"
    assert not [one for one in sums if "qkv_proj" in one or "gate_up_proj" in one]
    assert sums["model.embed_tokens.weight"] == held(model, 2).ranks[0]["model.embed_tokens.weight"]
    async with FakeServer(held(model, 2), **answers) as server:
        assert not (await push(tmp_path, server)).failures
    assert server.calls[-1] == "continue_generation"
    async with FakeServer(held(model, 2), **float8_server(model, 2, **{name: "0"})) as server:
        told = (await push(tmp_path, server)).failures[server.url]
    assert f"does not hold what was sent: {name}" in told
    assert "continue_generation" not in server.calls


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"load_format": "auto"}, "started with quantization=fp8, into which SGLang takes no new weights"),
        ({"load_format": "auto", "quantization": "awq"}, "started with quantization=awq"),
        ({"internal_states": []}, "flash_rl needs Espalier's plug-in"),
    ],
)
async def test_codes_that_take_no_weights_are_refused_before_any_pause(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    model = shape(tmp_path)
    answers = float8_server(model)
    answers["server_info"] = (200, answers["server_info"][1] | changes)
    async with FakeServer(held(model), **answers) as server:
        assert told in (await push(tmp_path, server)).failures[server.url]
    assert server.calls == ["server_info"]


def test_no_weights_are_sent_to_servers_of_a_float8_checkpoint(tmp_path: Path) -> None:
    shape(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(ConfigError, match=r"has float8 weights with scales.*espalier dequantise"):
        SGLangTransport(SharedTensors(), tmp_path, "bfloat16")


def test_what_a_peer_sends_is_never_unpickled() -> None:
    """Pickles leave this process; none enters it: no module of the engine reads one."""
    root = Path(sys.modules["system.engine"].__path__[0])
    for file in root.rglob("*.py"):
        assert "pickle.load" not in file.read_text(), file
