"""What a client asks a server for: the body of SGLang's ``/generate``."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from system.engine.protocol import GenerateRequest

# SGLang reports the probability among the tokens that top-p kept only for so many of them: its default for
# --sampling-mask-max-tokens.  What is beyond is not sampled either, so the report stays exact.
_MOST_KEPT = 4096


def generate_body(
    request: GenerateRequest, wire_rid: str, tokens: list[int], *, every_token: bool, top_logprobs: int
) -> bytes:
    """The JSON that asks for what is missing of ``request`` after ``tokens``, under the id ``wire_rid``.

    ``every_token``: a message for each, however the server batches them otherwise.  ``top_logprobs``: how
    many of the likeliest tokens to report, for estimates of the entropy.
    """
    asked = request.sampling
    truncated = asked.temperature > 0 and (asked.top_p < 1 or asked.top_k > 0)
    sampling = {
        "max_new_tokens": asked.max_new_tokens - len(tokens),
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": _MOST_KEPT if truncated and asked.top_k <= 0 else asked.top_k,
        "ignore_eos": asked.ignore_eos,
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "stop": asked.stop or None,
        "stop_token_ids": asked.stop_token_ids or None,
        "sampling_seed": asked.seed,
        "stream_interval": 1 if every_token else None,
    }
    body = {
        "rid": wire_rid,
        "input_ids": np.concatenate([request.input_ids, np.array(tokens, np.int32)]),
        "sampling_params": _given(sampling),
        "stream": True,
        "return_logprob": True,
        # Where the list of input log-probabilities begins; its first entry has none.
        "logprob_start_len": None if request.score_from is None else request.score_from - 1,
        "return_sampling_mask": truncated or None,
        "return_routed_experts": request.routes_from is not None or None,
        "routed_experts_start_len": request.routes_from,
        "top_logprobs_num": top_logprobs or None,
    }
    return orjson.dumps(_given(body), option=orjson.OPT_SERIALIZE_NUMPY)


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
