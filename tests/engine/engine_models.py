"""Tiny random models on disk, their Hugging Face twins, and comparisons of engines with these."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from family_models import as_in_files, family_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from system.engine.control import EngineControl
from system.engine.embedded import EmbeddedEngine
from system.engine.pool import EnginePool
from system.engine.protocol import Chunk, EngineError, EngineInfo, GenerateRequest, Sampling
from system.engine.weights.base import Buckets, Kv, PushReport, Transport
from system.engine.weights.http import SafetensorsHttp

torch.set_num_threads(1)

VOCAB = 320
SGLANG_KEY = "3c" * 32  # what the real server of the tests wants to be shown
EOS = 0
TOLERANCE = 1e-4
_TEXT = ["the quick brown fox <search> jumps over </search> the lazy dog <answer> 42 </answer> é ü 世界"] * 20


@dataclass(frozen=True)
class TinyModel:
    """A model directory, and the same weights as a Hugging Face module."""

    path: Path
    hf: Any

    def weights(self) -> dict[str, torch.Tensor]:
        """Tensors as a learner would send them: Hugging Face names, a tied head only once."""
        tied = self.hf.config.tie_word_embeddings
        held = as_in_files(self.hf.state_dict())
        return {k: v for k, v in held.items() if not (tied and k == "lm_head.weight")}


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def text_of() -> Callable[[list[int]], str]:
    """The models' tokenizer, from ids to text."""
    tokenizer = make_tokenizer()
    return lambda tokens: str(tokenizer.decode(tokens))


def make_model(
    path: Path, family: str, tied: bool, seed: int, rope: str = "default", **other: int
) -> TinyModel:
    """Random weights, scaled up so that the distributions are far from uniform and differ between seeds.

    ``other``: sizes to have in place of these.
    """
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 512,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 0.25,
        **other,
    }
    torch.manual_seed(seed)
    hf: Any = AutoModelForCausalLM.from_config(
        family_config(family, tied, rope, **sizes), dtype=torch.float32
    ).eval()
    with torch.no_grad():  # biases and norms start at constants that would hide mistakes
        for name, tensor in hf.named_parameters():
            if "norm" in name:
                tensor.mul_(1 + 0.3 * torch.randn_like(tensor))
            elif name.endswith("bias"):
                tensor.copy_(0.3 * torch.randn_like(tensor))
    hf.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return TinyModel(path, hf)


class EngineClient(EnginePool):
    """A pool of servers, with what tests say to all of them besides."""

    def __init__(self, urls: Sequence[str], *, transport: Transport | None = None, **settings: Any) -> None:
        super().__init__(urls, **settings)
        self.transport = transport or SafetensorsHttp()

    async def post(self, path: str, **body: Any) -> None:
        await asyncio.gather(*(EngineControl(url, self._http).post(path, **body) for url in self.urls))

    async def pause(self, mode: str = "retract") -> None:
        await self.post("/pause_generation", mode=mode)

    async def resume(self) -> None:
        await self.post("/continue_generation")

    async def abort(self, rid: str) -> None:
        """End a request of this client that runs, as its server knows it."""
        await self.post("/abort_request", rid=self._live[rid].wire_rid)

    async def flush_cache(self) -> None:
        await self.post("/flush_cache")

    async def update_weights_from_disk(self, path: str, version: int, **more: Any) -> None:
        await self.post("/update_weights_from_disk", model_path=path, weight_version=str(version), **more)

    async def push_weights(self, buckets: Buckets, version: int, kv: Kv = "recompute") -> PushReport:
        report = await self.transport.push(self._http, self.urls, buckets, version, kv)
        if report.failures:
            raise EngineError("; ".join(report.failures.values()))
        return report

    async def infos(self) -> list[EngineInfo]:
        return list(await asyncio.gather(*(EngineControl(url, self._http).info() for url in self.urls)))

    async def healthy(self, path: str = "/health") -> bool:
        try:
            await asyncio.gather(*(self._http.call(url + path, limit_s=20) for url in self.urls))
        except EngineError:
            return False
        return True

    async def wait_ready(self, deadline_s: float) -> None:
        async with asyncio.timeout(deadline_s):
            while not await self.healthy():  # noqa: ASYNC110 (a server's state)
                await asyncio.sleep(0.1)


class Paced:
    """A decoder that takes so long for a pass at least: what is to happen while tokens come, does."""

    def __init__(self, engine: EmbeddedEngine, pass_s: float) -> None:
        self.decoder, self.pass_s = engine._scheduler._decoder, pass_s
        engine._scheduler._decoder = self  # type: ignore[assignment]

    def forward(self, *given: Any) -> Any:
        time.sleep(self.pass_s)
        return self.decoder.forward(*given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)


@dataclass
class Served:
    """A running server and a client of it."""

    model: TinyModel
    engine: EmbeddedEngine
    client: EngineClient
    pace: Paced

    @property
    def url(self) -> str:
        return self.client.urls[0]

    async def checksum(self) -> tuple[int, int]:
        """(weight version, checksum of the weights held)."""
        return await asyncio.to_thread(self.engine.checksum)


async def collect(client: EngineClient, request: GenerateRequest) -> list[Chunk]:
    return [chunk async for chunk in client.generate(request)]


class Growing:
    """A request on its way: what has come, and when the first tokens have."""

    def __init__(self, client: EngineClient, asked: Any) -> None:
        self.chunks: list[Chunk] = []
        self._some = asyncio.Event()
        self._task = asyncio.create_task(self._run(client, asked))

    async def _run(self, client: EngineClient, asked: Any) -> None:
        async for chunk in client.generate(asked):
            self.chunks.append(chunk)
            self._some.set()

    async def begun(self) -> None:
        async with asyncio.timeout(60):
            await self._some.wait()

    @property
    def count(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)

    async def whole(self) -> Chunk:
        await self._task
        return joined(self.chunks)

    @property
    def done(self) -> bool:
        return self._task.done()


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCAB, length).astype(np.int32)


def request(rid: str, ids: Sequence[int] | np.ndarray, new: int = 24, **sampling: Any) -> GenerateRequest:
    sampling.setdefault("ignore_eos", True)
    return GenerateRequest(rid, np.asarray(ids, np.int32), Sampling(max_new_tokens=new, **sampling))


def joined(chunks: list[Chunk]) -> Chunk:
    """All chunks of a request as one."""
    tokens, logprob, entropy, version = (
        np.concatenate([getattr(chunk, name) for chunk in chunks])
        for name in ("tokens", "logprob", "entropy", "version")
    )
    return Chunk(tokens, logprob, entropy, version, chunks[-1].finish, chunks[-1].cached_tokens)


@torch.no_grad()
def log_p(model: TinyModel, ids: np.ndarray, tokens: np.ndarray, temperature: float = 1.0) -> torch.Tensor:
    """[k, V] Hugging Face log-probabilities of the distributions that ``tokens`` were drawn from."""
    sequence = torch.from_numpy(np.concatenate([ids, tokens]).astype(np.int64))[None]
    return torch.log_softmax(model.hf(sequence).logits[0, len(ids) - 1 : -1].float() / temperature, -1)


def assert_exact(model: TinyModel, ids: np.ndarray, out: Chunk, temperature: float = 1.0) -> None:
    reference = log_p(model, ids, out.tokens, temperature)
    expected = reference.gather(1, torch.from_numpy(out.tokens.astype(np.int64))[:, None])[:, 0].numpy()
    entropy = -(reference.exp() * reference).sum(-1).numpy()
    np.testing.assert_allclose(out.logprob, expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(out.entropy, entropy, atol=TOLERANCE, rtol=0)
