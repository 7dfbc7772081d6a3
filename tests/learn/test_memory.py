"""What a training step takes at the shapes of Qwen3-14B, on fake tensors, and what each means saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from learner_ranks import Place, Ranks

from system.bench.memory import Peak, StepSettings, of_all_layers
from system.config import load
from system.models.known import KNOWN
from system.plan import plan
from system.plan.hardware import GIB

SHAPE, TP, N = KNOWN["qwen3-14b"], 4, 16_384
CONFIGS = Path(__file__).parents[2] / "configs"


def measure_case(place: Place, layers: tuple[int, ...], tokens: int, way: StepSettings) -> list[Peak]:
    from system.bench.memory import measure

    return [measure(replace(SHAPE, layers=count), TP, tokens, way) for count in layers]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """A process of its own: fake tensors do not go with the threads that a learner before them leaves."""
    own = Ranks()
    yield own
    own.close()


@pytest.fixture(scope="module")
def few_layers(ranks: Ranks) -> dict[str, list[Peak]]:
    """Of two and four layers, by what is done."""
    ways = {
        "none": StepSettings("", "none"),
        "whole": StepSettings("", "none", whole_logits=True),
        "selective": StepSettings("", "selective", offload=True),
        "full": StepSettings("", "full"),
        "shared": StepSettings("", "selective", offload=True, cp=2),
    }
    return {
        name: ranks.run(measure_case, world=1, layers=(2, 4), tokens=N, way=way)[0]
        for name, way in ways.items()
    }


def test_recomputing_norms_and_mlp_saves_most_of_a_layer(few_layers: dict[str, list[Peak]]) -> None:
    kept = {name: (four.step - two.step) / 2 / N for name, (two, four) in few_layers.items()}
    assert kept["whole"] == kept["none"]
    assert 45_000 < kept["none"] < 52_000  # bytes per token, layer and rank
    assert kept["selective"] < 0.4 * kept["none"]
    assert kept["full"] == 2 * SHAPE.hidden / TP


def test_logits_exist_in_chunks_only(few_layers: dict[str, list[Peak]]) -> None:
    row = 2 * 2 * N * SHAPE.vocab / TP  # of logits and of their gradient, in bfloat16
    chunk = 2 * 2 * (1 << 27)
    for whole, chunks in zip(few_layers["whole"], few_layers["none"], strict=True):
        assert row - chunk < whole.step - chunks.step < row


def test_an_offloaded_optimizer_takes_nothing_on_the_gpu(few_layers: dict[str, list[Peak]]) -> None:
    layer = SHAPE.matrices(0) / TP + SHAPE.copied(0)
    for name, share in (("none", 18), ("selective", 6)):  # bytes per parameter
        two, four = few_layers[name]
        assert (four.states - two.states) / 2 == pytest.approx(share * layer, rel=1e-3)
        assert (four.host - two.host) / 2 == pytest.approx((18 - share) * layer, rel=1e-3)


def test_ranks_that_share_a_row_have_half_its_tokens_all_keys_and_half_the_optimizer(
    few_layers: dict[str, list[Peak]],
) -> None:
    alone, shared = few_layers["selective"], few_layers["shared"]
    step, half = ((four.step - two.step) / 2 for two, four in (alone, shared))
    keys_and_values = 2 * 2 * SHAPE.kv_heads * SHAPE.head_dim / TP * N  # bytes, of the whole row
    assert step / 2 < half < step / 2 + keys_and_values
    host, shared_host = ((four.host - two.host) / 2 for two, four in (alone, shared))
    assert shared_host == pytest.approx(host / 2, rel=1e-3)
    assert [peak.states for peak in alone] == [peak.states for peak in shared]


def test_the_optimizers_step_takes_no_memory_of_its_own(ranks: Ranks) -> None:
    ((peak,),) = ranks.run(measure_case, world=1, layers=(2,), tokens=128, way=StepSettings("", "none"))
    parameters = peak.states / 18
    assert peak.step < 2 * parameters  # bytes; torch's default AdamW would take 4


@pytest.mark.parametrize("name", ["qwen3-14b-1x8", "arpo-14b-deepsearch"])
def test_14b_trains_on_half_a_node(ranks: Ranks, name: str) -> None:
    """Four GPUs of 80 GB train, four generate."""
    config = load(CONFIGS / f"{name}.yaml")
    learn, made = config.learn, plan(config)
    assert (learn.ranks, made.gpus, learn.tp, learn.sequence_parallel) == (4, 8, TP, True)
    assert made.fits, made.problems
    way = StepSettings("", learn.recompute, offload=learn.offload)
    two, four = ranks.run(measure_case, world=1, layers=(2, 4), tokens=learn.micro_tokens, way=way)[0]
    measured = of_all_layers(two, four, SHAPE.layers)
    device, host = measured.device, measured.host
    planned = made.learner_memory.total - made.gpu.reserved
    assert 0.98 * device < planned < 1.1 * device
    assert made.host_memory.total == pytest.approx(host, rel=0.02)
    assert device + made.gpu.reserved < 0.6 * made.gpu.memory
    assert host / GIB < 45
