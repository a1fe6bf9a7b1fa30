"""Attention that works straight from bit-packed vector-quantization codes.

Queries are [B, H, M, d], keys and values [B, Hkv, L, d], codes int32 [B, N, C]; ``lse`` is the
natural log-sum-exp of the scores. Ops are ``torch.library`` ops. All but packing and
``scaled_dot_product_attention`` take ``impl``: "auto" (the quickest measured for the device),
"reference" (plain torch), "triton", and where there is one "native" (the C++ core). Attention,
merging and ``decode`` have gradients, the others are forward-only.
``attention.reference`` and so on are the slow, obvious torch references.
"""

import importlib

from astra_kernels import _C as _C
from astra_kernels import _library as _library
from astra_kernels.attention import attention
from astra_kernels.attention_varlen import attention_varlen
from astra_kernels.coded_attention import coded_attention
from astra_kernels.coded_attention_paged import coded_attention_paged
from astra_kernels.codeword_attention import codeword_attention
from astra_kernels.count_codes import count_codes
from astra_kernels.decode import decode
from astra_kernels.encode import encode
from astra_kernels.encode_packed import encode_packed
from astra_kernels.lookup_linear import fold_norm, lookup_linear
from astra_kernels.merge_state import merge_state
from astra_kernels.merge_states import merge_states
from astra_kernels.mixed_attention import mixed_attention
from astra_kernels.pack import pack, packed_size, unpack
from astra_kernels.quantized_linear import quantized_linear
from astra_kernels.scaled_dot_product_attention import scaled_dot_product_attention
from astra_kernels.warmup import warmup

__all__ = [
    "attention",
    "attention_varlen",
    "coded_attention",
    "coded_attention_paged",
    "codeword_attention",
    "count_codes",
    "decode",
    "encode",
    "encode_packed",
    "fold_norm",
    "lookup_linear",
    "merge_state",
    "merge_states",
    "mixed_attention",
    "pack",
    "packed_size",
    "quantized_linear",
    "scaled_dot_product_attention",
    "unpack",
    "warmup",
]

# Errors of ops name these.
for _op in (
    attention,
    attention_varlen,
    coded_attention,
    coded_attention_paged,
    codeword_attention,
    count_codes,
    decode,
    encode,
    encode_packed,
    lookup_linear,
    merge_state,
    merge_states,
    mixed_attention,
    pack,
    quantized_linear,
):
    _module = importlib.import_module(f"{_op.__module__}.reference")
    setattr(_op, "reference", getattr(_module, _op.__name__))  # noqa: B010 - functions have none
del _module, _op
