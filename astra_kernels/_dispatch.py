"""Which implementation runs: the one place that knows.

``auto`` takes the fastest that the device has: on a CPU the torch paths in ``cpu.py``, chosen by
measurement; on CUDA the Triton kernels, beside cuDNN for dense keys and cuBLAS, but for fp64, which
they do not take; elsewhere the reference. An explicit choice never falls back. Every implementation
of an op takes the arguments of its reference; the Triton ones take more, see ``Implementation``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from astra_kernels.attention import cpu as attention_cpu
from astra_kernels.attention import gradient as attention_gradient
from astra_kernels.attention import native as attention_native
from astra_kernels.attention import reference as attention_reference
from astra_kernels.coded_attention import cpu as coded_attention_cpu
from astra_kernels.coded_attention import gradient as coded_attention_gradient
from astra_kernels.coded_attention import native as coded_attention_native
from astra_kernels.coded_attention import reference as coded_attention_reference
from astra_kernels.codeword_attention import cpu as codeword_attention_cpu
from astra_kernels.codeword_attention import gradient as codeword_attention_gradient
from astra_kernels.codeword_attention import reference as codeword_attention_reference
from astra_kernels.count_codes import cpu as count_codes_cpu
from astra_kernels.count_codes import reference as count_codes_reference
from astra_kernels.decode import cpu as decode_cpu
from astra_kernels.decode import reference as decode_reference
from astra_kernels.encode import cpu as encode_cpu
from astra_kernels.encode import native as encode_native
from astra_kernels.encode import reference as encode_reference
from astra_kernels.encode_packed import cpu as encode_packed_cpu
from astra_kernels.encode_packed import reference as encode_packed_reference
from astra_kernels.lookup_linear import cpu as lookup_linear_cpu
from astra_kernels.lookup_linear import reference as lookup_linear_reference
from astra_kernels.merge_state import cpu as merge_state_cpu
from astra_kernels.merge_state import reference as merge_state_reference
from astra_kernels.merge_states import cpu as merge_states_cpu
from astra_kernels.merge_states import reference as merge_states_reference
from astra_kernels.mixed_attention import cpu as mixed_attention_cpu
from astra_kernels.mixed_attention import gradient as mixed_attention_gradient
from astra_kernels.mixed_attention import native as mixed_attention_native
from astra_kernels.mixed_attention import reference as mixed_attention_reference
from astra_kernels.quantized_linear import native as quantized_linear_native
from astra_kernels.quantized_linear import reference as quantized_linear_reference

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Implementation:
    """``extended``: reads packed codes where they lie and knows what only helps a GPU: the
    arguments code_bits and what goes with it. ``checks_codes``: refuses codes out
    of range as it meets them."""

    run: Kernel
    extended: bool = False
    checks_codes: bool = False


IMPLS = ("auto", "reference", "triton", "native")

_REFERENCE: dict[str, Kernel] = {
    "encode": encode_reference.encode,
    "encode_packed": encode_packed_reference.encode_packed,
    "decode": decode_reference.decode,
    "attention": attention_reference.attention,
    "coded_attention": coded_attention_reference.coded_attention,
    "codeword_attention": codeword_attention_reference.codeword_attention,
    "count_codes": count_codes_reference.count_codes,
    "lookup_linear": lookup_linear_reference.lookup_linear,
    "merge_state": merge_state_reference.merge_state,
    "merge_states": merge_states_reference.merge_states,
    "mixed_attention": mixed_attention_reference.mixed_attention,
    "quantized_linear": quantized_linear_reference.quantized_linear,
}

_CPU: dict[str, Kernel] = {
    "encode": encode_cpu.encode,
    "encode_packed": encode_packed_cpu.encode_packed,
    "decode": decode_cpu.decode,
    "attention": attention_cpu.attention,
    "coded_attention": coded_attention_cpu.coded_attention,
    "codeword_attention": codeword_attention_cpu.codeword_attention,
    "count_codes": count_codes_cpu.count_codes,
    "lookup_linear": lookup_linear_cpu.lookup_linear,
    "merge_state": merge_state_cpu.merge_state,
    "merge_states": merge_states_cpu.merge_states,
    "mixed_attention": mixed_attention_cpu.mixed_attention,
    "quantized_linear": quantized_linear_native.quantized_linear,
}

# Op -> its gradient in torch, on any device: by blocks, or with ``fast`` by torch's flash backward
# where that serves.
_GRADIENT: dict[str, Kernel] = {
    "attention": attention_gradient.attention,
    "coded_attention": coded_attention_gradient.coded_attention,
    "codeword_attention": codeword_attention_gradient.codeword_attention,
    "mixed_attention": mixed_attention_gradient.mixed_attention,
}

# Op -> kernel of the C++ core.
_NATIVE: dict[str, Kernel] = {
    "attention": attention_native.attention,
    "coded_attention": coded_attention_native.coded_attention,
    "encode": encode_native.encode,
    "mixed_attention": mixed_attention_native.mixed_attention,
    "quantized_linear": quantized_linear_native.quantized_linear,
}

# Op -> module holding a launcher of the op's name; imported on first use, as Triton is optional.
EXTENDED = ("coded_attention", "count_codes", "lookup_linear", "mixed_attention")
_TRITON: dict[str, str] = {
    op: f"astra_kernels.{op}.kernel"
    for op in (
        "encode",
        "encode_packed",
        "attention",
        "coded_attention",
        "codeword_attention",
        "count_codes",
        "decode",
        "lookup_linear",
        "merge_state",
        "merge_states",
        "mixed_attention",
    )
}

# Ops whose launchers know of cuDNN and cuBLAS, which are asked only where no implementation was
# named.
_LIBRARY = frozenset(
    ("attention", "coded_attention", "codeword_attention", "lookup_linear", "mixed_attention")
)

# Names of what a call may use, beside those of its arguments.
VALUE_WIDTH = "values of another width than keys"
MORE_QUERIES = "is_causal with more queries than keys"

# Op -> what its Triton kernel does not take of what the reference takes.
TRITON_LACKS: dict[str, frozenset[str]] = {}
# The same of the C++ kernels.
_SCORES = frozenset(("attn_mask", "window", "softcap"))
NATIVE_LACKS: dict[str, frozenset[str]] = {
    "attention": _SCORES,
    "coded_attention": _SCORES,
    "mixed_attention": _SCORES | {"code_attn_mask"},
}


def choose(
    op: str, impl: str, device: torch.device, dtype: torch.dtype, uses: Sequence[str] = ()
) -> Implementation:
    """The implementation of ``op`` to run on tensors of ``device``, the first one of ``dtype``.

    ``uses``: the optional arguments that the call has and not every implementation takes.
    """
    if impl == "auto":
        if device.type == "cpu":
            return Implementation(_CPU[op])
        takes_all = op in _TRITON and not _lacking(TRITON_LACKS, op, uses)
        if takes_all and dtype != torch.float64 and runs_triton(device):
            return _triton(op, library=op in _LIBRARY)
        return Implementation(_REFERENCE[op])
    if impl == "reference":
        return Implementation(_REFERENCE[op])
    if impl == "native":
        if op not in _NATIVE:
            raise RuntimeError(_unavailable(op, impl, f"there is no C++ kernel for {op}"))
        if device.type != "cpu":
            raise RuntimeError(_unavailable(op, impl, f"it runs on a CPU, not on {device}"))
        lacking = _lacking(NATIVE_LACKS, op, uses)
        if lacking:
            why = f"its kernel does not take {', '.join(lacking)}"
            raise RuntimeError(_unavailable(op, impl, why))
        coded = op in EXTENDED
        return Implementation(_NATIVE[op], extended=coded, checks_codes=coded)
    if impl == "triton":
        if op not in _TRITON:
            raise RuntimeError(_unavailable(op, impl, f"there is no Triton kernel for {op}"))
        if not has_triton():
            raise RuntimeError(_unavailable(op, impl, "the package triton is not installed"))
        lacking = _lacking(TRITON_LACKS, op, uses)
        if lacking:
            why = f"its kernel does not take {', '.join(lacking)}"
            raise RuntimeError(_unavailable(op, impl, why))
        if dtype == torch.float64:
            why = "the kernels take float32, float16 and bfloat16, not float64"
            raise RuntimeError(_unavailable(op, impl, why))
        launch = importlib.import_module("astra_kernels._triton.launch")
        if not launch.runnable(device):
            why = f"the kernels run on NVIDIA GPUs from sm_80 on, and the tensors are on {device}"
            raise RuntimeError(_unavailable(op, impl, why))
        return _triton(op)
    raise ValueError(f"astra_kernels.{op}: impl must be one of {', '.join(IMPLS)}, got {impl!r}")


def native_takes(op: str, uses: Sequence[str]) -> bool:
    """Whether the C++ kernel of ``op`` takes all that a call uses."""
    return op in _NATIVE and not _lacking(NATIVE_LACKS, op, uses)


def choose_gradient(op: str, impl: str) -> Kernel:
    """The gradient of ``op``, whose forward ran by ``impl``."""
    return functools.partial(_GRADIENT[op], fast=impl == "auto")


def _lacking(lacks: Mapping[str, frozenset[str]], op: str, uses: Sequence[str]) -> list[str]:
    """What of a call's arguments the op's kernel does not take."""
    lacking = lacks.get(op, frozenset())
    return [name for name in uses if name in lacking]


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_triton(device: torch.device) -> bool:
    """NVIDIA GPUs from sm_80 on, which the kernels' tiles and options are made for.

    ROCm calls its devices "cuda" too; older GPUs have less shared memory and no bf16.
    """
    return device.type == "cuda" and has_triton() and _supported(device.index)


@functools.cache
def _supported(index: int | None) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= (8, 0)


def packing(device: torch.device) -> Any:
    """The module that packs and unpacks tensors which are not on the CPU."""
    if runs_triton(device):
        return importlib.import_module("astra_kernels.pack.kernel")
    return importlib.import_module("astra_kernels.pack.reference")


@functools.cache
def _triton(op: str, library: bool = False) -> Implementation:
    launcher: Kernel = getattr(importlib.import_module(_TRITON[op]), op)
    if library:
        launcher = functools.partial(launcher, library=True)
    return Implementation(launcher, op in EXTENDED)


def _unavailable(op: str, impl: str, why: str) -> str:
    return f"astra_kernels.{op}: impl={impl!r} cannot run: {why}; impl='auto' takes what there is"
