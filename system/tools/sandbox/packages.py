"""Installed packages that programs may import, found without making the rest of site-packages readable.

:func:`find` runs in the sandbox's parent, which knows what is installed; :class:`Finder` in the fork server,
which has no site-packages on its path.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a large import, which every fork would copy
    from importlib.metadata import Distribution


@dataclass(frozen=True)
class Packages:
    """What is offered to programs."""

    modules: dict[str, str]  # top-level module -> its directory or file
    readable: tuple[str, ...]  # directories and files: the modules' own, and their shared libraries
    imported: tuple[str, ...]  # modules to import once, before any call
    missing: tuple[str, ...]  # asked for, and not installed


def find(names: Iterable[str]) -> Packages:
    """The packages ``names`` (distributions, or modules of them) and all that they require."""
    modules: dict[str, str] = {}
    readable: list[str] = []
    imported: list[str] = []
    missing: list[str] = []
    seen: set[str] = set()
    for name in names:
        asked = _distribution(name)
        own = {} if asked is None else _modules(asked, readable)
        if asked is None or not own:
            missing.append(name)
            continue
        imported += [name] if name in own else [module for module, path in own.items() if os.path.isdir(path)]
        modules |= own
        waiting = _requirements(asked)
        while waiting:
            if (required := waiting.pop()) not in seen:
                seen.add(required)
                if (found := _distribution(required)) is not None:
                    modules |= _modules(found, readable)
                    waiting += _requirements(found)
    return Packages(modules, tuple(dict.fromkeys(readable)), tuple(imported), tuple(missing))


class Finder(importlib.abc.MetaPathFinder):
    """Imports the modules offered, each from its own place; their parts are found on their own paths."""

    def __init__(self, modules: Mapping[str, str]):
        self._modules = modules

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        place = self._modules.get(fullname)
        if place is None:
            return None
        if os.path.isdir(place):
            inside = os.path.join(place, "__init__.py")
            return importlib.util.spec_from_file_location(
                fullname, inside, submodule_search_locations=[place]
            )
        return importlib.util.spec_from_file_location(fullname, place)


def _distribution(name: str) -> Distribution | None:
    from importlib import metadata

    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        owners = metadata.packages_distributions().get(name, [])
        return metadata.distribution(owners[0]) if owners else None


def _requirements(distribution: Distribution) -> list[str]:
    """Names of what it needs; what only an extra needs is left out, and what is not installed here falls out
    later."""
    needed = [text for text in distribution.requires or () if "extra ==" not in text]
    return [found.group() for text in needed if (found := re.match(r"[\w.-]+", text))]


def _modules(distribution: Distribution, readable: list[str]) -> dict[str, str]:
    """Its top-level modules by name; all its top-level entries are added to ``readable``."""
    found: dict[str, str] = {}
    tops = {file.parts[0] for file in distribution.files or ()}
    for top in sorted(tops - {"..", "__pycache__"}):
        path = os.path.realpath(str(distribution.locate_file(top)))
        if top.endswith((".dist-info", ".egg-info", ".data", ".pth")) or not os.path.exists(path):
            continue
        module = top.split(".")[0]
        if os.path.isfile(os.path.join(path, "__init__.py")) or top.endswith((".py", ".so")):
            found[module] = path
            readable.append(path)
        elif top.endswith(".libs"):
            readable.append(path)
    return found
