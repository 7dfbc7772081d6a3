"""Which rank holds which experts, and which layouts of a mixture of experts are refused.

Without expert parallelism each expert is split over the tensor-parallel ranks, like a dense MLP.  With
``learn.ep`` = n each of n ranks holds every n-th part of the experts, whole; those n ranks are consecutive
within a pipeline stage, so they hold different tokens of one row (tensor parallelism splits the tokens
between its matrices, too: sequence parallelism) or different rows (data parallelism).
"""

from __future__ import annotations

from collections.abc import Iterator

from system.config import LearnConfig
from system.config.schema_lora import ATTENTION
from system.models.shape import ModelShape


def expert_problems(shape: ModelShape, learn: LearnConfig) -> Iterator[str]:
    """What keeps ``learn`` from training the experts of a model, each with the remedy.

    What concerns no model is in :func:`system.config.check.check`.
    """
    if shape.experts is None:
        for name, value in (("ep", learn.ep > 1), ("aux_loss", learn.aux_loss > 0)):
            if value:
                yield f"learn.{name}={getattr(learn, name)}: the model has no experts; take it out"
        return
    if learn.lora.on and (beyond := [one for one in learn.lora.targets if one not in ATTENTION]):
        yield (
            f"learn.lora.targets: {', '.join(beyond)}: in a mixture of experts these are the experts' own, "
            f"which stand still, as does the router: choose of {', '.join(ATTENTION)}, which every token "
            "goes through"
        )
    if shape.experts.count % learn.ep:
        yield f"learn.ep={learn.ep} does not divide the model's {shape.experts.count} experts"
    if learn.tp > 1 and not learn.sequence_parallel:
        yield (
            f"learn.tp={learn.tp} with a mixture of experts: every rank would compute the same experts for "
            "the same tokens; set learn.sequence_parallel=true"
        )
