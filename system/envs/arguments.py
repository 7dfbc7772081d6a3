"""The arguments of a call as the world gets them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from system.tools.outcome import ToolSpec
from system.tools.service import cleaned
from system.tools.tool import CallRefused, argument_error
from system.tools.wanted import as_wanted


def typed(spec: ToolSpec, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arguments`` with texts read as the numbers (lists, …) that are wanted: some call syntaxes know only
    texts.

    Raises :class:`CallRefused` for arguments that the tool does not take.
    """
    made = as_wanted(spec.parameters, cleaned(arguments))
    if problem := argument_error(spec.parameters, made, spec.patterns):
        raise CallRefused(problem)
    return made
