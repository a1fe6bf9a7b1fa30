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

# An fp32 tensor [batch, heads, rows, width]: its address, and its strides but for the last, which
# is 1. The caller vouches for both.
Heads = tuple[int, tuple[int, ...]]

def attention(
    shape: tuple[int, int, int, int, int],
    query: Heads,
    count: int,
    key: Heads,
    value: Heads,
    mask: int,
    is_causal: bool,
    out: Heads,
    lse: int,
    scale: float,
    threads: int,
    isa: str = "",
) -> None:
    """csrc/include/astra/attention.hpp. shape is (batch, heads, kv_heads, rows, width); mask is the
    address of bytes [batch, count] or 0, lse that of contiguous fp32 [batch, heads, rows]."""

def attention_isas() -> list[str]: ...

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
