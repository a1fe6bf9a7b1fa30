"""Every rejection of bad input: the argument's name, what was expected, what came.

The checks run inside the op (real and fake kernel alike), so a graph that was compiled or exported
for one shape cannot carry another past them. They return the sizes that the kernels need.
"""

from astra_kernels._checks.arguments import (
    CODES,
    FLOATING,
    MAX_CODE_BITS,
    MAX_CODEWORDS,
    check_device,
    check_dtype,
    check_forward_only,
    check_ndim,
    check_scale,
    check_softcap,
    check_tensors,
    check_window,
    fail_type,
    fail_value,
    shape_of,
    split_rope,
)
from astra_kernels._checks.attention import (
    check_attn_mask,
    check_dense,
    check_merge,
    check_merge_states,
    check_query,
    check_scores,
)
from astra_kernels._checks.coded import (
    CodedInput,
    CodedShape,
    TableShape,
    check_code_values,
    check_coded,
    check_codewords,
    check_counts,
    check_tables,
)
from astra_kernels._checks.quantization import (
    check_count_codes,
    check_decode,
    check_encode,
    check_encode_packed,
)
from astra_kernels._checks.ragged import (
    check_page_values,
    check_pages,
    check_varlen,
    read_offsets,
)

__all__ = [
    "CODES",
    "FLOATING",
    "MAX_CODEWORDS",
    "MAX_CODE_BITS",
    "CodedInput",
    "CodedShape",
    "TableShape",
    "check_attn_mask",
    "check_code_values",
    "check_coded",
    "check_codewords",
    "check_count_codes",
    "check_counts",
    "check_decode",
    "check_dense",
    "check_device",
    "check_dtype",
    "check_encode",
    "check_encode_packed",
    "check_forward_only",
    "check_merge",
    "check_merge_states",
    "check_ndim",
    "check_page_values",
    "check_pages",
    "check_query",
    "check_scale",
    "check_scores",
    "check_softcap",
    "check_tables",
    "check_tensors",
    "check_varlen",
    "check_window",
    "fail_type",
    "fail_value",
    "read_offsets",
    "shape_of",
    "split_rope",
]
