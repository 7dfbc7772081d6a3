"""The configuration: one typed schema, YAML files that inherit from each other, dotted overrides.

``load("configs/quickstart.yaml", ["branching=none", "flow.staleness=0"])`` merges, in this order: the
defaults below, the file's ``base:`` (recursively), the file, the overrides.  An unknown key is an error that
names the nearest known one.  A plain word given for a section that has a ``name`` sets that name:
``branching=none`` is ``branching.name=none``.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from system.cluster import settings as cluster_settings
from system.cluster.settings import ClusterConfig, SlurmConfig
from system.engine.sglang import flags as sglang_flags


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the remedy."""


@dataclass
class PartConfig:
    """A part picked by name (:mod:`system.plugins`); a bare word for the setting is its name."""

    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class RunConfig:
    name: str = ""  # run directory's name under `dir`; empty: <config file>-s<seed>
    dir: str = "runs"
    seed: int = 0
    steps: int = 100  # training steps (weight versions after the warm start)
    stop_at_accuracy: float = 0.0  # end early once training accuracy (moving mean) reaches this; 0: never


@dataclass
class ModelConfig:
    path: str = ""  # Hugging Face directory; empty: a tiny model of the shape below is made for the task
    dtype: str = "float32"  # float32 | bfloat16
    hidden_size: int = 96
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    ffn_size: int = 256


@dataclass
class TaskConfig:
    name: str = "quickstart"  # quickstart | jsonl | reasoning-gym | package.module:Name
    path: str = ""  # data file for `jsonl` (JSONL or Parquet)
    eval_path: str = ""
    dataset: str = ""  # reasoning-gym data set name
    train_size: int = 4096
    eval_size: int = 200
    system_prompt: str = ""  # replaces the task's own when set
    options: dict[str, Any] = field(default_factory=dict)  # task-specific


@dataclass
class WarmStartConfig:
    steps: int = 0  # supervised steps on the task's demonstrations before reinforcement learning; 0: none
    demos: int = 4096
    batch: int = 64  # demonstrations per step
    lr: float = 3e-3


@dataclass
class RolloutConfig:
    # barrier-free | lockstep: the released ARPO code's rounds (generate all, wait for all tools, fork, top up
    # one root per round), for comparison; needs flow.staleness=0: a batch is grown, then trained on
    schedule: str = "barrier-free"
    leaves: int = 8  # n: leaves per tree
    roots: int = 4  # N: branches that start together; forks draw on n - N
    workers: int = 1
    concurrency: int = 32  # trees growing at once, over all workers
    syntax: str = "tags"  # tags | hermes
    max_response_tokens: int = 256  # per branch, tool results included
    max_tool_result_tokens: int = 128
    call_limit: int = 4  # tool calls per branch
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    generate_deadline_s: float = 120.0  # one engine call
    branch_deadline_s: float = 300.0
    tree_deadline_s: float = 600.0


@dataclass
class BranchingConfig:
    name: str = "arpo"  # arpo | arpo-paper | arpo-release | random | none
    alpha: float = 0.5
    beta: float = 0.2
    tau: float = 0.5  # threshold of arpo-paper
    probe_tokens: int = 8  # k: tokens after a tool result whose mean entropy decides
    options: dict[str, Any] = field(default_factory=dict)  # of one's own policy


@dataclass
class RewardConfig:
    name: str = "arpo"  # arpo | arpo-release | task | package.module:Name
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ToolsConfig:
    names: list[str] = field(default_factory=lambda: ["search", "python"])
    corpus: str = ""  # JSONL of {"id", "title", "text"} for search; empty: the task's own corpus
    search_top_k: int = 3
    search_url: str = ""  # use a retrieval server that already runs
    deadline_s: float = 20.0  # one call, retries included
    concurrency: int = 16  # calls at once, per tool
    rate_per_s: float = 0.0  # 0: unlimited
    retries: int = 2
    cache_size: int = 4096  # entries per pure tool
    python_cpu_s: float = 5.0
    python_wall_s: float = 10.0
    python_memory_mb: int = 256
    python_output_chars: int = 2000


@dataclass
class EngineConfig:
    name: str = "embedded"  # embedded | sglang
    replicas: int = 1
    tp: int = 1  # GPUs of one replica (SGLang's tensor parallelism)
    device: str = "auto"  # auto | cpu | cuda
    host: str = "127.0.0.1"
    max_running: int = 64  # sequences decoded together
    max_context: int = 1024  # tokens per sequence, prompt included
    cache_slots: int = 128  # finished sequences whose KV is kept for reuse
    chunk_tokens: int = 4  # tokens per streamed chunk
    in_flight: int = 256  # requests a rollout worker keeps open at one engine; more wait their turn in it
    threads: int = 1
    weights: str = "auto"  # how they travel: auto | http (embedded) | disk | tensor | distributed (SGLang)
    weights_dir: str = ""  # for disk: read by every engine; empty: temporary, for engines on this machine
    kv_after_update: str = "recompute"  # recompute | keep
    start_deadline_s: float = 300.0  # for a server to answer
    urls: list[str] = field(default_factory=list)  # attach to servers that run; they are never stopped
    entropy_top_k: int = 0  # attached servers without our plug-in: estimate entropies from so many top tokens
    python: str = ""  # runs SGLang; empty: .venv-sglang/bin/python if it exists, else this interpreter
    sglang: dict[str, Any] = field(default_factory=dict)  # SGLang's own flags: {mem_fraction_static: 0.8}


@dataclass
class FlowConfig:
    batch_leaves: int = 64  # B: leaves per training step
    staleness: int = 1  # η: versions a tree may lag behind the policy that trains on it; 0 is synchronous
    window: int = 4  # training batches from the head of the queue within which a closed tree may overtake
    # a waiting tree that would be trained on more versions than this after its start is thrown away, and its
    # prompt grown again; 0: none is, and staleness + window bounds it all the same
    max_staleness: int = 0
    max_attempts: int = 3  # times a prompt is grown before it is abandoned with a reason
    # in-flight: engines take new weights at a token boundary, whatever grows; drained: once no tree grows, so
    # that every tree is of one version (with staleness 1: one-step-off asynchronous training)
    update: str = "in-flight"


@dataclass
class LearnConfig:
    tp: int = 2  # tensor parallel: ranks that share every layer
    pp: int = 1  # pipeline parallel: stages that hold consecutive layers
    dp: int = 1  # data parallel: model copies, each with its share of the micro-batches
    sequence_parallel: bool = False  # split the activations between attention and MLP over the TP ranks too
    distributed_optimizer: bool = False  # split the optimizer state over the DP ranks
    recompute: str = "none"  # none | selective (attention) | full (every layer), in the backward pass
    threads: int = 1
    # grpo | arpo-soft | arpo-hard | rloo | reinforce++ | dr-grpo
    credit: PartConfig = field(default_factory=lambda: PartConfig("arpo-soft"))
    objective: PartConfig = field(
        default_factory=lambda: PartConfig("decoupled")
    )  # decoupled | ppo | grpo-flat
    aggregate: PartConfig = field(
        default_factory=lambda: PartConfig("token-mean")
    )  # token-mean | seq-mean | constant
    updates: int = 1  # optimizer steps per training batch
    micro_tokens: int = 4096  # packed tokens per forward pass
    lr: float = 1e-3
    warmup_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0  # 0: off
    tis_cap: float = 2.0  # cap of the proximal/behaviour ratio (truncated importance sampling)
    kl_coef: float = 0.0  # KL to the reference model; 0: no reference model is built
    entropy_coef: float = 0.0
    bucket_mb: int = 64  # weight export bucket


@dataclass
class EvalConfig:
    every: int = 0  # training steps between evaluations; 0: before and after only
    questions: int = 200
    temperature: float = 0.0


@dataclass
class CheckpointConfig:
    every: int = 20  # training steps; 0: only at the end and on a signal
    keep: int = 2


@dataclass
class ObserveConfig:
    wandb: str = "offline"  # offline | online | disabled
    project: str = "espalier"
    trees: int = 200  # closed trees kept in the run directory (the newest); -1: all
    progress_s: float = 2.0  # seconds between progress lines when not on a terminal


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    warmstart: WarmStartConfig = field(default_factory=WarmStartConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    branching: BranchingConfig = field(default_factory=BranchingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    learn: LearnConfig = field(default_factory=LearnConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


_AT_LEAST_0 = """
    run.seed run.steps warmstart.steps rollout.max_tool_result_tokens rollout.call_limit
    engine.entropy_top_k tools.rate_per_s tools.retries tools.cache_size engine.cache_slots flow.staleness
    flow.max_staleness
    learn.warmup_steps learn.kl_coef eval.every eval.questions eval.temperature checkpoint.every
"""
_AT_LEAST_1 = """
    model.hidden_size model.layers model.heads model.kv_heads model.ffn_size warmstart.batch
    rollout.leaves rollout.workers rollout.concurrency rollout.max_response_tokens
    branching.probe_tokens tools.search_top_k tools.concurrency engine.replicas engine.tp engine.max_running
    engine.chunk_tokens engine.in_flight engine.threads flow.batch_leaves flow.window flow.max_attempts
    learn.tp learn.pp learn.dp learn.threads learn.updates learn.micro_tokens learn.bucket_mb checkpoint.keep
"""
MINIMA: dict[str, float] = {
    **dict.fromkeys(_AT_LEAST_0.split(), 0),
    **dict.fromkeys(_AT_LEAST_1.split(), 1),
    "observe.trees": -1,
    "observe.progress_s": 0.1,
    **cluster_settings.MINIMA,
}

PLUGGABLE = (
    "task.name",
    "reward.name",
    "learn.credit",
    "learn.objective",
    "learn.aggregate",
    "branching.name",
)  # also one's own, as package.module:Name

CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("float32", "bfloat16"),
    "task.name": ("quickstart", "jsonl", "reasoning-gym"),
    "rollout.schedule": ("barrier-free", "lockstep"),
    "rollout.syntax": ("tags", "hermes"),
    "branching.name": ("arpo", "arpo-paper", "arpo-release", "random", "none"),
    "reward.name": ("arpo", "arpo-release", "task"),
    "engine.name": ("embedded", "sglang"),
    "engine.device": ("auto", "cpu", "cuda"),
    "engine.weights": ("auto", "http", "disk", "tensor", "distributed"),
    "engine.kv_after_update": ("recompute", "keep"),
    "flow.update": ("in-flight", "drained"),
    "learn.credit": (
        "grpo",
        "arpo-soft",
        "arpo-hard",
        "rloo",
        "reinforce++",
        "reinforce++-baseline",
        "dr-grpo",
    ),
    "learn.objective": ("decoupled", "ppo", "grpo-flat"),
    "learn.recompute": ("none", "selective", "full"),
    "learn.aggregate": ("token-mean", "seq-mean", "constant"),
    "observe.wandb": ("offline", "online", "disabled"),
    **cluster_settings.CHOICES,
}


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file (and its ``base:`` chain) and apply ``key=value`` overrides.

    Raises :class:`ConfigError` naming the key and what to do.
    """
    layers = list(_files(Path(path), ())) if path is not None else []
    layers += [(f"override {text!r}", _override(text)) for text in overrides]
    merged = OmegaConf.structured(Config)
    for source, layer in layers:
        layer = _expand_names(layer)
        _check_keys(layer, source)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: {_reason(error)}") from error
    config = _resolve(merged)
    validate(config)
    return config


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of :func:`to_dict`.  Raises :class:`ConfigError` for keys this version does not know."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), _escape(values))
    except OmegaConfBaseException as error:
        raise ConfigError(_reason(error)) from error
    return _resolve(merged)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionaries, for JSON, YAML and Ray."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """YAML that :func:`load` reads back to an equal configuration."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(to_dict(config))))


def validate(config: Config) -> None:
    """Check what types alone cannot: choices, ranges, and fields that must agree."""
    for key, allowed in CHOICES.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        value = value.name if isinstance(value, PartConfig) else value
        own = key in PLUGGABLE and ":" in value
        if value not in allowed and not own:
            raise ConfigError(
                f"{key}={value!r}: choose one of {', '.join(allowed)}{_close(str(value), allowed)}"
            )
    for key, low in MINIMA.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        _require(value >= low, f"{key}={value} must be {low} or more")
    rollout, flow, learn = config.rollout, config.flow, config.learn
    batch_trees = flow.batch_leaves // rollout.leaves
    _require(
        1 <= rollout.roots <= rollout.leaves,
        f"rollout.roots={rollout.roots} must lie between 1 and rollout.leaves={rollout.leaves}",
    )
    _require(
        rollout.schedule != "lockstep" or (flow.staleness == 0 and rollout.concurrency >= batch_trees),
        "rollout.schedule=lockstep grows a whole batch and then trains on it: it needs flow.staleness=0, not "
        f"{flow.staleness}, and rollout.concurrency={batch_trees} or more, not {rollout.concurrency}",
    )
    _require(
        flow.max_staleness == 0 or flow.max_staleness >= flow.staleness,
        f"flow.max_staleness={flow.max_staleness} is below flow.staleness={flow.staleness}: most trees would "
        "be thrown away; raise it, lower flow.staleness, or set 0 to throw away none",
    )
    _require(
        flow.batch_leaves % rollout.leaves == 0,
        f"flow.batch_leaves={flow.batch_leaves} must be a multiple of rollout.leaves={rollout.leaves}: "
        "a training step takes whole trees",
    )
    _require(
        learn.updates <= flow.batch_leaves // rollout.leaves,
        f"learn.updates={learn.updates} exceeds the {flow.batch_leaves // rollout.leaves} trees of a batch",
    )
    _require(rollout.temperature > 0, "rollout.temperature must be above 0: training needs samples")
    _require(0 < rollout.top_p <= 1, f"rollout.top_p={rollout.top_p} must lie in (0, 1]")
    _require(learn.lr > 0, "learn.lr must be above 0")
    _require(
        config.engine.max_context > rollout.max_response_tokens,
        f"engine.max_context={config.engine.max_context} must exceed "
        f"rollout.max_response_tokens={rollout.max_response_tokens}: it holds the prompt too",
    )
    engine = config.engine
    ways = ("auto", "http") if engine.name == "embedded" else ("auto", "disk", "tensor", "distributed")
    _require(
        engine.weights in ways,
        f"engine.weights={engine.weights}: the {engine.name} engine takes {', '.join(ways)}",
    )
    for problem in (
        *cluster_settings.problems(config.cluster, config.slurm),
        *sglang_flags.problems(engine.name, engine.sglang, engine.urls),
    ):
        raise ConfigError(problem)
    if not config.model.path:
        _check_shape(config.model, learn.tp, learn.pp)


def _check_shape(model: ModelConfig, tp: int, pp: int) -> None:
    """A model made by us: its heads divide its width, tensor parallelism divides heads and widths, pipeline
    parallelism the layers.
    """
    _require(
        model.hidden_size % model.heads == 0 and model.heads % model.kv_heads == 0,
        f"model.hidden_size={model.hidden_size} must be a multiple of model.heads={model.heads}, "
        f"and that of model.kv_heads={model.kv_heads}",
    )
    for name in ("heads", "kv_heads", "ffn_size"):
        value = getattr(model, name)
        _require(value % tp == 0, f"learn.tp={tp} must divide model.{name}={value}")
    _require(model.layers % pp == 0, f"learn.pp={pp} must divide model.layers={model.layers}")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _files(path: Path, seen: tuple[Path, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: `base:` leads back to itself: {' -> '.join(map(str, (*seen, path)))}")
    if not path.is_file():
        raise ConfigError(f"no such configuration file: {path}")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # the YAML library raises many kinds
        raise ConfigError(f"{path}: not readable as YAML: {_reason(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected sections at the top level, found a {type(loaded).__name__}")
    layer = OmegaConf.to_container(loaded)
    assert isinstance(layer, dict)
    base = layer.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base: names one file, relative to this one; found {base!r}")
        yield from _files(path.parent / base, (*seen, path))
    yield str(path), {str(k): v for k, v in layer.items()}


def _override(text: str) -> dict[str, Any]:
    if "=" not in text:
        raise ConfigError(f"override {text!r}: write key=value, for example flow.staleness=0")
    if text.endswith("="):
        text += "''"  # `run.name=` empties it; YAML would read null
    try:
        layer = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except Exception as error:  # the YAML library raises many kinds
        raise ConfigError(
            f"override {text!r}: the value is not readable as YAML: {_reason(error)}"
        ) from error
    assert isinstance(layer, dict)
    return {str(k): v for k, v in layer.items()}


def _expand_names(layer: dict[str, Any]) -> dict[str, Any]:
    """``branching: none`` -> ``branching: {name: none}`` (YAML reads a bare ``none`` as text)."""
    return _expand(layer, Config())


def _expand(layer: dict[str, Any], settings: Any) -> dict[str, Any]:
    expanded = dict(layer)
    for key, value in layer.items():
        inner = getattr(settings, str(key), None)
        if dataclasses.is_dataclass(inner):
            if hasattr(inner, "name") and isinstance(value, str | int | float):
                expanded[key] = {"name": str(value)}
            elif isinstance(value, dict):
                expanded[key] = _expand(value, inner)
    return expanded


def _section(name: str) -> Any:
    return getattr(Config(), name)


def _check_keys(layer: dict[str, Any], source: str) -> None:
    sections = [f.name for f in dataclasses.fields(Config)]
    everywhere = [f"{s}.{f.name}" for s in sections for f in dataclasses.fields(_section(s))]
    for name, values in layer.items():
        if name not in sections:
            raise ConfigError(f"{source}: unknown section {name!r}{_hint(name, sections, everywhere)}")
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: {name} is a section; set one of its keys, e.g. {name}.<key>=…")
        known = [f.name for f in dataclasses.fields(_section(name))]
        for key in values:
            if key not in known:
                hint = _hint(str(key), known, everywhere, f"{name}.")
                raise ConfigError(f"{source}: unknown key {name}.{key}{hint}")


def _hint(word: str, known: Sequence[str], everywhere: Sequence[str], prefix: str = "") -> str:
    """The key of that name in another section, else the nearest of the ``known``, else all of them."""
    elsewhere = [key for key in everywhere if key.endswith(f".{word}")]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return _close(word, known, prefix) or f"; known: {', '.join(known)}"


def _close(word: str, known: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _resolve(merged: Any) -> Config:
    """The typed configuration, with interpolations (``${section.key}``, ``${oc.env:NAME}``) filled in."""
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_reason(error)} (plain text with a dollar brace is written \\${{)") from error
    assert isinstance(config, Config)
    return config


def _escape(value: Any) -> Any:
    """``value`` so that OmegaConf reads ``${`` as text: what is resolved has no interpolations left."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escape(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _reason(error: Exception) -> str:
    """What went wrong and at which key, in one line without OmegaConf's internals."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OmegaConfBaseException):
        lines = lines[:1]
        if error.full_key:
            lines.insert(0, f"{error.full_key}:")
    return " ".join(lines)
