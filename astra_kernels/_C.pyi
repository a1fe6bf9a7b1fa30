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
