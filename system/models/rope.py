"""Rotary position embedding (RoFormer, Su et al., 2021) and the ways to stretch it to longer contexts.

A head of d dimensions turns its d/2 pairs, each by its frequency times the token's position.  A stretched
model turns the slow pairs more slowly than it was trained to.  Learner and embedded engine compute angles
here, in float32 whatever the model's dtype, with the very operations of transformers, so that they agree to
the last bit.

======== ====================================================================================================
default  each pair at its own frequency, theta ** (-2i / d)
linear   all of them divided by the factor (position interpolation)
llama3   slow waves divided by it, fast ones kept, those between mixed (Llama 3.1 and later)
yarn     the same, mixed by the number of turns within the original context, and cosines and sines times a
         factor (YaRN, Peng et al., 2023): Qwen2.5 and Qwen3 beyond 32,768 tokens
======== ====================================================================================================

What is read needs no torch; only the frequencies do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from system.models.reading import UnsupportedModel, number, whole

if TYPE_CHECKING:
    import torch

THETA = 10_000.0  # the base, where a file names none
Kind = Literal["default", "linear", "llama3", "yarn"]
NOT_COMPUTED = {
    "dynamic": "its frequencies change with the length of a sequence, so that tokens computed before would "
    "have to be computed anew",
    "longrope": "it has one set of frequencies for short sequences and one for long ones",
}


@dataclass(frozen=True, slots=True)
class Rope:
    """How the heads of a model turn."""

    theta: float = THETA  # base of the wavelengths
    kind: Kind = "default"
    factor: float = 1.0  # how many times longer contexts are than `original`
    original: int = 0  # positions it was trained on before (llama3, yarn)
    slow: float = 1.0  # llama3, yarn: waves with no more turns than this within `original` are slow
    fast: float = 1.0  # those with as many as this are fast
    scale: float = 1.0  # cosines and sines are multiplied with it (yarn)
    truncate: bool = True  # yarn: the bounds of slow and fast are whole dimensions
    disputed: str = ""  # yarn: what the file sets that SGLang reads otherwise than transformers

    @classmethod
    def read(cls, config: Mapping[str, Any], positions: int) -> Rope:
        """From a ``config.json`` whose ``max_position_embeddings`` are ``positions``.

        transformers 5 writes ``rope_parameters``, earlier versions ``rope_scaling`` (with ``type`` for
        ``rope_type``) and ``rope_theta`` beside it.  Raises :class:`UnsupportedModel` for other kinds.
        """
        given: Any = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(given, Mapping):
            raise UnsupportedModel(f"rope_parameters {given!r}; it is an object")
        if nested := [name for name, value in given.items() if isinstance(value, Mapping)]:
            raise UnsupportedModel(f"rope_parameters of {nested[0]}: layers that turn differently")
        share = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if share not in (None, 1):
            raise UnsupportedModel(f"partial_rotary_factor {share!r}: only whole heads are rotated here")
        theta = number(given, "rope_theta", number(config, "rope_theta", THETA))
        kind: Any = given.get("rope_type", given.get("type", "default"))
        match kind:
            case "default":
                return cls(theta)
            case "linear":
                return cls(theta, kind, _factor(given))
            case "llama3":
                slow, fast = number(given, "low_freq_factor"), number(given, "high_freq_factor")
                if fast <= slow:
                    raise UnsupportedModel(
                        f"high_freq_factor {fast:g} must be above low_freq_factor {slow:g}"
                    )
                return cls(theta, kind, _factor(given), _original(config, given, positions), slow, fast)
            case "yarn":
                original = _original(config, given, positions)
                factor = _factor(given, positions / original if given.get("factor", 0) is None else None)
                slow, fast = number(given, "beta_slow", 1.0), number(given, "beta_fast", 32.0)
                truncate = bool(given.get("truncate", True))
                scale, disputed = _yarn_scale(given, factor), _disputed(given)
                return cls(theta, kind, factor, original, slow, fast, scale, truncate, disputed)
            case _:
                why = f" ({NOT_COMPUTED[kind]})" if kind in NOT_COMPUTED else ""
                raise UnsupportedModel(f"rope_type {kind!r}{why}; supported: default, linear, llama3, yarn")

    def positions(self, stated: int) -> int:
        """Positions that a model knows whose ``max_position_embeddings`` are ``stated``.

        Qwen's documentation adds YaRN to a ``config.json`` and leaves that number as it was.
        """
        reach = {"linear": stated * self.factor, "yarn": self.original * self.factor}
        return max(stated, int(reach.get(self.kind, 0)))

    def frequencies(self, dimensions: int) -> torch.Tensor:
        """``[d/2]`` float32 on the CPU: radians per position of each pair of a head of ``dimensions``."""
        import torch  # only here: plans read models without it

        own = 1.0 / self.theta ** (torch.arange(0, dimensions, 2, dtype=torch.float32) / dimensions)
        match self.kind:
            case "default":
                return own
            case "linear":
                return own / self.factor
            case "llama3":
                return self._llama3(own)
            case "yarn":
                return self._yarn(own, dimensions)

    def _llama3(self, own: torch.Tensor) -> torch.Tensor:
        import torch

        wave = 2 * math.pi / own
        between = (self.original / wave - self.slow) / (self.fast - self.slow)
        mixed = (1 - between) * own / self.factor + between * own
        kept = torch.where(wave < self.original / self.fast, own, mixed)
        return torch.where(wave > self.original / self.slow, own / self.factor, kept)

    def _yarn(self, own: torch.Tensor, dimensions: int) -> torch.Tensor:
        import torch

        def dimension(turns: float) -> float:
            """That whose wave turns so often within the original context."""
            wave = self.original / (turns * 2 * math.pi)
            return dimensions * math.log(wave) / (2 * math.log(self.theta))

        low, high = dimension(self.fast), dimension(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dimensions - 1)
        if low == high:
            high += 0.001
        ramp = ((torch.arange(dimensions // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        fast = 1 - ramp
        waves = self.theta ** (torch.arange(0, dimensions, 2, dtype=torch.float32) / dimensions)
        return 1.0 / (self.factor * waves) * (1 - fast) + own * fast


def turns(
    frequencies: torch.Tensor, scale: float, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[N, d/2]`` in float32 for ``position`` ``[N]``; ``scale``: :attr:`Rope.scale`."""
    angles = position.float()[:, None] * frequencies
    return angles.cos() * scale, angles.sin() * scale


def _factor(given: Mapping[str, Any], default: float | None = None) -> float:
    if (factor := number(given, "factor", default)) < 1:
        raise UnsupportedModel(f"rope factor {factor:g}; it is a number from 1")
    return factor


def _original(config: Mapping[str, Any], given: Mapping[str, Any], positions: int) -> int:
    """Some files have it beside ``rope_parameters``; in transformers it counts more there."""
    name = "original_max_position_embeddings"
    return whole(config if config.get(name) else given, name, positions)


def _yarn_scale(given: Mapping[str, Any], factor: float) -> float:
    def grown(by: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    if given.get("attention_factor") is not None:
        return number(given, "attention_factor")
    if given.get("mscale") and given.get("mscale_all_dim"):
        return grown(number(given, "mscale")) / grown(number(given, "mscale_all_dim"))
    return grown()


def _disputed(given: Mapping[str, Any]) -> str:
    """SGLang 0.5.23 (``layers/rotary_embedding/yarn.py``) knows no ``attention_factor``, has two factors that
    transformers does not know, and takes a 0 in ``mscale`` and ``mscale_all_dim`` for a number, where it
    means to transformers that they are not set.
    """
    if given.get("attention_factor") is not None:
        return "attention_factor"
    for name in ("attn_factor", "extrapolation_factor"):
        if given.get(name, 1) != 1:
            return name
    both = (given.get("mscale"), given.get("mscale_all_dim"))
    return "mscale" if None not in both and not all(both) else ""
