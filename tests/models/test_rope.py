"""Our frequencies are transformers' to the last bit, however a file writes them."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from system.config import EngineConfig
from system.engine.sglang.command import interpreter, server_command
from system.models.reading import UnsupportedModel
from system.models.rope import Rope, turns

LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32_768,
}
theta = st.sampled_from([1e4, 1e5, 5e5, 1e6, 5e6, 10_000])
factor = st.floats(1.0, 64.0) | st.integers(1, 40)
original = st.sampled_from([64, 2048, 4096, 8192, 32_768, 40_960])
PARAMETERS: Any = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("default"), "rope_theta": theta}),
    st.fixed_dictionaries({"rope_type": st.just("linear"), "rope_theta": theta, "factor": factor}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": st.floats(0.5, 2.0),
            "high_freq_factor": st.floats(2.5, 32.0),
            "original_max_position_embeddings": original,
        }
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "rope_theta": theta,
            "factor": factor | st.none(),
            "original_max_position_embeddings": original,
        },
        optional={
            "attention_factor": st.floats(0.5, 2.0),
            "beta_fast": st.floats(8.0, 64.0),
            "beta_slow": st.floats(0.5, 4.0),
            "truncate": st.booleans(),
            "mscale": st.floats(0.5, 2.0),
            "mscale_all_dim": st.floats(0.5, 2.0),
        },
    ),
)


def by_transformers(parameters: dict[str, Any], dimensions: int) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=4 * dimensions,
        num_attention_heads=4,
        head_dim=dimensions,
        max_position_embeddings=131_072,
        rope_parameters=dict(parameters),
    )
    if parameters["rope_type"] == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)


@settings(max_examples=300, deadline=None)
@given(PARAMETERS, st.sampled_from([8, 12, 32, 64, 128, 256]))
def test_frequencies_and_scale_are_those_of_transformers(parameters: dict[str, Any], dimensions: int) -> None:
    rope = Rope.read({"rope_parameters": parameters}, 131_072)
    expected, scale = by_transformers(parameters, dimensions)
    assert torch.equal(rope.frequencies(dimensions), expected)
    assert rope.scale == scale


@pytest.mark.parametrize("parameters", [LLAMA31, QWEN_YARN], ids=["llama3", "yarn"])
def test_cosines_and_sines_are_those_of_a_model(parameters: dict[str, Any]) -> None:
    """At the ends of a context, where a rounded frequency would show."""
    position = torch.tensor([0, 1, 8191, 60_000, 131_071])
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=131_072,
        rope_parameters=dict(parameters),
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), position[None])
    rope = Rope.read({"rope_parameters": parameters}, 131_072)
    mine = turns(rope.frequencies(128), rope.scale, position)
    for own, theirs in zip(mine, (cos, sin), strict=True):
        assert torch.equal(own, theirs[0, :, :64])
        assert torch.equal(own, theirs[0, :, 64:])  # the other half of a head turns alike


def test_files_of_older_transformers_are_read_alike() -> None:
    old = {k: v for k, v in QWEN_YARN.items() if k not in ("rope_type", "rope_theta")}
    written: list[dict[str, Any]] = [
        {"rope_parameters": QWEN_YARN},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", **old}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **old}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},  # from what it states
    ]
    assert len({Rope.read(config, 32_768) for config in written}) == 1
    assert Rope.read({}, 2048) == Rope.read({"rope_scaling": None, "rope_theta": 1e4}, 2048) == Rope()


@pytest.mark.parametrize(
    ("parameters", "stated", "positions"),
    [
        ({"rope_type": "default"}, 40_960, 40_960),
        (QWEN_YARN, 32_768, 131_072),  # Qwen2.5's, edited as its documentation says
        (QWEN_YARN, 40_960, 131_072),  # Qwen3's
        (QWEN_YARN, 131_072, 131_072),
        (LLAMA31, 131_072, 131_072),  # Llama's state the stretched number
        ({"rope_type": "linear", "factor": 4.0}, 4096, 16_384),
    ],
)
def test_how_far_a_model_reaches(parameters: dict[str, Any], stated: int, positions: int) -> None:
    assert Rope.read({"rope_parameters": parameters}, stated).positions(stated) == positions


def test_yarn_says_how_much_sharper_attention_is() -> None:
    assert Rope.read({"rope_parameters": QWEN_YARN}, 32_768).scale == 0.1 * math.log(4) + 1


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' (its frequencies change"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope' (it has one set"),
        (
            {"rope_parameters": {"rope_type": "su"}},
            "rope_type 'su'; supported: default, linear, llama3, yarn",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters of full_attention",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5",
        ),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "rope factor 0.5"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "factor '4'; it is a number above 0"),
        ({"rope_parameters": LLAMA31 | {"high_freq_factor": 1.0}}, "high_freq_factor 1 "),
        ({"rope_parameters": [1]}, "rope_parameters [1]; it is an object"),
    ],
)
def test_other_ways_to_turn_are_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel) as refused:
        Rope.read(config, 4096)
    assert named in str(refused.value)


# What SGLang computes as transformers does, and what it does not: key, value, what is then disputed.
IN_SGLANG: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"truncate": False}, ""),
    ({"truncate": False, "beta_fast": 20.0, "beta_slow": 2.0}, ""),
    ({"mscale": 0.707, "mscale_all_dim": 1.0}, ""),
    ({"mscale": 1.0}, ""),
    ({"mscale_all_dim": 0.5, "truncate": False}, ""),
    ({"mscale": 0.5, "mscale_all_dim": 0.0}, "mscale"),
    ({"attention_factor": 1.5}, "attention_factor"),
    ({"attn_factor": 1.5}, "attn_factor"),
    ({"extrapolation_factor": 0.5}, "extrapolation_factor"),
]


@pytest.mark.sglang
def test_yarn_is_sglangs_but_for_what_is_disputed() -> None:
    """SGLang's own class against ours, which is transformers'."""
    positions = [0, 1, 8191, 60_000, 131_071]
    scalings = [QWEN_YARN | more for more, _ in IN_SGLANG]
    line = server_command(
        EngineConfig(name="sglang"), python=interpreter(EngineConfig()), model="", dtype="", port=0, cpu=True
    )
    done = subprocess.run(
        [line.argv[0], str(Path(__file__).with_name("rope_in_sglang.py"))],
        input=json.dumps({"scalings": scalings, "positions": positions}),
        env={**os.environ, **line.env},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for scaling, (more, disputed), theirs in zip(
        scalings, IN_SGLANG, json.loads(done.stdout.splitlines()[-1]), strict=True
    ):
        rope = Rope.read({"rope_parameters": scaling}, 32_768)
        assert rope.disputed == disputed, more
        mine = torch.cat(turns(rope.frequencies(128), rope.scale, torch.tensor(positions)), -1)
        assert torch.allclose(mine, torch.tensor(theirs), rtol=0, atol=1e-6) == (not disputed), more


@pytest.mark.parametrize(("more", "disputed"), IN_SGLANG)
def test_what_sglang_reads_otherwise_is_known(more: dict[str, Any], disputed: str) -> None:
    assert Rope.read({"rope_parameters": QWEN_YARN | more}, 32_768).disputed == disputed
