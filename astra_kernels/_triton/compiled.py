"""Kernels that were compiled before, started without Triton's binder.

Triton binds the arguments of every call anew, in Python: 38 µs for the 57 arguments of the
attention kernel, where the launch itself takes 3 (Triton 3.6, processor time of an EPYC core, with
a driver that does nothing). Which compiled kernel it takes depends on little: constants and
options, types, which addresses 16 divides, and which integers are 1 or multiples of 16. That is the
key here under which the kernel is kept that Triton took the first time. The key may tell apart what
Triton does not: then a kernel is kept twice. What it does not know goes to Triton as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from astra_kernels._recording import current_recorder

# What Triton takes for an integer of 32 bits.
LEAST, MOST = -(2**31), 2**31 - 1

# What divides an address, or an integer, so that Triton knows it.
DIVISOR = 16

_TENSORS = (Tensor, nn.Parameter)
_PLAIN = (int, float, bool, type(None))

Compiled = tuple[CompiledKernel, tuple[Any, ...]]  # and the constants, in the kernel's order


@dataclass(frozen=True, eq=False)
class _Binding:
    """Arguments of certain types, as a kernel's parameters take them.

    Attributes:
        kernel: kept, so that nothing else has its id.
        tensors, integers: their places among the arguments.
        specialized: places of integers that Triton looks at.
        compiled: what runs, by all else that decides it.
    """

    kernel: JITFunction[Any]
    tensors: tuple[int, ...]
    integers: tuple[int, ...]
    specialized: tuple[int, ...]
    constants: tuple[str, ...]
    compiled: dict[tuple[Any, ...], Compiled] = field(default_factory=dict)


_bindings: dict[tuple[int, tuple[type, ...], tuple[str, ...]], _Binding | None] = {}


def start(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
    device: int | None,
) -> None:
    """Runs ``kernel[grid](*args, **constants, **options)`` on the current device, ``device``."""
    signature = (id(kernel), tuple(map(type, args)), tuple(constants))
    try:
        binding = _bindings[signature]
    except KeyError:
        binding = _bindings[signature] = _bind(kernel, *signature[1:])
    recorder, found = current_recorder(), None
    if binding is not None:
        pointers = [args[place].data_ptr() for place in binding.tensors]
        key = _key(binding, args, pointers, constants, options, device)
        found = None if key is None else binding.compiled.get(key)
    if found is None:
        result = kernel[grid](*args, **constants, **options)
        if recorder is not None:
            recorder.lost()
        if binding is not None and key is not None and isinstance(result, CompiledKernel):
            binding.compiled[key] = result, tuple(constants[name] for name in binding.constants)
        return
    assert binding is not None
    compiled, values = found
    given = [*args, *values]
    for place, pointer in zip(binding.tensors, pointers, strict=True):
        given[place] = pointer
    run = compiled[(*grid, 1, 1)[:3]]
    run(*given)
    if recorder is not None:
        recorder.launched(run, given, binding.tensors)


def _key(
    binding: _Binding,
    args: tuple[Any, ...],
    pointers: Sequence[int],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
    device: int | None,
) -> tuple[Any, ...] | None:
    """All that decides which kernel Triton takes; None: it has integers of another width."""
    integers = [args[place] for place in binding.integers]
    if integers and not LEAST <= min(integers) <= max(integers) <= MOST:
        return None
    return (
        device,
        *constants.values(),
        *options.items(),
        *[args[place].dtype for place in binding.tensors],
        *[pointer % DIVISOR == 0 for pointer in pointers],
        *[_known_of(args[place]) for place in binding.specialized],
    )


def _known_of(value: int) -> int:
    """What Triton may know of an integer: that it is 1, that 16 divides it, or nothing."""
    return value if value == 1 else DIVISOR if value % DIVISOR == 0 else 0


def _bind(kernel: Any, types: tuple[type, ...], constants: tuple[str, ...]) -> _Binding | None:
    """None: a kernel that is interpreted, or arguments that are more than memory and numbers."""
    if not isinstance(kernel, JITFunction):
        return None
    parameters = kernel.params
    given, rest = parameters[: len(types)], parameters[len(types) :]
    fits = {p.name for p in rest} == set(constants) and all(p.is_constexpr for p in rest)
    plain = all(kind in _TENSORS or kind in _PLAIN for kind in types)
    if not fits or not plain or any(p.is_constexpr or p.annotation_type for p in given):
        return None
    places = range(len(types))
    integers = tuple(i for i in places if types[i] is int)
    return _Binding(
        kernel,
        tuple(i for i in places if types[i] in _TENSORS),
        integers,
        tuple(i for i in integers if not given[i].do_not_specialize),
        tuple(p.name for p in rest),
    )
