"""What a run by LoRA starts from, and what its checkpoints hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

from system.config import Config
from system.config.schema_lora import ATTENTION
from system.models.reading import UnsupportedModel
from system.models.shape import ModelShape
from system.observe.card import base_name
from system.plan.memory import WIDTH, adapter_parameters


def misfit(config: Config, shape: ModelShape) -> Iterator[str]:
    """What is wrong with ``learn.lora.init``, if anything, for a model of ``shape``."""
    lora = config.learn.lora
    if lora.on and lora.init:
        from system.models.adapter import AdapterError, adapter_of, read_adapter  # a second: torch

        wanted = adapter_of(lora, shape)
        assert wanted is not None
        try:
            read_adapter(lora.init, shape, wanted, config.model.path)
        except (AdapterError, UnsupportedModel) as error:
            yield f"learn.lora.init={lora.init}: {error}"


def chosen_targets(config: Config) -> Iterator[str]:
    """What to tell at the start of a run by LoRA that names no projections, of a mixture of experts, where
    not all have adapters.  Raises :class:`~system.models.reading.UnsupportedModel`.
    """
    lora = config.learn.lora
    if lora.on and not lora.targets and ModelShape.from_directory(config.model.path).experts:
        yield (
            f"learn.lora.targets: adapters on {', '.join(ATTENTION)}, which every token goes through; the "
            "experts and the router of this mixture stand still"
        )


def other_base(config: Config) -> Iterator[str]:
    """What to tell at the start of a new run from adapters that name another model than ``model.path``.

    A name proves nothing, as a directory may have any: where both sides have a fingerprint, that decides.
    """
    lora = config.learn.lora
    if not (lora.on and lora.init):
        return
    from system.models.adapter import stated_base  # a second: torch

    name, known = stated_base(lora.init)
    given, ours = PurePath(name).name, base_name(config)
    if given and not known and given.casefold() != PurePath(ours).name.casefold():
        yield (
            f"learn.lora.init={lora.init}: these adapters say that they belong to {name} "
            f"(base_model_name_or_path), and model.path is {ours}: with another model they are worth nothing"
        )


def trained(config: Config, parameters: int) -> int:
    """Numbers that have an optimizer: all ``parameters`` of the model, or its adapters'."""
    if not (config.learn.lora.on and parameters):
        return parameters
    return int(adapter_parameters(ModelShape.from_directory(config.model.path), config.learn))


def merged_bytes(config: Config, parameters: int) -> int:
    """Of the merged model that a run by LoRA leaves beside its checkpoints, each of which is smaller."""
    return WIDTH[config.model.dtype] * parameters if config.learn.lora.on else 0
