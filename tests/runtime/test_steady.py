"""Memory that is kept: repeated allocations of a call's size take no new pages."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from astra_runtime.steady import keep_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def call():
    blocks = [libc.malloc(4 << 20) for _ in range(40)]
    for block in blocks:
        ctypes.memset(block, 1, 4 << 20)
    for block in blocks:
        libc.free(block)

if sys.argv[1] == "kept":
    assert keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

call()
call()
print(min(faults() for _ in range(3)))  # a system short of memory takes pages away meanwhile
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_a_call_takes_no_new_pages_where_memory_is_kept() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", PROGRAM, how], **CAPTURED).stdout)
        for how in ("kept", "given back")
    }
    assert faults["kept"] < 20
    assert faults["given back"] > 5 * faults["kept"]


CAPTURED = {"check": True, "capture_output": True, "text": True}
