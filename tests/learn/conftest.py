from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from learner_ranks import Ranks
from learner_reference import save_tiny_model


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    workers = Ranks()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A function (family, tied) -> directory of a tiny model, made once per session."""
    made: dict[tuple[str, bool], Path] = {}

    def get(family: str = "qwen3", *, tied: bool = False) -> str:
        if (family, tied) not in made:
            made[family, tied] = tmp_path_factory.mktemp(f"{family}-{tied}")
            save_tiny_model(made[family, tied], family, tied=tied)
        return str(made[family, tied])

    return get
