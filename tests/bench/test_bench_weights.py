from __future__ import annotations

import json
from pathlib import Path

import pytest

from system.bench import weights
from system.bench.weights import WAYS, measure, run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    small = {"hidden_size": 64, "head_dim": 16, "vocab_size": 512, "intermediate_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(weights.SHAPE | small))
    return tmp_path


async def test_what_the_learner_sends_does_not_grow_with_the_servers(model: Path) -> None:
    old, new = [await measure(way, 3, model, 2e6, 3) for way in WAYS]
    assert (old.sent, new.sent) == (3.0, 1.0)
    assert new.pause_s < old.pause_s


async def test_an_update_that_fails_ends_the_benchmark(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "Behaviour", lambda **_: _refusing())
    with pytest.raises(RuntimeError, match="does not want to"):
        await measure("new", 1, model, 1e8, 1)


def _refusing() -> object:
    from system.bench.fake_sglang import Behaviour

    return Behaviour(fault="refuse", path="update_weights_from_distributed")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_report_says_what_was_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SHAPE", json.loads((model / "config.json").read_text()))
    monkeypatch.setattr(weights, "SERVERS", (1, 2))
    (tmp_path / "out").mkdir()
    report = run(tmp_path / "out", quick=True)
    written = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert {key: written[key] for key in report} == json.loads(json.dumps(report))
    assert [(c["servers"], c["way"], c["sent"]) for c in report["cases"]] == [
        (1, "old", 1.0), (1, "new", 1.0), (2, "old", 2.0), (2, "new", 1.0),
    ]  # fmt: skip
    assert report["growth"].keys() == WAYS.keys()
    assert (tmp_path / "out" / "weights.png").is_file()
