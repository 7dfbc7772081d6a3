"""The policies that a learner keeps besides the one it trains: a reference, and moving averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from system.config import Config
from system.learn.average import MovingAverage, decay_for
from system.learn.lora import AdapterCopy
from system.learn.model import TreeGPTModel


class Beside:
    """What of them the configuration asks for; all are the trained ``model`` at first."""

    def __init__(
        self, config: Config, model: TreeGPTModel, build: Callable[[], TreeGPTModel], *, clips: bool
    ) -> None:
        """``build``: makes a model of the same shape.  ``clips``: the objective clips against a proximal
        policy.
        """
        learn = config.learn
        self._model = model
        self.reference: TreeGPTModel | AdapterCopy | None = None  # for the KL term
        if learn.kl_coef and model.adapter:
            self.reference = AdapterCopy(model)
        elif learn.kl_coef:
            self.reference = build()
            self.reference.requires_grad_(False)
        self.average: MovingAverage[TreeGPTModel] | None = None  # the proximal policy
        if learn.proximal == "average" and clips:
            self.average = MovingAverage(build(), decay_for(config.flow.staleness + config.flow.window))
        self.teacher: MovingAverage[TreeGPTModel] | None = None
        if learn.teacher == "average":
            self.teacher = MovingAverage(build(), learn.teacher_decay)
        # By the words under which a checkpoint keeps them.
        both = {"average": self.average, "teacher": self.teacher}
        self._averages = {name: one for name, one in both.items() if one is not None}
        self.follow()

    def follow(self) -> None:
        """All := the current weights."""
        if isinstance(self.reference, AdapterCopy):
            self.reference.follow()
        elif self.reference is not None:
            self.reference.load_state_dict(self._model.state_dict())
        for average in self._averages.values():
            average.reset(self._model)

    def stepped(self) -> None:
        """The model has taken an optimizer step: the averages take it in."""
        for average in self._averages.values():
            average.update(self._model)

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a checkpoint keeps of each, by a word for it."""
        reference = self.reference
        kept = {} if reference is None else {"reference": _held(reference)}
        return kept | {name: one.mean for name, one in self._averages.items()}

    def state(self) -> dict[str, float]:
        """What else it keeps, for its JSON: the averages' total weights."""
        return {name: one.weight for name, one in self._averages.items()}

    def take_state(self, extra: dict[str, Any]) -> None:
        """Take :meth:`state` out of a checkpoint's JSON; its tensors have been read."""
        for name, one in self._averages.items():
            one.restored(extra.pop(name, 1.0))


def _held(model: TreeGPTModel | AdapterCopy) -> dict[str, torch.Tensor]:
    return model.tensors if isinstance(model, AdapterCopy) else dict(model.named_parameters())
