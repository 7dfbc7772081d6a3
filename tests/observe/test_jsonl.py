from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from system.observe.jsonl import JsonlError, JsonlWriter, read_jsonl


def test_values_come_back_as_plain_json(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    record = {
        "a": np.float32(0.5),
        "b": np.arange(3),
        "c": [np.int64(2), float("nan")],
        "d": float("inf"),
        "e": "é",
        "f": "\u2028\ud800",
    }
    with closing(JsonlWriter(path)) as writer:
        writer.write(record)
    (read,) = read_jsonl(path)
    assert read.pop("f") == record["f"]
    assert read == {"a": 0.5, "b": [0, 1, 2], "c": [2, None], "d": None, "e": "é"}


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}', "\x00" * 100_000])
def test_a_torn_tail_is_skipped_and_cut_off_before_the_next_record(tmp_path: Path, torn: str):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    assert [one["step"] for one in read_jsonl(path)] == [1, 2]
    with closing(JsonlWriter(path)) as writer:
        writer.write({"step": 4})
    assert [one["step"] for one in read_jsonl(path)] == [1, 2, 4]


def test_a_file_that_is_all_torn_starts_anew(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step"')
    with closing(JsonlWriter(path)) as writer:
        writer.write({"step": 1})
    assert list(read_jsonl(path)) == [{"step": 1}]


def test_a_bad_line_in_the_middle_is_an_error_that_says_where(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(JsonlError, match="line 2"):
        list(read_jsonl(path))


def test_no_file_no_records(tmp_path: Path):
    assert list(read_jsonl(tmp_path / "none.jsonl")) == []


def test_kill_nine_loses_nothing_that_was_written(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    script = (
        "import sys\nfrom system.observe.jsonl import JsonlWriter\n"
        "writer, step = JsonlWriter(sys.argv[1]), 0\n"
        "while True:\n    step += 1\n    writer.write({'step': step, 'pad': 'x' * 3000})\n"
        "    print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        acknowledged = 0
        until = time.monotonic() + 60
        while acknowledged < 50 and time.monotonic() < until:
            acknowledged = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        acknowledged = max([acknowledged, *(int(line) for line in process.stdout if line.endswith("\n"))])
    finally:
        process.kill()
        process.wait(timeout=10)
    with closing(JsonlWriter(path)) as writer:
        writer.write({"step": -1})
    steps = [one["step"] for one in read_jsonl(path)]
    assert len(steps) - 1 >= acknowledged >= 50
    assert steps == [*range(1, len(steps)), -1]
