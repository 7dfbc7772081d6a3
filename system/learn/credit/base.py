"""What a credit is.  A user's own is a subclass, named ``learn.credit=package.module:Name``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

import numpy as np
from numpy.typing import NDArray

from system.plugins import PluginError, blaming
from system.tree.plan import Floats, Per, where_read
from system.tree.stats import TreeStats


class Credit(ABC):
    """Advantages of a training batch; a group is one tree.

    Its constructor's parameters are its options (``learn.credit.options``).  Every learner rank computes the
    same credit of the same whole batch, so it must be deterministic.

    ``per``: "leaf" for advantages [L], the same on the whole path to a leaf; "node" for [J], one for each
    MODEL node alone, weighed by the leaves below it (other nodes' are not read); "path" for [L, J], one for
    each MODEL node on the way to each leaf.  ``hard``: a token shared by
    several leaves counts once, with the mean of their advantages and weights (:mod:`system.tree.plan`).
    """

    per: ClassVar[Per] = "leaf"
    hard: ClassVar[bool] = False

    @abstractmethod
    def advantages(self, batch: Sequence[TreeStats]) -> Sequence[Floats]:
        """One array per tree, [L], [J] or [L, J] as ``per`` says.

        Leaves that were not scored (``tree.scored``) weigh nothing: what is returned for them, and for nodes
        that lead to no other, is not read and may be NaN.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON takes it; saved with the learner's checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; not called without."""
        raise PluginError(f"the checkpoint holds the state of another credit: {type(self).__name__} has none")


def assign(credit: Credit, batch: Sequence[TreeStats]) -> list[NDArray[np.float32]]:
    """The credit's advantages over a batch, checked; 0 where they do not count.

    Raises ValueError for an infinite reward, and :class:`PluginError` for a credit that fails, and for arrays
    of the wrong number or shape, or not finite.
    """
    if any(np.isinf(tree.reward).any() for tree in batch):
        raise ValueError("a reward is infinite")
    name = type(credit).__name__
    if credit.per not in get_args(Per):
        raise PluginError(f"credit {name}: per = {credit.per!r} is none of {', '.join(get_args(Per))}")
    with blaming(f"credit {name}"):
        given = [np.asarray(values, np.float32) for values in credit.advantages(batch)]
    if len(given) != len(batch):
        raise PluginError(f"credit {name}: {len(given)} arrays of advantages for {len(batch)} trees")
    result: list[NDArray[np.float32]] = []
    for tree, values in zip(batch, given, strict=True):
        counts = where_read(tree, credit.per, tree.scored)
        where = f"credit {name}, tree of prompt {tree.prompt_id!r}"
        if values.shape != counts.shape:
            raise PluginError(
                f"{where}: advantages of shape {values.shape}, not {counts.shape}: one per {credit.per}"
            )
        values = np.where(counts, values, np.float32(0))
        if not np.isfinite(values).all():
            raise PluginError(f"{where}: an advantage is not finite")
        result.append(values)
    return result
