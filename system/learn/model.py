"""Qwen2 and Qwen3 dense language models on megatron-core's ``GPTModel``, reading packed trees.

Two things differ from the stock model: rotary frequencies come from explicit positions (a token's depth on
its root path; the stock ``position_embedding_type="rope"`` ignores position ids and numbers the packed row),
and the layers attend through :class:`~system.learn.attention.TreeAttention`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from system.config import ConfigError, LearnConfig
from system.learn import cpu
from system.learn.attention import TreeAttention, TreeMask

FAMILIES = ("qwen2", "qwen3")


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich, 2019) with the constructor Megatron's layer specs expect."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # Under sequence parallelism each rank norms its own tokens only; Megatron sums what is marked so.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class TreeGPTModel(GPTModel):
    """This rank's stage of a ``GPTModel`` that scores tokens of a packed row at their predictors."""

    def __init__(self, *, real_vocab_size: int, rope_theta: float, **kwargs: Any) -> None:
        super().__init__(position_embedding_type="none", **kwargs)
        self.real_vocab_size = real_vocab_size
        self.rope_theta = rope_theta
        if self.post_process:
            # The head sees chosen rows, which are not spread over the ranks as the hidden states are: each
            # rank computes its vocabulary share for all of them, and their gradients are summed here.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = self.config.tensor_model_parallel_size > 1

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, tokens: torch.Tensor, position: torch.Tensor, mask: TreeMask, rows: torch.Tensor
    ) -> torch.Tensor:
        """Logits at chosen rows on the last pipeline stage, hidden states on the others.

        ``tokens`` and ``position`` ``[N]`` int64; ``rows`` ``[M]`` int64 indices into the row, repeats
        allowed (the children of a fork share a predictor).  A later stage reads the hidden states given to
        ``set_input_tensor`` instead of the tokens.  Under sequence parallelism tp divides N.

        Returns ``[M, V/tp]``, this rank's share of the padded vocabulary (the output projection, the largest
        product of a small model, runs only where a token is scored), or ``[N, 1, hidden]`` (``[N/tp, 1,
        hidden]`` under sequence parallelism).
        """
        hidden = self.embedding(input_ids=tokens[None], position_ids=None) if self.pre_process else None
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=self.rotary(position),
            attention_bias=mask,
        )
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden.index_select(0, rows), weight=tied)
        return logits[:, 0]

    def rotary(self, position: torch.Tensor) -> torch.Tensor:
        """``[N, 1, 1, d]`` float32 rotary angles (RoFormer, Su et al., 2021) of explicit positions."""
        d = self.config.kv_channels
        assert d is not None
        exponent = torch.arange(0, d, 2, dtype=torch.float32, device=position.device) / d
        angles = position.float()[:, None] * (1.0 / self.rope_theta**exponent)
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]


def read_hf_config(path: str | Path) -> Any:
    """The Hugging Face configuration in ``path``; raises ``ConfigError`` when this learner cannot run such a
    model.
    """
    from transformers import AutoConfig  # slow import, and only needed here

    hf = AutoConfig.from_pretrained(str(path))
    rope = dict(getattr(hf, "rope_parameters", None) or {})
    refusals = (
        (hf.model_type not in FAMILIES, f"model_type {hf.model_type!r}; supported: {', '.join(FAMILIES)}"),
        (rope.get("rope_type", "default") != "default", f"rope_type {rope.get('rope_type')!r}"),
        (getattr(hf, "use_sliding_window", False), "sliding-window attention"),
        (hf.hidden_act != "silu", f"activation {hf.hidden_act!r}"),
        (hf.model_type == "qwen3" and getattr(hf, "attention_bias", False), "Qwen3 with attention biases"),
    )
    for refused, what in refusals:
        if refused:
            raise ConfigError(f"{path}: the learner does not support {what}")
    return hf


def transformer_config(hf: Any, learn: LearnConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of a Hugging Face Qwen2/Qwen3 model.  Raises ``ConfigError`` if the layout
    does not divide it.
    """
    tp, pp = learn.tp, learn.pp
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(hf, name) % tp:
            raise ConfigError(f"learn.tp={tp} does not divide the model's {name}={getattr(hf, name)}")
    if hf.num_hidden_layers % pp:
        raise ConfigError(f"learn.pp={pp} does not divide the model's {hf.num_hidden_layers} layers")
    on_cpu = cpu.needed()
    checkpointing: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        ffn_hidden_size=hf.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=hf.model_type == "qwen2",
        qk_layernorm=hf.model_type == "qwen3",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=dtype,
        batch_p2p_comm=not on_cpu,
        sequence_parallel=learn.sequence_parallel and tp > 1,
        use_cpu_initialization=on_cpu,
        # Without it `.tensor_model_parallel` stays unset on parameters and the gradient norm is wrong under
        # TP.
        perform_initialization=True,
        # Packed weights are normalised over the whole step: gradients are summed over DP ranks, never
        # averaged.
        calculate_per_token_loss=True,
        # Fused kernels need Apex or TransformerEngine.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        **checkpointing[learn.recompute],
    )


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary rounded up to a multiple of ``tp``."""
    return -(-vocab_size // tp) * tp


def build(hf: Any, config: TransformerConfig) -> TreeGPTModel:
    """A randomly initialised model shard on this rank's device; parallel state must be initialised."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    parts: Any = layer.submodules
    attention = parts.self_attention.submodules
    attention.core_attention = TreeAttention
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    norm: Any = RMSNorm  # Megatron takes a class here, whatever its annotation says
    spec: Any = TransformerBlockSubmodules([layer] * get_num_layers_to_build(config), layer_norm=norm)
    with cpu.scope():
        model = TreeGPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab_size(hf.vocab_size, config.tensor_model_parallel_size),
            real_vocab_size=hf.vocab_size,
            max_sequence_length=hf.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=bool(hf.tie_word_embeddings),
            parallel_output=True,
            rope_theta=float(hf.rope_parameters["rope_theta"]),
        )
        return model if cpu.needed() else model.cuda()
