"""A real model that talks, thinks and calls, though nothing trained it: each token's successor is drawn from
a table that stands in its weights.  And an engine that says what a test tells it to.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from byte_tokenizer import byte_tokenizer
from tokenizers import AddedToken, decoders
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from system.agents.forest import Forest
from system.agents.model import ServedModel
from system.engine.embedded.job import Event, Job
from system.engine.protocol import Chunk, Engine, Finish, GenerateRequest
from system.rollout.codec import ChatCodec
from system.rollout.syntax.hermes import HermesSyntax
from system.tree.record import Kind

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- 'Tools:' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
    {{- '\nCall: <tool_call>{"name": <name>, "arguments": <object>}</tool_call>' }}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if m.reasoning_content %}{{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{%- endif %}
        {{- m.content }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

OPEN, CLOSE, THINK, THOUGHT = "<tool_call>", "</tool_call>", "<think>", "</think>"
SAY, WONDER, DONE, ONE_MORE = "I will look. ", "\nWhat may it be?\n", "The answer is 42.", "\n\n"
ADD = '\n{"name": "add", "arguments": {"b":  2, "a": 1}}\n'
LOOK = '\n{"name": "look", "arguments": {"word": "ü"}}\n'
BAD = '\n{"name": "add", oops}\n'
WORDS = (OPEN, CLOSE, THINK, THOUGHT, SAY, WONDER, DONE, ONE_MORE, ADD, LOOK, BAD)
END = "<|im_end|>"
# What comes behind what, and how often.  A line break ends what the template writes before a turn.
TABLE: dict[str, dict[str, float]] = {
    "Ċ": {OPEN: 3, SAY: 3, THINK: 2, DONE: 2},
    SAY: {OPEN: 1},
    OPEN: {ADD: 4, LOOK: 4, BAD: 1},
    ADD: {CLOSE: 1},
    LOOK: {CLOSE: 1},
    BAD: {CLOSE: 1},
    CLOSE: {END: 2, OPEN: 1},
    THINK: {WONDER: 1},
    WONDER: {THOUGHT: 1},
    THOUGHT: {ONE_MORE: 1},
    ONE_MORE: {DONE: 1, OPEN: 2, SAY: 1},
    DONE: {END: 1},
}


def make_tokenizer(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Bytes, the special tokens of ChatML, and a token for each of the model's words, and for ``more``."""
    backend = byte_tokenizer(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL])
    backend.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in (*WORDS, *more)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(path: Path, table: Mapping[str, Mapping[str, float]] | None = None) -> Path:
    """Save a model whose next token depends on the last one alone, as ``table`` (TABLE) says; behind any
    other, the turn ends.
    """
    tokenizer = make_tokenizer()
    size = 8 * math.ceil(len(tokenizer) / 8)
    config = Qwen2Config(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=size // 8,
        num_key_value_heads=1,
        max_position_embeddings=1 << 15,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config).eval()
    ids = tokenizer.get_vocab()
    logits = torch.full((size, size), -30.0)  # of the next token, by this one
    logits[:, ids[END]] = 0.0
    for word, following in (TABLE if table is None else table).items():
        logits[ids[word]] = -30.0
        for other, weight in following.items():
            logits[ids[word], ids[other]] = math.log(weight)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(logits.T / math.sqrt(size))  # the norm makes sqrt(size) of the one
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@dataclass
class EngineRecord:
    """What the engine itself was asked and has sampled, by request."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    version: list[int] = field(default_factory=list)


class EngineBooks(dict[str, EngineRecord]):
    """The records of all requests; looks over the embedded engine's shoulder as it answers."""

    def see(self, job: Job, event: Event) -> None:
        record = self.setdefault(job.rid, EngineRecord(job.prompt.tolist()))
        record.tokens += event.tokens
        record.logprob += event.logprob
        record.version += [event.version] * len(event.tokens)

    def check(self, forest: Forest) -> int:
        """Every turn in ``forest`` is one that the engine sampled, behind just these tokens; how many."""
        left = list(self.values())
        turns = 0
        for number, piece in enumerate(forest.pieces):
            if piece.kind != Kind.MODEL:
                assert not piece.logprob.size
                assert not piece.trained
                continue
            before = forest.tokens(piece.parent).tolist()
            size = piece.tokens.size
            record = next(
                (one for one in left if one.prompt == before and one.tokens[:size] == piece.tokens.tolist()
                 and np.array_equal(np.asarray(one.logprob[:size], np.float32), piece.logprob)),
                None,
            )  # fmt: skip
            assert record is not None, f"piece {number} is nothing that the engine has sampled"
            assert record.version[:size] == piece.version.tolist()
            assert np.isfinite(piece.entropy).all()
            left.remove(record)
            turns += 1
        return turns


class ScriptedEngine:
    """Says the next of ``lines``, a few tokens at a time, each time under newer weights; an error among them
    is raised."""

    def __init__(self, lines: Sequence[str | Exception], chunk: int = 3, pause_s: float = 0.0) -> None:
        self.tokenizer = make_tokenizer()
        self.lines, self.chunk, self.pause_s = list(lines), chunk, pause_s
        self.requests: list[GenerateRequest] = []
        self.given_up = 0
        self.going = asyncio.Event()  # once it is set, what is said goes on behind the first chunk
        self.going.set()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        self.requests.append(request)
        line = self.lines.pop(0)
        if isinstance(line, Exception):
            raise line
        ids = self.tokenizer.encode(line)
        cut = ids[: request.sampling.max_new_tokens]
        finish = Finish("stop" if len(cut) == len(ids) else "length")
        whole = False
        try:
            for i in range(0, len(cut), self.chunk):
                part = np.asarray(cut[i : i + self.chunk], np.int32)
                scores = -np.arange(1, part.size + 1, dtype=np.float32)
                whole = i + self.chunk >= len(cut)
                yield Chunk(part, scores, scores, part * 0 + 7 + i // self.chunk, finish if whole else None)
                await self.going.wait()
                await asyncio.sleep(self.pause_s)
        finally:
            self.given_up += not whole


def served(engine: Engine, tokenizer: Any | None = None, **settings: Any) -> ServedModel:
    """A model with the calls of Hermes behind ``engine``."""
    tokenizer = tokenizer or make_tokenizer()
    defaults: dict[str, Any] = {"max_context": 4096}
    return ServedModel(
        engine, tokenizer, ChatCodec(tokenizer), HermesSyntax, one_call=False, **{**defaults, **settings}
    )
