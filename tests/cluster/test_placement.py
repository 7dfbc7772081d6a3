"""Who runs where: GPUs are never given twice, neighbours stay together, and what does not fit is refused."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from system.cluster.placement import Node, PlacementError, by_node, paper_nodes, place, spare_gpus
from system.config import Config, ConfigError, load


def config(**settings: str) -> Config:
    words = {"engine": "sglang", "model.path": "somewhere", **settings}
    return load(None, [f"{key}={value}" for key, value in words.items()])


def test_learner_and_rollout_on_nodes_of_their_own() -> None:
    wanted = config(
        **{"cluster.nodes": "3", "cluster.gpus_per_node": "8", "cluster.learner_nodes": "2", "engine.tp": "4",
           "learn.tp": "4", "learn.dp": "4", "engine.replicas": "2", "rollout.workers": "2"}
    )  # fmt: skip
    nodes = paper_nodes(wanted)
    seats = place(wanted, nodes)
    where = {seat.actor: (seat.node, seat.gpus) for seat in seats}
    assert [where[f"learner-{rank}"] for rank in range(16)] == [(0, 1)] * 8 + [(1, 1)] * 8
    assert where["engine-0"] == where["engine-1"] == (2, 4)
    assert {where[name][0] for name in ("rollout-0", "rollout-1", "tool-search", "tool-python")} == {2}
    assert spare_gpus(seats, nodes) == 0
    assert by_node(seats, nodes)[0] == "node-0 [8/8 GPUs]: driver, learner ranks 0-7"
    wanted.engine.replicas, wanted.eval.engines = 1, 1
    seats = place(wanted, nodes)
    where = {seat.actor: (seat.node, seat.gpus) for seat in seats}
    assert (where["engine-0"], where["eval-engine-0"], where["eval-rollout-0"]) == ((2, 4), (2, 4), (2, 0))
    assert "1 engine, 2 rollout, 1 eval-engine, 1 eval-rollout" in by_node(seats, nodes)[2]
    wanted.eval.engines = 2
    with pytest.raises(PlacementError, match=r"eval\.engines=2 of 4 GPUs each .* room for 1"):
        place(wanted, nodes)


def test_without_gpus_the_ranks_are_spread_in_blocks() -> None:
    wanted = config(**{"cluster.nodes": "2", "learn.tp": "2", "learn.dp": "2", "engine": "embedded"})
    where = {seat.actor: seat.node for seat in place(wanted, [Node("a"), Node("b")])}
    assert [where[f"learner-{rank}"] for rank in range(4)] == [0, 0, 1, 1]
    assert where["engine-0"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learn.tp": "8", "learn.dp": "4"}, r"needs 32 GPUs .* nodes have 16: lower learn.dp"),
        ({"learn.tp": "8", "learn.cp": "3"}, r"needs 24 GPUs \(tp=8 x pp=1 x cp=3 x dp=1\)"),
        ({"engine.replicas": "3", "engine.tp": "8"}, r"room for 1, each on one node; lower engine"),
        ({"engine.replicas": "1", "engine.tp": "16"}, r"room for 0"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, str], message: str) -> None:
    wanted = config(**{"cluster.nodes": "2", "cluster.gpus_per_node": "8", "learn.tp": "8", **settings})
    with pytest.raises(PlacementError, match=message):
        place(wanted, paper_nodes(wanted))


def test_a_split_that_leaves_nothing_for_rollout_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"leaves none of cluster\.nodes=2 for rollout"):
        config(**{"cluster.nodes": "2", "cluster.learner_nodes": "2"})


@settings(deadline=None)
@given(
    nodes=st.integers(1, 16), split=st.integers(0, 8), gpus=st.integers(0, 8), dp=st.integers(1, 8),
    tp=st.sampled_from([1, 2, 4, 8]), replicas=st.integers(1, 32), engine_tp=st.sampled_from([1, 2, 4, 8]),
    workers=st.integers(1, 8),
)  # fmt: skip
def test_every_actor_has_one_seat_and_no_gpu_two_owners(
    nodes: int, split: int, gpus: int, tp: int, dp: int, replicas: int, engine_tp: int, workers: int
) -> None:
    made = config()
    made.cluster.nodes, made.cluster.gpus_per_node = nodes, gpus
    made.cluster.learner_nodes = split if split < nodes else 0
    made.learn.tp, made.learn.dp, made.engine.tp, made.engine.replicas = tp, dp, engine_tp, replicas
    made.rollout.workers = workers
    try:
        seats = place(made, paper_nodes(made))
    except PlacementError:
        # What is refused does not fit: whole replicas waste less than one replica's GPUs per node.
        split = made.cluster.learner_nodes
        rollout = replicas * engine_tp + (nodes - split) * (engine_tp - 1)
        if split:
            assert tp * dp > split * gpus or rollout > (nodes - split) * gpus
        else:
            assert tp * dp + rollout > nodes * gpus
        return
    names = [seat.actor for seat in seats]
    assert len(set(names)) == len(names)
    kinds = Counter(name.split("-")[0] for name in names)
    assert kinds == {"learner": tp * dp, "engine": replicas, "rollout": workers, "tool": 2}
    used = Counter[int]()
    for seat in seats:
        used[seat.node] += seat.gpus
    assert all(used[node] <= gpus for node in range(nodes))
    if split := made.cluster.learner_nodes:
        assert all((seat.node < split) == seat.actor.startswith("learner") for seat in seats if seat.gpus)
