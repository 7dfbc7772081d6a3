"""A stub of torchvision, for models that see no images."""

import enum

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


import torchvision.transforms  # noqa: E402 (made by the line above)
import torchvision.transforms.functional  # noqa: E402
import torchvision.transforms.v2  # noqa: E402
import torchvision.transforms.v2.functional  # noqa: E402

for _module in (
    torchvision.transforms,
    torchvision.transforms.functional,
    torchvision.transforms.v2,
    torchvision.transforms.v2.functional,
):
    _module.InterpolationMode = InterpolationMode
