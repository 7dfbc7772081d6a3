"""Routes: which experts the tokens of a mixture-of-experts model went through when an engine computed them.

An array [T, S, k] of T tokens: the k experts that each of the model's S sparse layers chose.  It is of the
smallest unsigned type whose largest number is no expert: that number, in all places of a token, says that
there is no record of it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Routes: TypeAlias = NDArray[np.uint8 | np.uint16]


def route_type(experts: int) -> type[np.uint8 | np.uint16]:
    """What holds the numbers of so many experts, and one more."""
    return np.uint8 if experts <= np.iinfo(np.uint8).max else np.uint16


def no_routes() -> Routes:
    """Of a tree of which nothing was recorded."""
    return np.zeros((0, 0, 0), np.uint8)


def unrecorded(tokens: int, like: Routes) -> Routes:
    """[tokens, S, k] without a record, of the model that ``like`` is of."""
    return np.full((tokens, *like.shape[1:]), np.iinfo(like.dtype).max, like.dtype)


def recorded(routes: Routes) -> NDArray[np.bool_]:
    """[T] of which tokens there is a record."""
    return routes[:, 0, 0] != np.iinfo(routes.dtype).max


def route_defect(routes: Routes) -> str:
    """What is wrong with records; "": nothing."""
    if routes.dtype.str not in ("|u1", "<u2") or routes.ndim != 3 or not min(routes.shape[1:]):
        return f"routes of type {routes.dtype} and shape {routes.shape}"
    there, none = recorded(routes), np.iinfo(routes.dtype).max
    if (routes[~there] != none).any() or (routes[there] == none).any():
        return "a token whose experts are recorded in some layers only"
    ordered: NDArray[Any] = np.sort(routes[there], -1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        return "a token that goes through one expert twice"
    return ""
