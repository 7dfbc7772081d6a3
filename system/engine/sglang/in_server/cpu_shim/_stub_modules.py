"""Stub packages: every name in them resolves, decorators pass their function through, nothing runs.

SGLang imports Triton and torchvision at module level even where it launches no kernel and sees no image. A
stub package calls :func:`install` from its ``__init__``; its submodules then need no files.
"""

import importlib.abc
import importlib.machinery
import sys
import types
import typing


class _AnyClass:
    """What a capitalised name of a stub resolves to: something that can be a base class or be made."""

    def __init__(self, *args, **kwargs):
        pass


class StubModule(types.ModuleType):
    """A module in which any name exists: classes if capitalised, else a stub that is module and decorator."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            value = type(name, (_AnyClass,), {"__module__": self.__name__})
        else:
            value = _module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args, **kwargs):
        if len(args) == 1 and callable(args[0]) and not kwargs:  # @decorator
            return args[0]
        return lambda function: function  # @decorator(...)

    def __contains__(self, item):
        return False

    def __iter__(self):
        return iter(())

    def __bool__(self):
        return False


def _module(full_name):
    module = StubModule(full_name)
    module.__path__, module.__file__ = [], __file__
    module.__spec__ = importlib.machinery.ModuleSpec(full_name, _Finder, is_package=True)
    sys.modules[full_name] = module
    return module


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes the submodules of the installed stub packages."""

    roots: typing.ClassVar[set] = set()

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        root, dot, _ = name.partition(".")
        return (
            importlib.machinery.ModuleSpec(name, cls, is_package=True) if dot and root in cls.roots else None
        )

    @classmethod
    def create_module(cls, spec):
        return sys.modules.get(spec.name) or _module(spec.name)

    @classmethod
    def exec_module(cls, module):
        """Nothing: its names come to be when they are asked for."""


def install(name):
    """Turn the package ``name``, which is being imported, into a stub."""
    if not _Finder.roots:
        sys.meta_path.insert(0, _Finder)
    _Finder.roots.add(name)
    sys.modules[name].__class__ = StubModule
