"""`astra_runtime.codes.codebook` by its former name, for one release."""

from __future__ import annotations

import warnings

from .codes.codebook import Codebook

__all__ = ["Codebook"]

warnings.warn(
    "astra_runtime.codebook is astra_runtime.codes.codebook; say astra_runtime.Codebook",
    DeprecationWarning,
    stacklevel=2,
)
