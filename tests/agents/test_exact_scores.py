"""A model whose next token depends on everything before it: what was recorded is what it says of the path."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from agent_models import make_tokenizer, served
from test_chat_sdk import client
from transformers import Qwen3Config, Qwen3ForCausalLM

from system.agents.endpoint import AgentEndpoint
from system.config import EngineConfig
from system.engine.embedded import EmbeddedEngine
from system.engine.pool import EnginePool
from system.tree.record import Kind, Outcome


def random_model(path: Path) -> Any:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            max_position_embeddings=2048,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=None,
            initializer_range=0.15,
        )
    ).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


@torch.no_grad()
def scores(model: Any, path: np.ndarray, begin: int) -> np.ndarray:
    """[t] log-probabilities of the tokens of ``path`` from ``begin`` on."""
    ids = torch.from_numpy(path.astype(np.int64))
    logits = torch.log_softmax(model(ids[None]).logits[0].float(), -1)
    return logits[begin - 1 : -1].gather(1, ids[begin:, None])[:, 0].numpy()


async def test_log_probabilities_are_those_of_the_path(tmp_path: Path, stack: AsyncExitStack) -> None:
    """Garbage of many kinds: broken characters, special tokens in the middle, ends where they come."""
    model = random_model(tmp_path)
    config = EngineConfig(device="cpu", max_running=8, max_context=2048, cache_slots=16)
    engine = EmbeddedEngine(config, tmp_path, seed=0)
    pool = EnginePool([await engine.start()], deadline_s=60, stall_s=30)
    stack.push_async_callback(engine.stop)
    stack.push_async_callback(pool.close)
    endpoint = AgentEndpoint(served(pool, max_context=2048))
    await endpoint.start()
    stack.push_async_callback(endpoint.stop)

    turns = 0
    for seed in range(4):
        session = await endpoint.open("p", seed, deadline_s=60)
        messages: list[Any] = [{"role": "user", "content": "Wörter?"}]
        async with client(session) as sdk:
            for turn in range(4):
                asked: dict[str, Any] = {"model": "m", "messages": messages, "max_tokens": 40}
                if turn % 2:
                    parts = [chunk async for chunk in await sdk.chat.completions.create(**asked, stream=True)]
                    text = "".join(part.choices[0].delta.content or "" for part in parts)
                else:
                    text = (await sdk.chat.completions.create(**asked)).choices[0].message.content
                messages += [
                    {"role": "assistant", "content": text},
                    {"role": "user", "content": "And then?"},
                ]
        episode = session.close(Outcome.ENDED)
        assert episode.rewrites == 0
        for number, piece in enumerate(episode.forest.pieces):
            if piece.kind == Kind.MODEL:
                path = episode.forest.tokens(number)
                expected = scores(model, path, path.size - piece.tokens.size)
                np.testing.assert_allclose(piece.logprob, expected, atol=1e-4, rtol=0)
                assert set(piece.version.tolist()) == {0}
                turns += 1
    assert turns == 16
