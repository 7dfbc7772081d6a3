"""Weights into an SGLang server on a GPU: CUDA IPC and NCCL, proved by SGLang's own hash kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import EngineClient, collect, joined, make_tokenizer, prompt, request
from transformers import Qwen3Config, Qwen3ForCausalLM

from system.config import EngineConfig
from system.engine.sglang.command import interpreter, server_command
from system.engine.sglang.server import SglangServer
from system.engine.weights import make
from system.models.shape import ModelShape

pytestmark = [pytest.mark.gpu, pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(600)]
SETTINGS: dict[str, Any] = {"name": "sglang", "device": "cuda", "max_running": 16, "max_context": 512}


def model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=False,
        eos_token_id=0, bos_token_id=None, pad_token_id=None, initializer_range=0.1,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).bfloat16()


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[tuple[str, Path]]:
    """A server on the GPU and the directory of its model."""
    path, engine = tmp_path_factory.mktemp("model"), EngineConfig(**SETTINGS)
    model(0).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    port = free_port()
    command = server_command(
        engine, python=interpreter(engine), model=str(path), dtype="bfloat16", port=port, cpu=False
    )
    server = SglangServer(command, f"http://127.0.0.1:{port}", path / "log")
    try:
        yield server.wait_ready(300), path
    finally:
        server.stop()


@pytest.mark.parametrize("way", ["tensor", "distributed", "disk"])
async def test_a_gpu_server_proves_what_it_was_sent(served: tuple[str, Path], way: str) -> None:
    url, path = served
    transport = make(EngineConfig(**SETTINGS, weights=way), [url], path, "bfloat16")
    client = EngineClient([url], transport=transport)
    names = list(ModelShape.from_directory(path).tensors())
    try:
        for version in (1, 2):
            new = model(version).state_dict()
            buckets = [{name: new[name] for name in names[i::3]} for i in range(3)]
            report = await client.push_weights(buckets, version)
            out = joined(await collect(client, request(f"{way}-{version}", prompt(20), 8)))
            assert set(out.version.tolist()) == {version}
            gigabytes = report.bytes / 1e9
            print(f"\n{way}: {report.pause_s[url]:.3f} s for {gigabytes:.4f} GB")
    finally:
        await client.close()
