"""Former name of `transport.credentials` and `transport.certificates`, for one release."""

from __future__ import annotations

import warnings

from .transport.certificates import can_make_keys, ephemeral_keys, make_keys, show_keys
from .transport.credentials import Contexts, Keys, KeysError

__all__ = [
    "Contexts",
    "Keys",
    "KeysError",
    "can_make_keys",
    "ephemeral_keys",
    "make_keys",
    "show_keys",
]

warnings.warn(
    "astra_runtime.keys is astra_runtime.transport.credentials and .certificates",
    DeprecationWarning,
    stacklevel=2,
)
