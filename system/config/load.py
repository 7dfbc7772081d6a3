"""Files that inherit from each other, dotted overrides, and back to plain data."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from system.config.algorithms import ALGORITHMS
from system.config.check import validate
from system.config.hints import hint
from system.config.schema import Config
from system.config.schema_reward import RewardConfig, as_section
from system.config.settings import settings
from system.errors import ConfigError
from system.plugins import KINDS, escape, nearest

REPLACE = "!replace"
"""YAML tag of a dictionary that replaces an inherited one, where others are merged into it."""
_SCHEMA = OmegaConf.structured(Config)  # takes longer than all the rest: once, and copied


def _replacing(loader: Any, node: Any) -> dict[str, Any]:
    return {REPLACE: True, **loader.construct_mapping(node, deep=True)}


yaml.constructor.SafeConstructor.add_constructor(REPLACE, _replacing)


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file (and its ``base:`` chain) and apply ``key=value`` overrides.

    Raises :class:`ConfigError` with a line for each thing that is wrong, naming the key and what to do.
    """
    layers = list(_files(Path(path), ())) if path is not None else []
    problems: list[str] = []
    # An algorithm is where the others start from, wherever it stands.
    for text in sorted(overrides, key=lambda text: not text.startswith("algorithm=")):
        try:
            layers.append((f"override {text!r}", _override(text)))
        except ConfigError as error:
            problems.append(str(error))
    merged = OmegaConf.merge(_SCHEMA)
    for source, layer in layers:
        problems += _merge(merged, layer, source)
    try:
        config = _resolve(merged)
    except ConfigError as error:
        raise ConfigError("\n".join([*problems, str(error)])) from error
    validate(config, problems)
    return config


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of :func:`to_dict`.  Raises :class:`ConfigError` for keys this version does not know."""
    try:
        merged = OmegaConf.merge(_SCHEMA, escape(values))
    except OmegaConfBaseException as error:
        raise ConfigError(_reason(error)) from error
    return _resolve(merged)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionaries, for JSON, YAML and Ray."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """YAML that :func:`load` reads back to an equal configuration."""
    return OmegaConf.to_yaml(OmegaConf.create(escape(to_dict(config))))


def _files(path: Path, seen: tuple[Path, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: `base:` leads back to itself: {' -> '.join(map(str, (*seen, path)))}")
    if path.is_dir():
        raise ConfigError(f"no such configuration file: {path} is a directory; name a recipe (a YAML file)")
    if not path.is_file():
        beside = [one.name for one in path.parent.glob("*.yaml")]
        raise ConfigError(f"no such configuration file: {path}{nearest(path.name, beside)}")
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


def _merge(merged: Any, layer: dict[str, Any], source: str) -> Iterator[str]:
    """Merge a ``layer`` into ``merged``, an algorithm that it names before its other settings, and yield what
    is wrong with it.
    """
    rest = {key: value for key, value in layer.items() if key != "algorithm" or isinstance(value, dict)}
    if rest != layer:
        name = str(layer["algorithm"])
        if name not in ALGORITHMS:
            close = nearest(name, ALGORITHMS)
            yield f"{source}: algorithm={name}: choose one of {', '.join(ALGORITHMS)}{close}"
        for text in ALGORITHMS.get(name, ()):
            yield from _merge(merged, _override(text), f"{source}: algorithm={name}")
    sections = [one.name for one in dataclasses.fields(Config)]
    for name, values in _expand(rest, Config()).items():
        if name not in sections:
            meant = nearest(name, sections) or hint(_first_path(name, values), sections)
            yield f"{source}: unknown section {name!r}{meant}"
        elif not isinstance(values, dict):
            yield f"{source}: {name} is a section; set one of its keys, e.g. {name}.<key>=…"
        else:
            for key, value in _flat(name, values):
                if fault := _merge_key(merged, name, key, value):
                    yield f"{source}: {fault}"


def _flat(section: str, values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a section with their values; those of a section within it with a dot: ``lora.rank``."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and any(one.startswith(f"{section}.{key}.") for one in settings()):
            yield from _flat(section, value, f"{key}.")
        else:
            yield key, value


def _first_path(name: str, values: Any) -> str:
    """``name``, or the dotted path below it to the first value: ``actor_rollout_ref.rollout.n``."""
    while isinstance(values, dict) and values:
        key, values = next(iter(values.items()))
        name = f"{name}.{key}"
    return name


def _merge_key(merged: Any, section: str, key: str, value: Any) -> str:
    """Set one key, or merge a dictionary into it; returns what is wrong with it."""
    path = f"{section}.{key}"
    section, _, key = path.rpartition(".")
    if key == REPLACE:
        return f"{section} is no dictionary: {REPLACE} is for one, as in task.options"
    if (one := settings().get(path)) is None:
        known = [one.removeprefix(f"{section}.") for one in settings() if one.startswith(f"{section}.")]
        if within := [one for one in settings() if one.startswith(f"{path}.")]:
            return f"{path} is a section; set one of its keys, e.g. {within[0]}=…"
        return f"unknown key {path}{hint(key, known, f'{section}.')}"
    if isinstance(value, bool) and (word := str(value).lower()) in one.rule.choices:
        value = word  # a text, which YAML takes for its own
    named = isinstance(value, str) and "${" in value  # the value of another key
    if typing.get_origin(one.kind) is list and not (
        named or isinstance(value, list) or REPLACE in str(value)
    ):
        example = value if isinstance(value, str) and value else "a, b"
        return f"{path}: write a list: [{example}]"
    if typing.get_origin(one.kind) is dict and not (named or isinstance(value, dict)):
        return f"{path}={value!r} must be a dictionary: in a shell in quotes, '{path}={{a: 1}}'"
    entries = value if one.kind == list[dict[str, Any]] and isinstance(value, list) else []
    if wrong := [entry for entry in entries if not isinstance(entry, dict)]:
        return f"{path}: {wrong[0]!r} must be a dictionary; see: espalier config --explain {path}"
    layer = {key: value}
    try:
        inner = OmegaConf.select(merged, section)
        _make_room(inner, layer, f"{section}.")
        inner.merge_with(layer)
    except ConfigError as error:
        return str(error)
    except Exception as error:  # OmegaConf's own, and what it runs into with values of a wrong type
        plain = KINDS.get(one.kind)
        return f"{path}={value!r} must be {plain}: {one.rule.text}" if plain else _reason(error)
    return ""


def _expand(layer: dict[str, Any], values: Any) -> dict[str, Any]:
    """``branching: none`` -> ``branching: {name: none}`` (YAML reads a bare ``none`` as text)."""
    expanded = dict(layer)
    for key, value in layer.items():
        inner = getattr(values, str(key), None)
        if isinstance(inner, RewardConfig):
            expanded[key] = value if isinstance(value, str) and "${" in value else _one_or_several(value)
        elif dataclasses.is_dataclass(inner):
            if hasattr(inner, "name") and isinstance(value, str | int | float):
                expanded[key] = {"name": str(value)}
            elif isinstance(value, dict):
                expanded[key] = _expand(value, inner)
    return expanded


def _one_or_several(reward: Any) -> Any:
    """The section ``reward`` of a layer: who names one reward takes out several, and the other way round."""
    reward = as_section(reward)
    if not isinstance(reward, dict):
        return reward
    if isinstance(parts := reward.get("parts"), list) and parts:
        return {"name": "", "options": {REPLACE: True}, **reward}
    return {"parts": [], **reward} if "name" in reward else reward


def _make_room(merged: Any, layer: dict[str, Any], where: str = "") -> None:
    """Empty the dictionaries that are to be replaced by those of the ``layer``, and take its marks off.

    Raises :class:`ConfigError` for a mark on anything else.
    """
    for key, value in layer.items():
        path = f"{where}{key}"
        if isinstance(value, list) and REPLACE in str(value):
            raise ConfigError(f"{path} is a list, which replaces the old one anyway: no {REPLACE} in it")
        if not isinstance(value, dict):
            continue
        # What stands there as an interpolation is not looked into: it is the dictionary of another key.
        known = isinstance(merged, DictConfig) and key in list(merged)  # if not, merging will say so
        named = known and OmegaConf.is_interpolation(merged, key)
        there = merged.get(key) if known and not named else None
        if value.pop(REPLACE, False) and (named or there is not None):
            if not named and OmegaConf.get_type(there) is not dict:
                raise ConfigError(f"{path} is no dictionary: {REPLACE} is for one, as in task.options")
            merged[key], there = {}, None
        elif named:
            merged[key] = {}  # text cannot be merged with what is given now
        _make_room(there, value, f"{path}.")


def _resolve(merged: Any) -> Config:
    """The typed configuration, with interpolations (``${section.key}``, ``${oc.env:NAME}``) filled in."""
    try:
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{_reason(error)} (plain text with a dollar brace is written \\${{)") from error
    assert isinstance(config, Config)
    return config


def _reason(error: Exception) -> str:
    """What went wrong and at which key, in one line without OmegaConf's internals."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OmegaConfBaseException):
        lines = lines[:1]
        if error.full_key:
            lines.insert(0, f"{error.full_key}:")
    return " ".join(lines)
