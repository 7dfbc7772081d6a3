"""Language models of our families on megatron-core's ``GPTModel``, reading packed trees.

Two things differ from the stock model: the layers attend through
:class:`~system.learn.attention.TreeAttention`, which rotates queries and keys by explicit positions (a
token's depth on its root path; the stock ``position_embedding_type="rope"`` ignores position ids and numbers
the packed row), and the head is :mod:`system.learn.head`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import random
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn

from system.config import ConfigError, LearnConfig
from system.learn import cpu, experts
from system.learn.attention import RowContext, TreeAttention, TreeMask, choose_kernels
from system.learn.expert_layout import expert_problems
from system.learn.lora import adapt_spec, freeze
from system.learn.rotary import Rotary
from system.models.adapter import Adapter
from system.models.shape import ModelShape


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

    frequencies: torch.Tensor  # [head_dim / 2] float32

    def __init__(self, *, shape: ModelShape, adapter: Adapter | None = None, **kwargs: Any) -> None:
        super().__init__(position_embedding_type="none", **kwargs)
        self.shape, self.adapter = shape, adapter
        # Computed on the CPU, as by transformers: a GPU's powers differ in the last bit.
        self.register_buffer("frequencies", shape.rope.frequencies(shape.head_dim), persistent=False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens: torch.Tensor,
        position: torch.Tensor,
        mask: TreeMask,
        rows: torch.Tensor,
        padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states: at chosen rows on the last pipeline stage (those that :attr:`output_weight`
        projects), at all of them on the others.

        ``tokens`` and ``position`` ``[N]`` int64, of the row or of this rank's share of it; ``rows`` ``[M]``
        int64 indices into them, repeats allowed (the children of a fork share a predictor); ``padding``
        ``[N]`` bool: tokens that do not count in the load of experts (none by default).  A later stage
        reads the hidden states given to ``set_input_tensor`` instead of the tokens.  Under sequence
        parallelism tp divides N.

        Returns ``[M, hidden]``, the same on all tensor-parallel ranks (the output projection, the largest
        product of a small model, runs only where a token is scored), or ``[N, 1, hidden]`` (``[N/tp, 1,
        hidden]`` under sequence parallelism).
        """
        hidden = self.embedding(input_ids=tokens[None], position_ids=None) if self.pre_process else None
        if hidden is not None and self.adapter and torch.is_grad_enabled():
            # A layer that is computed again in the backward pass needs an input that has a gradient, and
            # nothing has one before the first adapter.
            hidden.requires_grad_()
        row = RowContext(mask, Rotary(position, self.frequencies, self.shape.rope.scale))
        if padding is not None and self.config.sequence_parallel:
            padding = padding.chunk(self.config.tensor_model_parallel_size)[self.pg_collection.tp.rank()]
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            attention_bias=row,
            padding_mask=None if padding is None else padding[None],
        )
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            # Each rank projects all chosen rows onto its share of the vocabulary, and sums their gradients.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden[:, 0].index_select(0, rows)

    @property
    def output_weight(self) -> torch.Tensor:
        """``[V/tp, hidden]``, this rank's share of the padded vocabulary, on the last pipeline stage."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        assert weight is not None
        return weight


def transformer_config(shape: ModelShape, learn: LearnConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of a model.  Raises ``ConfigError`` if the layout does not divide it."""
    tp, pp = learn.tp, learn.pp
    for name, value in shape.divided(whole_experts=learn.ep > 1).items():
        if value % tp:
            raise ConfigError(f"learn.tp={tp} does not divide the model's {name}={value}")
    if shape.layers % pp:
        raise ConfigError(f"learn.pp={pp} does not divide the model's {shape.layers} layers")
    for problem in expert_problems(shape, learn):
        raise ConfigError(problem)
    on_cpu = cpu.needed()
    checkpointing: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {
            "recompute_granularity": "selective",
            "recompute_modules": ["layernorm", "mlp", *(["moe"] if shape.experts else [])],
        },
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=shape.eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.family.qkv_bias,
        qk_layernorm=shape.family.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=learn.cp,
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
        # SwiGLU in one compiled kernel; RoPE is ours (rotary.py), and the other fused kernels need Apex or
        # TransformerEngine.
        bias_activation_fusion=not on_cpu,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        **checkpointing[learn.recompute],
        **(experts.settings(shape.experts, shape.layers, learn) if shape.experts else {}),
    )


def _layer(
    shape: ModelShape, config: TransformerConfig, kernels: str, sparse: bool, adapter: Adapter | None
) -> Any:
    """What a layer is made of; a ``sparse`` one has experts in place of its MLP."""
    count = config.num_moe_experts if sparse else None
    layer = get_gpt_layer_local_spec(
        normalization="RMSNorm", qk_layernorm=config.qk_layernorm, num_experts=count, moe_grouped_gemm=False
    )
    parts: Any = layer.submodules
    attention = parts.self_attention.submodules
    attention.core_attention = partial(TreeAttention, kernels=kernels)
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if adapter:
        adapt_spec(parts, shape, adapter, config.tensor_model_parallel_size)
    if sparse:
        parts.mlp.submodules.experts = experts.GroupedExperts
        parts.mlp.submodules.router = experts.ExpertRouter
    return layer


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary rounded up to a multiple of ``tp``."""
    return -(-vocab_size // tp) * tp


def build(
    shape: ModelShape, config: TransformerConfig, kernels: str, adapter: Adapter | None = None
) -> TreeGPTModel:
    """A randomly initialised model shard on this rank's device; parallel state must be initialised.

    ``kernels``: ``learn.attention``.  With an ``adapter`` nothing but adapters requires a gradient.
    Raises ``ConfigError`` where the kernels cannot be had.
    """
    if shape.experts:
        experts.install()
    kernels = choose_kernels(kernels, config.params_dtype, shape.head_dim, config.context_parallel_size)
    first = get_transformer_layer_offset(config)
    layers = [
        _layer(shape, config, kernels, shape.sparse(layer), adapter)
        for layer in range(first, first + get_num_layers_to_build(config))
    ]
    # By default megatron-core 0.16.1 takes FP8 to be in use here (`False is not None`), and then needs
    # TransformerEngine: no norm could be recomputed without it.
    tensor_parallel.CheckpointWithoutOutput = partial(random.CheckpointWithoutOutput, fp8=None)  # pyright: ignore
    norm: Any = RMSNorm  # Megatron takes a class here, whatever its annotation says
    spec: Any = TransformerBlockSubmodules(layers, layer_norm=norm)
    with cpu.scope():
        model = TreeGPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab_size(shape.vocab, config.tensor_model_parallel_size),
            shape=shape,
            adapter=adapter,
            max_sequence_length=shape.max_position,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=shape.tied,
            parallel_output=True,
        )
        if adapter:
            freeze(model)
        return model if cpu.needed() else model.cuda()
