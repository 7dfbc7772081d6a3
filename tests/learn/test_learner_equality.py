"""The learner against Hugging Face and against separate paths: forward, loss, gradients, optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from family_models import as_in_files
from learner_ranks import Place, Ranks
from learner_reference import (
    credit_of,
    flat_loss,
    gradients,
    learner_config,
    load_hf,
    m2po_clip,
    make_trees,
    pack_whole,
    path_logprobs,
    path_tokens,
    relative_distance,
    supervise,
    train,
)

from system.config import Config, PartConfig
from system.learn.batch import BatchPlanner
from system.plugins import CORRECTIONS
from system.tree.record import Tree

FAMILIES = [("qwen2", False), ("qwen2", True), ("qwen3", False), ("qwen3", True)]

# name -> settings.  `micro_tokens` 48 is below the largest tree (95 tokens) and above its longest path (41).
OBJECTIVES: dict[str, dict[str, Any]] = {
    "decoupled": {"objective": "decoupled"},
    "decoupled, cut": {"objective": "decoupled", "micro_tokens": 48},
    "ppo": {"objective": "ppo"},
    "ppo, cut": {"objective": "ppo", "micro_tokens": 48},
    "ppo, single clip": {"objective": "ppo", "dual_clip": 0.0},
    "ppo, sequence mean": {"objective": "ppo", "aggregate": "seq-mean"},
    "ppo, regularised, cut": {
        "objective": "ppo",
        "micro_tokens": 48,
        "entropy_coef": 0.01,
        "kl_coef": 0.1,
    },
    "grpo-flat": {"objective": "grpo-flat"},
    "decoupled, leaves weighed, cut": {
        "objective": PartConfig("decoupled", {"tis": "none"}),
        "correction": PartConfig("seq-tis", {"over": "mean"}),
        "micro_tokens": 48,
    },
    "ppo, leaves rejected, regularised, cut": {
        "objective": "ppo",
        "correction": PartConfig("geo-reject", {"low": 0.4, "high": 2.5}),
        "micro_tokens": 48,
        "kl_coef": 0.1,
    },
    "decoupled, against the close, cut": {
        "objective": "decoupled",
        "proximal": "closed",
        "micro_tokens": 48,
    },
    "ppo, leaves weighed by the close, cut": {
        "objective": "ppo",
        "proximal": "closed",
        "correction": PartConfig("seq-tis", {"over": "mean"}),
        "micro_tokens": 48,
    },
    "m2po, cut": {"objective": "m2po", "micro_tokens": 48},
    "a teacher alone, cut": {"teacher": 1.0, "credit": "none", "micro_tokens": 48},
    "a teacher beside rewards, cut": {"teacher": 0.3, "objective": "ppo", "micro_tokens": 48},
    "a teacher beside rewards, flat": {"teacher": 0.3, "objective": "grpo-flat"},
    "grpo-flat, leaves rejected": {
        "objective": "grpo-flat",
        "correction": PartConfig("geo-reject", {"low": 0.4, "high": 2.5}),
    },
}


def open_trainer(place: Place, config: Config, model: str) -> Any:
    from system.learn.trainer import Trainer

    return Trainer(config, model, rank=place.rank, world=place.world, init_method=place.init_method)


def hf_gradients(trainer: Any, *, adapters: bool = False) -> dict[str, np.ndarray]:
    """The step's summed gradients under Hugging Face names (``adapters``: theirs, under PEFT's), on rank 0
    (left in place by a step without clipping).
    """
    from system.learn.weights import Export

    export = Export(trainer.model, trainer.layout, 1 << 20, adapters=adapters)
    parameters = trainer.model.named_parameters()
    gradients = {name: one.main_grad for name, one in parameters if one.requires_grad}
    named: dict[str, np.ndarray] = {}
    for mapped in (mapped for bucket in export.plan for mapped in bucket):
        full = export.gather(mapped, gradients.get(mapped.key))
        named |= {name: tensor.cpu().numpy() for name, tensor in full.items()}
    return named


# ---------------------------------------------------------------------- log-probabilities and weights


def forward_case(place: Place, model: str, tp: int) -> dict[str, float]:
    from system.learn import cpu
    from system.learn.rows import Row

    trainer = open_trainer(place, learner_config(tp=tp, bucket_mb=1), model)
    try:
        hf = load_hf(model)
        trees = make_trees(0)
        worst = {"logits": 0.0, "logprob": 0.0, "nan": 0.0, "entropy": 0.0}
        for tree, values in zip(trees, trainer.logprobs(trees), strict=True):
            worst["nan"] += float(np.isnan(values[1:]).any()) + float(not np.isnan(values[0]))
            row = Row(pack_whole([tree]), trainer.layout.device, trained=False)
            with torch.no_grad():
                hidden = trainer.model(row.tokens, row.position, row.mask, torch.arange(tree.n_tokens))
                logits = hidden @ trainer.model.output_weight.T
            first = logits.size(1) * (place.rank if tp > 1 else 0)
            for leaf in range(tree.n_leaves):
                index = path_tokens(tree, leaf)
                with torch.no_grad():
                    ids = torch.from_numpy(tree.tokens[index].astype(np.int64))
                    full = hf(ids[None]).logits[0]
                    expected, _ = path_logprobs(hf, tree.tokens[index])
                mine = full[:, first : first + logits.size(1)]  # the last rank's shard ends in padding
                error = (logits[index][:, : mine.size(1)] - mine).abs().max()
                worst["logits"] = max(worst["logits"], float(error))
                worst["logprob"] = max(
                    worst["logprob"], float(np.abs(values[index][1:] - expected.numpy()).max())
                )
        exported = list(trainer.export())
        tensors = {n: t for bucket in exported for n, t in bucket.items()}
        stayed = {n: t for bucket in trainer.export(on_gpu=True) for n, t in bucket.items()}
        assert stayed.keys() == tensors.keys()
        assert all(torch.equal(stayed[n], t) for n, t in tensors.items())
        own = {parameter.data_ptr() for parameter in trainer.model.parameters()}
        assert not own & {t.data_ptr() for t in stayed.values()}, "the next step would change what is staged"
        if place.rank == 0:
            original = dict(hf.named_parameters())
            assert tensors.keys() == original.keys()
            worst["round trip"] = max(float((tensors[n] - original[n]).abs().max()) for n in original)
        else:
            assert not tensors
        worst["cuda calls outside the shim"] = float(not cpu.needed())
        return worst
    finally:
        trainer.close()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_forward_equals_hugging_face(
    ranks: Ranks, tiny_model: Callable[..., str], family: str, tied: bool, tp: int
) -> None:
    for worst in ranks.run(forward_case, world=tp, model=tiny_model(family, tied=tied), tp=tp):
        assert worst["logits"] < 1e-4
        assert worst["logprob"] < 1e-4
        assert worst["nan"] == 0
        assert worst.get("round trip", 0.0) == 0


# ---------------------------------------------------------------------- loss and gradient on trees


def gradient_case(
    place: Place, model: str, layout: dict[str, int], names: list[str]
) -> dict[str, dict[str, float]]:
    """Every objective's loss and gradient on packed trees against the same on paths in Hugging Face."""
    from system.learn.objective import make_objective

    config = learner_config(kl_coef=1.0, **layout)
    trainer = open_trainer(place, config, model)
    try:
        hf, reference = load_hf(model), load_hf(model)
        with (
            torch.no_grad()
        ):  # a reference model that differs from the policy, so that the KL term has a gradient
            for policy_weight in trainer.model.parameters():
                policy_weight.mul_(1.01)
            for weight in hf.parameters():
                weight.mul_(1.01)
        trees = make_trees(1)
        plain = (learn := config.learn).__dict__.copy()
        report = {}
        for name in names:
            changes = {
                k: PartConfig(v) if isinstance(v, str) and k != "proximal" else v
                for k, v in OBJECTIVES[name].items()
                if k != "teacher"
            }
            learn.__dict__.update(plain | {"kl_coef": 0.0} | changes)
            if coef := OBJECTIVES[name].get("teacher", 0.0):
                learn.teacher, learn.teacher_coef = "server", coef
            frozen, trainer.beside.reference = (
                trainer.beside.reference,
                trainer.beside.reference if learn.kl_coef else None,
            )
            trainer.objective = make_objective(learn)
            trainer.correction = CORRECTIONS.make(learn.correction.name, learn.correction.options)
            flat, dp = trainer.objective.flat, trainer.layout.dp
            trainer.planner = BatchPlanner(config, flat=flat, dp=dp, pad_to=trainer.planner.pad_to)
            stats = train(trainer, trees)
            trainer.beside.reference = frozen
            mine = hf_gradients(trainer)
            hf.zero_grad()
            gains, weights = credit_of(trees, config)
            if learn.objective.name == "m2po":
                learn.clip_low, learn.clip_high = m2po_clip(hf, trees, gains, 0.04)
                learn.dual_clip = 0.0
            loss = flat_loss(hf, trees, gains, weights, learn, reference=reference, teacher_coef=coef)
            loss.backward()
            report[name] = stats | {
                "gradient error": relative_distance(mine, gradients(hf)) if mine else 0.0,
                "loss error": abs(stats["loss"] - float(loss)) / abs(float(loss)),
                "expected norm": float(
                    np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients(hf).values()))
                ),
                "expected weight norm": float(sum((p.double() ** 2).sum() for p in hf.parameters())) ** 0.5,
            }
        return report
    finally:
        trainer.close()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("family", "tied"), [("qwen3", False), ("qwen2", True)])
def test_tree_gradient_equals_flat_paths(
    ranks: Ranks, tiny_model: Callable[..., str], family: str, tied: bool, tp: int
) -> None:
    names = list(OBJECTIVES) if family == "qwen3" else ["decoupled, cut", "ppo, cut"]
    reports = ranks.run(
        gradient_case, world=tp, model=tiny_model(family, tied=tied), layout={"tp": tp}, names=names
    )
    for report in reports:
        for name, got in report.items():
            assert got["gradient error"] < 1e-5, name
            assert got["loss error"] < 1e-5, name
            # The reported norm is the gradient's own: q/k norms are summed over TP, shards counted once.
            assert got["grad_norm"] == pytest.approx(got["expected norm"], rel=1e-4), name
            assert got["weight_norm"] == pytest.approx(got["expected weight norm"], rel=1e-6), name
        ppo = report.get("ppo", report["ppo, cut"])
        assert ppo["clip_high"] > 0.02  # the cases above do reach every branch of the clipped objective
        assert ppo["clip_low"] > 0.02
        assert ppo["ratio_max"] > 3.0
        for name, got in report.items():
            if "rejected" in name:
                assert 0.1 < got["learn/rejected_leaves"] < 0.9, name
                assert got["learn/effective_sample_size"] == pytest.approx(1 - got["learn/rejected_leaves"])
            if "teacher" in name:
                assert 0.5 < got["teacher_scored"] < 1.0, name
                assert abs(got["teacher_kl"]) > 0.1, name
        decoupled = report["decoupled, cut"]
        assert decoupled["ratio_mean"] == pytest.approx(1.0)
        assert 0 < decoupled["tis_capped"] < 1
        assert decoupled["staleness_max"] == 3.0
        assert decoupled["tokens_computed"] > report.get("decoupled", {}).get("tokens_computed", 0.0)


@pytest.mark.parametrize("ways", ["dp", "cp"])
def test_ranks_with_other_tokens_sum_their_gradients(
    ranks: Ranks, tiny_model: Callable[..., str], ways: str
) -> None:
    """Data-parallel ranks have other rows, context-parallel ones other tokens of the same rows."""
    names = ["decoupled", "ppo, cut", "ppo, regularised, cut"]
    names += ["decoupled, leaves weighed, cut", "ppo, leaves rejected, regularised, cut", "m2po, cut"]
    reports = ranks.run(gradient_case, world=2, model=tiny_model(), layout={ways: 2}, names=names)
    assert reports[0]["ppo, cut"]["clip_high"] > 0.02
    assert reports[0]["ppo, cut"]["clip_low"] > 0.02
    for name in names:
        for report in reports:
            assert report[name]["gradient error"] < 1e-5, name
            assert report[name]["loss error"] < 1e-5, name
        own = {k for k in reports[0][name] if k.startswith("time_")} | {"gradient error"}
        assert {k: v for k, v in reports[0][name].items() if k not in own} == {
            k: v for k, v in reports[1][name].items() if k not in own
        }


def idle_rank_case(place: Place, model: str, **layout: Any) -> dict[str, float]:
    """One tree for two data-parallel ranks: the second has nothing to compute."""
    trainer = open_trainer(place, learner_config(dp=2, **layout), model)
    try:
        trees = make_trees(2)[:1]
        stats = train(trainer, trees)
        hf = load_hf(model)
        flat_loss(hf, trees, *credit_of(trees, trainer.config), trainer.learn).backward()
        nothing = train(trainer, make_trees(2)[1:2])  # a single leaf: no signal for anybody
        mine = hf_gradients_after(trainer, trees)
        return stats | {
            "gradient error": relative_distance(mine, gradients(hf)) if mine else 0.0,
            "silent norm": nothing["grad_norm"],
        }
    finally:
        trainer.close()


def hf_gradients_after(trainer: Any, trees: list[Tree]) -> dict[str, np.ndarray]:
    train(trainer, trees)
    return hf_gradients(trainer)


def test_a_rank_without_work_joins_the_step(ranks: Ranks, tiny_model: Callable[..., str]) -> None:
    for stats in ranks.run(idle_rank_case, world=2, model=tiny_model()):
        assert stats["gradient error"] < 1e-5
        assert stats["silent norm"] == 0
        assert stats["tokens"] > 0


# ---------------------------------------------------------------------- optimizer steps


def adamw_case(
    place: Place, model: str, correction: PartConfig, offload: bool, **layout: Any
) -> dict[str, float]:
    """Three updates of one batch, a supervised step before, against torch AdamW on the Hugging Face model."""
    import system.learn.offload

    system.learn.offload.STAGED = 5000  # many chunks, which end inside parameters
    settings: dict[str, Any] = {
        "lr": 1e-3,
        "weight_decay": 0.1,
        "grad_clip": 0.5,
        # Adam divides by the gradient: where that is rounding noise, a small eps makes it ±lr.
        "eps": 1e-4,
        "warmup_steps": 2,
        "updates": 3,
        "correction": correction,
        "offload": offload,
    }
    config = learner_config(**layout, **settings)
    config.rollout.temperature = 0.8
    trainer = open_trainer(place, config, model)
    try:
        learn, trees = config.learn, make_trees(3)
        warm = supervise(trainer, trees, lr=2e-3)
        trainer.reset_optimizer()
        stats = train(trainer, trees)
        weights = {n: t for bucket in trainer.export() for n, t in bucket.items()}

        hf = load_hf(model)
        before = {n: p.detach().clone() for n, p in hf.named_parameters()}

        def optimizer() -> torch.optim.AdamW:
            matrices = [p for p in hf.parameters() if p.dim() > 1]
            vectors = [p for p in hf.parameters() if p.dim() == 1]  # norms and biases are not decayed
            groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
            return torch.optim.AdamW(groups, lr=1.0, betas=(learn.beta1, learn.beta2), eps=learn.eps)

        def step(adam: torch.optim.AdamW, loss: torch.Tensor, lr: float) -> None:
            hf.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(hf.parameters(), learn.grad_clip)
            for group in adam.param_groups:
                group["lr"] = lr
            adam.step()

        paths = [(t, path_tokens(t, leaf)) for t in trees for leaf in range(t.n_leaves)]
        trained = [np.repeat(t.kind == 1, t.end - t.start)[index][1:] for t, index in paths]
        logps = [path_logprobs(hf, t.tokens[index])[0] for t, index in paths]
        count = sum(int(m.sum()) for m in trained)
        nll = -sum(
            (lp[torch.from_numpy(m)].sum() for lp, m in zip(logps, trained, strict=True)), torch.zeros(())
        )
        step(optimizer(), nll / count, 2e-3)

        import copy

        proximal = copy.deepcopy(hf)
        gains, _ = credit_of(trees, config)
        adam = optimizer()
        for number, (a, b) in enumerate([(0, 1), (1, 3), (3, 5)]):
            _, w = credit_of(trees[a:b], config)
            loss = flat_loss(hf, trees[a:b], gains[a:b], w, learn, temperature=0.8, proximal=proximal)
            step(adam, loss, learn.lr * min(1.0, (number + 1) / 2))
        after, before = as_in_files(dict(hf.named_parameters())), as_in_files(before)
        return {
            "error": max((float((weights[n] - after[n]).abs().max()) for n in weights), default=0.0),
            "moved": max(float((after[n] - before[n]).abs().max()) for n in after),
            "steps": float(trainer.step_count),
            "nll error": abs(warm["loss"] - float(nll) / count),
            "skipped": stats["skipped_steps"],
        }
    finally:
        trainer.close()


@pytest.mark.parametrize(
    ("tp", "dp", "correction", "offload"),
    [
        (1, 1, PartConfig("none"), False),
        (2, 1, PartConfig("seq-tis", {"over": "mean"}), False),
        (1, 2, PartConfig("geo-reject", {"low": 0.4, "high": 2.5}), False),
        (2, 1, PartConfig("none"), True),
        (1, 2, PartConfig("none"), True),
    ],
    ids=lambda x: x.name if isinstance(x, PartConfig) else None,
)
def test_optimizer_steps_equal_torch_adamw(
    ranks: Ranks, tiny_model: Callable[..., str], tp: int, dp: int, correction: PartConfig, offload: bool
) -> None:
    case = {"model": tiny_model(), "tp": tp, "dp": dp, "correction": correction, "offload": offload}
    for result in ranks.run(adamw_case, world=tp * dp, **case):
        assert result["moved"] > 2e-3
        assert result["error"] < 1e-2 * result["moved"] / 3
        assert result["steps"] == 3
        assert result["nll error"] < 1e-5
        assert result["skipped"] == 0


# ---------------------------------------------------------------------- the same on CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("objective", ["decoupled", "ppo, cut", "ppo, regularised, cut"])
def test_tree_gradient_on_cuda(ranks: Ranks, tiny_model: Callable[..., str], objective: str) -> None:
    """Compiled FlexAttention, forward and backward, against Hugging Face on CPU."""
    (report,) = ranks.run(
        gradient_case, world=1, deadline_s=170, model=tiny_model(), layout={}, names=[objective]
    )
    assert report[objective]["gradient error"] < 1e-4
    assert report[objective]["loss error"] < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", [False, True])
def test_optimizer_steps_on_cuda(ranks: Ranks, tiny_model: Callable[..., str], offload: bool) -> None:
    """The fused step on the device, and the one in the host's memory with its copies beside it."""
    case = {"model": tiny_model(), "tp": 1, "dp": 1, "correction": PartConfig("none"), "offload": offload}
    (result,) = ranks.run(adamw_case, world=1, deadline_s=170, **case)
    assert result["moved"] > 2e-3
    assert result["error"] < 1e-2 * result["moved"]
