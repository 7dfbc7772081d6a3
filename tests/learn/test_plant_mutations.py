"""The planted mistakes have places to stand in, and the table of the documents names them."""

from __future__ import annotations

import re
from pathlib import Path

from plant_mutations import MISTAKES, ROOT


def test_every_mistake_can_be_planted() -> None:
    gone = [what for what, file, right, _ in MISTAKES if right not in (ROOT / "system" / file).read_text()]
    assert not gone


def test_the_table_of_the_documents_has_every_mistake() -> None:
    text = Path(ROOT / "docs" / "algorithms.md").read_text()
    _, _, table = text.partition("## Planted mistakes")
    rows = re.findall(r"^\| (.+?) \| `(\S+)` \| `\S", table, re.MULTILINE)
    assert rows == [(what, file) for what, file, _, _ in MISTAKES]
    assert f"({len(MISTAKES)} of {len(MISTAKES)}" in table
