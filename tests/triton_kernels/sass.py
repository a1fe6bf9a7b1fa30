"""What a compiled kernel's loops consist of, read from the assembler's own listing.

A loop is what lies between a label and a branch back to it; counted are those that hold no other.
The counts are those of a warp and a pass, whatever the predicates of its instructions say.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"

# Behind the opcode of a copy that only some of the threads make, as the data are fewer than they.
PARTIAL = ".PARTIAL"

_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_WIDTH = re.compile(r"\.(?:[US](8|16)|(64|128|256))\b")


@dataclass(frozen=True)
class Loop:
    """opcodes: with their modifiers; copies: asynchronous ones to shared memory, and loads: from
    global memory to registers, each by bytes a thread moves at a time; partial copies are those of
    fewer bytes than the threads could copy at once."""

    instructions: int
    opcodes: dict[str, int]

    def count(self, *names: str) -> int:
        """Instructions whose opcode, without modifiers, is one of ``names``."""
        return sum(n for code, n in self.opcodes.items() if code.partition(".")[0] in names)

    @property
    def copies(self) -> dict[int, int]:
        return self._widths("LDGSTS")

    @property
    def partial_copies(self) -> dict[int, int]:
        return self._widths("LDGSTS", partial=True)

    @property
    def loads(self) -> dict[int, int]:
        return self._widths("LDG")

    @property
    def matrix(self) -> int:
        return self.count("HGMMA", "HMMA", "QGMMA", "UTCHMMA", "UTCQMMA")

    def _widths(self, name: str, partial: bool = False) -> dict[int, int]:
        widths: Counter[int] = Counter()
        for code, count in self.opcodes.items():
            if code.partition(".")[0] == name and code.endswith(PARTIAL) == partial:
                found = _WIDTH.search(code)
                bits = next(filter(None, found.groups()), None) if found else 32
                widths[int(bits) // 8] += count
        return dict(sorted(widths.items()))


@functools.lru_cache(maxsize=256)
def loops(cubin: bytes) -> tuple[Loop, ...]:
    """The innermost loops of the kernel in a cubin, in the order in which they stand."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(BIN / "nvdisasm"), "-c", "-ndf", str(path)]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(loops_of(listing))


def loops_of(listing: str) -> list[Loop]:
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    spans: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := _INSTRUCTION.match(line):
            guard, opcode, operands = instruction.groups()
            opcodes.append(opcode + PARTIAL if guard and opcode.startswith("LDGSTS") else opcode)
            target = _TARGET.search(operands)
            # A branch to itself is how the assembler fills up what comes after the end.
            if target and labels.get(target[1], len(opcodes)) < len(opcodes) - 1:
                spans.append((labels[target[1]], len(opcodes)))
    inner = [
        (first, last)
        for first, last in spans
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans)
    ]
    return [Loop(last - first, dict(Counter(opcodes[first:last]))) for first, last in sorted(inner)]


@functools.lru_cache(maxsize=256)
def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(BIN / "cuobjdump"), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])
