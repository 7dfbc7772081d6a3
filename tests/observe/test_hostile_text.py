"""Text that would drive a terminal or a page, through every command that prints and every page."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from observe_trees import make_tree
from rich.console import Console

from actors.cli.main import _tell, main
from system.bench.report import Report
from system.config import Config
from system.errors import EspalierError
from system.evals.result import EvalResult, EvalScores
from system.observe.progress import Progress
from system.observe.recorder import Status
from system.observe.rundir import RunDir
from system.observe.terminal import shown, visible
from system.tree.store import TreeWriter

HOSTILE = [
    "x[/b]",
    "[bold red]x[/]",
    "[link=file:///etc/passwd]x[/link]",
    "\x1b[2J\x1b]0;owned\x07",
    "\x9b2J\x90q\x9c",
    "a\rb\x08\x08c",
    "\u202egnp.exe\u2066",
    "\u200f\u061c\u2028\u2029",
    "pass\u200bword\u2060\ufeff\u00ad",
    "\U000e0041\U000e0042",
    "</td><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "\ud83d lone",
    "\x00\x7f",
]
ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
    "\u00ad\u200b\u2060-\u2064\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


def harmless(text: str) -> None:
    assert not ACTIVE.search(text), repr(ACTIVE.search(text))
    text.encode()


@pytest.fixture
def hostile_run(tmp_path: Path) -> RunDir:
    """A run whose trees, logs and attempts are full of it."""
    config = Config()
    config.run.dir = str(tmp_path / "runs")
    run = RunDir.create(config, "small")
    with TreeWriter(run.trees, -1) as writer:
        for text in HOSTILE:
            stored = text.encode(errors="replace").decode()  # a store keeps UTF-8 only
            tree = make_tree(prompt_id=stored, task=stored)
            calls = [replace(call, tool=stored, status=stored) for call in tree.calls]
            meta = {"question": stored, "answer": stored, "gold": [stored]}
            writer.append(replace(tree, calls=calls, meta=meta))
    (run.logs / "engine-0.log").write_bytes("\n".join(HOSTILE).encode(errors="surrogatepass"))
    (run.root / "slurm").mkdir()
    (run.root / "slurm" / "submission.json").write_text('{"jobs": ["1"], "time": 0}')
    start = {"event": "start", "attempt": 0, "job": "1", "nodes": "n", "trained": 0, "time": 1}
    ends = [
        {"event": "end", "attempt": 0, "exit": 1, "cause": text, "trained": 0, "next": "failed", "time": 2}
        for text in HOSTILE
    ]
    lines = [json.dumps(event) for end in ends for event in (start, end)]
    (run.root / "attempts.jsonl").write_text("\n".join(lines) + "\n")
    return run


@pytest.mark.parametrize(
    "words",
    [
        ["tree", "RUN"],
        ["tree", "RUN", "--list"],
        ["tree", "RUN", "--full"],
        ["tree", "RUN", "--entropy"],
        ["tree", "RUN", "--prompt", "x[/b]"],
        ["tree", "RUN", "--prompt", "\x1b[2Jnone"],
        ["logs", "RUN"],
        ["logs", "RUN", "engine"],
        ["logs", "RUN", "\x1b[2J"],
        ["status", "RUN"],
        ["config", "RUN/config.yaml", "run.name=\x1b[2J"],
        ["config", "\x1b[2J.yaml"],
        ["config", "run.\x1b[2J=1"],
        ["doctor", "RUN/config.yaml", "tools.corpus=\x1b[2J"],
        ["train", "\x9b2J.yaml"],
        ["eval", "\x1b[2J"],
        ["submit", "RUN/config.yaml", "--dry-run", "slurm.partition='\x1b[2J'"],
    ],
)
def test_every_printing_command(
    words: list[str], hostile_run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([word.replace("RUN", str(hostile_run.root)) for word in words])
    assert code in (0, 1, 2)
    out, err = capsys.readouterr()
    harmless(out)
    harmless(err)
    assert "Traceback" not in err
    assert out or err


def test_all_trees_of_a_hostile_run_can_be_shown(
    hostile_run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(len(HOSTILE)):
        assert main(["tree", str(hostile_run.root), "--number", str(index)]) == 0
    out = capsys.readouterr().out
    harmless(out)
    for text in HOSTILE[:3]:  # markup is shown as it stands
        assert f"question: {text}" in out
    assert main(["tree", str(hostile_run.root), "--list"]) == 0
    assert "x[/b]" in capsys.readouterr().out


@pytest.mark.parametrize("text", HOSTILE)
def test_errors_notes_and_progress(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _tell(EspalierError(text)) == 1
    _tell(RuntimeError(text))  # a traceback
    harmless("".join(capsys.readouterr()))
    for terminal in (False, True):
        screen = io.StringIO()
        console = Console(
            file=screen, width=100, force_terminal=terminal, color_system=None, legacy_windows=False
        )
        with Progress(Status, total_steps=3, interval_s=0.0, console=console) as progress:
            progress.note(text)
            progress.phase("training", detail=text)
        drawn = screen.getvalue()
        if not terminal:  # on one, rich itself moves the cursor
            harmless(drawn)
        assert visible(text.replace("\n", "")) in drawn or terminal
        assert "2J" not in re.findall("\x1b\\[([0-9;?]*[A-Za-z])", drawn)


def test_eval(
    hostile_run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = EvalResult(kinds={text: EvalScores() for text in HOSTILE})
    fake = SimpleNamespace(evaluate=lambda *_: result)
    monkeypatch.setitem(sys.modules, "actors.evaluate", fake)
    hostile_run.model.mkdir()
    (hostile_run.model / "config.json").write_text("{}")
    assert main(["eval", str(hostile_run.root)]) == 0
    harmless(capsys.readouterr().out)


def test_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path, "page", "x<script>", "lead <img src=x>")
    for text in HOSTILE:
        report.section(text, text)
        report.facts({text: text})
        report.table(text, [text], [[text]], note=text)
    report.finish({})
    page = (tmp_path / "page.html").read_text(errors="surrogatepass")
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    harmless(capsys.readouterr().out)


@pytest.mark.parametrize("text", HOSTILE)
def test_the_one_function(text: str) -> None:
    for breaks in (False, True):
        harmless(visible(text, breaks))
        assert visible(visible(text, breaks), breaks) == visible(text, breaks)
    harmless(shown(text))
