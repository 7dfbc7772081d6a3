"""What is found against a run before it is started, and how that is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from system.config import Config
from system.errors import EspalierError, told


@dataclass(frozen=True, slots=True)
class Problem:
    """What would end the run.  ``field``: the setting at fault, where ``text`` does not begin with it."""

    field: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return (
            f"{self.field}{': ' if self.field else ''}{self.text}{'; ' if self.remedy else ''}{self.remedy}"
        )

    @classmethod
    def several(cls, error: BaseException, field: str = "") -> list[Problem]:
        """Of an error that names fields and remedies itself, a line each; or of one of the file system."""
        named = isinstance(error, EspalierError)
        lines = told(error).splitlines() if named else [told(error)]
        return [cls("" if named else field, " ".join(line.split())) for line in lines]


Check = Callable[[Config], Iterator[Problem]]
"""Of one topic: yields all that it finds; what it raises of ``EXPECTED`` is a problem, too."""
