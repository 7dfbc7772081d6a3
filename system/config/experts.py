"""Rules on mixtures of experts that no model has to be read for."""

from __future__ import annotations

from collections.abc import Iterator

from system.config.schema import Config


def expert_rules(config: Config) -> Iterator[str]:
    """What is wrong with the experts of a model made here, and with ``learn.ep``."""
    model, learn = config.model, config.learn
    if model.experts_per_token > model.experts:
        yield f"model.experts_per_token={model.experts_per_token} is more than model.experts={model.experts}"
    if learn.ep == 1:
        return
    ranks = learn.tp * learn.cp * learn.dp
    if learn.ep % learn.tp or ranks % learn.ep:
        yield (
            f"learn.ep={learn.ep} must be a multiple of learn.tp={learn.tp} and divide learn.tp · learn.cp · "
            f"learn.dp={ranks}: its ranks are some of those"
        )
