"""The documents name files and settings that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from system.config import load
from system.config.algorithms import ALGORITHMS
from system.plugins import AGGREGATES, CORRECTIONS, CREDITS, OBJECTIVES, POLICIES, Registry

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
_FILE = re.compile(r"`((?:system|actors|configs|docs|examples|slurm|tests)/[\w./*{},-]*)`")
_LINK = re.compile(r"\]\((?!http)([^)#]+)\)")
_RECIPE = re.compile(r"^```yaml\n((?!# prometheus\.yml).*?)^```", re.DOTALL | re.MULTILINE)
_SETTING = re.compile(
    r"`((?:run|task|model|warmstart|sft|rollout|branching|tools|reward|engine|flow|learn|eval|checkpoint|observe"
    r"|cluster|slurm)\.[a-z_.]+)(?:=[^`]*)?`"
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_files_it_names_are_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for name in _FILE.findall(text):
        pattern = re.sub(r"\{[^}]*\}", "*", name).rstrip("/")
        assert list(ROOT.glob(pattern)), f"{document.name}: {name}"
    for name in _LINK.findall(text):
        assert (document.parent / name).exists(), f"{document.name}: {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_settings_it_names_are_there(document: Path) -> None:
    config = load(None, [])
    text = document.read_text(encoding="utf-8")
    if document.name == "coming-from.md":  # the other columns name others' settings
        text = re.sub(r"^(\| [^|]*\|).*", r"\1", text, flags=re.MULTILINE)
    for name in _SETTING.findall(text):
        if name.endswith((".py", ".json", ".yaml")):
            continue
        at: object = config
        for word in name.split("."):
            at = at.get(word, "an entry of a dictionary") if isinstance(at, dict) else getattr(at, word, None)
        assert at is not None, f"{document.name}: {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_recipes_it_shows_are_taken(document: Path, tmp_path: Path) -> None:
    """Every block of YAML that does not say whose it is is one of ours, by itself."""
    for number, text in enumerate(_RECIPE.findall(document.read_text(encoding="utf-8"))):
        recipe = tmp_path / f"{number}.yaml"
        recipe.write_text(text, encoding="utf-8")
        load(recipe, [])


@pytest.mark.parametrize(
    "parts", [CREDITS, OBJECTIVES, AGGREGATES, CORRECTIONS, POLICIES], ids=lambda one: one.key
)
def test_every_part_of_an_algorithm_stands_in_its_document(parts: Registry) -> None:
    text = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    assert [name for name in parts.names if f"`{name}`" not in text and f"={name}`" not in text] == []


def test_every_algorithm_and_planted_mistake_stands_in_the_document() -> None:
    text = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    named = text.partition("## All together")[2].partition("\n## ")[0]
    assert [name for name in ALGORITHMS if f"`{name}`" not in named] == []
    listed = re.findall(r"^\| (.*?) \| `", text.partition("## Planted mistakes")[2], re.MULTILINE)
    planted = (ROOT / "tests" / "learn" / "plant_mutations.py").read_text(encoding="utf-8")
    assert listed == re.findall(r'^    \("(.*?)", "', planted, re.MULTILINE)
