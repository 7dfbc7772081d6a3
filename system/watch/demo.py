"""The recorded run that ``espalier watch --demo`` shows, and how it is made anew.

    espalier train configs/quickstart.yaml run.name=demo eval.every=30
    python -m system.watch.demo runs/demo system/watch/demo.zip

Of a run of the quickstart the second command takes the figures, the tokenizer and some of the trees.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import zipfile
from collections.abc import Generator, Iterator, Sequence
from importlib import resources
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from system.config import to_yaml
from system.observe.rundir import RunDir
from system.scratch import Scratch
from system.tree.store import complete_files

_TREES = 40  # of the newest; the sample is taken whole
_GROUPS = ("step", "time", "version", "eval", "rollout", "flow", "train", "tree", "engine")
_DATE = (2026, 1, 1, 0, 0, 0)  # of all files in it: the same run makes the same bytes


@contextlib.contextmanager
def unpacked() -> Generator[Path]:
    """The demo as a run directory, for the length of the block."""
    packed = Path(str(resources.files("system.watch"))) / "demo.zip"
    scratch = Scratch.make("demo")
    try:
        with zipfile.ZipFile(packed) as file:
            file.extractall(scratch.path / "demo")
        yield scratch.path / "demo"
    finally:
        shutil.rmtree(scratch.path)
        scratch.release()


def pack(run_dir: RunDir, out: Path) -> None:
    """Write the archive."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as file:
        for name, data in _parts(run_dir):
            file.writestr(zipfile.ZipInfo(name, _DATE), data, zipfile.ZIP_LZMA)


def _parts(run_dir: RunDir) -> Iterator[tuple[str, bytes]]:
    yield run_dir.config_path.name, to_yaml(run_dir.config(("run.dir=runs",))).encode()
    yield run_dir.events_path.name, run_dir.events_path.read_bytes()
    summary = json.loads(run_dir.summary_path.read_text(encoding="utf-8"))
    del summary["config"]
    yield run_dir.summary_path.name, json.dumps(summary).encode()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        yield f"model/{name}", (run_dir.model / name).read_bytes()
    lines = run_dir.metrics_path.read_text(encoding="utf-8").splitlines()
    records = [json.dumps(_fewer(json.loads(line))) for line in lines]
    yield run_dir.metrics_path.name, "\n".join([*records, ""]).encode()
    newest = complete_files(run_dir.trees)[-_TREES // 8 :]
    for files in (newest, complete_files(run_dir.tree_sample)):  # each set as one file: a file costs 16 kB
        yield f"{files[0].parent.name}/{files[0].name}", _together(files)


def _together(files: Sequence[Path]) -> bytes:
    """The trees of several files as one, which the archive compresses: numbers by the places of their bytes,
    by which the archive is a sixth smaller.
    """
    whole = pa.concat_tables([pq.read_table(path) for path in files]).combine_chunks()
    floats = [one.name for one in whole.schema if one.type == pa.list_(pa.float32())]
    split = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in floats}
    written = io.BytesIO()
    pq.write_table(whole, written, compression="none", use_dictionary=False, column_encoding=split)
    return written.getvalue()


def _fewer(record: dict[str, object]) -> dict[str, object]:
    """The figures that the pages show, to five digits."""
    return {
        key: round(value, 5) if isinstance(value, float) and key != "time" else value
        for key, value in record.items()
        if key.split("/")[0] in _GROUPS or key.startswith("time/")
    }


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m system.watch.demo RUN FILE.zip")
    pack(RunDir(Path(sys.argv[1])), Path(sys.argv[2]))
