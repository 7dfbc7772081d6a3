"""Two sessions of a run before one view; the second goes back to a checkpoint and does two steps again.

``python view_sessions.py NAME RUN_DIR SETTING…`` prints as JSON what the view holds then.  In a process of
its own, since libraries keep services, settings and paths per process.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import struct
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from observe_trees import make_tree

from system.config import Config, load
from system.observe import tree_table
from system.observe.rundir import RunDir
from system.observe.sinks import RESUMED, Alarm, GuardedView
from system.observe.views import VIEWS, sinks
from system.tree.store import TreeWriter

SECRET = "hunter2"
Curves = dict[str, list[tuple[int, float]]]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def record(step: int, session: int) -> dict[str, Any]:
    """Its loss says which session wrote it; at step 2 the entropy is not known."""
    entropy = math.nan if step == 2 else 0.5
    return {
        **{"step": step, "version": step, "time": 1e9 + step, "rollout/trees": 8.0},
        **{"train/loss": session + step / 100, "train/entropy": entropy, "tools/search/ok/p95_s": 0.25},
    }


def evaluation(step: int, which: str, accuracy: float) -> dict[str, Any]:
    return {"step": step, "time": 1e9 + step, "eval/which": which, "eval/accuracy": accuracy}


def sessions(name: str, run_dir: RunDir, config: Config) -> Curves:
    with TreeWriter(run_dir.trees) as trees:
        for number in range(3):
            trees.append(make_tree(f"q{number}", (1.0, 0.0, 0.5)))
    first = sinks(run_dir, config)
    for one in [evaluation(0, "before", 0.1), *(record(step, 1) for step in (1, 2, 3, 4))]:
        for sink in first:
            sink.write(one)
    for sink in first:
        sink.alarm(Alarm(4, 1e9, "entropy collapse", True, "0.01 nats per token"))
        assert not isinstance(sink, GuardedView) or sink.ready(), "it failed"
        sink.close()
    if name == "Weights & Biases":
        time.sleep(1.1)  # it calls a session's directory by the second in which it starts
    second = sinks(run_dir, config)
    for sink in second:
        sink.write({RESUMED: 2, "time": 2e9})
        for one in [*(record(step, 2) for step in (3, 4, 5)), evaluation(5, "after", 0.9)]:
            sink.write(one)
    held = scraped(second[-1]) if name == "Prometheus" else {}
    for sink in second:
        sink.close()
    return held or READERS[name](run_dir)


def scraped(sink: Any) -> Curves:
    from prometheus_client.parser import text_string_to_metric_families as parsed

    with urllib.request.urlopen(sink._view.url, timeout=30) as answer:
        text = answer.read().decode()
    assert SECRET not in text
    (Path(sys.argv[2]) / "scraped.txt").write_text(text)
    samples = [sample for family in parsed(text) for sample in family.samples]
    (step,) = (int(one.value) for one in samples if one.name == "espalier_step")
    return {one.name: [(step, one.value)] for one in samples}


def of_tensorboard(run_dir: RunDir) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.disable()  # it tells of steps that count no more
    found = EventAccumulator(str(run_dir.tensorboard))
    found.Reload()
    return {key: [(one.step, one.value) for one in found.Scalars(key)] for key in found.Tags()["scalars"]}


def of_trackio(run_dir: RunDir) -> Curves:
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("espalier")
    curves: Curves = {}
    for row in SQLiteStorage.get_logs("espalier", run):
        for key, value in row.items():
            if isinstance(value, int | float) and key != "step":
                curves.setdefault(key, []).append((row["step"], value))
    return curves


def of_wandb(run_dir: RunDir) -> Curves:
    from wandb.proto.wandb_internal_pb2 import Record

    curves: Curves = {}
    for log in sorted(
        run_dir.wandb.glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns
    ):
        for data in leveldb_records(log.read_bytes()):
            held = Record.FromString(data)
            if held.WhichOneof("record_type") == "history":
                row = {one.key or one.nested_key[0]: json.loads(one.value_json) for one in held.history.item}
                for key, value in row.items():
                    if isinstance(value, int | float) and key != "step" and not key.startswith("_"):
                        curves.setdefault(key, []).append((row["step"], value))
    return curves


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, behind W&B's header of 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


READERS: dict[str, Callable[[RunDir], Curves]] = {
    "Weights & Biases": lambda _: {},  # its file is whole when this process has ended: the test reads it
    "TensorBoard": of_tensorboard,
    "trackio": of_trackio,
}


if __name__ == "__main__":
    os.environ["TRACKIO_DIR"] = str(Path(sys.argv[2]) / "trackio-files")
    made = load(None, ["observe.wandb=disabled", *sys.argv[3:]])
    made.observe.wandb_trees = 2
    tree_table.decoder = lambda *_: lambda tokens: f"{len(tokens)} tokens"  # no tokenizer is there
    made.task.options = {"api_key": SECRET}
    assert [one.name for one in VIEWS.values() if one.wanted(made)] == [sys.argv[1]]
    held = sessions(sys.argv[1], RunDir(Path(sys.argv[2])), made)
    print(json.dumps(held))
