"""A stub of Triton: SGLang defines its kernels with it when imported; on a CPU none of them is launched."""

import _stub_modules

__version__ = "3.7.0"


def cdiv(a, b):
    return -(a // -b)


def next_power_of_2(n):
    return 1 << (n - 1).bit_length() if n > 0 else 1


_stub_modules.install(__name__)
