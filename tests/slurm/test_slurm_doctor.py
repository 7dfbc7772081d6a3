"""``espalier doctor`` within an allocation of a real Slurm asks all of its nodes."""

import json
import sys
from pathlib import Path

import pytest
from slurm_cluster import ROOT, SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
ASK = """
import dataclasses, json, os, pathlib, sys
from system.doctor.cluster_facts import gather_nodes
place = pathlib.Path(sys.argv[1])
place.mkdir()
print(json.dumps(dataclasses.asdict(gather_nodes(os.environ, place))))
"""


@pytest.mark.parametrize("shared", [True, False])
def test_the_doctor_asks_every_node_of_its_allocation(shared: bool, cluster: SlurmCluster) -> None:
    if not (shared or cluster.namespaces):
        pytest.skip("nodes that share a host share all its files")
    place = cluster.shared / f"doctor-{shared}"
    place.mkdir()
    (place / "ask.py").write_text(ASK)
    runs = place / "runs" if shared else Path("/tmp/espalier-doctor-runs")  # each node has a /tmp of its own
    (place / "job.sh").write_text(
        f"#!/bin/bash\n#SBATCH --nodes=2 --ntasks=2 --output={place}/log\n"
        f"PYTHONPATH={ROOT} {sys.executable} {place}/ask.py {runs} > {place}/told\n"
    )
    job = cluster.slurm("sbatch", "--parsable", str(place / "job.sh")).strip()
    log = place / "log"

    def evidence() -> str:
        return log.read_text() if log.exists() else ""

    assert cluster.wait_end(job, 240, evidence) == "COMPLETED", evidence()
    told = json.loads((place / "told").read_text())
    assert (told["asked"], len(told["seen"]), told["error"]) == (2, 2, "")
    assert all(abs(node["clock_s"]) < 5 for node in told["seen"])
    read = [node["shares"] == "" for node in told["seen"]]
    assert all(read) if shared else sorted(read) == [False, True]
    if cluster.namespaces:
        assert len({node["name"] for node in told["seen"]}) == 2
