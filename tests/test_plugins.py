"""One's own parts, and ours, by name: found, checked and made; and every way in which that fails."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from system import plugins
from system.config import Config, settings
from system.plugins import REWARDS, PluginError, Registry
from system.rollout.reward import BranchView, Score
from system.tree.prompt import Prompt

NOT_CALLABLE = 3


class AlwaysRight:
    def score(self, prompt: Prompt, branch: BranchView) -> Score:
        return Score(1.0, correct=True)


@dataclasses.dataclass(frozen=True)
class Window:
    size: int = 2


@dataclasses.dataclass(frozen=True)
class Part:
    given: str
    size: int = 1
    share: float = 0.5
    on: bool = False
    name: str | None = None
    window: Window = Window()
    words: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("size is negative")


def function(given: str, *, needed: int, offered: int = 0) -> tuple[str, int, int]:
    return given, needed, offered


def anything(given: str, **options: Any) -> dict[str, Any]:
    return options


def untyped(given, value=None):  # type: ignore[no-untyped-def]
    return value


def nothing() -> None:
    """Takes none of what parts of the kind are given."""


KIND = Registry(
    "kind.name", {"part": f"{__name__}:Part", "gone": "no.such.module:Part"}, ("what",), ("offered",)
)
MINE = f"{__name__}:Part"


def test_a_part_of_ours_and_ones_own_are_made_alike() -> None:
    assert KIND.make("part", {}, "x") == KIND.make(MINE, {}, "x") == Part("x")
    assert KIND.make(f"{__name__}:function", {"needed": 3}, "x", offered=7) == ("x", 3, 7)
    assert KIND.make(f"{__name__}:function", {"needed": 3, "offered": 1}, "x", offered=7) == ("x", 3, 1)
    assert KIND.make(f"{__name__}:function", {"needed": 3}, "x", offered=None, unknown=1) == ("x", 3, 0)
    assert KIND.make(f"{__name__}:anything", {"a": [1], "b": "${x}"}, "x") == {"a": [1], "b": "${x}"}
    assert isinstance(REWARDS.make(f"{__name__}:AlwaysRight", {}), AlwaysRight)


def test_options_are_converted_to_their_types() -> None:
    options = {"size": "3", "share": 1, "on": "true", "name": None, "window": {"size": "4"}, "words": ["a"]}
    made = KIND.make("part", options, "x")
    assert made == Part("x", 3, 1.0, True, None, Window(4), ["a"])
    assert isinstance(made.share, float)
    assert KIND.make("part", {"name": "${run.seed} \\${x}"}, "x").name == "${run.seed} \\${x}"
    assert KIND.make(f"{__name__}:untyped", {"value": {"a": 1}}, "x") == {"a": 1}


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "prat",
            {},
            "choose one of part, gone, or your own as package.module:Name; did you mean part?",
        ),
        ("", {}, "kind.name='': choose one of part"),
        ("gone", {"a": 1}, "kind.name='gone': ModuleNotFoundError: No module named 'no'"),
        ("no.such:Part", {}, "ModuleNotFoundError"),
        (":Part", {}, "ValueError: Empty module name"),
        (f"{__name__}:Missing", {}, "AttributeError"),
        (f"{__name__}:Prat", {}, "has no attribute 'Prat'; did you mean Part?"),
        (f"{__name__}:", {}, "AttributeError"),
        (f"{__name__}:NOT_CALLABLE", {}, "NOT_CALLABLE is not callable"),
        (
            "part",
            {"sise": 3},
            "options.sise: part has no such option; did you mean size?; it takes size, share",
        ),
        ("part", {"given": "y"}, "kind.options.given: part has no such option"),
        ("part", {"size:3": None}, "part has no such option; write size: 3 with a space"),
        (
            "part",
            {"size": "three"},
            "kind.options.size='three' must be an integer",
        ),
        ("part", {"size": [1]}, "kind.options.size=[1]"),
        ("part", {"window": 3}, "kind.options.window=3"),
        (f"{__name__}:function", {}, "kind.options: test_plugins:function needs needed"),
        (f"{__name__}:nothing", {}, "it is called with (what), which it does not take"),
        (
            "collections:OrderedDict",
            {"a": 1},
            "kind.options.a: collections:OrderedDict has no such option; it takes none",
        ),
    ],
)
def test_what_cannot_be_made_is_told_without_making_it(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(PluginError) as checked:
        KIND.check(name, options)
    with pytest.raises(PluginError) as made:
        KIND.make(name, options, "x")
    assert says in str(checked.value) == str(made.value)
    assert "\n" not in str(made.value)


def test_a_part_that_fails_to_be_made_is_named() -> None:
    KIND.check("part", {"size": -1})
    with pytest.raises(PluginError, match=r"kind.name='part': ValueError: size is negative"):
        KIND.make("part", {"size": -1}, "x")


def test_a_part_of_ours_without_options_is_not_imported() -> None:
    KIND.check("gone", {})


def test_options_may_stand_elsewhere() -> None:
    with pytest.raises(PluginError, match=r"tools\.options\.python\.colour: python has no such option"):
        plugins.TOOLS.check("python", {"colour": "red"})


def test_a_module_that_fails_to_import_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the current directory is on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_part_here.py").write_text("class Part:\n    pass\n")
    (tmp_path / "own_broken_here.py").write_text("1 / 0\n")
    assert plugins.load("own_part_here:Part").__name__ == "Part"
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        plugins.load("own_broken_here:Part")


@pytest.mark.parametrize("key", [key for key, one in settings().items() if one.rule.registry])
def test_every_table_leads_to_parts_that_can_be_made(key: str) -> None:
    """Each takes what parts of its kind are given, and needs no option; a judge has to be named."""
    registry = settings()[key].rule.registry
    assert registry is not None
    assert registry.key == key
    for name, path in registry.table.items():
        registry.check(path, {"base_url": "http://judge", "model": "m"} if name == "judge" else {})
        registry.check_name(name)


def test_the_defaults_are_parts_of_ours() -> None:
    config = Config()
    for key, one in settings().items():
        several_or_none = key in ("tools.names", "agent.run")
        if one.rule.registry and one.rule.registry.table and not several_or_none:
            value = one.of(config)
            assert getattr(value, "name", value) in one.rule.registry.names


def test_a_part_of_another_kind_is_refused_before_anything_starts() -> None:
    for registry, path in ((plugins.CREDITS, "builtins:dict"), (plugins.POLICIES, "fractions:Fraction")):
        with pytest.raises(PluginError, match=rf"{registry.key}='{path}': .* is not derived from system\."):
            registry.check(path, {})
        with pytest.raises(PluginError, match="is not derived from"):
            registry.make(path, {})
