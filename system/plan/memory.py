"""Memory per GPU, of a learner rank and of an engine, in bytes.

Pure arithmetic on shapes and layouts; nothing is allocated.  Activations follow Korthikanti et al. (2022),
"Reducing Activation Recomputation in Large Transformer Models", section 4, for a gated MLP, grouped-query
attention, and an attention kernel that keeps no score matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from system.config import Config, ConfigError, LearnConfig
from system.config.precision import FLOAT8_CACHES, float8_weights, sglang_flags
from system.learn.sizes import LOGITS, STAGED
from system.models.shape import ModelShape

WIDTH = {"float32": 4, "bfloat16": 2}  # bytes per number
_GRADIENT = 4  # gradients are accumulated and reduced in fp32
_ADAM = 8  # two fp32 moments
_MASTER = 4  # fp32 copy of bf16 weights
UNEVEN = 1.25  # tokens of the rank whose experts are asked most, over the mean (`train/expert_load` tells)


@dataclass(frozen=True, slots=True)
class EngineLayout:
    """One engine: ``tp`` GPUs, of whose memory ``memory_share`` may hold weights and KV cache."""

    tp: int = 1
    memory_share: float = 0.85
    dtype: str = "bfloat16"
    float8: bool = False  # matrices of a byte a weight
    cache_width: int | None = None  # bytes of a number of the KV cache; None: as many as dtype has

    @property
    def told(self) -> str:
        """What of it is float8, to be put behind a line."""
        parts = {"weights": self.float8, "KV cache": self.cache_width == 1}
        what = " and ".join(name for name, there in parts.items() if there)
        return f", float8 {what} (docs/precision.md)" if what else ""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by purpose on the fullest GPU of its kind."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def engine_layout(config: Config) -> EngineLayout:
    """Of one engine, whose memory is what SGLang's own flag says.  Raises :class:`ConfigError` if that is no
    share.
    """
    layout = EngineLayout(tp=config.engine.tp, dtype=config.model.dtype)
    if config.engine.name != "sglang":
        return layout
    flags = sglang_flags(config.engine.sglang)
    narrow = flags.get("kv_cache_dtype") in FLOAT8_CACHES
    layout = replace(layout, float8=float8_weights(flags), cache_width=1 if narrow else None)
    if (share := flags.get("mem_fraction_static")) is None:
        return layout
    if not isinstance(share, int | float) or not 0 < share < 1:
        raise ConfigError(
            f"engine.sglang.mem_fraction_static={share}: it is a share of a GPU's memory, between 0 and 1"
        )
    return replace(layout, memory_share=share)


def learner_memory(
    shape: ModelShape, learn: LearnConfig, dtype: str = "bfloat16", reserved: float = 0.0
) -> Memory:
    """The fullest pipeline stage: the first holds most activations, the last the logits."""
    stages = {stage: _stage(shape, learn, dtype, stage) for stage in {0, learn.pp - 1}}
    worst = max(stages.values(), key=lambda parts: sum(parts.values()))
    return Memory({**worst, "reserved": reserved})


def engine_memory(shape: ModelShape, layout: EngineLayout, memory: float) -> Memory:
    """Weights, and the KV cache that takes the rest of the engine's share of ``memory`` (bytes per GPU).

    A negative KV part means that the weights alone do not fit.
    """
    weights = weight_bytes(shape, layout) / layout.tp
    share = memory * layout.memory_share
    return Memory({"weights": weights, "KV cache": share - weights, "reserved": memory - share})


def weight_bytes(shape: ModelShape, layout: EngineLayout) -> float:
    """Of all weights of an engine: float8 leaves embedding, head, norms, routers and biases as they are, and
    has a float32 scale for every row of a matrix.
    """
    width = WIDTH[layout.dtype]
    if not layout.float8:
        return shape.parameters * width
    matrices = [
        size
        for at in range(shape.layers)
        for part, size in shape.layer_parts(at).items()
        if len(size) == 2 and part != "router"
    ]
    small = sum(rows * columns for rows, columns in matrices)
    small += sum(shape.of_experts(at) for at in range(shape.layers))
    return (shape.parameters - small) * width + small + 4 * sum(rows for rows, _ in matrices)


def kv_capacity(shape: ModelShape, layout: EngineLayout, memory: float) -> int:
    """Tokens whose KV fits into one engine (all its GPUs together); 0 when the weights do not fit."""
    shards = min(layout.tp, shape.kv_heads)  # beyond that, KV heads are replicated
    per_gpu = shape.kv_bytes_per_token(layout.cache_width or WIDTH[layout.dtype]) / shards
    room = engine_memory(shape, layout, memory).parts["KV cache"]
    return max(0, int(room / per_gpu))


def activation_bytes_per_token(
    shape: ModelShape, learn: LearnConfig, dtype: str = "bfloat16"
) -> tuple[float, float]:
    """Bytes that each token of a rank keeps for the backward pass per layer: (whole layer, what recomputation
    keeps).

    Whole layer, in numbers per token: the inputs and outputs of both norms (4h, divided only by sequence
    parallelism); q, k and v before rotation and q and k after it, the attention's output in the kernel's
    layout and in the projection's; gate and up, and their product.  Under context parallelism the keys and
    values of the other ranks' tokens too.  The mean of the layers, where some have experts.
    """
    width, tp = WIDTH[dtype], learn.tp
    split = tp if learn.sequence_parallel else 1
    attention = (4 * shape.heads + 3 * shape.kv_heads) * shape.head_dim / tp
    if learn.cp > 1:
        attention += gathered_bytes_per_token(shape, learn, dtype) / width
    norms_and_attention = width * (4 * shape.hidden / split + attention)
    whole = norms_and_attention + mlp_bytes_per_token(shape, learn, dtype)
    kept = {
        "none": whole,
        # The inputs of both norms stay; what they give and the MLP are computed again.
        "selective": width * (2 * shape.hidden / split + attention),
        "full": width * shape.hidden / split,
    }[learn.recompute]
    return whole, kept


def mlp_bytes_per_token(shape: ModelShape, learn: LearnConfig, dtype: str = "bfloat16") -> float:
    """Bytes that the MLP of a layer keeps for each token of a rank, or the experts; the mean of the layers.

    Of each expert that a token goes through, in numbers: what comes to it (h), gate and up, and three
    products of their width, the last one weighed; of the router its scores and a map of who goes where.
    Experts that stand still beside adapters have no gradients of weights, and keep neither what comes to
    them nor the last product.
    All of a row's tokens come to each rank where experts are split over ranks (``learn.expert_tp``); where
    they are whole, as many as leave it.
    """
    width = WIDTH[dtype]
    dense = width * 3 * shape.ffn / learn.tp
    if (experts := shape.experts) is None:
        return dense
    split = learn.tp if learn.sequence_parallel else 1
    chosen = experts.chosen * UNEVEN * width
    frozen = learn.lora.on
    each = (0 if frozen else shape.hidden) + (4 if frozen else 5) * experts.ffn / learn.expert_tp
    inside = chosen * each * learn.expert_tp / split
    router = experts.count * (width + 1) / split
    sparse = experts.layers / shape.layers
    return (1 - sparse) * dense + sparse * (inside + router)


def _travelling(shape: ModelShape, learn: LearnConfig, dtype: str) -> float:
    """Bytes for each token of a rank that exist while it goes to its experts and back in one layer: as it is
    sent, comes, leaves the expert and returns, and in the backward pass the gradients of all four.
    """
    if (experts := shape.experts) is None:
        return 0.0
    split = learn.tp if learn.sequence_parallel else 1
    ways = 2 + 2 * UNEVEN * learn.expert_tp
    return 2 * ways * experts.chosen * WIDTH[dtype] * shape.hidden / split


def gathered_bytes_per_token(shape: ModelShape, learn: LearnConfig, dtype: str = "bfloat16") -> float:
    """Bytes of the whole row's keys and values in one layer, for each token that a rank has of it itself."""
    return WIDTH[dtype] * 2 * shape.kv_heads * shape.head_dim / learn.tp * learn.cp


def averages(learn: LearnConfig) -> bool:
    """Whether a moving average of the weights is the proximal policy (``Trainer.average``)."""
    return learn.proximal == "average" and learn.objective.name == "decoupled"


def besides(learn: LearnConfig, dtype: str) -> dict[str, int]:
    """The models that the learner keeps besides the one it trains: bytes of each parameter on its device.

    A moving average is kept in float32, and computes in the model's ``dtype`` (``MovingAverage``).
    """
    mean = WIDTH[dtype] + (_MASTER if dtype != "float32" else 0)
    kept = {"reference": WIDTH[dtype]} if learn.kl_coef > 0 else {}
    kept |= {"average": mean} if averages(learn) else {}
    return kept | ({"teacher": mean} if learn.teacher == "average" else {})


def besides_saved(learn: LearnConfig, dtype: str) -> int:
    """Bytes of these models in a checkpoint, for each parameter; of an average it has the float32 numbers."""
    return sum(WIDTH[dtype if name == "reference" else "float32"] for name in besides(learn, dtype))


def host_memory(shape: ModelShape, learn: LearnConfig, dtype: str = "bfloat16") -> Memory:
    """What a learner rank keeps in its host's memory: the state of an offloaded optimizer, and what is on its
    way.
    """
    if not learn.offload:
        return Memory()
    parameters = max(_stepped(shape, learn, stage) for stage in (0, learn.pp - 1))
    staged = 2 * min(STAGED, parameters) * (_GRADIENT + WIDTH[dtype])
    return Memory({"optimizer": (_ADAM + _MASTER) * parameters, "staged": staged})


def stage_layers(shape: ModelShape, learn: LearnConfig, stage: int) -> range:
    """The layers of a pipeline stage."""
    each = -(-shape.layers // learn.pp)
    return range(stage * each, min((stage + 1) * each, shape.layers))


def _parameters(shape: ModelShape, learn: LearnConfig, stage: int) -> float:
    """Of a rank on a pipeline stage."""
    layers = stage_layers(shape, learn, stage)
    parameters = sum(shape.matrices(at) / learn.tp + shape.copied(at) for at in layers)
    first, last = stage == 0, stage == learn.pp - 1
    tables = first + (last and not (shape.tied and first))  # a tied head is a second copy on another stage
    return parameters + tables * shape.embedding / learn.tp + _experts(shape, learn, stage)


def _experts(shape: ModelShape, learn: LearnConfig, stage: int) -> float:
    """Parameters of a rank's experts."""
    of_all = sum(shape.of_experts(at) for at in stage_layers(shape, learn, stage))
    return of_all / (learn.ep * learn.expert_tp)


def _stepped(shape: ModelShape, learn: LearnConfig, stage: int) -> float:
    """Parameters whose optimizer state a rank has, where the ranks that hold the same share it."""
    if learn.lora.on:
        return adapter_parameters(shape, learn, stage) / learn.copies
    experts = _experts(shape, learn, stage)
    return (_parameters(shape, learn, stage) - experts) / learn.copies + experts / learn.expert_copies


def adapted(shape: ModelShape, learn: LearnConfig) -> tuple[str, ...]:
    """The parts of every layer that have adapters, if any have."""
    return learn.lora.parts(experts=shape.experts is not None)


def adapter_parameters(shape: ModelShape, learn: LearnConfig, stage: int | None = None) -> float:
    """Numbers of all adapters (``learn.lora``), or of those that a rank on a pipeline stage holds."""
    lora, tp = learn.lora, 1 if stage is None else learn.tp
    layers = shape.layers if stage is None else -(-shape.layers // learn.pp)
    each = 0.0
    for part in adapted(shape, learn):
        wide, narrow = shape.layer_parts(0)[part]
        # The factor beside the cut of its layer is split over the tensor-parallel ranks (learn/lora.py).
        split = (wide, narrow / tp) if part in ("out", "down") else (wide / tp, narrow)
        each += lora.rank * sum(split)
    return layers * each


def trained_parameters(shape: ModelShape, learn: LearnConfig, stage: int) -> float:
    """Of a rank on a pipeline stage: all of them, or its adapters."""
    return (adapter_parameters if learn.lora.on else _parameters)(shape, learn, stage)


def _beside_adapters(shape: ModelShape, learn: LearnConfig, width: int, tokens: float, layers: int) -> float:
    """What adapters keep for the backward pass: between A and B, and every layer's A's side by side; and what
    the first hidden states have of a gradient.
    """
    lora, split = learn.lora, learn.tp if learn.sequence_parallel else 1
    if not lora.on:
        return 0.0
    parts = adapted(shape, learn)
    recomputed = {"none": (), "selective": ("gate", "up", "down"), "full": parts}[learn.recompute]
    kept = 0.0
    for part in parts:
        by_columns = part in ("out", "down")
        wide = shape.layer_parts(0)[part][1] / (learn.tp if by_columns else 1)
        once = width * lora.rank * (tokens / (split if by_columns else 1) + wide)
        kept += once * (1 if part in recomputed else layers)
    return kept + width * tokens * shape.hidden / split


def _stage(shape: ModelShape, learn: LearnConfig, dtype: str, stage: int) -> dict[str, float]:
    layers = -(-shape.layers // learn.pp)
    parameters = _parameters(shape, learn, stage)
    last, width, tokens = stage == learn.pp - 1, WIDTH[dtype], learn.micro_tokens / learn.cp
    states = _ADAM + (_MASTER if dtype != "float32" else 0)
    whole, kept = activation_bytes_per_token(shape, learn, dtype)
    in_flight = learn.pp - stage  # micro-batches that 1F1B keeps on this stage
    # What one layer has beside it: the gradients at its ends, and what is computed again, or else those of
    # its MLP.
    inside = mlp_bytes_per_token(shape, learn, dtype) if learn.recompute == "none" else whole - kept
    beside = width * 2 * shape.hidden + inside + _travelling(shape, learn, dtype)
    if learn.cp > 1:  # as the ranks gave them and as the row has them; the gradients of both
        beside += 3 * gathered_bytes_per_token(shape, learn, dtype)
    trained = trained_parameters(shape, learn, stage)
    adapters = width * trained if learn.lora.on else 0.0
    parts = {"weights": width * parameters + adapters, "gradients": _GRADIENT * trained}
    if not learn.offload:
        stepped = _stepped(shape, learn, stage) if learn.distributed_optimizer else trained
        parts["optimizer"] = states * stepped
    parts["activations"] = tokens * (in_flight * layers * kept + beside)
    parts["activations"] += _beside_adapters(shape, learn, width, tokens, in_flight * layers)
    if not last:
        # A row in flight also holds its output, what travels and its angles; the gradient that arrives, and
        # what is made of it, exist once.  (Fitted to tests/plan/peaks.json, not derived.)
        split = learn.tp if learn.sequence_parallel else 1
        held = 2 * width * shape.hidden / split + 8 * shape.head_dim
        parts["activations"] += tokens * (in_flight * held + 2 * width * shape.hidden)
    if last:
        # The hidden states of scored tokens and their gradients; a chunk of logits and theirs; a product that
        # is added to the weight's gradient.
        share = shape.vocab / learn.tp
        chunk = min(tokens * share, LOGITS)
        product = 0.0 if learn.lora.on else shape.hidden * share
        parts["logits"] = width * (2 * shape.hidden * tokens + 2 * chunk + product)
    numbers = trained if learn.lora.on else parameters
    return parts | {name: each * numbers for name, each in besides(learn, dtype).items()}
