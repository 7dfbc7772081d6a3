"""A checkpoint is written beside the training that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from learner_ranks import Place, Ranks
from learner_reference import learner_config, make_trees, train
from test_learner_equality import open_trainer
from test_learner_state import STEP, weights_of


def beside_case(place: Place, model: str, path: str) -> dict[str, Any]:
    """A checkpoint that is held up: what stands under its name meanwhile, and what it holds in the end."""
    import threading

    from system.learn import checkpoint

    trainer = open_trainer(place, learner_config(tp=2, **STEP), model)
    go_on, write = threading.Event(), checkpoint.write_boxes
    try:
        train(trainer, make_trees(4))
        trainer.save(path, {"version": 1})
        trainer.saved()

        def held_up(*arguments: Any, **named: Any) -> None:
            go_on.wait()
            write(*arguments, **named)

        checkpoint.write_boxes = held_up
        before = weights_of(trainer)
        train(trainer, make_trees(5))
        trainer.save(path, {"version": 2})
        second, ended = weights_of(trainer), trainer.saved(wait=False)
        train(trainer, make_trees(6))  # steps while the checkpoint is under way
        manifest = json.loads((Path(path) / checkpoint.MANIFEST).read_text())
        go_on.set()
        trainer.saved()
        extra = trainer.load(path)
        return {
            "ended": ended,
            "meanwhile": manifest["extra"],
            "extra": extra,
            "loaded": all(np.array_equal(value, second[name]) for name, value in weights_of(trainer).items()),
            "moved": any(not np.array_equal(value, second[name]) for name, value in before.items()),
        }
    finally:
        go_on.set()
        checkpoint.write_boxes = write
        trainer.close()


def test_training_goes_on_while_a_checkpoint_is_written_and_the_one_before_stands_until_then(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    results = ranks.run(beside_case, world=2, model=tiny_model(), path=str(tmp_path / "v1"))
    for result in results:
        assert not result["ended"]
        assert result["meanwhile"] == {"version": 1}
        assert result["extra"] == {"version": 2}
        assert result["loaded"]
    assert results[0]["moved"]


def crash_case(place: Place, model: str, path: str) -> None:
    """Leaves a checkpoint, and another one of the same name half written."""
    import threading

    from system.learn import checkpoint

    trainer = open_trainer(place, learner_config(tp=2, **STEP), model)
    train(trainer, make_trees(4))
    trainer.save(path, {"version": 1})
    trainer.saved()
    digest = checkpoint._digest
    reached = threading.Event()

    def never(file: Path) -> str:
        reached.set()
        threading.Event().wait()
        return digest(file)

    checkpoint._digest = never
    train(trainer, make_trees(5))
    trainer.save(path, {"version": 2})
    assert reached.wait(60)


def after_case(place: Place, model: str, path: str) -> list[Any]:
    trainer = open_trainer(place, learner_config(tp=2, **STEP), model)
    try:
        found = [trainer.load(path), trainer.step_count]
        train(trainer, make_trees(5))
        trainer.save(path, {"version": 2})
        trainer.saved()
        return [*found, trainer.load(path), trainer.step_count]
    finally:
        trainer.close()


def test_a_crash_while_a_checkpoint_is_written_leaves_the_one_before(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    case = {"model": tiny_model(), "path": str(tmp_path / "v1")}
    ranks.run(crash_case, world=2, **case)
    assert {path.name for path in tmp_path.iterdir()} == {"v1", "v1.partial"}
    ranks.close()  # kills them
    for found in ranks.run(after_case, world=2, **case):
        assert found == [{"version": 1}, 1, {"version": 2}, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"v1"}
