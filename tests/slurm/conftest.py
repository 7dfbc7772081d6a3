"""One real Slurm cluster for each process of this area's tests."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, Unavailable, install


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """Three nodes; skips, saying why, where Slurm is missing and cannot be installed.

    Only clusters in namespaces of their own can be on one machine at once: others wait for their turn.
    """
    with (Path(tempfile.gettempdir()) / f"slurm-tests-{os.getuid()}").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        try:
            install()
        except Unavailable as reason:
            pytest.skip(f"no Slurm: {reason}")
        made = SlurmCluster(nodes=3)
        if made.namespaces:
            fcntl.flock(turn, fcntl.LOCK_UN)
        try:
            made.start()
            yield made
        finally:
            made.close()
