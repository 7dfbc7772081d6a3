"""Credits and objectives by name, against numbers of the reference functions.

``algorithm_vectors.json`` holds inputs and what the authors' functions make of them (each record's "source"
and "how").
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from system.config import LearnConfig, PartConfig
from system.learn.average import MovingAverage, decay_for
from system.learn.credit.base import assign
from system.learn.objective import LossTokens, make_objective, row_loss
from system.plugins import CREDITS, PluginError
from system.rollout.scoring import overlong
from system.tree.builder import TreeBuilder
from system.tree.factor import EntropyFactor
from system.tree.record import Kind, Origin, Outcome, Tree
from system.tree.stats import TreeStats

VECTORS = {
    record["name"]: record
    for record in json.loads((Path(__file__).parent / "algorithm_vectors.json").read_text())["records"]
}
# What they are for is not there yet, or is tested elsewhere.
LATER = {"m2po (AReaL)"}
ELSEWHERE = {
    "reinforce++-baseline (token-whitened)", "reinforce++ (no group baseline)",  # test_credit.py
    "a2tgpo",  # test_gain.py
    "aepo rollouts",  # tests/rollout/test_branching.py
    "tree identities",  # test_tree_is_its_paths.py
    "rejection: token-RS, MIS (seq_sum_k1), geo-RS (seq_mean_k1), K3-RS, max-K2",  # test_corrections.py
}  # fmt: skip


def numbers(name: str) -> tuple[Any, Any]:
    """A record's inputs and what is expected of them; the record counts as tested."""
    USED.add(name)
    return VECTORS[name]["inputs"], VECTORS[name]["expected"]


USED: set[str] = set()


# Credits ----------------------------------------------------------------------------------------------------


def group(rewards: Sequence[float], task: str = "t") -> TreeStats:
    """A prompt and one MODEL node of three tokens per leaf."""
    return grown(
        [-1, *[0] * len(rewards)], [1, *[3] * len(rewards)], range(1, len(rewards) + 1), rewards, task
    )


def grown(
    parent: Sequence[int],
    tokens: Sequence[int],
    leaf: Sequence[int],
    reward: Sequence[float],
    task: str = "t",
    surprise: Sequence[float | None] = (),
) -> TreeStats:
    """A prompt and MODEL nodes; ``surprise``: -mean log-probability of each node's tokens."""
    growth = TreeBuilder("p", task, [1] * tokens[0], budget=len(leaf))
    nodes = [growth.prompt]
    for node in range(1, len(parent)):
        nodes.append(growth.node(nodes[parent[node]], Kind.MODEL))
        h = (surprise or [0.1] * len(parent))[node]
        growth.extend(nodes[node], np.zeros(tokens[node]), -float(h or 0.0), None, 0)
    for node, value in zip(leaf, reward, strict=True):
        growth.score(growth.leaf(nodes[node], Outcome.STOPPED, Origin.ROOT), value, value > 0)
    return TreeStats.of(growth.close(0.0))


def fixture() -> TreeStats:
    """The tree of the records "tree-grpo" and "at2po-credit"."""
    tree = VECTORS["tree-grpo"]["inputs"]["tree"]
    return grown(tree["parent"], tree["tokens"], tree["leaf"], tree["reward"], surprise=tree["H"])


def of(name: str, batch: Sequence[TreeStats], **options: Any) -> list[list[float]]:
    return [a.tolist() for a in assign(CREDITS.make(name, options), batch)]


@pytest.mark.parametrize("name", ["grpo", "dr-grpo", "rloo"])
def test_credits_of_a_group(name: str) -> None:
    given, expected = numbers(name)
    for key, rewards in given["rewards"].items():
        if len(rewards) > 1:  # the references give a lone leaf its reward, we give it 0
            (a,) = of(name, [group(rewards)])
            assert a == pytest.approx(expected["leaf"][key], abs=2e-6)


def test_gaussian_grpo() -> None:
    given, expected = numbers("g2rpo (gaussian grpo)")
    for a, values in zip(of("g2rpo", [group(r) for r in given["groups"]]), expected, strict=True):
        assert a == pytest.approx(values, abs=1e-6)


def test_ema_grpo_keeps_moments_of_each_task_over_steps_and_a_resume() -> None:
    given, expected = numbers("ema-grpo")
    credit = CREDITS.make("ema-grpo", {})
    for step, state in (("step1", "state1"), ("step2", "state2")):
        rewards, task = given[step]["rewards"], given[step]["task"]
        resumed = CREDITS.make("ema-grpo", {})
        resumed.load_state_dict(json.loads(json.dumps(credit.state_dict())))
        credit = resumed
        answers = assign(credit, [group(r, task[key]) for key, r in rewards.items()])
        for key, a in zip(rewards, answers, strict=True):
            assert a.tolist() == pytest.approx(expected[step][key], abs=1e-6)
        for name, (first, second, _) in expected[state].items():
            assert credit.state_dict()[name] == pytest.approx([first, second], abs=1e-6)
    batch = [group([0, 0, 0, 0, 1], "rare"), group([0] * 60, "rare")]
    assert of("ema-grpo", batch)[0] == pytest.approx(expected["guard_case_H"], abs=2e-6)


def test_tree_grpo() -> None:
    _, expected = numbers("tree-grpo")
    assert of("tree-grpo", [fixture()])[0] == pytest.approx(expected["A"], abs=2e-6)


@pytest.mark.parametrize("mode", ["node_value", "diff_parent", "diff_global", "diff_localglobal"])
def test_at2po(mode: str) -> None:
    _, expected = numbers("at2po-credit")
    assert of("at2po", [fixture()], advantage=mode)[0] == pytest.approx(expected["A"][mode], abs=2e-6)
    mean = of("at2po", [fixture()], children="mean")[0]
    assert mean == pytest.approx(expected["V_child_mean"], abs=2e-6)


def test_vineppo_on_a_tree_with_the_references_values() -> None:
    """Rewards that make the mean below each fork what the reference's Monte Carlo rollouts said."""
    given, expected = numbers("vineppo")
    parent, leaf = [-1, 0, 1, 2, 2, 1, 1, 0, 0, 0, 0], [3, 4, 5, 6, 7, 8, 9, 10]
    tree = grown(parent, [1] * 11, leaf, [1.0, 0.75, 0.25, 0, 0, 0, 0, 0])
    assert tree.mean_reward_below[:3].tolist() == given["mc_values"][:3]
    assert of("vineppo", [tree])[0][1:4] == pytest.approx(expected[:3])


def test_turns_between_two_forks_share_vineppos_advantage() -> None:
    tree = grown([-1, 0, 1, 2, 3, 2], [1] * 6, [4, 5], [1.0, 0.0])
    assert of("vineppo", [tree])[0] == [0, 0, 0, 0.5, 0.5, -0.5]


def test_treerl_by_hand() -> None:
    """Five leaves: c = r - mean of the others, V its mean below, [(V - V_root) + (V - V_parent)] / √n."""
    tree, r = fixture(), np.array([1, 0, 1, 0, 0])
    c = np.array([one - np.delete(r, i).mean() for i, one in enumerate(r)])
    a, a2, b = c[:3].mean(), c[1:3].mean(), c[3:].mean()
    expected = [0, 2 * a / 3**0.5, 2 * c[0] - a, (2 * a2 - a) / 2**0.5, 2 * c[1] - a2, 2 * c[2] - a2]
    expected += [2 * b / 2**0.5, 2 * c[3] - b, 2 * c[4] - b]
    assert of("treerl", [tree])[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("weight", ["average", "group_size"])
def test_treepo_by_hand(weight: str) -> None:
    """Subtrees of the fixture: all five leaves, a's three, a2's two, b's two; then whitened over tokens."""
    tree, r = fixture(), np.array([1.0, 0, 1, 0, 0])
    subtrees = [(5, [0, 1, 2, 3, 4]), (3, [0, 1, 2]), (2, [1, 2]), (2, [3, 4])]
    values = []
    for leaf in range(5):
        mine = [(n, r[leaf] - r[inside].mean()) for n, inside in subtrees if leaf in inside]
        weights = [n if weight == "group_size" else 1 for n, _ in mine]
        values.append(np.average([delta for _, delta in mine], weights=weights))
    flat = np.repeat(values, tree.response_tokens)
    expected = (values - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8)
    assert of("treepo", [tree], weight=weight)[0] == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("norm", ["mean_std", "mean"])
def test_gigpo_by_hand(norm: str) -> None:
    """Two branches from the prompt; the first forks after its tool's result into a short and a longer end."""
    growth = TreeBuilder("p", "t", [1], budget=3)

    def grow(above: int, kind: Kind) -> int:
        node = growth.node(above, kind)
        growth.extend(node, np.ones(2), *((-0.1, None, 0) if kind == Kind.MODEL else ()))
        return node

    first = grow(growth.prompt, Kind.MODEL)
    result = grow(first, Kind.TOOL)
    short = grow(result, Kind.MODEL)
    long = grow(result, Kind.MODEL)
    last = grow(grow(long, Kind.TOOL), Kind.MODEL)
    other = grow(growth.prompt, Kind.MODEL)
    for leaf, (node, reward) in enumerate([(short, 1.0), (last, 1.0), (other, 0.0)]):
        assert growth.leaf(node, Outcome.STOPPED, Origin.ROOT) == leaf
        growth.score(leaf, reward, reward > 0)
    tree = TreeStats.of(growth.close(0.0))

    def normal(*values: float) -> np.ndarray:
        centred = np.array(values) - np.mean(values)
        return centred / (np.std(values, ddof=1) + 1e-6) if norm == "mean_std" else centred

    episode = normal(1, 1, 0)
    at_prompt, at_result = normal(0.9, 0.81, 0.0), normal(1.0, 0.9)
    (a,) = assign(CREDITS.make("gigpo", {"gamma": 0.9, "omega": 2.0, "norm": norm}), [tree])
    assert a[[0, 1, 2], [first, first, other]] == pytest.approx(episode + 2 * at_prompt, abs=1e-5)
    assert a[[0, 1], [short, long]] == pytest.approx(episode[:2] + 2 * at_result, abs=1e-5)
    assert a[1, last] == pytest.approx(episode[1], abs=1e-6)  # nobody else was in that state
    assert a[0, long] == 0


def test_ucpo_gives_the_unlikely_of_the_correct_leaves_more_and_keeps_their_sum() -> None:
    surprise = [None, 0.1, 2.0, 0.5, 0.3]
    tree = grown([-1, 0, 0, 0, 0], [1, 4, 4, 4, 4], [1, 2, 3, 4], [1, 1, 0, 0], surprise=surprise)
    z = np.array([1, 1, -1, -1]) * 0.5 / (np.sqrt(1 / 3) + 1e-8)
    q = np.exp([-0.1, -2.0]) / np.exp([-0.1, -2.0]).sum()
    shares = 0.8 / 2 + 0.2 * (1 / q) / (1 / q).sum()
    (a,) = of("ucpo", [tree])
    assert a == pytest.approx([*(2 * z[:2] * shares), *z[2:]], abs=1e-6)
    assert sum(a) == pytest.approx(0, abs=1e-6)
    assert a[1] > a[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("treepo", {"weight": "x"}),
        ("ucpo", {"tau": 2}),
        ("at2po", {"advantage": "x"}),
        ("at2po", {"children": ""}),
        ("gigpo", {"norm": "x"}),
        ("gigpo", {"gamma": 0}),
    ],
)
def test_an_option_that_cannot_be_is_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match=f"learn.credit.options.{next(iter(options))}="):
        CREDITS.make(name, options)


# Objectives -------------------------------------------------------------------------------------------------


def made(name: str, options: Mapping[str, Any] | None = None, **learn: Any) -> Any:
    return make_objective(LearnConfig(objective=PartConfig(name, dict(options or {})), **learn))


def turns(mask: torch.Tensor) -> torch.Tensor:
    """[B, T] a number for each run of tokens in the mask."""
    begins = mask & ~torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], 1)
    return begins.flatten().cumsum(0).view(mask.shape)


def masked(rows: Sequence[Sequence[float]], mask: torch.Tensor) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)[mask]


OBJECTIVE_RECORDS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("ppo-clip + dual clip", "ppo", {}, {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}),
    ("dapo clip-higher", "ppo", {}, {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0}),
    ("aepo balanced clipping", "aepo", {}, {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}),
    ("cispo", "cispo", {}, {}),
    ("sapo", "sapo", {}, {}),
    ("dppo-tv", "dppo-tv", {}, {}),
    ("topr (ROLL)", "topr", {}, {}),
    ("at2po turn-level ratio", "at2po", {}, {}),
    ("gspo", "gspo", {}, {}),
    ("m2po (authors)", "m2po", {}, {}),
    (
        "decoupled PPO + TIS",
        "decoupled",
        {},
        {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "tis_cap": 2.0},
    ),
]


@pytest.mark.parametrize(("record", "name", "options", "learn"), OBJECTIVE_RECORDS, ids=lambda x: str(x)[:16])
def test_losses_and_gradients(record: str, name: str, options: dict[str, Any], learn: dict[str, Any]) -> None:
    given, expected = numbers(record)
    mask = torch.tensor(given["mask"]) > 0
    a = torch.tensor(given["advantage_per_sequence"], dtype=torch.float64)[:, None].expand(mask.shape)
    weight = torch.ones(mask.shape, dtype=torch.float64) / mask.sum()
    if VECTORS[record]["hyper"]["agg"] == "seq-mean-token-mean":
        weight = (1 / (mask.sum(1, keepdim=True) * len(mask))).expand(mask.shape).double()
    logprob = masked(given["logp_new"], mask).requires_grad_()
    old, w = masked(given["logp_old"], mask), weight[mask]
    engine = masked(given["logp_engine"], mask) if "logp_engine" in given else old
    tokens = LossTokens(
        logprob=logprob,
        entropy=torch.zeros_like(logprob),
        behaviour=engine,
        s_plus=w * a[mask].clamp(min=0),
        s_minus=w * a[mask].clamp(max=0),
        mult=w,
        staleness=torch.zeros_like(logprob),
        node=turns(mask)[mask],
        path=torch.arange(len(mask))[:, None].expand(mask.shape)[mask],
        proximal=old,
    )
    objective = made(name, options, **learn)
    if objective.adapts:
        objective.adapt(logprob.detach() - old, torch.stack([a[mask] > 0, a[mask] < 0], 1))
        assert objective.clip_low == pytest.approx(expected["clip_low"], abs=2e-6)
        assert objective.clip_high == pytest.approx(expected["clip_high"], abs=2e-6)
    loss, _ = row_loss(objective, tokens)
    loss.backward()
    assert float(loss) == pytest.approx(expected["loss"], abs=2e-6)
    gradient = torch.zeros(mask.shape, dtype=torch.float64)
    assert logprob.grad is not None
    gradient[mask] = logprob.grad
    np.testing.assert_allclose(gradient, expected["grad"], atol=2e-6)


def test_aepo_weighs_advantages_by_entropy() -> None:
    """The factors, and the loss and gradient of PPO with them.  A path per row; the masked is a tool's."""
    given, expected = numbers("aepo entropy-aware advantage")
    mask = np.array(given["mask"]) > 0
    trees: list[Tree] = []
    for row, known in zip(given["entropy"], mask, strict=True):
        growth = TreeBuilder("p", "t", [1], budget=1)
        node = growth.prompt
        for h, is_model in zip(row, known.tolist(), strict=True):
            node = growth.node(node, Kind.MODEL if is_model else Kind.TOOL)
            if is_model:
                growth.extend(node, [1], [-1.0], [h], 0)
            else:
                growth.extend(node, [1])
        growth.score(growth.leaf(node, Outcome.STOPPED, Origin.ROOT), 1.0, True)
        trees.append(growth.close(0.0))
    stats = [TreeStats.of(tree) for tree in trees]
    factor = EntropyFactor.over(0.2, stats, [np.ones(1)] * len(trees))
    found = np.where(mask, np.stack([factor.of(tree.entropy[1:]) for tree in trees]), 0)
    np.testing.assert_allclose(found, expected["factor"], atol=2e-6)

    where = torch.from_numpy(mask)
    a = torch.tensor(given["advantage_per_sequence"], dtype=torch.float64)[:, None].expand(mask.shape)[where]
    w = torch.full_like(a, 1 / len(a))
    weighed = w * a * torch.from_numpy(found)[where]
    logprob = masked(given["logp_new"], where).requires_grad_()
    old, zero = masked(given["logp_old"], where), torch.zeros_like(w)
    tokens = LossTokens(
        logprob=logprob,
        entropy=zero,
        behaviour=old,
        s_plus=weighed.clamp(min=0),
        s_minus=weighed.clamp(max=0),
        mult=w,
        staleness=zero,
        node=turns(where)[where],
        path=torch.arange(len(where))[:, None].expand(where.shape)[where],
        proximal=old,
    )
    loss, _ = row_loss(made("ppo", {}, clip_low=0.2, clip_high=0.2, dual_clip=3.0), tokens)
    loss.backward()
    assert float(loss) == pytest.approx(expected["loss"], abs=2e-6)
    assert logprob.grad is not None
    np.testing.assert_allclose(logprob.grad, np.array(expected["grad"])[mask], atol=2e-6)


@pytest.mark.parametrize(
    ("record", "column", "options", "cap"),
    [
        ("tis", "weight", {}, 2.0),
        ("icepop", "weight_0_5_5", {"tis": "mask", "tis_low": 0.5}, 5.0),
        ("icepop", "weight_0_5_2", {"tis": "mask", "tis_low": 0.5}, 2.0),
    ],
)
def test_token_corrections(record: str, column: str, options: dict[str, Any], cap: float) -> None:
    """At r = 1 the gradient of a token of S⁺ = 1 is minus its weight."""
    given, expected = numbers(record)
    mask = torch.tensor(given["mask"]) > 0
    logprob = masked(given["logp_train"], mask).requires_grad_()
    ones = torch.ones_like(logprob)
    tokens = LossTokens(
        logprob=logprob,
        entropy=0 * ones,
        behaviour=masked(given["logp_engine"], mask),
        s_plus=ones,
        s_minus=0 * ones,
        mult=ones,
        staleness=0 * ones,
        node=torch.zeros(len(ones), dtype=torch.int64),
        path=torch.zeros(len(ones), dtype=torch.int64),
        proximal=logprob.detach(),
    )
    made("decoupled", options, tis_cap=cap).loss(tokens)[0].backward()
    assert logprob.grad is not None
    np.testing.assert_allclose(-logprob.grad, masked(expected[column], mask), atol=2e-6)


def test_a_log_linear_proximal_policy() -> None:
    """AReaL's version 7 is the one on its way: the batch began with 6."""
    given, expected = numbers("log-linear proximal (A-3PO)")
    version = np.array(given["token_version"][0])
    sampled = version >= 0
    mu, theta = (torch.tensor(given[name][0])[sampled] for name in ("logp_behaviour", "logp_theta"))
    age = torch.tensor(given["current_version"] - 1 - version[sampled], dtype=torch.float32)
    ones, zeros = torch.ones_like(mu), torch.zeros(len(mu), dtype=torch.int64)
    tokens = LossTokens(theta, 0 * ones, mu, ones, 0 * ones, ones, age, zeros, zeros)
    proximal = made("a3po").proximal(tokens)
    np.testing.assert_allclose(proximal, np.array(expected["loglinear"])[sampled], atol=2e-6)


def test_overlong_shaping() -> None:
    given, expected = numbers("overlong shaping (DAPO soft)")
    options = {name: VECTORS["overlong shaping (DAPO soft)"]["hyper"][name] for name in ("buffer", "penalty")}
    shaped = [given["reward"] + overlong(n, limit=200, **options) for n in given["lengths"]]
    assert shaped == pytest.approx(expected)


def test_a_correction_that_cannot_be_is_refused() -> None:
    for options in ({"tis": "drop"}, {"tis_low": 3.0}, {"tis_low": -1.0}):
        with pytest.raises(PluginError, match="truncate, mask or none"):
            made("decoupled", options, tis_cap=2.0)


def test_dppo_kl_keeps_what_is_near_or_leads_back() -> None:
    p, q = torch.tensor([0.5, 0.9, 0.1, 0.52]), torch.tensor([0.5, 0.3, 0.6, 0.5])
    up, down = made("dppo-kl").kept(p, q)
    assert up.tolist() == [True, False, True, True]  # where the advantage is positive
    assert down.tolist() == [True, True, False, True]
    near_one = made("dppo-kl").kept(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1e-30]))
    assert [bool(x[0]) for x in near_one] == [True, True]


def test_ppo_ewma_averages_the_weights() -> None:
    given, expected = numbers("ppo-ewma proximal weights")

    def averaged(lag: int, reset_at: int = -1) -> tuple[list[float], float]:
        model, mean = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        values: list[float] = []
        average = MovingAverage(mean, decay_for(lag))
        for step, theta in enumerate(given["theta_k"]):
            torch.nn.init.constant_(model.weight, theta)
            if step in (0, reset_at):
                average.reset(model)
            else:
                average.update(model)
            values.append(float(mean.weight))
        return values, average.weight

    assert averaged(2)[0] == pytest.approx(expected["W2"], abs=1e-5)
    assert averaged(4)[0] == pytest.approx(expected["W4"], abs=1e-5)
    assert averaged(2, reset_at=3)[0] == pytest.approx(expected["W2_reset_at_step_3"], abs=1e-5)
    assert averaged(2)[1] == expected["total_weight_W2"]


def test_every_record_is_used_or_said_to_come_later() -> None:
    """Runs after the tests that use them (a file's tests stay together, in order)."""
    if len(USED) < 3:
        pytest.skip("the tests that use the records did not run")
    assert set(VECTORS) == USED | LATER | ELSEWHERE
    assert not USED & LATER
