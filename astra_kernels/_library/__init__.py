"""Registration of every op with torch: schema, kernel, fake kernel; one boundary a public call.

A kernel checks its input, unpacks codes where they are packed, and hands over to the implementation
that ``_dispatch`` chooses. The fake kernel makes the same checks of shapes and dtypes and gives the
outputs' shapes, dtypes and strides, which are those of every implementation. Gradients are ops of
their own, ``<name>_backward``.
"""

from astra_kernels._library import (
    attention,
    coded,
    linear,
    merging,
    packing,
    quantization,
    ragged,
)

__all__ = ["attention", "coded", "linear", "merging", "packing", "quantization", "ragged"]
