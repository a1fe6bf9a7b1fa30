"""Calls that a GPU was given before: the same launches again, without asking anew which they are.

A launcher asks some sixty things of shapes, strides and dtypes before it starts a kernel, and all
of its answers follow from them. So what a call did (``_recording``) is kept under all that it may
depend on, once it has come for the second time. A call of the same kind then takes about a tenth of
the time on the host.

Left alone are calls that are differentiated, traced, compiled or seen by anybody's dispatch mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from astra_kernels._recording import Call, Recorder, current_recorder, recording_with

T = TypeVar("T")
Key = tuple[Any, ...]

# Calls that are kept, and such as were seen once; at more, all are forgotten.
MOST = 4096

# Addresses with the same remainder are aligned alike, whatever a launcher looks at.
ALIGNMENT = 16

_TENSORS = (Tensor, nn.Parameter)
_NUMBERS = (int, float, bool, str, type(None), torch.dtype)

_calls: dict[Key, Call | None] = {}  # None: cannot be done again
_seen: set[Key] = set()
_kinds: dict[tuple[type, ...], tuple[tuple[int, ...], tuple[int, ...]] | None] = {}
_choices: str = ""
_suspended = 0


def run(op: str, args: tuple[Any, ...]) -> Any:
    """The result of a call of ``op`` that was kept, from its arguments as the schema has them; None
    where none was."""
    if torch.compiler.is_compiling() or not _calls:
        return None
    key = _key(op, args)
    call = None if key is None else _calls.get(key)
    if call is None:
        return None
    if not torch._C._is_any_autocast_enabled():
        return call(args)
    with torch._C._DisableAutocast():  # as for launchers, see `registration`
        return call(args)


def kept(op: str, kernel: Callable[..., T]) -> Callable[..., T]:
    """``kernel``, whose calls on a GPU are kept when they come for the second time."""

    def watched(*args: Any) -> T:
        if not serves(args[0].device) or current_recorder() is not None:
            return kernel(*args)
        key = _key(op, args)
        if key is None:
            return kernel(*args)
        if key in _calls:
            call = _calls[key]
            return kernel(*args) if call is None else call(args)
        if key not in _seen:
            if len(_seen) >= MOST:
                _seen.clear()
            _seen.add(key)
            return kernel(*args)
        recorder = Recorder(args)
        try:
            with recording_with(recorder):
                result = kernel(*args)
            if len(_calls) >= MOST:
                _calls.clear()
            _calls[key] = recorder.call(result)
        finally:
            recorder.forget()
        return result

    return watched


def serves(device: torch.device) -> bool:
    return device.type == "cuda"


def forget() -> None:
    """What was chosen before may be chosen differently from now on."""
    _calls.clear()
    _seen.clear()


@contextlib.contextmanager
def choosing(name: str) -> Iterator[None]:
    """In here launchers choose by other rules, of that name."""
    global _choices
    before, _choices = _choices, name
    try:
        yield
    finally:
        _choices = before


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """In here no call is kept or replayed, so that launchers run."""
    global _suspended
    _suspended += 1
    try:
        yield
    finally:
        _suspended -= 1


def _key(op: str, args: tuple[Any, ...]) -> Key | None:
    """All that a call depends on but for values in its tensors; None: it is to be left alone."""
    if _suspended or not is_unwatched():
        return None
    kinds = tuple(map(type, args))
    try:
        places = _kinds[kinds]
    except KeyError:
        places = _kinds[kinds] = _places(kinds)
    if places is None:
        return None
    tensors, others = places
    graded = torch.is_grad_enabled()
    key: list[Any] = [op, _choices, kinds, torch.are_deterministic_algorithms_enabled()]
    # What users switch on and off, and operations of torch depend on.
    key += (torch._C._get_cudnn_enabled(), torch._C._get_cudnn_sdp_enabled())
    for place in tensors:
        tensor = args[place]
        if (graded and tensor.requires_grad) or tensor.is_neg():
            return None
        key += (
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.device,
            tensor.data_ptr() % ALIGNMENT,
        )
    key += [args[place] for place in others]
    return tuple(key)


def _places(kinds: tuple[type, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Where tensors are among arguments, and where the rest; None where there is anything else."""
    if not all(kind in _TENSORS or kind in _NUMBERS for kind in kinds):
        return None
    tensors = tuple(i for i, kind in enumerate(kinds) if kind in _TENSORS)
    return tensors, tuple(i for i, kind in enumerate(kinds) if kind not in _TENSORS)


def is_unwatched() -> bool:
    """Whether nobody follows the operations of this thread, or transforms them."""
    if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    modes = range(torch._C._len_torch_function_stack())
    return all(type(torch._C._get_function_stack_at(i)) is DeviceContext for i in modes)
