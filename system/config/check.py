"""What types alone cannot tell: each setting's own rule, and settings that must agree."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

from system.config.agent import agent_problems
from system.config.by_step import at_step, course_problems
from system.config.cluster import cluster_problems
from system.config.evaluation import all_rewards, eval_problems
from system.config.experts import expert_rules
from system.config.guide import ACTIONS
from system.config.lora import adapters_travel, lora_problems
from system.config.mcp import place
from system.config.observe import observe_problems
from system.config.precision import precision_problems, sglang_flags
from system.config.reward import reward_problems
from system.config.rule import PartConfig
from system.config.rule_checks import MAY_BE_EMPTY, broken_rules, names_of
from system.config.schema import Config
from system.config.schema_sft import sft_problems
from system.config.settings import settings
from system.config.teacher import teacher_problems
from system.errors import ConfigError
from system.plugins import CREDITS, REWARDS, PluginError, nearest
from system.urls import Allowed

# What needs the gold answer's scores.
INFORMED = ("learn.credit=a2tgpo", "learn.credit=igpo", "learn.objective=a2tgpo")
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
TOOL_LIMITS = ("deadline_s", "concurrency", "rate_per_s", "retries", "cache_size")

# Of our credits, all but this one know a leaf's worth only beside others of its tree.
OVER_THE_BATCH = "reinforce++"


def validate(config: Config, problems: Sequence[str] = ()) -> None:
    """Check every rule of the schema, and fields that must agree.

    Raises :class:`ConfigError` with one line per problem, ``problems`` that are known already among them.
    Whether fields agree is asked only where there is nothing else.
    """
    found = [*problems, *(line for one in settings().values() for line in broken_rules(one, one.of(config)))]
    found = found or [line for check in AGREEMENTS for line in check(config)]
    if found:
        raise ConfigError("\n".join(found))


def _limits(config: Config) -> Iterator[str]:
    """MCP servers; what may be browsed; the limits of single tools, each against the rule of the setting
    that it stands in for."""
    for number, server in enumerate(config.tools.mcp):
        try:
            place(f"tools.mcp[{number}]", server)
        except ConfigError as error:
            yield str(error)
    try:
        Allowed(config.tools.browse_allow, config.tools.browse_private)
    except ConfigError as error:
        yield str(error)
    if "browse" in config.tools.names and not config.tools.browse_allow:
        yield "tools.browse_allow is empty, so browse may open nothing: name what it may, or take browse out"
    for name, limits in config.tools.limits.items():
        where = f"tools.limits.{name}"
        if name not in config.tools.names and not config.tools.mcp:  # whose tools are not known yet
            names = ", ".join(config.tools.names)
            yield f"{where}: no such tool in tools.names ({names}): correct either"
            continue
        for key, value in limits.items():
            if key not in TOOL_LIMITS:
                close = nearest(str(key), TOOL_LIMITS)
                yield f"{where}.{key}: a tool's limits are {', '.join(TOOL_LIMITS)}{close}"
                continue
            one = settings()[f"tools.{key}"]
            if isinstance(value, bool) or not isinstance(value, int if one.kind is int else int | float):
                yield f"{where}.{key}={value!r} must be {one.rule.bounds}: {one.rule.text}"
            else:
                yield from broken_rules(dataclasses.replace(one, section=where), value)


def _by_step(config: Config) -> Iterator[str]:
    """The courses of settings that change, each value against the rule of its setting."""
    problems = [line for key, course in config.run.by_step.items() for line in course_problems(key, course)]
    yield from problems
    if problems:
        return
    for key, course in config.run.by_step.items():
        if (name := key.removeprefix("learn.")) in config.learn.objective.options:
            yield (
                f"run.by_step.{key} would change nothing: learn.objective.options.{name} goes before it: "
                "take out either"
            )
        for step, value in course:
            where = dataclasses.replace(
                settings()[key], section=f"run.by_step, step {step}: {key.split('.')[0]}"
            )
            yield from broken_rules(where, value)
            yield from (f"run.by_step, step {step}: {line}" for line in _void(at_step(config, step)))


def part_problems(config: Config) -> list[str]:
    """What is wrong with the configured parts, all of it: each with the key and a remedy."""
    problems: list[str] = []
    for one in settings().values():
        if (registry := one.rule.registry) is None:
            continue
        if registry is REWARDS:
            wanted = [(REWARDS.at(part.key), part.name, part.options) for part in all_rewards(config)]
        else:
            value = one.of(config)
            options = value.options if isinstance(value, PartConfig) else getattr(config, one.section).options
            of_each = isinstance(value, list)
            if one.key in MAY_BE_EMPTY and not value:
                continue
            wanted = [
                (registry, name, options.get(name, {}) if of_each else options) for name in names_of(value)
            ]
        for kind, name, its in wanted:
            try:
                kind.check(name, its)
            except PluginError as error:
                problems += str(error).splitlines()
    if twice := [name for name in config.tools.names if config.tools.names.count(name) > 1]:
        problems.append(f"tools.names: {twice[0]!r} stands there twice")
    for name in config.tools.options:
        if name not in config.tools.names:
            names = ", ".join(config.tools.names)
            problems.append(f"tools.options.{name}: no such tool in tools.names ({names}): correct either")
    return problems


def _sizes(config: Config) -> Iterator[str]:
    """Trees, batches and what an engine holds."""
    rollout, flow, learn = config.rollout, config.flow, config.learn
    batch_trees = flow.batch_leaves // rollout.leaves
    if rollout.history == "template":
        yield (
            "rollout.history=template is not there yet: what was said before a user speaks again stays as it "
            "was said; set rollout.history=keep, or give the model a chat template that leaves nothing out"
        )
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
    if 0 <= config.task.eval_size < config.eval.questions:
        yield (
            f"eval.questions={config.eval.questions} are more than task.eval_size={config.task.eval_size}: "
            "raise task.eval_size too"
        )
    if config.eval.engines and config.engine.urls:
        yield (
            "eval.engines are started by the run, and with engine.urls it starts none: leave one of them out"
        )
    if config.engine.max_context <= rollout.max_response_tokens:
        yield (
            f"engine.max_context={config.engine.max_context} must exceed "
            f"rollout.max_response_tokens={rollout.max_response_tokens}: it holds the prompt too"
        )


def _engine(config: Config) -> Iterator[str]:
    """What goes with the kind of engine; and the addresses of servers."""
    engine = config.engine
    swapped = engine.name == "sglang" and not adapters_travel(config)  # else a request keeps its version
    if config.rollout.rescore and swapped and engine.kv_after_update == "keep":
        yield (
            "rollout.rescore=true needs engine.kv_after_update=recompute: a score that an update interrupts "
            "would be of two versions"
        )
    ways = ("auto", "http") if engine.name == "embedded" else ("auto", "disk", "tensor", "distributed")
    if engine.weights not in ways:
        yield f"engine.weights={engine.weights}: the {engine.name} engine takes {', '.join(ways)}"
    elif engine.weights == "tensor" and config.cluster.gpus_per_node and not engine.urls:
        yield (
            "engine.weights=tensor with cluster.gpus_per_node: learner and engines see their own GPUs only, "
            "and SGLang opens no memory of others (Invalid device_uuid): set engine.weights=distributed"
        )
    elif engine.weights == "disk" and config.cluster.nodes > 1 and not engine.weights_dir:
        yield (
            "engine.weights=disk with cluster.nodes > 1: set engine.weights_dir to a directory that all "
            "machines see under the same name"
        )
    if sglang_flags(engine.sglang).get("enable_symm_mem") and engine.weights in ("auto", "distributed"):
        yield (
            "engine.sglang.enable_symm_mem sets NCCL_CUMEM_ENABLE=1 in the servers, which NCCL wants alike "
            "in the learner: take it out, or set engine.weights=disk"
        )
    for flag in engine.sglang:
        if setter := SET_BY.get(str(flag).replace("-", "_")):
            yield f"engine.sglang.{flag} is set by {setter}: take it out of engine.sglang"
    search, teacher = config.tools.search_url, config.teacher
    for key, urls in (
        ("engine.urls", engine.urls),
        ("teacher.urls", teacher.urls),
        ("tools.search_url", [search] if search else []),
    ):
        for url in urls:
            if not url.startswith(("http://", "https://")):
                yield f"{key}: {url!r} must begin with http:// or https://"
        servers = [url.rstrip("/") for url in urls]
        if twice := sorted({url for url in servers if servers.count(url) > 1}):
            yield f"{key} names {', '.join(twice)} more than once: a server is one engine"
    tools = config.tools
    for key, name, its_server, server in (
        ("engine.api_key_env", engine.api_key_env, "engine.urls", engine.urls),
        ("teacher.api_key_env", teacher.api_key_env, "teacher.urls", teacher.urls),
        ("tools.search_key_env", tools.search_key_env, "tools.search_url", tools.search_url),
    ):
        if name and not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield f"{key}: name the environment variable that holds the key, not the key itself"
        elif name and not server:
            yield f"{key} is for a server of others: set {its_server}, or take it out"
    if engine.urls and engine.name != "sglang":
        yield "engine.urls attaches to SGLang servers: set engine=sglang, or take engine.urls out"


def _learner(config: Config) -> Iterator[str]:
    """What goes with the learner's layout."""
    learn = config.learn
    if learn.cp > 1 and learn.attention == "flash":
        yield (
            f"learn.attention=flash attends to whole rows, and learn.cp={learn.cp} spreads them over ranks: "
            "set learn.attention=auto (or flex), or learn.cp=1"
        )


def _shape(config: Config) -> Iterator[str]:
    """A model made by us: its heads divide its width, and the learner's layout divides it."""
    model = config.model
    if model.path:
        return
    if config.learn.lora.on:
        yield (
            f"learn.lora.rank={config.learn.lora.rank} trains adapters of a model whose own weights stand "
            "still, and without model.path they would be random ones: name a trained model"
        )
    if model.hidden_size % model.heads or model.heads % model.kv_heads:
        yield (
            f"model.hidden_size={model.hidden_size} must be a multiple of model.heads={model.heads}, "
            f"and that of model.kv_heads={model.kv_heads}"
        )
    sizes = {name: getattr(model, name) for name in ("heads", "kv_heads", "ffn_size", "layers")}
    yield from undivided(config, {f"model.{name}": size for name, size in sizes.items()})


def undivided(config: Config, sizes: Mapping[str, int]) -> Iterator[str]:
    """Sizes of a model, by name, that the learner's layout does not divide: tensor parallelism divides heads
    and widths, pipeline parallelism the layers.
    """
    for ranks, into in (("tp", config.learn.tp), ("pp", config.learn.pp)):
        divided = {name: size for name, size in sizes.items() if name.endswith("layers") == (ranks == "pp")}
        if wrong := [f"{name}={size}" for name, size in divided.items() if size % into]:
            yield f"learn.{ranks}={into} must divide {', '.join(wrong)}"


def _void(config: Config) -> Iterator[str]:
    """Settings with which training would run, and teach nothing or something else."""
    rollout, learn = config.rollout, config.learn
    if learn.proximal == "closed" and not rollout.rescore:
        yield (
            "learn.proximal=closed clips against what the engine found when a turn ended: set "
            "rollout.rescore=true too"
        )
    asks = [name for name in ("rescore", "score_answer") if getattr(rollout, name)]
    if asks and config.engine.name == "sglang" and rollout.temperature != 1:
        yield (
            f"rollout.{asks[0]}=true: SGLang scores given tokens at temperature 1 only: leave "
            f"rollout.temperature={rollout.temperature:g} at 1, or set engine=embedded"
        )
    parts = (f"learn.credit={learn.credit.name}", f"learn.objective={learn.objective.name}")
    informed = " and ".join(part for part in parts if part in INFORMED)
    if informed and not rollout.score_answer:
        yield (
            f"{informed}: what a turn is worth there is how likely the gold answer becomes with each tool "
            "result: set rollout.score_answer=true too"
        )
    if 0 < learn.dual_clip <= 1 + learn.clip_high:
        yield (
            f"learn.dual_clip={learn.dual_clip} must exceed 1 + learn.clip_high={1 + learn.clip_high:g}: it "
            "bounds a ratio that starts at 1; 3 is usual, 0 is off"
        )
    for name in ("beta1", "beta2"):
        if getattr(learn, name) == 1:
            yield f"learn.{name}=1 must be below 1: Adam's mean would never move"
    credit = learn.credit.name
    compares = credit in CREDITS.names and credit not in (OVER_THE_BATCH, "none")
    if rollout.leaves == 1 and compares and config.run.steps:
        yield (
            f"rollout.leaves=1 leaves learn.credit={credit} nothing to compare a leaf with: every advantage "
            f"would be 0; set rollout.leaves=2 or more, or learn.credit={OVER_THE_BATCH}"
        )


def truncated(config: Config) -> str:
    """Why a run cannot train on what ``rollout.top_p`` and ``rollout.top_k`` let through; empty: it can.

    An evaluation may sample so.
    """
    rollout = config.rollout
    if rollout.top_p == 1 and rollout.top_k < 0:
        return ""
    return (
        f"rollout.top_p={rollout.top_p}, rollout.top_k={rollout.top_k}: training needs samples of the whole "
        "distribution, whose probabilities the learner computes: leave top_p at 1 and top_k at -1"
    )


def _sft(config: Config) -> Iterator[str]:
    """Supervised learning on conversations."""
    yield from sft_problems(config.sft)


def _guide(config: Config) -> Iterator[str]:
    """Guided trees."""
    if config.guide.hopeless and not config.flow.curriculum:
        yield (
            f"guide.hopeless={config.guide.hopeless}: without a curriculum no question is known to be "
            "hopeless: set flow.curriculum=true, or guide.others"
        )
    if config.guide.shows and config.learn.proximal == "closed":
        yield (
            "learn.proximal=closed: the engine scores a guided tree's turns under the guided prompt, and "
            "none of an expert's: take start or average with guide.hopeless, guide.others and guide.expert"
        )
    if config.guide.on and ACTIONS not in config.guide.text:
        yield f"guide.text has no {ACTIONS}: put it where the demonstration's actions shall stand"


AGREEMENTS = (
    *(_limits, _by_step, _sizes, reward_problems, _engine, agent_problems),
    *(
        precision_problems,
        lora_problems,
        _learner,
        cluster_problems,
        _shape,
        expert_rules,
        _guide,
        _sft,
        eval_problems,
        teacher_problems,
        observe_problems,
        _void,
    ),
)
