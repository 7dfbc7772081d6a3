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
    """A function (family, tied, rope) -> directory of a tiny model, made once per session."""
    made: dict[tuple[str, bool, str], Path] = {}

    def get(family: str = "qwen3", *, tied: bool = False, rope: str = "default") -> str:
        if (key := (family, tied, rope)) not in made:
            made[key] = tmp_path_factory.mktemp(f"{family}-{tied}-{rope}")
            save_tiny_model(made[key], family, tied=tied, rope=rope)
        return str(made[key])

    return get
