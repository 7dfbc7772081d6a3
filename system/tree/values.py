"""What is given to a growing tree, in the form in which the record has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from system.tree.record import ARRAYS, Int32, TreeError
from system.tree.routes import unrecorded

MOST_DEPTH = 50  # objects and lists within one another, in what a model or an author's code says


def plain(value: Any, where: str) -> Any:
    """``value`` as JSON has it, numpy's numbers as Python's.  TreeError names what is not JSON."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TreeError(f"{where}: {type(value).__name__} is not JSON")


def row(values: ArrayLike, size: int, dtype: type, name: str) -> NDArray[Any]:
    """A private copy [size] of ``values``; a single value stands for the whole chunk."""
    copy = np.array(values, dtype)
    if copy.shape == (size,):
        return copy
    if copy.shape == ():
        return np.full(size, copy)
    raise TreeError(f"{name} has shape {copy.shape} beside {size} tokens")


def unsampled(name: str, tokens: Int32, like: NDArray[Any]) -> NDArray[Any]:
    """The array ``name`` of a tree, ``like`` it elsewhere, of ``tokens`` that no engine has seen."""
    if name == "routes":
        return unrecorded(tokens.size, like)
    off = {"tokens": tokens, "logprob": 0.0, "version": -1, "closed_version": -1}
    return np.full(tokens.shape, off.get(name, np.nan), ARRAYS[name])


def too_deep(value: Any, most: int = MOST_DEPTH) -> bool:
    """Whether ``value``, JSON from a model or an author, has objects and lists within one another more than
    ``most`` deep: what copies, compares and writes them is recursive.
    """
    level = [value]
    for _ in range(most + 1):
        held = [one for one in level if isinstance(one, dict | list)]
        level = [inner for one in held for inner in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return False
    return True


def odd_number(value: Any) -> bool:
    """Whether ``value``, JSON from a model, has a number that JSON does not know (Python reads NaN, and 1e999
    as infinity), or an integer that no float can hold: whoever calculates with it fails, or gets nothing.
    """
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict | list):
            waiting.extend(one.values() if isinstance(one, dict) else one)
        elif isinstance(one, int | float):
            try:
                if not math.isfinite(one):
                    return True
            except OverflowError:
                return True
    return False
