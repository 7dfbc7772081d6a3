"""Adapters (LoRA) of several weight versions beside one set of base weights.

A sequence ends with the adapters that it began with: an update adds a version, and one that no sequence uses
any more goes.  All versions lie in one pair of matrices per projection, A one below the other and B side by
side, so that a step has two thin products more per projection, however many versions run; a mask per token
takes what belongs to others out of what is between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from system.engine.embedded.weights import STACKED
from system.models.adapter import Adapter, factors
from system.models.shape import ModelShape

FIELDS = ("qkv", "out", "gate_up", "down")  # of LayerWeights


@dataclass(frozen=True, slots=True)
class Factors:
    """What is added to one matrix product x·Wᵀ: K versions of r rows each."""

    a: Tensor  # [K·r, in]
    b: Tensor  # [out, K·r]

    def add(self, x: Tensor, product: Tensor, mask: Tensor) -> Tensor:
        """``product`` with each token's own version added; ``mask`` ``[T, K]``: the version's scale, else
        0.
        """
        low = F.linear(x, self.a).view(len(x), mask.size(1), -1) * mask[..., None]
        return product + F.linear(low.flatten(1), self.b)


Layers = tuple[dict[str, Factors], ...]  # of each layer, by field of LayerWeights


@dataclass(frozen=True)
class AdapterWeights:
    """Adapters of one version, fused as the model's weights are."""

    adapter: Adapter
    layers: Layers


def fuse_adapters(
    shape: ModelShape, adapter: Adapter, tensors: Mapping[str, Tensor], device: torch.device
) -> AdapterWeights:
    """Copy complete, checked adapters, by PEFT's names, into the engine's."""
    layers: list[dict[str, Factors]] = []
    for layer in range(shape.layers):
        fields: dict[str, Factors] = {}
        for field in FIELDS:
            if not (parts := _adapted(adapter, field)):
                continue
            pairs = {part: [tensors[one] for one in factors(shape.tensor(part, layer))] for part in parts}
            first = pairs[parts[0]][0]
            sizes = {part: shape.layer_parts(0)[part][0] for part in STACKED[field]}
            b = first.new_zeros(sum(sizes.values()), adapter.rank * len(parts))
            for place, row in _blocks(adapter, field, sizes):
                b[row, place] = pairs[parts[place.start // adapter.rank]][1]
            a = torch.cat([pairs[part][0] for part in parts])
            fields[field] = Factors(a.to(device), b.to(device))
        layers.append(fields)
    return AdapterWeights(adapter, tuple(layers))


def unfuse_adapters(shape: ModelShape, held: AdapterWeights) -> Iterator[tuple[str, Tensor]]:
    """The held adapters under PEFT's names: the inverse of :func:`fuse_adapters`."""
    adapter = held.adapter
    for layer, fields in enumerate(held.layers):
        for field, pair in fields.items():
            sizes = {part: shape.layer_parts(0)[part][0] for part in STACKED[field]}
            blocks = _blocks(adapter, field, sizes)
            for part, (place, row) in zip(_adapted(adapter, field), blocks, strict=True):
                names = factors(shape.tensor(part, layer))
                yield from zip(names, (pair.a[place], pair.b[row, place]), strict=True)


def _adapted(adapter: Adapter, field: str) -> list[str]:
    """The parts of a field that have adapters."""
    return [part for part in STACKED[field] if part in adapter.parts]


def _blocks(adapter: Adapter, field: str, sizes: Mapping[str, int]) -> list[tuple[slice, slice]]:
    """Of each such part: its place in the low rank, and its rows among the field's outputs."""
    blocks: list[tuple[slice, slice]] = []
    row = place = 0
    for part, size in sizes.items():
        if part in adapter.parts:
            blocks.append((slice(place, place + adapter.rank), slice(row, row + size)))
            place += adapter.rank
        row += size
    return blocks


class AdapterStack:
    """The versions that sequences run with, the newest last."""

    def __init__(self) -> None:
        self._held: dict[int, AdapterWeights] = {}
        self.layers: Layers = ()
        self._scale = 0.0

    def __bool__(self) -> bool:
        return bool(self._held)

    @property
    def versions(self) -> list[int]:
        return [*self._held]

    @property
    def newest(self) -> AdapterWeights:
        return [*self._held.values()][-1]

    def add(self, version: int, weights: AdapterWeights) -> None:
        """``weights`` are what sequences begin with from now on."""
        self._held.pop(version, None)
        self._held[version] = weights
        self._scale = weights.adapter.scale
        self._stack()

    def keep(self, versions: set[int]) -> None:
        """Forget all but these and the newest."""
        gone = [version for version in self.versions[:-1] if version not in versions]
        for version in gone:
            del self._held[version]
        if gone:
            self._stack()

    def clear(self) -> None:
        self._held, self.layers = {}, ()

    def mask(self, versions: list[int]) -> Tensor:
        """[N, K] for N sequences of these versions; zeros for one that began before there were adapters."""
        own = np.array(versions, np.int64)[:, None] == np.array(self.versions)
        return torch.from_numpy(own) * self._scale

    def _stack(self) -> None:
        every = [*self._held.values()]
        if len(every) == 1:
            self.layers = every[0].layers
            return
        self.layers = tuple(
            {
                field: Factors(
                    torch.cat([one[field].a for one in versions]),
                    torch.cat([one[field].b for one in versions], 1),
                )
                for field in versions[0]
            }
            for versions in zip(*(one.layers for one in every), strict=True)
        )
