"""The model card: what a trained model is, how it was made and what it scores, from its run's own records."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, cast

from system.config import Config, to_dict
from system.config.settings import settings
from system.evals.table import share
from system.observe.hub import REPOSITORY
from system.redact import redact
from system.text import one_line

CARD = "README.md"
# Sections that make the model what it is.  What is left out says where the run was: paths, hosts, accounts.
_MADE_BY = (
    "run", "model", "task", "sft", "warmstart", "rollout", "branching", "reward", "guide", "flow", "learn",
    "eval",
)  # fmt: skip
_PLACES = ("run.name", "run.dir", "run.push", "task.path", "task.eval_path", "sft.path", "sft.eval_path")
_MARKUP = re.compile(r"([\\`*_\[\]<>|#&~])")


def model_card(
    config: Config,
    summary: Mapping[str, Any],
    *,
    name: str,
    version: int,
    adapter: bool = False,
    merged: tuple[str, float] | None = None,
) -> str:
    """Markdown, with the head that a hub reads.

    ``summary``: of the run, whose model of step ``version`` this is.  Its figures of the end are left out if
    that is not its last step.  ``adapter``: these are its adapters alone.  ``merged``: they were merged in
    this dtype, which kept this share of what they change (``Rounding.kept``).
    """
    last = summary.get("versions") == version
    scores: Mapping[str, Any] = summary.get("eval", {})
    evaluated = {when: one for when, one in scores.items() if one and (last or when == "before")}
    lines = [
        *_head(config, adapter),
        f"# {_text(name)}",
        "",
        f"Trained with Espalier {_how(config, summary, version)}.",
        "",
        *_choice(summary, version),
        *_adapters(config, adapter, merged),
        *_scores(evaluated),
        *_losses(summary, version),
        *(_totals(summary) if last else ()),
        "## Settings",
        "",
        "Those that are not the default, as `espalier train` takes them; where the data lay is left out.",
        "",
        *(f"    {line}" for line in _settings(config)),
        "",
    ]
    return "\n".join(lines)


def _head(config: Config, adapter: bool) -> Iterator[str]:
    """YAML; JSON texts are YAML's, too."""
    yield "---"
    yield f"library_name: {'peft' if adapter else 'transformers'}"
    yield "pipeline_tag: text-generation"
    if base := _hub_name(config):
        yield f"base_model: {json.dumps(base)}"
    yield "tags: [reinforcement-learning, tool-use, espalier]"
    yield "---"
    yield ""


def _hub_name(config: Config) -> str:
    """The name on the hub of the model that training began with; empty where its directory does not tell.

    It tells in the hub's own cache (``models--owner--name``), and where it is called ``owner/name`` and its
    card has that name too.
    """
    path = Path(config.model.path).absolute()
    for part in path.parts:
        if part.startswith("models--") and part.count("--") == 2:
            return part.removeprefix("models--").replace("--", "/")
    name, card = "/".join(path.parts[-2:]), path / CARD
    if config.model.path and REPOSITORY.fullmatch(name) and card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        return name if re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w-])", text) else ""
    return ""


def base_name(config: Config) -> str:
    """What the model that training began with is called: on the hub, or else as its directory, or as the run
    whose ``model/`` it is.  No path, which means nothing on another machine.  "start" where the run has made
    it.
    """
    path = Path(config.model.path or "start").absolute()
    of_run = path.name == "model" and (path.parent / "config.yaml").is_file()
    return _hub_name(config) or (path.parent if of_run else path).name


def _adapters(config: Config, alone: bool, merged: tuple[str, float] | None) -> Iterator[str]:
    """Of a run by LoRA: what these files are."""
    lora = config.learn.lora
    if alone:
        yield f"Adapters (LoRA) of rank {lora.rank} alone, in PEFT's format."
        yield ""
    elif merged:
        dtype, kept = merged
        yield (
            f"Its adapters (LoRA) of rank {lora.rank} are merged into the weights in {dtype}, which keeps "
            f"{kept:.1%} of what they change (of its squared norm)."
        )
        yield ""


def _choice(summary: Mapping[str, Any], version: int) -> Iterator[str]:
    """Why it is not the last one."""
    chosen = summary.get("chosen", {})
    if "value" in chosen and chosen["step"] == version:
        yield (
            f"It is the model of step {version} of {summary.get('versions')}, whose evaluation had the "
            f"highest {_text(chosen['by'])}: {chosen['value']:.3f}."
        )
        yield ""


def _base(config: Config) -> str:
    if not config.model.path:
        return "a small model of random weights that the run made"
    return _text(base_name(config))


def _how(config: Config, summary: Mapping[str, Any], version: int) -> str:
    if data := summary.get("data"):  # of a supervised run
        counted = (
            f"{data['conversations']:,} conversations ({data['learned_tokens']:,} tokens of the model's)"
        )
        return f"on {counted}, from {_base(config)}: step {version} of {summary.get('steps')}"
    return (
        f"by reinforcement learning on trees of trajectories, from {_base(config)}: {version} steps of "
        f"{config.flow.batch_leaves} trajectories on the task {_text(config.task.name)}"
    )


def _scores(evaluated: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    if not evaluated:
        return
    yield "## Held-out questions"
    yield ""
    yield "| " + " | ".join(["questions", *(_text(when) + " training" for when in evaluated)]) + " |"
    yield "| --- |" + " --- |" * len(evaluated)
    kinds = list(dict.fromkeys(kind for one in evaluated.values() for kind in one.get("kinds", {})))
    for kind in ["", *(kinds if len(kinds) > 1 else ())]:
        found = [one["kinds"].get(kind, {}) if kind else one for one in evaluated.values()]
        cells = (share(one.get("accuracy") or 0.0, one.get("questions", 0)) for one in found)
        count = max(one.get("questions", 0) for one in found)
        yield "| " + " | ".join([f"{_text(kind or 'all')}: {count}", *cells]) + " |"
    yield ""
    yield "Share answered right, and its 95 % interval over the questions."
    yield ""


def _losses(summary: Mapping[str, Any], version: int) -> Iterator[str]:
    """Of a supervised run."""
    if not (held_out := [one for one in summary.get("held_out", ()) if one["step"] <= version]):
        return
    yield "## Held-out conversations"
    yield ""
    yield "| step | loss, nats per token |"
    yield "| --- | --- |"
    for one in held_out:
        yield f"| {one['step']} | {one['loss']:.4f} |"
    yield ""


def _totals(summary: Mapping[str, Any]) -> Iterator[str]:
    tokens = summary.get("tokens", {})
    figures = {
        "trees": summary.get("trees"),
        "trajectories": summary.get("leaves"),
        "forks": summary.get("forks"),
        "tool calls": summary.get("tool_calls"),
        "tokens generated": tokens.get("generated"),
        "tokens trained on": tokens.get("trained"),
        "hours": round(summary.get("wall_s", 0.0) / 3600, 2),
    }
    yield "## Training"
    yield ""
    yield "| what | how much |"
    yield "| --- | --- |"
    for what, value in figures.items():
        if value:
            yield f"| {what} | {value:,} |"
    yield ""


def _settings(config: Config) -> Iterator[str]:
    given, default = to_dict(config), to_dict(Config())
    for key, one in settings().items():
        value, usual = (reduce(getitem, key.split("."), values) for values in (given, default))
        if one.section not in _MADE_BY or key in _PLACES or value == usual:
            continue
        value = redact(_nowhere(value), one.name)
        yield f"{key}={one_line(value if isinstance(value, str) else json.dumps(value))}"


def _nowhere(value: Any) -> Any:
    """``value`` with the last part of paths alone, which tell of no machine."""
    if isinstance(value, Mapping):
        return {key: _nowhere(item) for key, item in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list):
        return [_nowhere(item) for item in cast("list[Any]", value)]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _text(value: object) -> str:
    """Text of the run's in a line of Markdown: nothing in it is markup."""
    return _MARKUP.sub(r"\\\1", one_line(value))
