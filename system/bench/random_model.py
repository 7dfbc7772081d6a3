"""Models with random weights and trees with random tokens: speed does not ask what a model knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from system.tree.builder import TreeBuilder
from system.tree.record import Kind, Origin, Outcome, Tree


def random_model(path: Path, config: PreTrainedConfig, seed: int, device: str = "cpu") -> Any:
    """A model of ``config``'s shape and dtype with random weights, saved to ``path`` as Hugging Face does."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)  # in its dtype, which a constructor overlooks
    model.save_pretrained(path)
    return model.eval()


def forked_tree(shared: int, own: int, leaves: int, vocab: int, rng: np.random.Generator) -> Tree:
    """A prompt and a MODEL turn, ``shared`` tokens together, then a branch of ``own`` tokens per leaf."""
    prompt = shared - shared // 2
    growth = TreeBuilder("bench", "bench", rng.integers(0, vocab, prompt), budget=leaves)
    turn = growth.node(growth.prompt, Kind.MODEL)
    growth.extend(turn, rng.integers(0, vocab, shared - prompt), -6.0, None, 0)
    for number in range(leaves):
        node = growth.node(turn, Kind.MODEL)
        growth.extend(node, rng.integers(0, vocab, own), -6.0, None, 0)
        growth.score(growth.leaf(node, Outcome.STOPPED, Origin.FORK), float(number), False)
    return growth.close(0.0)
