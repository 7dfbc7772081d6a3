"""A tree is its flattened paths, for every credit with every objective: a new name enters by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_reference import (
    CHAIN,
    LED,
    SHAPE,
    STAR,
    is_model,
    learner_config,
    make_tree,
    path_ratios,
    path_tokens,
)

from system.config import LearnConfig, PartConfig
from system.learn.aggregate import leaf_weights
from system.learn.batch import BatchPlanner
from system.learn.correction import NodeRatios, spread, weigh
from system.learn.credit.base import Credit, assign
from system.learn.credit.gain import clip_scale
from system.learn.gates import M2po
from system.learn.objective import LossTokens, Objective, make_objective
from system.learn.rows import Row
from system.plugins import AGGREGATES, CORRECTIONS, CREDITS, OBJECTIVES
from system.tree.pack import PackedBatch, pack, pack_share, with_credit_of
from system.tree.plan import BatchPlan, Part, flat_paths, node_credit, reweighed, signed_leaves
from system.tree.record import Kind, Tree, TreeError
from system.tree.stats import TreeStats


def made(name: str) -> Objective:
    return make_objective(LearnConfig(objective=PartConfig(name)))


def random_trees(seed: int) -> list[Tree]:
    rng = np.random.default_rng(seed)
    shapes = enumerate((SHAPE, STAR, CHAIN, SHAPE, LED))
    trees = [make_tree(shape, rng, prompt=f"p{i}", guide=i % 2) for i, shape in shapes]
    for tree in trees:
        tree.reward[:] = rng.integers(0, 3, tree.n_leaves) / 2
        tree.reward[rng.random(tree.n_leaves) < 0.1] = np.nan
    return [answered(tree, rng) for tree in trees]


def answered(tree: Tree, rng: np.random.Generator) -> Tree:
    """The same tree with the gold answer scored behind the prompt and most tool results."""
    known = (tree.kind != Kind.MODEL) & (rng.random(tree.n_nodes) < 0.9)
    scores = -rng.exponential(1.0, tree.n_nodes)
    return replace(tree, answer_logprob=np.where(known, scores, np.nan).astype(np.float32))


def rows(
    trees: Sequence[Tree], stats: Sequence[TreeStats], credit: Credit, aggregate: str, *, flat: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[M] tokens in the loss, numbered through all trees, [M] their nodes, [3, M] S⁺, S⁻, multiplicity."""
    weights = leaf_weights(AGGREGATES.make(aggregate, {}, length_cap=64), stats, hard=credit.hard)
    parts: list[Part] = []
    for i, (one, a, w) in enumerate(zip(stats, assign(credit, stats), weights, strict=True)):
        if flat:
            parts += flat_paths(i, one, a, w, credit.per)
        else:
            whole = node_credit(one, a, w, per=credit.per, hard=credit.hard)
            parts.append(Part(i, np.arange(one.nodes), whole, 0))
    return laid_out(trees, parts)


def laid_out(trees: Sequence[Tree], parts: Sequence[Part]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What :func:`rows` returns, of these parts."""
    first = np.cumsum([0, *(tree.n_tokens for tree in trees)])
    where: list[np.ndarray] = []
    held: list[np.ndarray] = []
    for part in parts:
        tree = trees[part.tree]
        for node, three in zip(part.nodes.tolist(), part.credit, strict=True):
            if three[2] > 0:
                where.append(first[part.tree] + np.arange(tree.start[node], tree.end[node]))
                held.append(np.tile(three, (where[-1].size, 1)))
    node = np.repeat(np.arange(len(where)), [at.size for at in where])
    return torch.tensor(np.concatenate(where)), torch.tensor(node), torch.tensor(np.concatenate(held)).T


@pytest.mark.parametrize("name", [name for name in CREDITS.names if not CREDITS.make(name, {}).hard])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16), aggregate=st.sampled_from(AGGREGATES.names))
def test_a_tree_is_its_flat_paths(name: str, seed: int, aggregate: str) -> None:
    """Loss and gradient of each shared token, for every credit with every objective, in float64."""
    trees = random_trees(seed)
    stats = [TreeStats.of(tree) for tree in trees]
    whole, paths = (
        rows(trees, stats, CREDITS.make(name, {}), aggregate, flat=flat) for flat in (False, True)
    )
    assert len(whole[0]) < len(paths[0]), "tokens are shared"
    generator = torch.Generator().manual_seed(seed)
    total = sum(tree.n_tokens for tree in trees)
    logprob = -torch.rand(total, generator=generator, dtype=torch.float64) * 4
    moved = torch.randn(total, generator=generator, dtype=torch.float64)
    scale = scales(stats)
    for objective in OBJECTIVES.names:
        if made(objective).flat:
            continue  # trains the paths themselves
        (loss, gradient), (flat_loss, flat_gradient) = (
            loss_of(objective, logprob, moved, scale, *tokens) for tokens in (whole, paths)
        )
        assert loss == pytest.approx(flat_loss, abs=1e-12)
        torch.testing.assert_close(gradient, flat_gradient, rtol=1e-9, atol=1e-12)


def scored(plan: BatchPlan, trees: Sequence[Tree], log_ratio: Sequence[torch.Tensor]) -> NodeRatios:
    """What all data-parallel ranks together know once each has scored its rows."""
    assert plan.assigned
    nodes = NodeRatios(plan.assigned, torch.device("cpu"))
    for parts in (micro for update in plan.updates for rank in update for micro in rank):
        row = Row(pack(parts, dict(enumerate(trees)), pad_to=32), torch.device("cpu"), trained=True)
        d = [
            log_ratio[part.tree][trees[part.tree].start[n] : trees[part.tree].end[n]]
            for part in parts
            for n in part.nodes
        ]
        nodes.add(parts, row.batch.node[row.scored], torch.cat(d)[row.scored])
    return nodes


# Whose paths have something to weigh: of trees without an advantage nothing is computed.
WEIGHED = [name for name in CREDITS.names if name != "none" and not CREDITS.make(name, {}).hard]


@pytest.mark.parametrize("name", [name for name in CORRECTIONS.names if name != "none"])
@settings(max_examples=3, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    credit=st.sampled_from(WEIGHED),
    aggregate=st.sampled_from(AGGREGATES.names),
    width=st.sampled_from([0.002, 0.02, 0.2]),
)
def test_a_corrected_tree_is_its_corrected_paths(
    name: str, seed: int, credit: str, aggregate: str, width: float
) -> None:
    """Loss and gradient of every correction with every objective: paths by themselves, each times the weight
    of its own tokens, against trees cut into rows on two ranks, and against the plan of flattened paths.
    """
    trees = random_trees(seed)
    stats, correction = [TreeStats.of(tree) for tree in trees], CORRECTIONS.make(name, {})
    generator = torch.Generator().manual_seed(seed)
    sizes = [tree.n_tokens for tree in trees]
    logprob = -torch.rand(sum(sizes), generator=generator, dtype=torch.float64) * 4
    moved = torch.randn(sum(sizes), generator=generator, dtype=torch.float64)
    log_ratio = (width * moved).split(sizes)

    def own(tree: int, leaf: int) -> torch.Tensor:
        at = path_tokens(trees[tree], leaf)
        return log_ratio[tree][at[is_model(trees[tree])[at]]]

    config = learner_config(dp=2, credit=credit, aggregate=aggregate, micro_tokens=48)
    trained: list[list[Part]] = []
    weight: dict[tuple[int, int], float] = {}
    for flat in (True, False):
        plan = BatchPlanner(config, flat=flat, dp=2).plan(stats)
        chosen, leaves = scored(plan, trees, log_ratio).leaves()
        numbers = [(i, leaf) for i, mask in enumerate(chosen) for leaf in np.flatnonzero(mask).tolist()]
        expected = weigh(correction, path_ratios([own(*number) for number in numbers]))
        torch.testing.assert_close(weigh(correction, leaves), expected, rtol=1e-9, atol=1e-12)
        weight |= dict(zip(numbers, expected.tolist(), strict=True))
        after = reweighed(plan, spread(expected, chosen)).updates[0]
        trained.append([part for rank in after for micro in rank for part in micro])
        if not flat:
            assert {part.tree for part in trained[-1]} == {tree for tree, _ in numbers}
            assert plan.assigned
            assigned = plan.assigned
    by_hand = [
        replace(part, credit=part.credit * [[weight.get((part.tree, part.leaf), 1.0)] * 2 + [1.0]])
        for i, (one, a, w) in enumerate(zip(stats, assigned.advantages, assigned.weights, strict=True))
        for part in flat_paths(i, one, a, w, assigned.per)
    ]
    for objective in OBJECTIVES.names:
        if made(objective).flat:
            continue  # trains the paths themselves
        (loss, gradient), *others = (
            loss_of(objective, logprob, moved, scales(stats), *laid_out(trees, parts))
            for parts in (by_hand, *trained)
        )
        for other_loss, other in others:
            assert other_loss == pytest.approx(loss, abs=1e-9)
            torch.testing.assert_close(other, gradient, rtol=1e-6, atol=1e-9)


def scales(stats: Sequence[TreeStats]) -> torch.Tensor:
    """Of every token, what A²TGPO's clip is scaled by."""
    return torch.from_numpy(np.concatenate([np.repeat(clip_scale(one, 0.3), one.length) for one in stats]))


def loss_of(
    objective: str,
    logprob: torch.Tensor,
    moved: torch.Tensor,
    scale: torch.Tensor,
    at: torch.Tensor,
    node: torch.Tensor,
    sums: torch.Tensor,
) -> tuple[float, torch.Tensor]:
    """The loss of the tokens at ``at``, and its gradient by every token's log-probability."""
    variable = logprob.clone().requires_grad_()
    here, step = variable[at], moved[at]
    plus, minus, mult = sums
    tokens = LossTokens(
        logprob=here,
        entropy=torch.zeros_like(mult),
        behaviour=here.detach() + 0.7 * step,
        s_plus=plus,
        s_minus=minus,
        mult=mult,
        staleness=torch.zeros_like(mult),
        node=node,
        path=torch.zeros_like(node),
        proximal=here.detach() + 0.3 * step,
        clip_scale=scale[at],
    )
    loss, _ = made(objective).loss(tokens)
    loss.backward()
    assert variable.grad is not None
    return float(loss), variable.grad


def test_the_tokens_of_a_flattened_path_have_one_number() -> None:
    """Also behind a path of one turn, and before padding."""
    rng = np.random.default_rng(0)
    trees = [make_tree(shape, rng) for shape in (SHAPE, CHAIN)]
    stats = [TreeStats.of(tree) for tree in trees]
    parts = [
        part
        for i, one in enumerate(stats)
        for part in flat_paths(i, one, np.ones(one.leaves), np.ones(one.leaves), "leaf")
    ]
    batch = pack(parts, dict(enumerate(trees)), pad_to=64)
    row = Row(batch, torch.device("cpu"), trained=True)
    zero = torch.zeros(len(row.scored))
    path = row.loss_tokens(zero, zero, 0, None).path
    sizes = [int(one.length[part.nodes][one.kind[part.nodes] == Kind.MODEL].sum()) for part in parts
             for one in [stats[part.tree]]]  # fmt: skip
    assert path.bincount().tolist() == sizes
    assert (path.diff() >= 0).all()


def test_a_guided_tree_is_trained_under_the_plain_prompt() -> None:
    """Planned, packed and counted as if there had been no other prompt; all that differs is the mark that
    its tokens' log-probabilities, which stand as they were sampled, are under another one.
    """
    guided = random_trees(7)
    plain = [replace(tree, sampled_prompt=tree.sampled_prompt[:0], guide=0) for tree in guided]
    for flat in (False, True):
        plans = [
            BatchPlanner(learner_config(credit="grpo", micro_tokens=48), flat=flat).plan(
                [TreeStats.of(tree) for tree in trees]
            )
            for trees in (guided, plain)
        ]
        for ours, theirs in zip(plans[0].updates[0][0], plans[1].updates[0][0], strict=True):
            one, two = pack(ours, dict(enumerate(guided))), pack(theirs, dict(enumerate(plain)))
            for name in (field.name for field in fields(PackedBatch) if field.name != "guided"):
                np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
            led = np.isnan(one.logprob)  # an expert's tokens
            other = np.array([guided[tree].guided for tree in one.tree])
            assert one.guided.tolist() == (other | led).tolist()
            assert two.guided.tolist() == led.tolist()
    assert [tree.guided for tree in guided] == [False, True, False, True, False]


def test_an_experts_turns_learn_from_those_who_did_well_after_them_and_have_a_ratio_of_one() -> None:
    """S- is 0, whatever those below lost; what nobody below earned is not computed at all."""
    led = random_trees(11)[-1]
    expert = np.repeat(led.kind == Kind.EXPERT, led.end - led.start)
    led = replace(led, logprob=np.where(expert, 0, led.logprob).astype(np.float32))
    sums = {}
    for good in (0, 3):  # the leaf that earned something
        led.reward[:] = np.arange(led.n_leaves) == good
        stats = TreeStats.of(led)
        plan = BatchPlanner(learner_config(credit="grpo", micro_tokens=400), flat=False).plan([stats])
        row = Row(pack(plan.updates[0][0][0], {0: led}), torch.device("cpu"), trained=True)
        mine = led.kind[row.batch.node[row.scored]] == Kind.EXPERT
        sums[good] = mine.sum(), float(row.batch.s_plus[row.scored][mine].sum())
        assert (row.batch.s_minus[row.scored][mine] == 0).all()
        logprob = torch.linspace(-3, -1, len(row.scored))
        seen = row.loss_tokens(logprob, torch.zeros_like(logprob), 5, None)
        assert (seen.behaviour[mine] == logprob[mine]).all()
        assert (seen.behaviour[~mine] == torch.tensor(row.batch.logprob[row.scored])[~mine]).all()
        assert (seen.staleness[mine] == 0).all()
        assert (row.log_ratio(logprob.double())[mine] == 0).all()
        row.proximal = logprob - 0.5
        assert (row.loss_tokens(logprob, logprob, 5, None).behaviour[mine] == row.proximal[mine]).all()
    assert sums[0][0] == 9, "behind both turns of the expert somebody did well"
    assert sums[0][1] > 0
    assert sums[3] == (0, 0), "only the branch without them did"


@pytest.mark.parametrize("credit", ["grpo", "gigpo", "treerl"])
def test_a_trees_leaves_by_sign_give_m2po_the_bounds_of_its_paths(credit: str) -> None:
    """A shared token counts once for each leaf below it, with the sign of that leaf's advantage."""
    trees = random_trees(3)
    stats = [TreeStats.of(tree) for tree in trees]
    generator = torch.Generator().manual_seed(0)
    moved = [torch.randn(tree.n_tokens, generator=generator, dtype=torch.float64) for tree in trees]
    config = learner_config(credit=credit, micro_tokens=48)
    bounds = []
    for flat in (True, False):
        plan = BatchPlanner(config, flat=flat).plan(stats)
        assert plan.assigned
        ratios, leaves = [], []
        for part in (part for micro in plan.updates[0][0] for part in micro):
            tree, signs = trees[part.tree], torch.from_numpy(signed_leaves(plan.assigned, part))
            for node, sign, mult in zip(part.nodes.tolist(), signs, part.credit[:, 2], strict=True):
                if mult > 0:
                    ratios.append(moved[part.tree][tree.start[node] : tree.end[node]])
                    leaves.append(sign.expand(len(ratios[-1]), 2))
        objective = made("m2po")
        assert isinstance(objective, M2po)
        objective.adapt(torch.cat(ratios), torch.cat(leaves))
        bounds.append((objective.clip_low, objective.clip_high))
    assert bounds[0] == bounds[1]
    assert 0 < bounds[0][0] < 0.5


@pytest.mark.parametrize("correction", [False, True])
def test_a_factor_on_tokens_is_the_same_on_a_tree_and_on_its_paths(correction: bool) -> None:
    """Its statistics count a shared token once per leaf; a factor below 0 turns the signs of all leaves."""
    trees = random_trees(9)  # no leaf's advantage is 0, without which its path is left out
    rng = np.random.default_rng(1)
    for tree in trees:
        tree.entropy[is_model(tree)] = rng.exponential(1.0, int(is_model(tree).sum()))
        tree.entropy[rng.random(tree.n_tokens) < 0.1] = np.nan
    stats = [TreeStats.of(tree) for tree in trees]
    config = learner_config(credit="grpo", micro_tokens=48)
    config.learn.entropy_factor = 2.0
    sums: list[dict[tuple[int, float], np.ndarray]] = []
    for flat in (True, False):
        plan = BatchPlanner(config, flat=flat).plan(stats)
        assert plan.factor
        factors = [np.arange(1, tree.n_leaves + 1) / tree.n_leaves for tree in trees]
        after = reweighed(plan, factors) if correction else plan
        found: dict[tuple[int, float], np.ndarray] = {}
        for micro, parts in zip(plan.updates[0][0], after.updates[0][0], strict=True):
            batch = with_credit_of(pack(micro, dict(enumerate(trees)), factor=plan.factor), parts)
            for i in np.flatnonzero((batch.mult > 0) & ~np.isnan(batch.logprob)).tolist():
                key = int(batch.tree[i]), float(batch.logprob[i])  # no two tokens have one
                here = np.array([batch.s_plus[i], batch.s_minus[i], batch.mult[i]], np.float64)
                found[key] = found.get(key, 0) + here
                assert batch.s_plus[i] >= 0 >= batch.s_minus[i]
            assert (batch.factor < 0).any()
        sums.append(found)
    assert sums[0].keys() == sums[1].keys()
    for key, three in sums[0].items():
        np.testing.assert_allclose(sums[1][key], three, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("flat", [False, True])
def test_a_turns_clip_is_scaled_alike_wherever_its_tokens_are_packed(flat: bool) -> None:
    """By the results of the whole tree, also in rows that hold a part of it, and before padding."""
    trees = random_trees(4)
    stats = [TreeStats.of(tree) for tree in trees]
    objective = made("a2tgpo")
    planner = BatchPlanner(
        learner_config(credit="a2tgpo", micro_tokens=48),
        flat=flat,
        pad_to=16,
        clip_scale=objective.clip_scale,
    )
    plan = planner.plan(stats)
    own = [np.repeat(objective.clip_scale(one), one.length) for one in stats]
    expected = {
        (i, float(tree.logprob[at])): own[i][at]
        for i, tree in enumerate(trees)
        for at in np.flatnonzero(is_model(tree))
    }
    seen: set[float] = set()
    for batch in pack_share(plan, 0, dict(enumerate(trees)))[0]:
        row = Row(batch, torch.device("cpu"), trained=True)
        zero = torch.zeros(len(row.scored))
        given = row.loss_tokens(zero, zero, 0, None).clip_scale
        assert given is not None
        for at, scale in zip(row.scored.tolist(), given.tolist(), strict=True):
            if not np.isnan(batch.logprob[at]):  # an expert's
                assert scale == pytest.approx(expected[int(batch.tree[at]), float(batch.logprob[at])])
                seen.add(round(scale, 3))
        assert (batch.clip_scale[batch.tree < 0] == 1).all()
    assert min(seen) < 1 < max(seen)


@pytest.mark.parametrize("flat", [False, True])
def test_what_the_engine_found_at_a_turns_close_is_the_proximal_policy(flat: bool) -> None:
    """Where it is not known, that is the policy that sampled."""
    rng = np.random.default_rng(2)
    trees = random_trees(5)
    for i, tree in enumerate(trees):
        known = is_model(tree) & (rng.random(tree.n_tokens) < 0.8)
        closed = np.where(known, tree.logprob - rng.random(tree.n_tokens), np.nan).astype(np.float32)
        trees[i] = replace(
            tree, closed_logprob=closed, closed_version=np.where(known, 3, -1).astype(np.int32)
        )
    expected = {
        (i, float(tree.logprob[at])): float(np.nan_to_num(tree.closed_logprob[at], nan=tree.logprob[at]))
        for i, tree in enumerate(trees)
        for at in np.flatnonzero(is_model(tree))
    }
    planner = BatchPlanner(learner_config(credit="grpo", micro_tokens=48), flat=flat)
    differ = 0
    for batch in pack_share(planner.plan([TreeStats.of(tree) for tree in trees]), 0, dict(enumerate(trees)))[
        0
    ]:
        row = Row(batch, torch.device("cpu"), trained=True)
        row.anchor()
        zero = torch.zeros(len(row.scored))
        given = row.loss_tokens(zero, zero, 0, None)
        assert given.anchored
        assert given.proximal is not None
        for at, proximal in zip(row.scored.tolist(), given.proximal.tolist(), strict=True):
            if not np.isnan(mu := float(batch.logprob[at])):  # an expert's
                assert proximal == pytest.approx(expected[int(batch.tree[at]), mu])
                differ += proximal != mu
    assert differ > 20


def test_a_factor_without_entropies_says_what_it_needs() -> None:
    config = learner_config(credit="grpo")
    config.learn.entropy_factor = 0.2
    with pytest.raises(TreeError, match=r"learn\.entropy_factor needs entropies"):
        BatchPlanner(config, flat=False).plan([TreeStats.of(tree) for tree in random_trees(5)])
