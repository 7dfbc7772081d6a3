"""What types alone cannot tell: each setting's own rule, and settings that must agree."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from system.config.schema import Config, ModelConfig, PartConfig
from system.config.settings import Setting, settings
from system.errors import ConfigError
from system.plugins import PluginError, nearest

# SGLang's flags that the rest of the system depends on, and what sets each of them.
SET_BY: dict[str, str] = {
    **dict.fromkeys(("model", "model_path"), "model.path"),
    **dict.fromkeys(("tp", "tp_size", "tensor_parallel_size"), "engine.tp"),
    **dict.fromkeys(("dp", "dp_size", "data_parallel_size"), "engine.replicas"),
    **dict.fromkeys(("port", "incremental_streaming_output"), "the system"),
    "dtype": "model.dtype",
    "device": "engine.device",
    "host": "engine.host",
    "context_length": "engine.max_context",
    "max_running_requests": "engine.max_running",
    "stream_interval": "engine.chunk_tokens",
    "random_seed": "run.seed",
    **dict.fromkeys(("api_key", "admin_api_key"), "the system"),  # a flag is read by every user of a machine
}


def validate(config: Config) -> None:
    """Check every rule of the schema, and fields that must agree.  Raises :class:`ConfigError`."""
    for one in settings().values():
        _check_rule(one, one.of(config))
    for checked in (_sizes, _engine, _cluster):
        for problem in checked(config):
            raise ConfigError(problem)
    if not config.model.path:
        for problem in _shape(config.model, config.learn.tp, config.learn.pp):
            raise ConfigError(problem)


def _check_rule(one: Setting, value: Any) -> None:
    """``value`` against the setting's own rule."""
    key, rule = one.key, one.rule
    if isinstance(value, list | dict) and typing.get_args(one.kind)[-1] is str:
        items: Iterable[Any] = value.values() if isinstance(value, dict) else value
        if wrong := [item for item in items if not isinstance(item, str)]:
            raise ConfigError(f"{key}: {wrong[0]!r} must be a text: {rule.text}")
    if rule.registry is not None:
        for name in names_of(value):
            rule.registry.check_name(name)
    if rule.choices and value not in rule.choices:
        close = nearest(str(value), rule.choices)
        raise ConfigError(f"{key}={value!r}: choose one of {', '.join(rule.choices)}{close}")
    if isinstance(value, int | float):
        low = -math.inf if rule.least is None else rule.least
        high = math.inf if rule.most is None else rule.most
        if not math.isfinite(value):
            raise ConfigError(f"{key}={value} must be a finite number: {rule.text}")
        if not low <= value <= high or (rule.above is not None and value <= rule.above):
            raise ConfigError(f"{key}={value} must be {rule.bounds}: {rule.text}")


def names_of(value: Any) -> list[str]:
    """The names of parts that a setting with a registry holds."""
    if isinstance(value, PartConfig):
        return [value.name]
    return [value] if isinstance(value, str) else value


def check_parts(config: Config) -> None:
    """Import every configured part and check its options, before a run directory or any process is made.

    Raises :class:`ConfigError` with one line per problem.
    """
    if problems := part_problems(config):
        raise ConfigError("\n".join(problems))


def part_problems(config: Config) -> list[str]:
    """What is wrong with the configured parts, all of it: each with the key and a remedy."""
    problems: list[str] = []
    for one in settings().values():
        if (registry := one.rule.registry) is None:
            continue
        value = one.of(config)
        options = value.options if isinstance(value, PartConfig) else getattr(config, one.section).options
        for name in names_of(value):
            try:
                registry.check(name, options.get(name, {}) if isinstance(value, list) else options)
            except PluginError as error:
                problems.append(str(error))
    for name in config.tools.options:
        if name not in config.tools.names:
            names = ", ".join(config.tools.names)
            problems.append(f"tools.options.{name}: no such tool in tools.names ({names}): correct either")
    return problems


def _sizes(config: Config) -> Iterator[str]:
    """Trees, batches and what an engine holds."""
    rollout, flow, learn = config.rollout, config.flow, config.learn
    batch_trees = flow.batch_leaves // rollout.leaves
    if rollout.roots > rollout.leaves:
        yield f"rollout.roots={rollout.roots} must lie between 1 and rollout.leaves={rollout.leaves}"
    if rollout.schedule == "lockstep" and (flow.staleness or rollout.concurrency < batch_trees):
        yield (
            "rollout.schedule=lockstep grows a whole batch and then trains on it: it needs flow.staleness=0, "
            f"not {flow.staleness}, and rollout.concurrency={batch_trees} or more, not {rollout.concurrency}"
        )
    if 0 < flow.max_staleness < flow.staleness:
        yield (
            f"flow.max_staleness={flow.max_staleness} is below flow.staleness={flow.staleness}: most trees "
            "would be thrown away; raise it, lower flow.staleness, or set 0 to throw away none"
        )
    if flow.batch_leaves % rollout.leaves:
        yield (
            f"flow.batch_leaves={flow.batch_leaves} must be a multiple of rollout.leaves={rollout.leaves}: "
            "a training step takes whole trees"
        )
    if learn.updates > batch_trees:
        yield f"learn.updates={learn.updates} exceeds the {batch_trees} trees of a batch"
    if config.engine.max_context <= rollout.max_response_tokens:
        yield (
            f"engine.max_context={config.engine.max_context} must exceed "
            f"rollout.max_response_tokens={rollout.max_response_tokens}: it holds the prompt too"
        )


def _engine(config: Config) -> Iterator[str]:
    """What goes with the kind of engine."""
    engine = config.engine
    ways = ("auto", "http") if engine.name == "embedded" else ("auto", "disk", "tensor", "distributed")
    if engine.weights not in ways:
        yield f"engine.weights={engine.weights}: the {engine.name} engine takes {', '.join(ways)}"
    for flag in engine.sglang:
        if setter := SET_BY.get(str(flag).replace("-", "_")):
            yield f"engine.sglang.{flag} is set by {setter}: take it out of engine.sglang"
    for url in engine.urls:
        if not url.startswith(("http://", "https://")):
            yield f"engine.urls: {url!r} must begin with http:// or https://"
    tools = config.tools
    for key, name, its_server, server in (
        ("engine.api_key_env", engine.api_key_env, "engine.urls", engine.urls),
        ("tools.search_key_env", tools.search_key_env, "tools.search_url", tools.search_url),
    ):
        if name and not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield f"{key}: name the environment variable that holds the key, not the key itself"
        elif name and not server:
            yield f"{key} is for a server of others: set {its_server}, or take it out"
    if engine.urls and engine.name != "sglang":
        yield "engine.urls attaches to SGLang servers: set engine=sglang, or take engine.urls out"


def _cluster(config: Config) -> Iterator[str]:
    """Nodes, and what SLURM is asked for."""
    cluster, slurm = config.cluster, config.slurm
    if cluster.learner_nodes and cluster.learner_nodes >= cluster.nodes:
        yield (
            f"cluster.learner_nodes={cluster.learner_nodes} leaves none of cluster.nodes={cluster.nodes} for "
            "rollout; 0 lets learner and rollout share all nodes"
        )
    if slurm.heterogeneous and not cluster.learner_nodes:
        yield "slurm.heterogeneous=true needs cluster.learner_nodes: the size of the first component"
    limit = seconds(slurm.time)
    if limit is None:
        yield f"slurm.time={slurm.time!r}: write minutes, H:MM:SS or D-HH:MM:SS (in YAML in quotes)"
    elif limit <= slurm.signal_s:
        yield (
            f"slurm.time={slurm.time} leaves no time to train: the run checkpoints slurm.signal_s="
            f"{slurm.signal_s} seconds before the limit"
        )
    if slurm.container != "none" and not slurm.image:
        yield f"slurm.container={slurm.container} needs slurm.image"
    if slurm.image and slurm.container == "none":
        yield "slurm.image is set: choose slurm.container=pyxis or slurm.container=apptainer"


def _shape(model: ModelConfig, tp: int, pp: int) -> Iterator[str]:
    """A model made by us: its heads divide its width, tensor parallelism divides heads and widths, pipeline
    parallelism the layers.
    """
    if model.hidden_size % model.heads or model.heads % model.kv_heads:
        yield (
            f"model.hidden_size={model.hidden_size} must be a multiple of model.heads={model.heads}, "
            f"and that of model.kv_heads={model.kv_heads}"
        )
    for name in ("heads", "kv_heads", "ffn_size"):
        value = getattr(model, name)
        if value % tp:
            yield f"learn.tp={tp} must divide model.{name}={value}"
    if model.layers % pp:
        yield f"learn.pp={pp} must divide model.layers={model.layers}"


def seconds(limit: str) -> int | None:
    """A time limit as sbatch reads it: M, M:SS, H:MM:SS, D-H, D-H:MM or D-H:MM:SS; None if it is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:  # minutes come first
        numbers.insert(0, 0)
    hours, minutes, rest = [*numbers, 0, 0][:3]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + rest
