"""The learner goes through the experts that an engine chose, held against Hugging Face that does the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_ranks import Place, Ranks
from learner_reference import (
    credit_of,
    flat_loss,
    gradients,
    is_model,
    learner_config,
    load_hf,
    make_trees,
    of_new_adapters,
    path_logprobs,
    path_tokens,
    relative_distance,
    train,
)
from test_learner_equality import hf_gradients, open_trainer

from system.config import LoraConfig
from system.models.adapter import adapter_of
from system.models.shape import ModelShape
from system.tree.pack import PackedBatch, pack_share
from system.tree.record import Tree, validate
from system.tree.stats import TreeStats

EXPERTS, CHOSEN = 8, 2
WORK: dict[str, Any] = {"objective": "ppo", "micro_tokens": 64, "kl_coef": 0.1}
TP2: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp1 full": {"recompute": "full"},
    "tp2 selective": TP2 | {"recompute": "selective"},
    "pp2 full": {"pp": 2, "recompute": "full"},
    "pp2": {"pp": 2},
    "cp2": {"cp": 2},
    "ep2 selective": {"dp": 2, "ep": 2, "recompute": "selective"},
    "ep2 with tp2 full": TP2 | {"ep": 2, "recompute": "full"},
}


def routed(tree: Tree, layers: int, seed: int) -> Tree:
    """With experts drawn at random, and no record of some tokens and of what each branch ends with."""
    rng = np.random.default_rng(seed)
    routes = rng.random((tree.n_tokens, layers, EXPERTS)).argsort(-1)[..., :CHOSEN].astype(np.uint8)
    routes[rng.random(tree.n_tokens) < 0.1] = 255
    routes[tree.end[tree.leaf] - 1] = 255
    tree = replace(tree, routes=routes)
    validate(tree)
    return tree


def with_routes(model: str) -> list[Tree]:
    experts = ModelShape.from_directory(model).experts
    assert experts is not None
    return [routed(tree, experts.layers, seed) for seed, tree in enumerate(make_trees(1))]


@contextmanager
def forced(hf: Any, trees: Sequence[Tree]) -> Iterator[None]:
    """Hugging Face's model takes the experts of a path that is one of ``trees``', but for guided ones, with
    the weights of its own scores.
    """
    given: dict[bytes, torch.Tensor] = {}
    for tree in trees:
        for leaf in range(tree.n_leaves):
            index = path_tokens(tree, leaf)
            routes = tree.routes[index].astype(np.int64)
            routes[(routes == 255) | tree.guided] = -1
            given[tree.tokens[index].astype(np.int64).tobytes()] = torch.from_numpy(routes)
    now: list[torch.Tensor] = []

    def begin(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now[:] = [given[(args[0] if args else kwargs["input_ids"]).numpy().tobytes()]]

    def choose(router: Any, _args: Any, out: Any, layer: int) -> Any:
        logits, _, free = out
        wanted = now[0][:, layer]
        index = torch.where(wanted < 0, free, wanted)
        weights = logits.softmax(-1).gather(-1, index)
        if router.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, index

    gates = [module for name, module in hf.named_modules() if name.endswith("mlp.gate")]
    hooks = [hf.register_forward_pre_hook(begin, with_kwargs=True)]
    for layer, gate in enumerate(gates):
        hook = gate.register_forward_hook(
            lambda module, args, out, layer=layer: choose(module, args, out, layer)
        )
        hooks.append(hook)
    yield
    for hook in hooks:
        hook.remove()


def prefixes(batch: PackedBatch, scored: np.ndarray) -> list[bytes]:
    """The tokens on the path to each scored one, itself included."""
    found = []
    for at in scored.tolist():
        path = []
        while at >= 0:
            path.append(batch.tokens[at])
            at = batch.predictor[at]
        found.append(np.array(path[::-1], np.int32).tobytes())
    return found


def replay_case(place: Place, model: str, layout: dict[str, Any]) -> dict[str, Any]:
    """A step on trees with records; and their scores, replayed and not, before and after it."""
    trainer, trees = open_trainer(place, learner_config(**(WORK | layout)), model), with_routes(model)
    try:
        before = trainer.logprobs(trees)
        stats = train(trainer, trees)
        gradient = hf_gradients(trainer, adapters=trainer.learn.lora.on)
        report = {"gradient": gradient, "stats": stats, "free": trainer.logprobs(trees)}
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(before, report["free"], strict=True))
        plan = trainer.planner.plan([TreeStats.of(tree) for tree in trees])
        (share,) = pack_share(plan, trainer.layout.dp_rank, dict(enumerate(trees)))
        rows = trainer._rows(share)
        report["scored"] = [
            (prefixes(row.batch, row.scored), *(None if one is None else one.numpy() for one in both))
            for row, *both in zip(
                rows,
                trainer._score(trainer.model, rows),
                trainer._score(trainer.model, rows, replays=False),
                strict=True,
            )
        ]
        return report
    finally:
        trainer.close()


@pytest.mark.parametrize("name", list(LAYOUTS))
@pytest.mark.parametrize("tied", [False, True], ids=["all sparse", "one dense"])
def test_a_step_goes_through_the_recorded_experts(
    ranks: Ranks, tiny_model: Callable[..., str], tied: bool, name: str
) -> None:
    """Log-probabilities, loss and gradients, routers included; the reference model chooses freely."""
    model, layout = tiny_model("qwen3_moe", tied=tied), LAYOUTS[name]
    world = 1 if name.startswith("tp1") else 2
    reports = ranks.run(replay_case, world=world, model=model, layout=layout)
    hf, free, trees, config = load_hf(model), load_hf(model), with_routes(model), learner_config(**WORK)
    expected: dict[bytes, tuple[float, float]] = {}
    with forced(hf, trees):
        loss = flat_loss(hf, trees, *credit_of(trees, config), config.learn, reference=free)
        loss.backward()
        for tree in trees:
            for leaf in range(tree.n_leaves):
                path = tree.tokens[path_tokens(tree, leaf)]
                with torch.no_grad():
                    both = [path_logprobs(one, path)[0].tolist() for one in (hf, free)]
                for position, pair in enumerate(zip(*both, strict=True), 2):
                    expected[path[:position].tobytes()] = pair
    assert relative_distance(reports[0]["gradient"], gradients(hf)) < 1e-5
    moved = 0.0
    for report in reports:
        assert report["stats"]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        for keys, replayed, freely in report["scored"]:
            if replayed is None:  # before the last stage
                continue
            right = np.array([expected[key] for key in keys])
            np.testing.assert_allclose(np.stack([replayed, freely], 1), right, rtol=0, atol=1e-4)
            moved = max(moved, float(np.abs(replayed - freely).max(initial=0.0)))
    assert moved > 0.5, "the records make a difference"
    routers = [name for name in reports[0]["gradient"] if name.endswith("mlp.gate.weight")]
    assert len(routers) == (1 if tied else 2)
    assert all(np.abs(reports[0]["gradient"][name]).max() > 0 for name in routers)


@pytest.mark.parametrize("name", ["ep2 selective", "ep2 with tp2 full"])
def test_adapters_learn_through_the_recorded_experts(
    ranks: Ranks, tiny_model: Callable[..., str], name: str
) -> None:
    model, lora = tiny_model("qwen3_moe"), LoraConfig(rank=4, alpha=8.0)
    adapter = adapter_of(lora, ModelShape.from_directory(model))
    assert adapter is not None
    layout = LAYOUTS[name] | {"lora": lora}
    found = ranks.run(replay_case, world=2, model=model, layout=layout)[0]["gradient"]
    hf, trees, config = load_hf(model), with_routes(model), learner_config(**WORK)
    with forced(hf, trees):
        flat_loss(hf, trees, *credit_of(trees, config), config.learn, reference=load_hf(model)).backward()
    expected = of_new_adapters(gradients(hf), adapter)
    assert relative_distance(found, expected) < 1e-5


def share_case(place: Place, model: str, replays: bool, **layout: Any) -> dict[str, float]:
    """One uncut step on the trees that are not guided."""
    config = learner_config(objective="ppo", **layout)
    config.rollout.replay_routes = replays
    trainer = open_trainer(place, config, model)
    try:
        return train(trainer, [tree for tree in with_routes(model) if not tree.guided])
    finally:
        trainer.close()


@pytest.mark.parametrize("layout", [{}, TP2, {"pp": 2}, {"cp": 2}, {"dp": 2, "ep": 2}], ids=str)
def test_statistics_count_the_tokens_that_were_replayed(
    ranks: Ranks, tiny_model: Callable[..., str], layout: dict[str, Any]
) -> None:
    model, world = tiny_model("qwen3_moe"), 2 if layout else 1
    trees = [tree for tree in with_routes(model) if not tree.guided and tree.n_leaves > 1]
    known = np.concatenate([tree.routes[:, 0, 0] != 255 for tree in trees])
    for stats in ranks.run(share_case, world=world, model=model, replays=True, **layout):
        assert stats["routes_replayed"] == pytest.approx(known.mean())
        assert 0.8 < stats["routes_changed"] < 1, "two of eight experts at random"
    for stats in ranks.run(share_case, world=world, model=model, replays=False, **layout):
        assert stats["routes_replayed"] == stats["routes_changed"] == 0


# An engine and a learner that differ a little -----------------------------------------------------


def engine_trees(hf: Any) -> list[Tree]:
    """Trees with the log-probabilities and the experts of the model ``hf``, of the version in training."""
    seen: list[torch.Tensor] = []
    gates = [module for name, module in hf.named_modules() if name.endswith("mlp.gate")]
    hooks = [gate.register_forward_hook(lambda _m, _a, out: seen.append(out[2])) for gate in gates]
    trees = []
    for tree in (tree for tree in make_trees(2) if not tree.guided):
        logprob = np.zeros(tree.n_tokens, np.float32)
        routes = np.full((tree.n_tokens, len(gates), CHOSEN), 255, np.uint8)
        for leaf in range(tree.n_leaves):
            index = path_tokens(tree, leaf)
            seen.clear()
            with torch.no_grad():
                logprob[index[1:]] = path_logprobs(hf, tree.tokens[index])[0].numpy()
            routes[index] = torch.stack(seen, 1).numpy()
        sampled = is_model(tree)
        version = np.where(sampled, 6, -1).astype(np.int32)
        trees.append(
            replace(
                tree, logprob=np.where(sampled, logprob, 0), version=version, routes=routes, **NOT_RESCORED
            )
        )
    for hook in hooks:
        hook.remove()
    return trees


NOT_RESCORED: Any = {"closed_logprob": np.zeros(0, np.float32), "closed_version": np.zeros(0, np.int32)}


def kl_case(place: Place, model: str, engine: str, replays: bool) -> dict[str, float]:
    config = learner_config(objective="decoupled")
    config.rollout.replay_routes = replays
    trainer = open_trainer(place, config, model)
    try:
        return train(trainer, engine_trees(load_hf(engine)))
    finally:
        trainer.close()


def test_an_engine_that_routes_a_little_otherwise_is_followed(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    """The learner's routers are off by so little that rounding could have done it: without replay some tokens
    go elsewhere, and the engine's log-probabilities are not the learner's.
    """
    engine = tiny_model("qwen3_moe")
    off, generator = load_hf(engine), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in off.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.add_(
                    OFF * torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
                )
    off.save_pretrained(tmp_path)
    found = {
        (model, replays): ranks.run(kl_case, world=1, model=path, engine=engine, replays=replays)[0]
        for model, path in (("same", engine), ("off", str(tmp_path)))
        for replays in (True, False)
    }
    for (model, replays), stats in found.items():
        assert stats["routes_replayed"] == float(replays)
        assert (stats["routes_changed"] > 0) == (model == "off" and replays)
    assert found["same", True]["engine_kl"] < 1e-8
    assert found["same", False]["engine_kl"] < 1e-8
    assert found["off", True]["engine_kl"] < 1e-5
    assert found["off", False]["engine_kl"] > 100 * found["off", True]["engine_kl"]


OFF = 0.004  # of the size of the routers' weights


def refused_case(place: Place, model: str, count: int) -> str:
    trainer = open_trainer(place, learner_config(objective="ppo"), model)
    trees = [replace(tree, routes=np.repeat(tree.routes[:, :1], count, 1)) for tree in with_routes(model)]
    try:
        train(trainer, trees)
    except ValueError as error:
        return str(error)
    finally:
        trainer.close()
    return ""


def test_records_of_another_model_are_refused(ranks: Ranks, tiny_model: Callable[..., str]) -> None:
    (said,) = ranks.run(refused_case, world=1, model=tiny_model("qwen3_moe"), count=3)
    assert "the trees' routes are of another model: 3 layers, 2 experts of" in said
    assert "this one has 2, 2 of 8" in said
