"""What a benchmark leaves behind: JSON, tables on the terminal, PNG plots, and one HTML page with all of it.

The page needs nothing but a browser: its style is inline and its pictures are in it, so it can be mailed,
kept beside a run, or opened on a machine without a network.
"""

from __future__ import annotations

import base64
import html
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from system.doctor.facts import usable_cpus, version_of
from system.observe.jsonl import jsonable
from system.observe.rundir import write_atomic
from system.observe.terminal import visible

Cell = str | int | float | None

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.lead { margin-top: 0; } small, figcaption, caption { color: #777; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } tr:hover td { background: var(--soft); }
td.text { text-align: left; } figure { margin: 1rem 0; } img { max-width: 100%; background: white; }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; }
dt { color: #777; } dd { margin: 0; } .scroll { overflow-x: auto; }
"""


class Report:
    """Collects a benchmark's findings in the order in which a reader should see them.

    Tables are printed as they come.  :meth:`finish` writes ``<name>.json``, ``<name>.html`` and the tables as
    Markdown, ``<name>.md``, into ``out_dir``, beside the figures' PNG files.
    """

    def __init__(self, out_dir: Path, name: str, title: str, lead: str = "") -> None:
        """``lead``: one or two sentences that say what was measured and what came of it."""
        out_dir.mkdir(parents=True, exist_ok=True)
        self.out_dir, self.name, self.title, self.lead = out_dir, name, title, lead
        self._body: list[str] = []
        self._tables: list[str] = []  # as Markdown
        self._console = Console(width=shutil.get_terminal_size((120, 24)).columns, markup=False)

    def section(self, heading: str, *paragraphs: str) -> None:
        """Start a section."""
        self._body.append(f"<h2>{_escaped(heading)}</h2>")
        self.text(*paragraphs)

    def text(self, *paragraphs: str) -> None:
        self._body += [f"<p>{_escaped(one)}</p>" for one in paragraphs]

    def facts(self, values: Mapping[str, Any]) -> None:
        """Names and values, one under the other (settings, assumptions)."""
        self._body.append(_definitions(values))

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], note: str = ""
    ) -> None:
        """A table, printed at once.  Numbers stand right, words left; a float is shown with 3 digits.

        On a terminal too narrow for it the table goes on below with the columns that are left, the first
        repeated, so that no figure is cut short.
        """
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"table {title!r}: a row of {len(row)} cells under {len(columns)} columns")
        title, columns, note = visible(title), [visible(column) for column in columns], visible(note)
        cells = [[column, *(_cell(row[i]) for row in rows)] for i, column in enumerate(columns)]
        widths = [_width(*column) for column in cells]
        parts = _side_by_side(widths, self._console.width)
        for number, part in enumerate(parts, 1):
            self._console.print(title if number == 1 else f"{title} (continued)", style="italic")
            shown = Table(caption=note if number == len(parts) else None, caption_justify="left")
            for i in part:
                words = any(isinstance(row[i], str) for row in rows)
                shown.add_column(columns[i], justify="left" if words else "right", width=widths[i])
            for line in range(1, len(rows) + 1):
                shown.add_row(*(cells[i][line] for i in part))
            self._console.print(shown)
        self._tables.append(_markdown(title, columns, [[_cell(one) for one in row] for row in rows], note))
        head = "".join(f"<th>{_escaped(column)}</th>" for column in columns)
        body = "".join("<tr>" + "".join(_html_cell(cell) for cell in row) + "</tr>" for row in rows)
        foot = f"<p><small>{_escaped(note)}</small></p>" if note else ""
        self._body.append(
            f'<div class="scroll"><table><caption>{_escaped(title)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{foot}"
        )

    def figure(self, name: str, figure: Figure, caption: str = "") -> None:
        """Save ``figure`` as ``<name>.png`` and show it here."""
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        (self.out_dir / f"{name}.png").write_bytes(buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode()
        words = _escaped(caption)
        self._body.append(
            f'<figure><img alt="{words or _escaped(name)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{words}</figcaption></figure>"
        )

    def finish(self, data: dict[str, Any]) -> dict[str, Any]:
        """Write ``data`` (with the machine's description), the page and the tables; returns ``data``."""
        where = machine()
        record = jsonable({**data, "machine": where})
        write_atomic(self.out_dir / f"{self.name}.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
        if self._tables:
            write_atomic(self.out_dir / f"{self.name}.md", "\n".join(self._tables))
        page = self.out_dir / f"{self.name}.html"
        write_atomic(
            page,
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_escaped(self.title)}</title><style>{_STYLE}</style></head><body>\n"
            f'<h1>{_escaped(self.title)}</h1>\n<p class="lead">{_escaped(self.lead)}</p>\n'
            + "\n".join(self._body)
            + f"\n<h2>Measured on</h2>\n{_definitions(where)}\n</body></html>\n",
        )
        self._console.print(f"report: {page}")
        return data


def machine() -> dict[str, str]:
    """What a figure depends on besides the program: when, what machine, and how busy it was."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "espalier": version_of("espalier") or "from source",  # of a tree that is not installed
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "cores": str(usable_cpus()),
        "load (1, 5, 15 min)": ", ".join(f"{one:.1f}" for one in os.getloadavg()),
    }


def against(value: float, base: float) -> str:
    """A figure, and what it is times ``base``."""
    return f"{value:,.0f} (× {value / base:.2f})"


def _cell(value: Any) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        case int():
            return f"{value:,}"
        case _:
            return visible(str(value))


def _markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    """A table in the form of GitHub's Markdown."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"

    lines = [f"**{title}**", "", line(columns), line(["---"] * len(columns)), *map(line, rows)]
    return "\n".join([*lines, *(["", note] if note else []), ""])


def _width(header: str, *cells: str) -> int:
    """Characters that a column needs for its longest cell and its header's longest word; 40 at most."""
    return min(40, max(map(len, (*header.split(), *cells)), default=1))


def _side_by_side(widths: Sequence[int], room: int) -> list[list[int]]:
    """Which columns are printed together in ``room`` characters; the first stands in every part."""
    taken = [width + 3 for width in widths]  # a blank on each side, and a line
    parts = [[0]]
    for i in range(1, len(widths)):
        if len(parts[-1]) > 1 and sum(taken[j] for j in (*parts[-1], i)) + 1 > room:
            parts.append([0])
        parts[-1].append(i)
    return parts


def _escaped(text: str) -> str:
    """``text`` on a page, whoever wrote it."""
    return html.escape(visible(text, breaks=True))


def _html_cell(value: Cell) -> str:
    kind = ' class="text"' if isinstance(value, str) else ""
    return f"<td{kind}>{_escaped(_cell(value))}</td>"


def _definitions(values: Mapping[str, Any]) -> str:
    pairs = [(_escaped(str(name)), _escaped(_cell(value))) for name, value in values.items()]
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{value}</dd>' for name, value in pairs)}</dl>"
