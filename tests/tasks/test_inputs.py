"""What a run starts from."""

from __future__ import annotations

from pathlib import Path

from system.config import load
from system.tasks.base import make_task
from system.tasks.inputs import corpus_file

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def test_documents_are_never_seen_half_written(tmp_path: Path) -> None:
    """Runs of a study share them: one starts while the search of another is reading."""
    config = load(QUICKSTART, [])
    task = make_task(config)
    path = corpus_file(config, task, tmp_path)
    assert path is not None
    whole = path.read_text()
    assert whole.count("\n") > 100

    class Watching:
        def corpus(self) -> list[dict[str, str]]:
            assert path.read_text() == whole
            return [{"id": "1", "title": "one", "text": "alone"}]

    assert corpus_file(config, Watching(), tmp_path) == path  # type: ignore[arg-type]
    assert path.read_text().count("\n") == 1
    assert [*tmp_path.iterdir()] == [path]
