"""What a run and its model's mixtures of experts do not agree on."""

from __future__ import annotations

from collections.abc import Iterator

from system.config import Config
from system.learn.expert_layout import expert_problems
from system.models.shape import ModelShape
from system.plan.memory import WIDTH

_ROW_BYTES = 16  # of which torch's grouped matrix product wants rows to be a multiple


def expert_misfits(config: Config, shape: ModelShape) -> Iterator[str]:
    """A line each, with the remedy; none where all is well."""
    yield from expert_problems(shape, config.learn)
    if shape.experts is None:
        return
    multiple = _ROW_BYTES // WIDTH[config.model.dtype]
    split = config.learn.expert_tp
    sizes = {"hidden size": shape.hidden, f"experts' width over {split} ranks": shape.experts.ffn // split}
    for name, size in sizes.items():
        if size % multiple:
            yield (
                f"the model's {name} is {size}: grouped products of {config.model.dtype} numbers need a "
                f"multiple of {multiple}; take another model (model.hidden_size, model.expert_size) or "
                "another learn.tp, or learn.ep=learn.tp"
            )
    if config.rollout.replay_routes and config.agent.on:
        yield (
            "rollout.replay_routes: of what an agent's model says, the experts are not recorded; set it to "
            "false: the learner then chooses them anew"
        )
