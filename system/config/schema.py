"""The configuration's sections.  Each field states its default, what it is, and its own rule.

The rules are read by :mod:`system.config.check` (bounds, choices), by a resumed run (which keys it may
change), by snapshots of growing trees (what their growth depends on) and by the settings reference
(``espalier config --explain``, ``docs/settings.md``).
"""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from system.config.guide import GuideConfig
from system.config.machines import ClusterConfig, SlurmConfig
from system.config.rule import PartConfig, setting
from system.config.schema_agent import AgentConfig
from system.config.schema_environment import EnvironmentConfig
from system.config.schema_eval import EvalConfig
from system.config.schema_learn import LearnConfig
from system.config.schema_reward import RewardConfig
from system.config.schema_sft import SftConfig
from system.config.schema_teacher import TeacherConfig
from system.plugins import POLICIES, SYNTAXES, TASKS, TOOLS


@dataclass
class RunConfig:
    """The run directory, the seed, and when the run ends."""

    name: str = setting("", "run directory's name under run.dir; empty: <config file>-s<seed>")
    dir: str = setting("runs", "where run directories lie", path=True)
    seed: int = setting(0, "of everything that is drawn at random", least=0)
    steps: int = setting(
        100, "training steps (weight versions after the warm start)", least=0, safe_on_resume=True
    )
    by_step: dict[str, Any] = setting(
        {},
        "settings that change: {rollout.temperature: [[0, 1.0], [100, 0.8]]}, a line from step to step; also "
        "learn.clip_low and learn.clip_high",
    )
    push: str = setting(
        "", "owner/name: at its end the model is uploaded there (HF_TOKEN, HF_ENDPOINT)", safe_on_resume=True
    )
    stop_at_accuracy: float = setting(
        0.0,
        "end early once training accuracy (moving mean, 0 to 1) reaches this; 0: never",
        least=0,
        most=1,
        safe_on_resume=True,
    )


# Of system/models/families; not qwen2, for which transformers loads Qwen's own tokenizer, whatever is there.
MADE_FAMILIES = ("qwen3", "qwen3_moe", "llama", "mistral")


@dataclass
class ModelConfig:
    """The model that is trained: a given one, or the shape of a tiny one that is made for the task."""

    path: str = setting(
        "", "Hugging Face directory; empty: a tiny model of the shape below is made", path=True
    )
    dtype: str = setting("float32", "of the weights in engines and learner", choices=("float32", "bfloat16"))
    family: str = setting(
        "qwen3", "of a model made here; a given one's is in its config.json", choices=MADE_FAMILIES
    )
    hidden_size: int = setting(96, "width of the residual stream of a model made here", least=1)
    layers: int = setting(2, "its layers", least=1)
    heads: int = setting(4, "its attention heads", least=1)
    kv_heads: int = setting(2, "its key and value heads (grouped-query attention)", least=1)
    ffn_size: int = setting(256, "width of its feed-forward layers", least=1)
    experts: int = setting(8, "experts of a layer, where they are mixtures (model.family=qwen3_moe)", least=1)
    experts_per_token: int = setting(2, "experts that a token goes through", least=1)
    expert_size: int = setting(128, "width of an expert", least=1)


@dataclass
class TaskConfig:
    """The questions that are trained on, and those that are held out."""

    name: str = setting("quickstart", "which task", registry=TASKS)
    path: str = setting(
        "", "data for `jsonl`: a file (jsonl, json, parquet, csv; .gz), a directory or a glob", path=True
    )
    eval_path: str = setting("", "held-out questions for `jsonl`; empty: none", path=True)
    columns: dict[str, str] = setting(
        {},
        "columns of the data, where they have other names than usual: {question: …, answer: …, id: …, "
        "kind: …, system: …, demonstration: …}; a.b is a field of an object, '' says that there is none",
    )
    dataset: str = setting("", "name of a reasoning-gym data set")
    train_size: int = setting(
        -1, "training questions, at most; -1: all of a file, 4096 of a task that makes them", least=-1
    )
    eval_size: int = setting(
        -1, "held-out questions, at most; -1: all of a file, 200 of a task that makes them", least=-1
    )
    system_prompt: str = setting("", "replaces the task's own when set")
    tools_in_prompt: str = setting(
        "auto",
        "who tells the model of tools, calls and the form of an answer: template (the chat template's "
        "tools), words (of the call syntax, in the system message), none; auto: the template where it "
        "teaches the call syntax, else words, but nobody where the data do, or for a model made here",
        choices=("auto", "template", "words", "none"),
    )
    template: dict[str, Any] = setting({}, "arguments of the chat template: {enable_thinking: false}")
    options: dict[str, Any] = setting({}, "the task's own options")


@dataclass
class WarmStartConfig:
    """Supervised learning on the task's demonstrations, before reinforcement learning."""

    steps: int = setting(0, "supervised steps; 0: none", least=0)
    demos: int = setting(4096, "demonstrations", least=1)
    batch: int = setting(64, "demonstrations per step", least=1)
    lr: float = setting(
        3e-3,
        "peak learning rate; a model made here without norms of queries and keys (model.family=llama, "
        "mistral) takes half of it",
        above=0,
    )


@dataclass
class RolloutConfig:
    """How trees grow: their size, how many at once, how tokens are sampled, and the deadlines."""

    schedule: str = setting(
        "barrier-free",
        "barrier-free: a tree starts the rest of its roots once no branch can fork any more; eager: at a "
        "result it also forks what is over the shares of the branches that can later (a share is n/N - 1 "
        "leaves; each keeps 0.25 where the policy forks, 1.5 where it does not), and calls of over twice "
        "their tool's median hold back no roots; "
        "lockstep: the released ARPO code's rounds (generate all, wait for all tools, fork, top up one root "
        "per round), for comparison; it needs flow.staleness=0: a batch is grown, then trained on",
        choices=("barrier-free", "eager", "lockstep"),
    )
    leaves: int = setting(8, "n: leaves per tree", least=1)
    roots: int = setting(4, "N: branches that start together; forks draw on n - N", least=1)
    workers: int = setting(1, "processes that grow trees", least=1, safe_on_resume=True)
    concurrency: int = setting(32, "trees growing at once, over all workers", least=1, safe_on_resume=True)
    syntax: PartConfig = setting(PartConfig("tags"), "how the model writes a tool call", registry=SYNTAXES)
    answers: str = setting(
        "auto",
        "what stands around the answers of tools and users: template: what the model's chat template writes "
        "there, up to the model's next turn; syntax: what the call syntax writes; auto: template where it "
        "teaches a syntax whose calls end a turn (hermes, qwen3-coder), else syntax",
        choices=("auto", "template", "syntax"),
    )
    calls_per_turn: str = setting(
        "one",
        "one: a turn ends at its first tool call; many: at the token with which the model ends it, and its "
        "calls are made side by side (those into one environment one after the other), which needs answers "
        "by the chat template",
        choices=("one", "many"),
    )
    history: str = setting(
        "keep",
        "what was said before stays as it was said (keep), also where a chat template would leave earlier "
        "thoughts out once a user speaks again (template: not there yet)",
        choices=("keep", "template"),
    )
    max_response_tokens: int = setting(256, "per branch, tool results included", least=1)
    max_tool_result_tokens: int = setting(128, "a longer tool result is cut", least=1)
    call_limit: int = setting(4, "tool calls per branch", least=0)
    temperature: float = setting(1.0, "of sampling: training needs samples", least=0.01, most=100)
    top_p: float = setting(1.0, "sample from the likeliest tokens of this total probability", above=0, most=1)
    top_k: int = setting(-1, "sample from so many likeliest tokens; -1: all", least=-1)
    generate_deadline_s: float = setting(120.0, "one engine call", above=0, safe_on_resume=True)
    branch_deadline_s: float = setting(300.0, "one branch, tools included", above=0, safe_on_resume=True)
    tree_deadline_s: float = setting(600.0, "one tree", above=0, safe_on_resume=True)
    rescore: bool = setting(
        False,
        "when a turn ends, the engine scores its tokens once more, all under the weights it holds then, for "
        "learn.proximal=closed: a prefill of the turn per turn",
        safe_on_resume=True,
    )
    replay_routes: bool = setting(
        True,
        "of a mixture of experts: the learner sends every token through the experts that the engine chose "
        "(R3), and the policy learns how much each of them counts; false: it chooses anew",
        safe_on_resume=True,
    )
    score_answer: bool = setting(
        False,
        "the engine scores the gold answer behind the prompt and behind each tool result, for "
        "credits and objectives by information gain: a prefill of the result and the answer per result",
        safe_on_resume=True,
    )
    answer_opening: str = setting(
        "<answer> \\boxed{", "what stands before the gold answer when it is scored", safe_on_resume=True
    )


@dataclass
class BranchingConfig:
    """The policy that decides where a tree forks."""

    name: str = setting("arpo-calibrated", "which policy", registry=POLICIES)
    alpha: float = setting(
        0.5, "mean fork probability; arpo: the one at an unchanged entropy", least=0, most=1
    )
    beta: float = setting(0.2, "how far the entropy moves it: to alpha ± beta; arpo: weight of its rise")
    tau: float = setting(0.5, "threshold of arpo-paper")
    probe_tokens: int = setting(
        8, "k: tokens after a tool result whose mean entropy decides (arpo-release: 20, their sum)", least=1
    )
    options: dict[str, Any] = setting({}, "the policy's own: arpo-calibrated's by, at2po's width, …")


@dataclass
class ToolsConfig:
    """The tools an agent may call, and the limits around every call."""

    names: list[str] = setting(["search", "python"], "which tools", registry=TOOLS)
    options: dict[str, dict[str, Any]] = setting({}, "options by tool: {search: {top_k: 5}}")
    mcp: list[dict[str, Any]] = setting(
        [],
        "MCP servers whose tools are offered, too: [{command: npx -y some-server}] (args, cwd; env: {NAME: "
        "text}, env_from: variables that it gets) or [{url: ...}] (headers_from: {Authorization: VARIABLE}); "
        "of either include: its tools to offer, prefix: before their names, names: {its: ours}, pure and "
        "idempotent: tools that may be cached, or asked twice, start_s",
    )
    limits: dict[str, dict[str, Any]] = setting(
        {},
        "other limits for one tool (deadline_s, concurrency, rate_per_s, retries, cache_size): "
        "{search: {deadline_s: 5, rate_per_s: 2}}",
    )
    corpus: str = setting(
        "", 'JSONL of {"id", "title", "text"} for search; empty: the task\'s own corpus', path=True
    )
    search_top_k: int = setting(3, "documents per search", least=1)
    search_url: str = setting("", "use a retrieval server that already runs")
    search_key_env: str = setting(
        "", "environment variable with the key that this server wants to be shown; empty: none"
    )
    deadline_s: float = setting(20.0, "one call, retries included", above=0)
    concurrency: int = setting(16, "calls at once, per tool", least=1, safe_on_resume=True)
    rate_per_s: float = setting(0.0, "calls per second and tool; 0: unlimited", least=0, safe_on_resume=True)
    retries: int = setting(2, "further attempts of a call that failed for the tool's sake", least=0)
    cache_size: int = setting(4096, "entries per pure tool", least=0)
    python_cpu_s: float = setting(5.0, "CPU seconds of one program", above=0)
    python_wall_s: float = setting(10.0, "wall-clock seconds of one program", above=0)
    python_memory_mb: int = setting(256, "memory of one program", least=1)
    python_packages: list[str] = setting(
        ["numpy", "sympy"], "installed packages that programs may import, with what these need"
    )
    python_output_chars: int = setting(2000, "of what a program prints, the rest is cut", least=1)
    browse_allow: list[str] = setting(
        [],
        "what browse may open, nothing else: [https://en.wikipedia.org/, http://127.0.0.1:8000/wiki/], "
        "https://*.wikipedia.org/ for all hosts below, https:// for all public ones",
    )
    browse_private: list[str] = setting(
        [], "private networks that the hosts of browse_allow may be in: [10.0.0.0/8]; others are not reached"
    )
    browse_agent: str = setting(
        "espalier-browse/0.1", "the User-Agent that browse shows; many sites want a way to reach you in it"
    )
    browse_page_chars: int = setting(
        8000, "characters of one page of a document that browse shows", least=500
    )
    browse_mb: float = setting(8.0, "megabytes of a document that browse reads at most", above=0)
    browse_pdf_pages: int = setting(300, "pages of a PDF that browse reads at most", least=1)
    browse_rate_per_s: float = setting(
        2.0, "pages a second that a rollout worker fetches from one host; 0: unlimited", least=0
    )
    browse_cache: str = setting(
        "", "directory that keeps what browse has read, for several runs; empty: the run's own", path=True
    )
    browse_cache_mb: float = setting(1024.0, "megabytes kept there; 0: nothing is kept", least=0)


@dataclass
class EngineConfig:
    """The inference engines that the rollout talks to."""

    name: str = setting("embedded", "which engine", choices=("embedded", "sglang"))
    replicas: int = setting(1, "engines", least=1, safe_on_resume=True)
    tp: int = setting(1, "GPUs of one replica (SGLang's tensor parallelism)", least=1)
    device: str = setting("auto", "where the embedded engine computes", choices=("auto", "cpu", "cuda"))
    host: str = setting("127.0.0.1", "address that servers listen on")
    max_running: int = setting(64, "sequences decoded together", least=1, safe_on_resume=True)
    max_context: int = setting(1024, "tokens per sequence, prompt included", least=1)
    cache_slots: int = setting(128, "finished sequences with KV kept for reuse", least=0, safe_on_resume=True)
    chunk_tokens: int = setting(4, "tokens per streamed chunk", least=1)
    in_flight: int = setting(
        256, "requests a rollout worker keeps open at one engine; more wait their turn in it", least=1
    )
    threads: int = setting(1, "CPU threads of one embedded engine", least=1, safe_on_resume=True)
    weights: str = setting(
        "auto",
        "how they travel: http (embedded); disk, tensor or distributed (SGLang)",
        choices=("auto", "http", "disk", "tensor", "distributed"),
    )
    weights_dir: str = setting(
        "", "for disk: read by every engine; empty: temporary, for engines on this machine", path=True
    )
    kv_after_update: str = setting(
        "recompute", "what becomes of cached keys and values at new weights", choices=("recompute", "keep")
    )
    start_deadline_s: float = setting(300.0, "for a server to answer", above=0)
    urls: list[str] = setting([], "attach to servers that run; they are never stopped")
    api_key_env: str = setting(
        "", "environment variable with the key that the servers of urls want to be shown; empty: none"
    )
    entropy_top_k: int = setting(
        0, "attached servers without our plug-in: estimate entropies from so many top tokens", least=0
    )
    python: str = setting(
        "", "runs SGLang; empty: .venv-sglang/bin/python if there, else this interpreter", path=True
    )
    sglang: dict[str, Any] = setting(
        {},
        "SGLang's own flags: {mem_fraction_static: 0.8}; for float8 {quantization: fp8, load_format: "
        "flash_rl, kv_cache_dtype: fp8_e5m2}",
    )


@dataclass
class FlowConfig:
    """How trees flow from rollout to learner."""

    batch_leaves: int = setting(64, "B: leaves per training step", least=1)
    staleness: int = setting(
        1,
        "η: versions a tree may lag behind the policy that trains on it (one that is overtaken, up to window "
        "more); 0 is synchronous",
        least=0,
    )
    window: int = setting(
        4, "training batches from the head of the queue within which a closed tree may overtake", least=1
    )
    max_staleness: int = setting(
        0,
        "a waiting tree that would be trained on more versions than this after its start is thrown away, and "
        "its prompt grown again; 0: none is, and staleness + window bounds it all the same",
        least=0,
    )
    max_attempts: int = setting(3, "times a prompt is grown before it is abandoned with a reason", least=1)
    give_up_after: int = setting(
        1000,
        "trees that may fail since the last training step before the run stops with the cause; those lost "
        "with a machine or an engine do not count; 0: never",
        least=0,
        safe_on_resume=True,
    )
    skip_silent: int = setting(
        0,
        "trees whose leaves all earned the same that may be left out per training step, others being grown "
        "in their places (DAPO's dynamic sampling); more are trained on as they are, so that no run waits "
        "for ever; 0: none is left out",
        least=0,
        safe_on_resume=True,
    )
    curriculum: bool = setting(
        False,
        "draw questions by the mean correctness of their last trees: those that are solved, and those that "
        "are hopeless, come back rarely; off: epochs, each in a seeded order",
    )
    curriculum_trees: int = setting(
        2, "a question's last trees: all right it is solved, all wrong hopeless", least=1
    )
    curriculum_solved: float = setting(
        0.1, "how often a solved question is drawn, against one that is neither", above=0, most=1
    )
    curriculum_hopeless: float = setting(
        0.1, "how often a hopeless question is drawn, against one that is neither", above=0, most=1
    )
    update: str = setting(
        "in-flight",
        "in-flight: engines take new weights at a token boundary, whatever grows; drained: once no tree "
        "grows, so that every tree is of one version (with staleness 1: one-step-off asynchronous training)",
        choices=("in-flight", "drained"),
    )


@dataclass
class CheckpointConfig:
    """What a run saves.  Any of it may change on resume."""

    every: int = setting(20, "training steps; 0: only at the end and on a signal", least=0)
    keep: int = setting(2, "checkpoints kept, the newest", least=1)


@dataclass
class ObserveConfig:
    """What a run shows and records.  Any of it may change on resume."""

    wandb: str = setting("offline", "Weights & Biases", choices=("offline", "online", "disabled"))
    project: str = setting("espalier", "the project there, and in trackio")
    wandb_trees: int = setting(
        0, "newest trees sent to W&B as a table at each evaluation, with what model and tools said", least=0
    )
    tensorboard: bool = setting(False, "write tensorboard/ in the run directory")
    trackio: bool = setting(False, "log to trackio, which keeps it on this machine (docs/observe.md)")
    prometheus: str = setting(
        "none", "where Prometheus may read the metrics: a port of this machine, or host:port; none: nowhere"
    )
    otel: str = setting("none", "URL of an OpenTelemetry collector (OTLP over HTTP) for spans; none: off")
    trees: int = setting(
        200,
        "closed trees kept in the run directory (the newest); -1: all; 0: none, nor a sample",
        least=-1,
    )
    tree_sample: int = setting(
        64,
        "stretches of the run's whole time of which two trees each are kept besides: the first, and the one "
        "whose rewards differ most; 0: none",
        least=0,
    )
    progress_s: float = setting(2.0, "seconds between progress lines when not on a terminal", least=0.1)


@dataclass
class Config:
    """Every section."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    warmstart: WarmStartConfig = field(default_factory=WarmStartConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    branching: BranchingConfig = field(default_factory=BranchingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    guide: GuideConfig = field(default_factory=GuideConfig)
    learn: LearnConfig = field(default_factory=LearnConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    @property
    def trees_at_once(self) -> int:
        """How many trees grow at once; those of agents, as many as find their episodes' places free."""
        rollout, agent = self.rollout, self.agent
        if not agent.on:
            return rollout.concurrency
        return min(rollout.concurrency, rollout.workers * max(agent.concurrency // rollout.leaves, 1))
