"""One real Slurm cluster for this area."""

from collections.abc import Iterator

import pytest
from slurm_cluster import SlurmCluster, Unavailable, install


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """Three nodes; skips, saying why, where Slurm is missing and cannot be installed."""
    try:
        install()
    except Unavailable as reason:
        pytest.skip(f"no Slurm: {reason}")
    made = SlurmCluster(nodes=3)
    try:
        made.start()
        yield made
    finally:
        made.close()
