"""Objectives and the vocabulary-parallel log-probability on their own."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from learner_ranks import Place, Ranks

from system.config import LearnConfig, PartConfig
from system.learn.divergence import k3
from system.learn.objective import (
    LossTokens,
    Ppo,
    Statistics,
    clipped_surrogate,
    inert_clip,
    make_objective,
    row_loss,
)
from system.learn.schedule import learning_rate


def tokens(n: int = 64, **changes: Any) -> LossTokens:
    generator = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(n, generator=generator)

    fields: dict[str, Any] = {
        "logprob": (normal() - 2).requires_grad_(),
        "entropy": normal().abs().requires_grad_(),
        "behaviour": normal() - 2,
        "s_plus": normal().abs() / n,
        "s_minus": -normal().abs() / n,
        "mult": normal().abs() / n,
        "staleness": torch.zeros(n),
        "node": torch.arange(n) // 5,
        "path": torch.arange(n) // 10,
    }
    return LossTokens(**(fields | changes))


def loss_of(name: str, t: LossTokens, learn: LearnConfig) -> tuple[torch.Tensor, Statistics]:
    learn.objective = PartConfig(name)
    return row_loss(make_objective(learn), t, entropy_coef=learn.entropy_coef, kl_coef=learn.kl_coef)


@pytest.mark.parametrize("dual", [0.0, 3.0])
def test_two_sums_give_the_sum_over_leaves(dual: float) -> None:
    """S+ and S- against Σ w·min(rA, clip(r)A), leaf by leaf, siblings of opposite sign, at every ratio."""
    rng = np.random.default_rng(0)
    ratio = torch.tensor(np.exp(rng.normal(0, 1.5, 500)), dtype=torch.float64)
    gains, w = torch.tensor(rng.normal(0, 1, (500, 4))), torch.tensor(rng.random((500, 4)))
    each = torch.minimum(ratio[:, None] * gains, ratio.clamp(0.8, 1.28)[:, None] * gains)
    if dual:
        each = torch.where(gains < 0, torch.maximum(each, dual * gains), each)
    plus, minus = (w * gains.clamp(min=0)).sum(1), (w * gains.clamp(max=0)).sum(1)
    mine = clipped_surrogate(ratio, plus, minus, 0.2, 0.28, dual)
    torch.testing.assert_close(mine, (w * each).sum(1), rtol=1e-12, atol=1e-12)


def test_decoupled_at_a_fixed_proximal_policy_is_weighted_ppo() -> None:
    """π_prox = μ makes the importance weight 1 and the ratio PPO's own."""
    t = tokens()
    learn = LearnConfig()
    loss, stats = loss_of("decoupled", tokens(proximal=t.behaviour), learn)
    expected, _ = loss_of("ppo", t, learn)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats.sums["tis_mean"], stats.sums["weight"])


def test_engine_mismatch_is_measured_on_tokens_of_the_trained_weights_only() -> None:
    """Stale tokens differ because the policy moved; fresh ones say how well engine and learner agree."""
    stale = torch.arange(64) % 4
    t = tokens(staleness=stale.float())
    behaviour = torch.where(stale == 0, t.logprob.detach() + 1e-3, t.behaviour)
    _, stats = loss_of("decoupled", tokens(staleness=stale.float(), behaviour=behaviour), LearnConfig())
    assert float(stats.sums["engine_kl"] / stats.sums["fresh"]) == pytest.approx(5e-7, rel=0.05)
    assert float(stats.maxima["engine_logprob_diff_max"]) == pytest.approx(1e-3, rel=1e-3)
    assert float(stats.sums["fresh"]) == pytest.approx(float(t.mult[stale == 0].sum()))
    assert float(stats.sums["mismatch_kl"]) > 100 * float(stats.sums["engine_kl"])


def test_what_a_guide_changes_is_no_fault_of_an_engine() -> None:
    """Tokens sampled under another prompt differ at the same weights, and count in no comparison of them; in
    the loss they are like any other: the ratio is π_θ(y | prompt) / μ(y | prompt with the guide).
    """
    guided = (torch.arange(64) % 4 == 0).float()
    plain = tokens()
    behaviour = torch.where(guided > 0, plain.behaviour, plain.logprob.detach() + 1e-3)
    t = tokens(behaviour=behaviour, guided=guided)
    loss, stats = loss_of("ppo", t, LearnConfig())
    assert float(stats.maxima["engine_logprob_diff_max"]) == pytest.approx(1e-3, rel=1e-3)
    assert float(stats.sums["fresh"]) == pytest.approx(float(t.mult[guided == 0].sum()))
    torch.testing.assert_close(loss, loss_of("ppo", tokens(behaviour=behaviour), LearnConfig())[0])


def test_importance_weight_is_capped_and_detached() -> None:
    t = tokens()
    learn = LearnConfig(tis_cap=1.5)
    loss, stats = loss_of("decoupled", t, learn)
    loss.backward()
    weight = (t.logprob.detach() - t.behaviour).exp().clamp(max=1.5)
    # At r = 1 neither clip acts, so ∂loss/∂logπ = -weight·(S+ + S-): nothing flows through the weight itself.
    torch.testing.assert_close(t.logprob.grad, -weight * (t.s_plus + t.s_minus))
    assert 0 < float(stats.sums["tis_capped"]) < float(stats.sums["weight"])


def test_regularisers_enter_the_loss_with_their_coefficients() -> None:
    plain, _ = loss_of("ppo", tokens(), LearnConfig())
    t = tokens(reference=torch.full((64,), -2.0))
    loss, stats = loss_of("ppo", t, LearnConfig(kl_coef=0.3, entropy_coef=0.1))
    kl = (t.mult * k3(torch.full((64,), -2.0) - t.logprob)).sum()
    torch.testing.assert_close(loss, plain + 0.3 * kl - 0.1 * (t.mult * t.entropy).sum())
    torch.testing.assert_close(stats.sums["reference_kl"], kl.detach())


def test_a_clip_without_effect_is_told() -> None:
    """π_θ/π_prox is 1 in the only update of a batch."""

    def told(name: str, by_step: tuple[str, ...] = (), **learn: Any) -> str | None:
        settings = LearnConfig(**{"objective": PartConfig(name), **learn})
        return inert_clip(make_objective(settings), settings, by_step)

    assert told("decoupled") is None  # nobody asked for a clip
    assert (told("decoupled", clip_high=0.28) or "").startswith(
        "learn.clip_high will do nothing: learn.objec"
    )
    assert "learn.clip_low and learn.dual_clip" in (told("decoupled", clip_low=0.1, dual_clip=0) or "")
    assert "learn.clip_high" in (told("decoupled", ("learn.clip_high", "rollout.temperature")) or "")
    options = PartConfig("decoupled", {"clip_low": 0.2})
    assert "learn.clip_low" in (told("decoupled", objective=options) or "")
    assert told("decoupled", clip_high=0.28, updates=2) is None
    for proximal in ("average", "closed"):
        assert told("decoupled", clip_high=0.28, proximal=proximal) is None
        assert f"learn.proximal={proximal} has no effect" in (told("ppo", proximal=proximal) or "")
    correction = PartConfig("geo-reject")
    assert told("ppo", proximal="closed", correction=correction) is None  # that one reads it
    assert told("ppo", clip_high=0.28) is None
    learn = LearnConfig(objective=PartConfig("decoupled"))
    far = tokens(behaviour=torch.full((64,), -6.0))  # a ratio of about 55 to the policy that sampled
    _, stats = loss_of("decoupled", far, learn)
    assert float(stats.sums["clip_high"]) == float(stats.sums["clip_low"]) == 0
    _, stats = loss_of("ppo", far, learn)
    assert float(stats.sums["clip_high"]) > 0


def test_options_of_an_objective_go_before_the_settings_of_learn() -> None:
    learn = LearnConfig(clip_high=0.2, objective=PartConfig("ppo", {"clip_high": 0.4}))
    objective = make_objective(learn)
    assert isinstance(objective, Ppo)
    assert (objective.clip_low, objective.clip_high) == (0.2, 0.4)


@pytest.mark.parametrize(
    ("decay", "middle", "last"), [("constant", 1.0, 1.0), ("linear", 0.6, 0.2), ("cosine", 0.6, 0.2)]
)
def test_courses_of_the_learning_rate(decay: str, middle: float, last: float) -> None:
    def rate(step: int) -> float:
        return learning_rate(step, 111, 2.0, warmup=10, decay=decay, end=0.2) / 2

    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert [rate(10), rate(60), rate(110)] == pytest.approx([1.0, middle, last])
    assert rate(500) == rate(110), "a run that goes on stays there"
    assert learning_rate(0, 1, 2.0, warmup=0, decay=decay, end=0.2) == 2.0


def test_k3_estimates_the_kl_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    sample = torch.multinomial(p, 200_000, replacement=True, generator=generator)
    estimate = k3((q.log() - p.log())[sample]).mean()
    assert float(estimate) == pytest.approx(float((p * (p / q).log()).sum()), rel=0.02)


def test_huge_ratios_stay_finite() -> None:
    far = torch.full((64,), -1e4)
    for name, (a, b) in itertools.product(("ppo", "decoupled"), [(far, far * 0), (far * 0, far)]):
        t = tokens(logprob=a.clone().requires_grad_(), behaviour=b)
        loss, stats = loss_of(name, t, LearnConfig(dual_clip=0.0))
        loss.backward()
        assert torch.isfinite(loss)
        assert t.logprob.grad is not None
        assert torch.isfinite(t.logprob.grad).all()
        assert all(torch.isfinite(v) for v in stats.sums.values())


# ---------------------------------------------------------------------- log-probability and entropy


def relative(error: torch.Tensor, to: torch.Tensor) -> float:
    return float(error.abs().max() / to.abs().max().clamp(min=1e-9))


def vocabulary_case(
    place: Place, vocab: int, temperature: float, dtype: torch.dtype, chunk: int, logits: int, buffered: bool
) -> dict[str, float]:
    """The head against float64 over the whole vocabulary, on the same logits as it rounds them."""
    import torch.distributed as dist

    from system.learn import head

    head.CHUNK, head.LOGITS = chunk, logits
    dist.init_process_group("gloo", init_method=place.init_method, rank=place.rank, world_size=place.world)
    try:
        group = dist.group.WORLD
        assert group is not None
        generator = torch.Generator().manual_seed(0)
        share = -(-vocab // place.world)
        mine = slice(place.rank * share, (place.rank + 1) * share)
        hidden = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
        whole = torch.randn(vocab, 16, generator=generator).to(dtype)
        target = torch.randint(0, vocab, (50,), generator=generator)
        g1, g2 = torch.randn(2, 50, generator=generator)
        padding = torch.full((share * place.world - vocab, 16), 99.0, dtype=dtype)  # never to be read
        weight = torch.cat([whole, padding])[mine].clone().requires_grad_()
        if buffered:
            setattr(weight, "main_grad", torch.ones(weight.shape))  # noqa: B010
        logp, entropy = head.logprob_entropy(hidden, weight, target, vocab, group, temperature)
        (logp * g1 + entropy * g2).sum().backward()
        assert hidden.grad is not None
        found = weight.main_grad - 1 if buffered else weight.grad
        assert found is not None
        assert buffered == (weight.grad is None)

        exact_hidden, exact = (t.detach().double().requires_grad_() for t in (hidden, whole))
        product = exact_hidden @ exact.T
        rounded = product + ((hidden @ whole.T).double() - product).detach()
        ls = (rounded / temperature).log_softmax(-1)
        elp, ee = ls.gather(-1, target[:, None])[:, 0], -(ls.exp() * ls).sum(-1)
        (elp * g1 + ee * g2).sum().backward()
        assert exact.grad is not None
        assert exact_hidden.grad is not None
        expected = torch.cat([exact.grad, torch.zeros(padding.shape)])[mine]
        return {
            "logp": float((logp - elp).abs().max()),
            "entropy": float((entropy - ee).abs().max()),
            "hidden": relative(hidden.grad - exact_hidden.grad, exact_hidden.grad),
            "weight": relative(found - expected, exact.grad),
        }
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("vocab", "world", "temperature", "dtype", "chunk", "logits", "buffered"),
    [
        (151, 1, 1.0, torch.float32, 1 << 20, 1 << 27, False),  # one chunk, which keeps its logits
        (151, 1, 1.0, torch.float32, 1 << 20, 151 * 7, True),  # seven rows at a time, and one at the end
        (151, 2, 0.7, torch.float32, 300, 1000, False),
        (150, 2, 1.3, torch.float32, 1, 1, True),
        (1, 2, 1.0, torch.float32, 1 << 20, 20, False),  # the second rank holds padding only
        # bfloat16 logits are divided in float32: in bfloat16 the values would be off by up to 0.1 nats.
        (151, 1, 0.7, torch.bfloat16, 1 << 20, 1 << 27, False),
        (151, 2, 0.7, torch.bfloat16, 300, 1000, True),
    ],
)
def test_log_probability_and_entropy_of_a_split_vocabulary(
    ranks: Ranks,
    vocab: int,
    world: int,
    temperature: float,
    dtype: torch.dtype,
    chunk: int,
    logits: int,
    buffered: bool,
) -> None:
    given: dict[str, object] = {"vocab": vocab, "temperature": temperature, "dtype": dtype, "chunk": chunk}
    for worst in ranks.run(vocabulary_case, world=world, **given, logits=logits, buffered=buffered):
        assert worst["logp"] < 2e-5
        assert worst["entropy"] < 2e-5
        assert worst["hidden"] < (1e-5 if dtype == torch.float32 else 0.02)
        assert worst["weight"] < (1e-5 if dtype == torch.float32 else 0.02)
