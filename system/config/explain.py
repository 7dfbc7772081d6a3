"""The settings reference, made from the schema: for the console, and as ``docs/settings.md``."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from typing import Any

from system.config.algorithms import ALGORITHMS
from system.config.hints import hint
from system.config.rule import PartConfig
from system.config.schema import Config
from system.config.settings import Setting, settings
from system.errors import ConfigError

HEAD = """\
# Settings

Every key of a configuration, made by `espalier config --explain --markdown > docs/settings.md` from
`system/config/schema.py`. `espalier config --explain KEY` prints one of them.

- A recipe is YAML. `base: other.yaml` inherits from another file, relative to its own; overrides on the
  command line (`key=value`) come last. `${section.key}` and `${oc.env:NAME}` are filled in.
- A plain word for a section or part that has a `name` sets that name: `branching=none` is
  `branching.name=none`.
- A part (task, reward, tool, call syntax, policy, credit, objective, aggregate, correction) is one of the
  names listed, or your own as `package.module:Name`, with the current directory on the path. Its `options`
  are its parameters.
- A dictionary is merged into the one it inherits. `!replace` replaces it: `options: !replace {}` in YAML,
  `'task.options=!replace {}'` as an override.
- `algorithm: dapo` in a recipe, or `algorithm=dapo`, sets credit, objective, aggregate, clip and branching of
  a method by name, before other settings (`espalier config --explain algorithm`, `docs/algorithms.md`).
- ↻ marks what a resumed run may change without becoming a different experiment.
"""


def text(wanted: str = "") -> str:
    """The reference for the console: of all settings, of a section, or of one key.

    Raises :class:`ConfigError` for a key that there is not.
    """
    if wanted == "algorithm":
        return "".join(f"algorithm={name}\n    {' '.join(parts)}\n" for name, parts in ALGORITHMS.items())
    chosen = [one for one in settings().values() if wanted in ("", one.section, one.key)]
    chosen = chosen or [one for key, one in settings().items() if key.startswith(f"{wanted}.")]
    if not chosen:
        section, _, key = wanted.rpartition(".")
        known = [one.name for one in settings().values() if one.section == section]
        if not known:
            known, section, key = [*(one.name for one in dataclasses.fields(Config)), "algorithm"], "", wanted
        close = hint(key, known, f"{section}." if section else "")
        raise ConfigError(f"no setting or section {wanted!r}{close}")
    lines: list[str] = []
    for number, one in enumerate(chosen):
        if wanted != one.key and (number == 0 or chosen[number - 1].section != one.section):
            lines.append(f"{one.section}: {_about(one.section)}\n")
        safe = ["safe on resume"] if one.safe_on_resume else []
        facts = "; ".join([f"{kind(one.kind)}, default {default(one)}", *filter(None, [allowed(one)]), *safe])
        told = (textwrap.fill(part, 96) for part in (facts, one.rule.text))
        lines += [one.key, *(textwrap.indent(part, "    ") for part in told), ""]
    return "\n".join(lines)


def markdown() -> str:
    """``docs/settings.md``."""
    lines = [HEAD]
    for section in dataclasses.fields(Config):
        lines += [f"## {section.name}", "", _about(section.name), ""]
        lines += ["| key | type | default | may be | what it is |", "| --- | --- | --- | --- | --- |"]
        for one in settings().values():
            if one.section == section.name:
                safe = " ↻" if one.safe_on_resume else ""
                cells = (
                    f"`{one.name}`{safe}",
                    kind(one.kind),
                    f"`{default(one)}`",
                    allowed(one),
                    one.rule.text,
                )
                lines.append(
                    "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"
                )
        lines.append("")
    return "\n".join(lines)


def kind(wanted: Any) -> str:
    """A type in words."""
    if wanted is PartConfig:
        return "part"
    inner = typing.get_args(wanted)
    if typing.get_origin(wanted) is list:
        return f"list of {kind(inner[0])}"
    if typing.get_origin(wanted) is dict:
        return "dictionary"
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[wanted]


def default(one: Setting) -> str:
    value = one.default.name if isinstance(one.default, PartConfig) else one.default
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value != "" else "''"


def allowed(one: Setting) -> str:
    """Bounds or choices in words; empty where anything goes."""
    rule = one.rule
    if rule.registry is not None:
        return f"{', '.join(rule.registry.names)}, or your own as package.module:Name"
    return ", ".join(rule.choices) or rule.bounds


def _about(section: str) -> str:
    """The section class's docstring."""
    return (type(getattr(Config(), section)).__doc__ or "").strip()
