"""A stub of torchvision, for models that see no images."""

import enum
import importlib

import _stub_modules

__version__ = "0.28.0"

_stub_modules.install(__name__)


class InterpolationMode(enum.Enum):
    """Read by transformers' image processors when they are imported."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


for _name in ("transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional"):
    importlib.import_module(f"{__name__}.{_name}").InterpolationMode = InterpolationMode
