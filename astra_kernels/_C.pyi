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

def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
