"""One tree as one file that opens anywhere: the page's own drawing, with the texts in it; or a table."""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
from collections.abc import Iterable
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from system.errors import ConfigError, naming
from system.observe.outline import table
from system.observe.rundir import RunDir
from system.observe.show import select
from system.observe.terminal import visible
from system.tree.record import Tree
from system.tree.store import StoreError, numbered_trees
from system.watch.reader import RunReader, texts
from system.watch.server import page_files

MODULES = ("dom.js", "draw.js", "treeview.js", "mail.js")  # each after those it imports from
MOST_TOKENS = 100_000  # whose texts go into the file, shared evenly between the nodes
_IMPORT = re.compile(r'^import [^;]*? from "\./[\w.]+";\n', re.MULTILINE)
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src {script_hash}; \
style-src {style_hash}; img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main id="main"></main>
<script type="application/json" id="tree">{data}</script>
<script type="module">{script}</script>
</body>
</html>
"""


_LIST_WIDTH = 200  # columns
_LIST = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
base-uri 'none'; form-action 'none'">
<meta name="color-scheme" content="light dark">
<title>TITLE</title>
</head>
<body>
<pre>{code}</pre>
</body>
</html>
"""


def run(args: argparse.Namespace) -> int:
    """``espalier tree RUN --html FILE``: a tree drawn, or with ``--list`` the table of all."""
    run_dir = RunDir.open(args.run)
    try:
        trees = numbered_trees(*run_dir.tree_directories)
        text = listed(run_dir, trees) if args.list else page(run_dir, select(trees, args, run_dir))
    except StoreError as error:
        raise ConfigError(str(error)) from error
    with naming(args.html):
        args.html.write_text(text, encoding="utf-8")
    size = args.html.stat().st_size / 1024
    print(f"{visible(str(args.html))}: {size:.0f} KiB, opens in any browser, offline")
    return 0


def page(run_dir: RunDir, tree: Tree) -> str:
    """The file's text.  All scripts and styles but its own, and all of the network, are forbidden in it."""
    run, static = RunReader(run_dir.root), {path.name: path for path in page_files().values()}
    drawn = run.drawing(tree)
    each = max(1, MOST_TOKENS // tree.n_nodes)
    said = [texts(tree, node, 0, each, run.decoder()) for node in range(tree.n_nodes)]
    script, style = bundle(static), "\n" + static["style.css"].read_text(encoding="utf-8")
    return _PAGE.format(
        title=escape(f"{drawn['prompt']} · {run.name}"),
        style=style,
        style_hash=_digest(style),
        script=script,
        script_hash=_digest(script),
        data=_data({"tree": drawn, "texts": said}),
    )


def listed(run_dir: RunDir, trees: Iterable[tuple[int, Tree]]) -> str:
    """The text of a file with the table that ``--list`` prints."""
    console = Console(record=True, file=StringIO(), width=_LIST_WIDTH, highlight=False)
    console.print(table(trees))
    title = escape(f"trees of {visible(run_dir.name)}").replace("{", "{{").replace("}", "}}")
    return console.export_html(code_format=_LIST.replace("TITLE", title), inline_styles=True)


def bundle(static: dict[str, Path]) -> str:
    """The modules as one: without what they import from and export to each other."""
    parts: list[str] = []
    for name in MODULES:
        text = static[name].read_text(encoding="utf-8")
        parts.append(re.sub(r"^export ", "", _IMPORT.sub("", text), flags=re.MULTILINE))
    return "\n" + "\n".join(parts)


def _data(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS).decode()
    return text.replace("<", "\\u003c")


def _digest(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
