"""Ahead-of-time compilation of recorded launches for chips that need not be there.

    python -m tests.triton_kernels.aot --capability 90          # every configuration, as a table
    python -m tests.triton_kernels.aot --capability 90 --few    # those that `make test` checks

A launch is compiled as the JIT would: pointers aligned to 16 bytes, integers specialized on 1 and
on divisibility by 16. The compiler's report says how many registers a thread takes, how much shared
memory a block, and how much of the stack a thread: any is a spill.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from astra_kernels._triton.launch import Launch

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Report:
    """What the compiler says of one kernel. ``stack`` bytes a thread; ``matrix`` is the matrix
    instruction it uses, "" for none."""

    registers: int
    stack: int
    shared: int
    matrix: str
    copies: int  # asynchronous copies, the mark of a pipelined loop


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Types, compile-time constants and attributes of a launch's arguments."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    aligned: dict[tuple[int], Any] = {}
    parameters = launch.kernel.params
    for index, (parameter, value) in enumerate(zip(parameters, launch.args, strict=False)):
        name = parameter.name
        if value is None or (
            isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        ):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name], aligned[index,] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i64" if abs(value) >= 2**31 else "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned[index,] = [["tt.divisibility", 16]]
    types.update(dict.fromkeys(launch.constants, "constexpr"))
    ordered = {parameter.name: types[parameter.name] for parameter in parameters}
    return ordered, constants, aligned


def compile_launch(launch: Launch, capability: int) -> Report:
    types, constants, aligned = signature(launch)
    compiled = triton.compile(
        ASTSource(launch.kernel, types, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages, **launch.options},
    )
    ptx = compiled.asm["ptx"]
    matrix = next((m for m in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if m in ptx), "")
    registers, stack = resources(compiled.asm["cubin"])
    return Report(registers, stack, compiled.metadata.shared, matrix, ptx.count("cp.async.c"))


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        command = [str(CUOBJDUMP), "--dump-resource-usage", path]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])
