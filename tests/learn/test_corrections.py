"""Off-policy corrections of tokens and of whole leaves, against numbers of the reference functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_reference import path_ratios

from system.config import LearnConfig, PartConfig
from system.learn.correction import Correction, LeafRatios, effect, twice_weighed, weigh
from system.learn.objective import LossTokens, Objective, make_objective
from system.plugins import CORRECTIONS, PluginError

RECORDS = json.loads((Path(__file__).parent / "algorithm_vectors.json").read_text())["records"]


def record(name: str) -> tuple[Any, Any]:
    """Inputs, and what is expected of them."""
    return next((one["inputs"], one["expected"]) for one in RECORDS if one["name"] == name)


def made(name: str, options: Mapping[str, Any] | None = None) -> Objective:
    return make_objective(LearnConfig(objective=PartConfig(name, dict(options or {}))))


REJECTION = "rejection: token-RS, MIS (seq_sum_k1), geo-RS (seq_mean_k1), K3-RS, max-K2"


def test_rejection_of_tokens() -> None:
    """verl's token_k1 0.6_1.6, whose bounds are of 1/ρ: a token of ρ = 0.67 stays, one of 2 goes."""
    given, expected = record(REJECTION)
    mask = torch.tensor(given["mask"]) > 0
    logprob = torch.tensor(given["logp_train"], dtype=torch.float64)[mask].requires_grad_()
    ones, zeros = torch.ones_like(logprob), torch.zeros(int(mask.sum()), dtype=torch.int64)
    tokens = LossTokens(
        logprob,
        0 * ones,
        torch.tensor(given["logp_engine"])[mask],
        ones,
        0 * ones,
        ones,
        0 * ones,
        zeros,
        zeros,
    )
    options = {"tis": "none", "reject": "k1", "reject_low": 0.6, "reject_high": 1.6}
    loss, statistics = made("decoupled", options).loss(tokens)
    loss.backward()
    kept = torch.tensor(expected["token_k1 0.6_1.6"])[mask]
    assert logprob.grad is not None
    assert (-logprob.grad).tolist() == kept.tolist()
    assert float(statistics.sums["tis_rejected"]) == float((1 - kept).sum())
    for measure, high, dropped in (("k2", 0.3, 2), ("k3", 0.2, 3)):  # log ρ = 1.2, -0.9 (and 0.7)
        _, statistics = made("decoupled", {"reject": measure, "reject_high": high}).loss(tokens)
        assert float(statistics.sums["tis_rejected"]) == dropped, measure


def sequences(given: Mapping[str, Any]) -> LeafRatios:
    """Each sequence of a record as the path of a leaf."""
    d = torch.tensor(given["logp_train"], dtype=torch.float64) - torch.tensor(given["logp_engine"])
    return path_ratios([row[torch.tensor(mask) > 0] for row, mask in zip(d, given["mask"], strict=True)])


@pytest.mark.parametrize(
    ("key", "name", "options"),
    [
        ("seq_sum_k1 0.5_2.0", "seq-reject", {}),
        ("seq_mean_k1 0.9_1.1", "geo-reject", {"low": 0.9, "high": 1.1}),
        ("seq_mean_k3 0.05", "seq-reject", {"measure": "k3", "over": "mean", "low": 0, "high": 0.05}),
        ("seq_max_k2 0.3", "seq-reject", {"measure": "k2", "over": "max", "low": 0, "high": 0.3}),
    ],
)
def test_rejection_of_sequences(key: str, name: str, options: dict[str, Any]) -> None:
    given, expected = record(REJECTION)
    weights = weigh(CORRECTIONS.make(name, options), sequences(given))
    assert weights.tolist() == [float(max(row)) for row in expected[key]]


def test_sequence_weights_by_hand() -> None:
    """Of the record's sequences Σ log ρ is 1.12, -0.59, 0.45 and 0; verl's normalised 2 is 1.56."""
    given, _ = record("tis")
    full = np.exp([1.12, -0.59, 0.45, 0.0])
    capped = np.minimum(full, 2)

    def of(name: str, **options: Any) -> list[float]:
        return weigh(CORRECTIONS.make(name, options), sequences(given)).tolist()

    assert of("seq-tis") == pytest.approx(capped.tolist(), abs=1e-6)
    assert of("seq-tis", normalize=True) == pytest.approx((capped / capped.mean()).tolist(), abs=1e-6)
    assert of("seq-tis", normalize=True)[0] == pytest.approx(1.56, abs=5e-3)
    assert of("seq-tis", mode="clip", low=0.8)[1] == pytest.approx(0.8)
    assert of("seq-mis") == pytest.approx([0, *full[1:]], abs=1e-6)
    geometric = np.exp(np.array([1.12, -0.59, 0.45, 0.0]) / [5, 4, 5, 2])
    assert of("seq-tis", over="mean") == pytest.approx(geometric.tolist(), abs=1e-6)
    # slime's veto: the second sequence has a token of ρ = e^-0.9 = 0.41
    assert of("seq-tis", veto=0.42) == pytest.approx([2, 0, capped[2], 1], abs=1e-6)
    assert of("geo-reject", low=0.5, high=2, veto=0.40) == [1, 1, 1, 1]


class Negative(Correction):
    def weights(self, leaves: LeafRatios) -> torch.Tensor:
        return -leaves.tokens


class Short(Correction):
    def weights(self, leaves: LeafRatios) -> torch.Tensor:
        return leaves.tokens[1:]


@pytest.mark.parametrize(("name", "what"), [("Negative", "negative"), ("Short", r"shape \[3\] for 4")])
def test_weights_that_cannot_be_are_refused(name: str, what: str) -> None:
    correction = CORRECTIONS.make(f"test_corrections:{name}", {})
    with pytest.raises(PluginError, match=f"correction {name}: .*{what}"):
        weigh(correction, sequences(record("tis")[0]))


def test_an_effective_sample_size() -> None:
    assert effect(torch.tensor([1.0, 0.0, 1.0, 0.0])) == {
        "learn/rejected_leaves": 0.5,
        "learn/effective_sample_size": 0.5,
    }
    assert effect(torch.tensor([3.0, 1.0]))["learn/effective_sample_size"] == pytest.approx(0.8)
    assert effect(torch.zeros(0)) == {"learn/rejected_leaves": 0, "learn/effective_sample_size": 0}


def test_weighing_leaves_and_tokens_by_their_ratios_is_told() -> None:
    tis, rejection = (CORRECTIONS.make(name, {}) for name in ("seq-tis", "seq-reject"))
    assert "tis=none" in (twice_weighed(tis, made("ppo")) or "")
    assert "tis=none" in (twice_weighed(tis, made("decoupled")) or "")
    assert twice_weighed(tis, made("decoupled", {"tis": "none"})) is None
    assert twice_weighed(rejection, made("ppo")) is None


def test_a_correction_that_cannot_be_is_refused() -> None:
    for options, what in (
        ({"reject": "k4"}, "one of k1, k2, k3"),
        ({"reject": "k1", "reject_low": 2.0, "reject_high": 1.0}, "reject_low < reject_high"),
        ({"reject": "k2", "reject_low": 0.5}, "one bound, reject_high"),
    ):
        with pytest.raises(PluginError, match=what):
            made("decoupled", options)
    for name, options in (
        ("seq-tis", {"over": "max"}),
        ("seq-tis", {"low": 2.0}),
        ("seq-mis", {"veto": 1.0}),
        ("seq-reject", {"measure": "k4"}),
        ("geo-reject", {"low": 1.1, "high": 1.0}),
    ):
        with pytest.raises(PluginError, match=next(iter(options))):
            CORRECTIONS.make(name, options)
