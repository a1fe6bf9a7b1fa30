"""The native module. A `Memory` is a C-contiguous buffer or a pair (address, element count)."""

from typing_extensions import Buffer

Memory = Buffer | tuple[int, int]

version: str

def packed_size(count: int, bits: int) -> int: ...
def pack(codes: Memory, bits: int, out: Memory) -> None: ...
def unpack(data: Memory, bits: int, count: int, out: Memory) -> None: ...
def encode(
    vectors: int,
    codebook: int,
    rows: int,
    groups: int,
    codewords: int,
    width: int,
    codes: int,
    threads: int,
) -> None:
    """Addresses of contiguous fp32 [rows, groups, width], fp32 [groups, codewords, width] and int32
    [rows, groups], for which the caller vouches."""

# csrc/include/astra/attention.hpp. An address is that of contiguous memory, or 0 for none; the
# caller vouches for all of them.
# A tensor [batch, heads, rows, width]: its address, and its strides but for the last, 1.
Heads = tuple[int, tuple[int, ...]]
# batch, heads, kv_heads, rows, width, value_width
Shape = tuple[int, int, int, int, int, int]
# count, key, value, mask, is_causal
DenseKeys = tuple[int, Heads, Heads, int, bool]
# address, bits (0: int32), codes of a token, int32 or bytes from a batch row to the next
TokenCodes = tuple[int, int, int, int]
# address, stages, groups, codewords
CodeTable = tuple[int, int, int, int]
# count, codes and table of the keys, of the values, cos, sin, numbers from a batch row of them to
# the next, mask, and the storage of cos and sin, if that is not fp32
CodedKeys = (
    tuple[int, TokenCodes, CodeTable, TokenCodes, CodeTable, int, int, int, int]
    | tuple[int, TokenCodes, CodeTable, TokenCodes, CodeTable, int, int, int, int, int]
)

def attention(
    shape: Shape,
    query: Heads,
    dense: DenseKeys,
    out: Heads,
    lse: int,
    scale: float,
    sinks: int,
    threads: int,
    isa: str = "",
    storage: int = 0,
    rounded: bool = False,
) -> None: ...
def coded_attention(
    shape: Shape,
    query: Heads,
    coded: CodedKeys,
    out: Heads,
    lse: int,
    scale: float,
    sinks: int,
    threads: int,
    isa: str = "",
    storage: int = 0,
    rounded: bool = False,
) -> int:
    """0, or 1 or 2 where a code of the keys or of the values is in no table."""

def mixed_attention(
    shape: Shape,
    query: Heads,
    dense: DenseKeys,
    coded: CodedKeys,
    out: Heads,
    lse: int,
    scale: float,
    sinks: int,
    threads: int,
    isa: str = "",
    storage: int = 0,
) -> int:
    """As coded_attention."""

def attention_dtypes() -> list[str]:
    """By the `storage` of a call: that of queries, out, and dense keys and values."""

def attention_isas() -> list[str]: ...
def attention_rounds() -> bool: ...
def quantized_linear(
    x: int,
    values: int,
    scales: int,
    minima: int,
    bias: int,
    out: int,
    *,
    rows: int,
    inputs: int,
    outputs: int,
    groups: int,
    bits: int,
    half_scales: bool,
    threads: int,
    isa: str | None = None,
) -> None:
    """Addresses of what csrc/include/astra/linear.hpp describes, 0 for none, for which the caller
    vouches."""

def quantized_linears(
    x: int,
    parts: list[tuple[int, int, int, int, int, int, int, bool]],
    rows: int,
    inputs: int,
    groups: int,
    threads: int,
) -> None:
    """parts: of each layer the addresses of values, scales, minima, bias and out, its outputs, its
    bits, and whether scales have 16 bits; as in `quantized_linear`."""

def linear_isas() -> list[str]: ...

# csrc/include/astra/elementwise.hpp. Addresses of contiguous fp32, for which the caller vouches.
def rms_norm(
    x: int, weight: int, rows: int, width: int, eps: float, out: int, threads: int
) -> None: ...
def gated_silu(gate: int, up: int, count: int, out: int, threads: int) -> None: ...
def product_isa() -> str: ...
def product_suits_many_rows() -> bool: ...
def product(
    x: int,
    weights: int,
    bias: int,
    rows: int,
    inputs: int,
    outputs: int,
    out: int,
    threads: int,
    add: bool = False,
    rounded: bool = False,
) -> None:
    """Addresses of contiguous fp32 [rows, inputs], [outputs, inputs], [outputs] or 0 for no bias,
    and [rows, outputs]. `rounded`: of weights bf16 [outputs, inputs rounded up to even]."""

def product_rounds() -> bool: ...
def rotate(
    shape: tuple[int, int, int, int, int], x: Heads, cos: int, sin: int, out: Heads, threads: int
) -> None:
    """shape: batch, heads, tokens, width, and floats from a batch row of angles to the next."""

def merge_state(
    out_a: int,
    lse_a: int,
    out_b: int,
    lse_b: int,
    rows: int,
    width: int,
    out: int,
    lse: int,
    threads: int,
) -> None: ...
def merge_into(
    shape: tuple[int, int, int, int],
    one: tuple[Heads, Heads],
    other: tuple[Heads, Heads],
    threads: int,
) -> None:
    """shape: batch, heads, tokens, width. A side: its out and its lse, the strides of the latter in
    the same order."""

def all_finite(shape: tuple[int, int, int, int], x: Heads) -> bool: ...
def look_up(shape: tuple[int, int, int, int], codes: int, tables: int, out: int) -> bool:
    """shape: rows, groups, codewords, width. Whether there is a codeword of every code."""

def add_rows(
    shape: tuple[int, int, int, int], codes: int, tables: int, out: int, threads: int
) -> bool:
    """shape: rows, groups, codewords, width. `tables` are bfloat16; see elementwise.hpp."""

# What csrc/include/astra/frame.hpp says of bytes that a peer sent, its verdicts as integers.
def check_header(data: Buffer, expected: tuple[int, int, int, int, int, int, int]) -> int: ...
def is_bye(data: Buffer, source: int) -> bool: ...
def judge_prefix(data: Buffer) -> int: ...
def read_hello(data: Buffer) -> tuple[int, int, int, int, int, int, bytes]:
    """Verdict, version, world size, rank, rank addressed, length of the reason, run."""

def read_facts(data: Buffer) -> tuple[int, int, list[str]]:
    """Verdict, position of what is wrong, names and values in turns."""

def read_codes(data: Memory, bits: int, codewords: int, count: int, out: Memory) -> tuple[int, int]:
    """Verdict, the code that is too large."""

def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...

class Keeper:
    """csrc/include/astra/keeper.hpp. Raises OSError where the system has no such thing."""

    @property
    def pid(self) -> int: ...
