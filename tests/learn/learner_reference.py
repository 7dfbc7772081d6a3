"""What the learner is checked against: tiny Hugging Face models, random trees, the flat-path loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from family_models import as_in_files

from system.config import Config, LearnConfig, PartConfig
from system.learn.aggregate import leaf_weights
from system.learn.batch import BatchPlanner
from system.learn.correction import LeafRatios
from system.learn.credit.base import assign
from system.learn.divergence import MEASURES, divergence
from system.models.adapter import Adapter, factors
from system.models.families.base import NAMES
from system.tree.pack import PackedBatch, pack, pack_share
from system.tree.plan import plan_update
from system.tree.record import Kind, Outcome, Tree, validate
from system.tree.stats import TreeStats

VOCAB = 151  # odd, so that two tensor-parallel ranks pad it

# (kind, tokens, ends a leaf, children): a prompt, forks on several levels, a fork after a tool result, a
# leaf that ends where a sibling goes on, and a one-token leaf.
SHAPE: Any = (
    Kind.PROMPT, 17, False, [
        (Kind.MODEL, 6, False, [
            (Kind.TOOL, 5, False, [
                (Kind.MODEL, 7, True, [(Kind.TOOL, 3, False, [(Kind.MODEL, 9, True, [])])]),
                (Kind.MODEL, 1, True, []),
                (Kind.MODEL, 11, True, []),
            ]),
        ]),
        (Kind.MODEL, 13, True, []),
        (Kind.MODEL, 4, False, [
            (Kind.TOOL, 6, False, [(Kind.MODEL, 8, True, []), (Kind.MODEL, 5, True, [])]),
        ]),
    ],
)  # fmt: skip
# Two turns of an expert, behind each of which branches of the model go on, and one branch without them.
LED: Any = (
    Kind.PROMPT, 8, False, [
        (Kind.EXPERT, 4, False, [
            (Kind.TOOL, 3, False, [
                (Kind.EXPERT, 5, False, [
                    (Kind.TOOL, 2, False, [(Kind.MODEL, 6, True, []), (Kind.MODEL, 3, True, [])]),
                ]),
                (Kind.MODEL, 7, True, []),
            ]),
        ]),
        (Kind.MODEL, 9, True, []),
    ],
)  # fmt: skip
CHAIN: Any = (Kind.PROMPT, 9, False, [(Kind.MODEL, 14, True, [])])
STAR: Any = (Kind.PROMPT, 12, False, [(Kind.MODEL, n, True, []) for n in (3, 8, 8, 5)])


def save_tiny_model(
    path: Path,
    family: str,
    *,
    tied: bool,
    rope: str = "default",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    file_size: str = "1GB",
    **overrides: Any,
) -> None:
    """A random Hugging Face model whose every tensor matters (norms and biases off their initial values)."""
    from family_models import family_config
    from transformers import AutoModelForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
    }
    if family != "qwen2":
        shape["head_dim"] = 32  # not hidden_size / heads, on purpose
    config = family_config(family, tied, rope, **(shape | overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    model.to(dtype).save_pretrained(path, max_shard_size=file_size)


def load_hf(path: str | Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()


def make_tree(
    shape: Any, rng: np.random.Generator, *, prompt: str = "p", vocab: int = VOCAB, guide: int = 0
) -> Tree:
    """A tree of the given shape with random tokens, rewards and behaviour log-probabilities.

    With a ``guide`` it was sampled from another, longer prompt than its root.
    """
    start, parent, kind, leaf = [], [], [], []
    total = 0

    def grow(node: Any, above: int) -> None:
        nonlocal total
        node_kind, length, ends, children = node
        here = len(start)
        start.append(total)
        parent.append(above)
        kind.append(int(node_kind))
        total += length
        if ends:
            leaf.append(here)
        for child in children:
            grow(child, here)

    grow(shape, -1)
    model = np.repeat(np.array(kind) == Kind.MODEL, np.diff([*start, total]))
    n = len(leaf)
    tree = Tree(
        prompt_id=prompt,
        task="test",
        tokens=rng.integers(0, vocab, total).astype(np.int32),
        logprob=np.where(model, rng.normal(-4.0, 1.0, total), 0).astype(np.float32),
        entropy=np.full(total, np.nan, np.float32),
        version=np.where(model, rng.integers(3, 6, total), -1).astype(np.int32),
        start=np.array(start, np.int32),
        parent=np.array(parent, np.int32),
        kind=np.array(kind, np.int8),
        leaf=np.array(leaf, np.int32),
        reward=rng.normal(0.0, 1.0, n).astype(np.float32),
        correct=np.zeros(n, np.int8),
        outcome=np.full(n, int(Outcome.STOPPED), np.int8),
        origin=np.zeros(n, np.int8),
        budget=n,
        sampled_prompt=np.arange(40 if guide else 0, dtype=np.int32),
        guide=guide,
    )
    validate(tree)
    return tree


def make_trees(seed: int) -> list[Tree]:
    rng = np.random.default_rng(seed)
    shapes = (SHAPE, CHAIN, STAR, SHAPE, STAR)
    trees = [make_tree(shape, rng, prompt=f"p{i}", guide=i % 2) for i, shape in enumerate(shapes)]
    return [taught(rescored(tree, np.random.default_rng([seed, i])), i) for i, tree in enumerate(trees)]


def rescored(tree: Tree, rng: np.random.Generator) -> Tree:
    """The same tree, most of whose turns were scored when they ended, under weights a version later."""
    known = np.repeat((tree.kind == Kind.MODEL) & (rng.random(tree.n_nodes) < 0.8), tree.end - tree.start)
    noise = rng.normal(0.0, 0.5, tree.n_tokens).astype(np.float32)
    return replace(
        tree,
        closed_logprob=np.where(known, tree.logprob + noise, np.float32(np.nan)),
        closed_version=np.where(known, 6, -1).astype(np.int32),
    )


def taught(tree: Tree, seed: int) -> Tree:
    """The same tree, most of whose turns a teacher has scored."""
    rng = np.random.default_rng([seed, 1])
    known = np.repeat((tree.kind == Kind.MODEL) & (rng.random(tree.n_nodes) < 0.8), tree.end - tree.start)
    scores = rng.normal(-3.0, 1.0, tree.n_tokens).astype(np.float32)
    return replace(tree, teacher_logprob=np.where(known, scores, np.float32(np.nan)))


def path_tokens(tree: Tree, leaf: int) -> np.ndarray:
    """Indices of the tokens on the path to a leaf, in order."""
    return np.concatenate([np.arange(tree.start[node], tree.end[node]) for node in tree.path(leaf)])


def is_model(tree: Tree) -> np.ndarray:
    return np.repeat(tree.kind == Kind.MODEL, tree.end - tree.start)


def path_logprobs(
    model: Any, tokens: np.ndarray, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """[n - 1] log-probabilities of tokens 1.. and [n - 1] entropies, of one path on its own."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    logp = (model(ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
    return logp.gather(-1, ids[1:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def flat_loss(
    model: Any,
    trees: Sequence[Tree],
    advantages: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
    learn: LearnConfig,
    *,
    temperature: float = 1.0,
    reference: Any = None,
    proximal: Any = None,
    teacher_coef: float = 0.0,
) -> torch.Tensor:
    """The step's loss by its definition, path by path, in PPO's own words (minimum of two products).

    ``proximal``: the model at the start of the batch; the current one by default.
    """
    correction = learn.correction
    total = torch.zeros(())
    for tree, gains, w in zip(trees, advantages, weights, strict=True):
        for leaf in range(tree.n_leaves):
            index = path_tokens(tree, leaf)
            logp, entropy = path_logprobs(model, tree.tokens[index], temperature)
            behaviour = torch.from_numpy(tree.logprob[index][1:])
            mask = torch.from_numpy(is_model(tree)[index][1:])
            start = logp.detach()
            if proximal is not None:
                with torch.no_grad():
                    start, _ = path_logprobs(proximal, tree.tokens[index], temperature)
            if learn.proximal == "closed":
                closed = torch.from_numpy(tree.closed_logprob[index][1:])
                start = torch.where(closed.isnan(), behaviour, closed)
            a = float(gains[leaf]) * leaf_factor(correction, (start - behaviour)[mask])
            if learn.objective.name == "decoupled":
                ratio = (logp - start).exp()
                scale = (start - behaviour).exp().clamp(max=learn.tis_cap)
                if learn.objective.options.get("tis") == "none":
                    scale = torch.ones_like(scale)
            else:
                ratio = (logp - behaviour).exp()
                scale = torch.ones_like(ratio)
            gain = torch.minimum(ratio * a, ratio.clamp(1 - learn.clip_low, 1 + learn.clip_high) * a)
            if learn.dual_clip > 0 and a < 0:
                gain = torch.maximum(gain, torch.tensor(learn.dual_clip * a))
            each = -scale * gain - learn.entropy_coef * entropy
            if learn.kl_coef:
                with torch.no_grad():
                    anchor, _ = path_logprobs(reference, tree.tokens[index], temperature)
                d = anchor - logp
                each = each + learn.kl_coef * (d.exp() - d - 1)
            if teacher_coef:
                gap = (logp.detach() - torch.from_numpy(tree.teacher_logprob[index][1:])).nan_to_num(0.0)
                scale = (logp.detach() - behaviour).exp().clamp(max=learn.tis_cap)
                each = each + teacher_coef * scale * gap * (logp - logp.detach() + 1)
            total = total + float(w[leaf]) * each[mask].sum()
    return total


def path_ratios(paths: Sequence[torch.Tensor]) -> LeafRatios:
    """Of n paths, each by its tokens' log ρ."""
    return LeafRatios(
        torch.tensor([float(len(d)) for d in paths], dtype=torch.float64),
        torch.stack([torch.stack([divergence(measure, d).sum() for measure in MEASURES]) for d in paths]),
        torch.stack([d.min() for d in paths]),
        torch.stack([d.max() for d in paths]),
    )


def m2po_clip(
    model: Any, trees: Sequence[Tree], advantages: Sequence[np.ndarray], budget: float
) -> tuple[float, float]:
    """M2PO's ε below and above by its definition, over the harmful tokens of all paths."""
    squares: list[float] = []
    for tree, gains in zip(trees, advantages, strict=True):
        for leaf in range(tree.n_leaves):
            index = path_tokens(tree, leaf)
            with torch.no_grad():
                logp, _ = path_logprobs(model, tree.tokens[index])
            d = (logp.numpy() - tree.logprob[index][1:])[is_model(tree)[index][1:]]
            squares += (d[d * float(gains[leaf]) > 0].astype(np.float64) ** 2).tolist()
    assert np.mean(squares) > budget
    fits = [limit for limit in (0.0, *squares) if np.minimum(squares, limit).mean() < budget]
    tau = max(fits) ** 0.5 - 1e-6  # the token that sets it is clipped
    return 1 - float(np.exp(-tau)), float(np.exp(tau)) - 1


def leaf_factor(correction: PartConfig, log_ratio: torch.Tensor) -> float:
    """The weight of a path with these log ρ, for the corrections that the tests use."""
    mean = float(log_ratio.mean().exp())
    match correction.name:
        case "none":
            return 1.0
        case "seq-tis":
            assert correction.options == {"over": "mean"}
            return min(mean, 2.0)
        case "geo-reject":
            return float(correction.options["low"] <= 1 / mean <= correction.options["high"])
        case name:
            raise AssertionError(name)


def gradients(model: Any) -> dict[str, np.ndarray]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: tensor.numpy().copy() for n, tensor in as_in_files(found).items()}


def of_new_adapters(
    gradient: dict[str, np.ndarray], adapter: Adapter, seed: int = 0
) -> dict[str, np.ndarray]:
    """The gradient of adapters as they begin, of that of all weights by Hugging Face names: where B is zero,
    G of W + s·B A is s·G Aᵀ of B, and zero of A.
    """
    from system.learn.lora import drawn  # Megatron, seconds

    found: dict[str, np.ndarray] = {}
    for name, of_weight in gradient.items():
        part = next((one for one in adapter.parts if name.endswith(NAMES[one])), None)
        if part is not None:
            a, b = factors(name)
            begun = drawn(a, (adapter.rank, of_weight.shape[1]), seed).numpy()
            found |= {a: np.zeros_like(begun), b: adapter.scale * of_weight @ begun.T}
    return found


def relative_distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """‖a - b‖ / ‖b‖ over all tensors together."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    error = sum(float(((a[n].astype(np.float64) - b[n]) ** 2).sum()) for n in b)
    return float(np.sqrt(error / sum(float((b[n].astype(np.float64) ** 2).sum()) for n in b)))


def pack_whole(trees: Sequence[Tree], pad_to: int = 1) -> PackedBatch:
    """All trees in one row, every leaf with advantage and weight 1."""
    ones = [np.ones(t.n_leaves, np.float32) for t in trees]
    budget = sum(t.n_tokens for t in trees) + pad_to
    ((micro_batch,),) = plan_update([TreeStats.of(t) for t in trees], ones, ones, budget=budget)
    return pack(micro_batch, dict(enumerate(trees)), pad_to)


def train(trainer: Any, trees: Sequence[Tree]) -> dict[str, float]:
    """What a learner rank does with a batch: plan it, pack its own share, step; at weight version 6."""
    plan = trainer.planner.plan([TreeStats.of(tree) for tree in trees])
    share = pack_share(plan, trainer.layout.dp_rank, dict(enumerate(trees)))
    return trainer.train(plan, share, version=6)


def supervise(trainer: Any, trees: Sequence[Tree], lr: float) -> dict[str, float]:
    plan = trainer.planner.supervised([TreeStats.of(tree) for tree in trees])
    (micro_batches,) = pack_share(plan, trainer.layout.dp_rank, dict(enumerate(trees)))
    return trainer.supervise(micro_batches, lr)


def credit_of(trees: Sequence[Tree], config: Config) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per tree: the advantage and the weight of each leaf."""
    planner, stats = BatchPlanner(config, flat=False), [TreeStats.of(tree) for tree in trees]
    return assign(planner.credit, stats), leaf_weights(planner.aggregate, stats)


def learner_config(tp: int = 1, dp: int = 1, **learn: Any) -> Config:
    config = Config()
    defaults = {"micro_tokens": 256, "grad_clip": 0.0, "lr": 0.0, "weight_decay": 0.0}
    for name, value in (defaults | learn | {"tp": tp, "dp": dp}).items():
        assert hasattr(config.learn, name), name
        part = isinstance(value, str) and isinstance(getattr(config.learn, name), PartConfig)
        setattr(config.learn, name, PartConfig(value) if part else value)
    return config
