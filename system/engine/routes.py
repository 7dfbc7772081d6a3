"""How a server tells which experts the tokens of a request went through: SGLang's ``routed_experts``.

Base64 of int32 [r, layers, k], of all layers of the model; what stands at the ones without experts means
nothing.  The record lies beside the keys and values: of a cached prefix it is that of the pass that computed
it.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from system.models.families import FAMILIES
from system.models.shape import ModelShape
from system.tree.routes import Routes, route_defect, route_type


@dataclass(frozen=True, slots=True)
class RouteFormat:
    """What is recorded of a model with experts."""

    layers: int
    sparse: tuple[int, ...]  # numbers of the layers that have experts
    experts: int
    chosen: int

    @classmethod
    def of(cls, shape: ModelShape) -> RouteFormat | None:
        """None without experts."""
        if shape.experts is None:
            return None
        sparse = tuple(layer for layer in range(shape.layers) if shape.sparse(layer))
        return cls(shape.layers, sparse, shape.experts.count, shape.experts.chosen)

    @classmethod
    def of_directory(cls, path: str | Path) -> RouteFormat | None:
        """None also for a model of a family that is not computed here."""
        file = Path(path) / "config.json"
        config: Any = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        family = FAMILIES.get(config.get("model_type"))
        return cls.of(ModelShape.from_directory(path)) if family and family.experts else None

    def read(self, text: Any, rows: int) -> Routes:
        """[rows, sparse layers, k].  Raises ValueError for what is no such record."""
        try:
            numbers = np.frombuffer(base64.b64decode(text, validate=True), "<i4")
        except (binascii.Error, TypeError, ValueError) as error:
            raise ValueError(f"routed_experts: {error}") from error
        if numbers.size != rows * self.layers * self.chosen:
            raise ValueError(
                f"routed_experts: {numbers.size} numbers, not {rows} tokens x {self.layers} layers x "
                f"{self.chosen} experts"
            )
        routes = numbers.reshape(rows, self.layers, self.chosen)[:, self.sparse]
        wrong = routes[(routes < 0) | (routes >= self.experts)]
        if wrong.size:
            raise ValueError(f"routed_experts: {wrong[0]} is none of {self.experts} experts")
        found: Routes = routes.astype(route_type(self.experts))
        if rows and (defect := route_defect(found)):
            raise ValueError(f"routed_experts: {defect}")
        return found

    def write(self, routes: Routes) -> str:
        """The inverse of :meth:`read`; 0 at layers without experts."""
        whole = np.zeros((len(routes), self.layers, self.chosen), "<i4")
        whole[:, self.sparse] = routes
        return base64.b64encode(whole.tobytes()).decode()
