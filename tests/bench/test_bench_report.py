"""The report page: complete, self-contained, and safe to open."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from system.bench.report import Report


class Links(HTMLParser):
    """Everything that a browser would have to fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and not (value or "").startswith("data:"):
                self.outside.append(f"{tag} {name}={value}")


def build(out: Path) -> tuple[Path, str]:
    report = Report(out, "speed", "Speed <of> things", "It is fast & small.")
    report.section("Results", "A paragraph.")
    report.table("Table", ["case", "tok/s", "share"], [["a <b>", 12345.6, 0.12345], ["c", 7, None]], "note")
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], [1, 0])
    report.figure("curve", figure, "A curve")
    report.facts({"η": 1})
    report.finish({"rate": 3.0, "missing": float("nan")})
    page = out / "speed.html"
    return page, page.read_text()


def test_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page, text = build(tmp_path)
    assert page == tmp_path / "speed.html"
    links = Links()
    links.feed(text)
    assert links.outside == []
    assert "script" not in links.tags
    assert links.tags.count("img") == 1
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_text_is_escaped_and_numbers_are_readable(tmp_path: Path) -> None:
    _, text = build(tmp_path)
    assert "Speed &lt;of&gt; things" in text
    assert "a &lt;b&gt;" in text
    assert "<td>12,346</td><td>0.123</td>" in text
    assert "<td>7</td><td>–</td>" in text


def test_json_is_strict_and_names_the_machine(tmp_path: Path) -> None:
    build(tmp_path)
    data = json.loads((tmp_path / "speed.json").read_text())
    assert data["rate"] == 3.0
    assert data["missing"] is None
    assert {"date", "cores", "load (1, 5, 15 min)"} <= data["machine"].keys()


@pytest.mark.parametrize("width", [30, 60, 200])
def test_no_figure_is_cut_short_on_a_narrow_terminal(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    columns = ["GPUs", *(f"a long header {i}" for i in range(8)), "why"]
    rows = [[n, *(1000.0 * n + i for i in range(8)), f"few [b] {n}"] for n in (8, 4096)]
    Report(tmp_path, "x", "X").table("T", columns, rows)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    for row in rows:
        for cell in row[1:]:
            assert (f"{cell:,.0f}" if isinstance(cell, float) else cell) in printed
    parts = printed.count("(continued)") + 1
    assert printed.count("│ 4,096 │") == parts  # each part says which row is which
    assert (parts == 1) == (width == 200)


def test_a_row_of_the_wrong_length_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 cells under 1 columns"):
        Report(tmp_path, "x", "X").table("T", ["one"], [[1, 2]])
