"""Entropies estimated from the most likely tokens: the truth lies within the stated bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from system.engine.entropy import TopEntropy, entropy_bounds
from system.engine.stream import StreamReader


def distributions(seed: int, vocab: int, sharpness: float) -> np.ndarray:
    """[5, vocab] log-probabilities, the largest first."""
    logits = sharpness * np.random.default_rng(seed).normal(size=(5, vocab))
    logits -= logits.max(-1, keepdims=True)
    return -np.sort(-(logits - np.log(np.exp(logits).sum(-1, keepdims=True))), -1)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 400), st.floats(0.0, 8.0), st.integers(1, 30))
def test_the_truth_lies_within_the_bounds(seed: int, vocab: int, sharpness: float, k: int) -> None:
    log_p = distributions(seed, vocab, sharpness)
    truth = -(np.exp(log_p) * log_p).sum(-1)
    low, high = entropy_bounds(log_p[:, : min(k, vocab)], vocab)
    assert (low <= truth + 1e-9).all()
    assert (truth <= high + 1e-9).all()


def test_bounds_close_where_nothing_is_left_open() -> None:
    log_p = distributions(0, 50, 3.0)
    low, high = entropy_bounds(log_p, 50)
    np.testing.assert_allclose(low, high, atol=1e-6)
    uniform = np.full((1, 10), -np.log(200.0))  # the rest can only be as likely as the tenth: uniform, too
    low, high = entropy_bounds(uniform, 200)
    np.testing.assert_allclose([low[0], high[0]], np.log(200.0))


def test_a_stream_without_entropies_is_read_with_estimates() -> None:
    log_p = distributions(3, 60, 2.0)[:3]
    top = [[[float(value), token, None] for token, value in enumerate(row[:20])] for row in log_p]
    meta = {
        "completion_tokens": 3,
        "output_token_logprobs": [[-1.0, token, None] for token in (4, 5, 6)],
        "output_top_logprobs": top,
        "weight_version": "2",
        "finish_reason": None,
    }
    message = {"output_ids": [4, 5, 6], "meta_info": meta, "text": "x"}
    reader = StreamReader(TopEntropy(20, 60))
    chunk, _ = reader.read(message)
    low, high = entropy_bounds(log_p[:, :20], 60)
    np.testing.assert_allclose(chunk.entropy, (low + high) / 2, rtol=1e-6)
    assert reader.estimated == 3
    assert reader.error == pytest.approx((high - low).sum() / 2)
    assert np.isnan(StreamReader().read(message)[0].entropy).all(), "never made up unless asked for"
    exact, _ = StreamReader(TopEntropy(20, 60)).read({**message, "meta_info": {**meta, "entropy": [1, 2, 3]}})
    assert exact.entropy.tolist() == [1, 2, 3]
