"""What a call on a GPU does, so that it can be done again: allocations, launches and operations of
torch, on tensors by their numbers.

It is kept only where nothing can go wrong unseen. A dispatch mode watches the call. Every address
that a kernel was given, and every tensor that an operation took, has to begin where exactly one
tensor does that is known: an argument, an allocation, or what an operation made. Views may be
taken from the beginning of such a tensor; a view from its middle, a number that was read from a
tensor or a write to an argument, and the call is not kept.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Kernels are started by one thread at a time. A kernel that one thread is still loading, Triton
# (3.6 to 3.9) would start for another without its code; and its interpreter keeps the number of the
# program that runs in one place.
starting = threading.Lock()

_ALLOCATIONS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("new_empty", "empty_like", "new_empty_strided", "empty_strided")
) | {torch.ops.aten.empty.memory_format}


class Memory(NamedTuple):
    """A tensor to allocate."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> Memory:
        return Memory(tuple(tensor.shape), tensor.stride(), tensor.dtype)


class View(NamedTuple):
    """A tensor by its number, as it is looked at from its beginning on; None: as it is."""

    number: int
    memory: Memory | None

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        tensor = tensors[self.number]
        if self.memory is None:
            return tensor
        if tensor.dtype != self.memory.dtype:
            tensor = tensor.view(self.memory.dtype)
        return tensor.as_strided(self.memory.size, self.memory.stride)


class Launch(NamedTuple):
    """A kernel to start: arguments, of which those at ``places`` are addresses of tensors, by their
    numbers."""

    run: Callable[..., object]
    arguments: tuple[Any, ...]
    places: tuple[tuple[int, int], ...]


class Operation(NamedTuple):
    """An operation of torch; tensors among its arguments are views. ``makes``: its results are
    tensors with numbers of their own."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    makes: bool

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        def seen(value: Any) -> Any:
            if type(value) is View:
                return value.of(tensors)
            return [seen(part) for part in value] if type(value) is list else value

        options = {name: seen(value) for name, value in self.options.items()}
        result = self.run(*map(seen, self.arguments), **options)
        return _tensors(result) if self.makes else []


Step = Memory | Launch | Operation


@dataclass(frozen=True, eq=False)
class Call:
    """What a call does: with its tensor arguments, the first ones to have numbers, at ``given``.
    ``single``: its result is one tensor and no tuple."""

    device: torch.device
    given: tuple[int, ...]
    steps: tuple[Step, ...]
    results: tuple[View, ...]
    single: bool

    def __call__(self, args: Sequence[Any]) -> Any:
        if is_current(self.device):
            return self._do(args)
        with torch.cuda.device(self.device):
            return self._do(args)

    def _do(self, args: Sequence[Any]) -> Any:
        tensors = [args[place] for place in self.given]
        addresses = [tensor.data_ptr() for tensor in tensors]
        device = self.device
        with starting:
            for step in self.steps:
                if isinstance(step, Launch):
                    run, arguments, places = step
                    filled = list(arguments)
                    for place, number in places:
                        filled[place] = addresses[number]
                    run(*filled)
                elif isinstance(step, Memory):
                    size, stride, dtype = step
                    tensor = torch.empty_strided(size, stride, dtype=dtype, device=device)
                    tensors.append(tensor)
                    addresses.append(tensor.data_ptr())
                else:
                    made = step(tensors)
                    tensors += made
                    addresses += [tensor.data_ptr() for tensor in made]
        results = [view.of(tensors) for view in self.results]
        return results[0] if self.single else tuple(results)


class _State(threading.local):
    recorder: Recorder | None = None


_state = _State()


def current_recorder() -> Recorder | None:
    """What the call that this thread is in is kept by, if it is."""
    return _state.recorder


@contextlib.contextmanager
def recording_with(recorder: Recorder) -> Iterator[None]:
    _state.recorder = recorder
    try:
        with recorder:
            yield
    finally:
        _state.recorder = None


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Kernels start on the current device, so another one is made current."""
    return contextlib.nullcontext() if is_current(device) else torch.cuda.device(device)


def is_current(device: torch.device) -> bool:
    return device.type != "cuda" or device.index == torch.cuda.current_device()


class Recorder(TorchDispatchMode):
    """What one call does, while it runs."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would load its compiler at the first operation, and keep that call's frames,
        with the tensors in them, until garbage is collected. A compiled call has no recorder."""
        return False

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.whole = True  # so far nothing was done that could not be done again
        self.given = tuple(i for i, arg in enumerate(args) if isinstance(arg, Tensor))
        self.device = args[0].device
        self.tensors: list[Tensor] = []  # kept, so that no address comes twice
        self.numbers: dict[int, int | None] = {}  # by address; None: of several tensors
        self.steps: list[Step] = []
        self.looked_at: set[int] = set()  # by operations of torch, which care for strides
        for place in self.given:
            self._add(args[place])

    def _add(self, tensor: Tensor) -> None:
        address = tensor.data_ptr()
        known = address in self.numbers or not address
        # a seed for dropout, for one, may lie on the host; nobody takes it
        number = None if known or tensor.device != self.device else len(self.tensors)
        self.numbers[address] = number
        self.tensors.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, options = func(*args, **(kwargs or {})), kwargs or {}
        if func in _ALLOCATIONS:
            self.whole = self.whole and result.device == self.device
            self.steps.append(Memory.of(result))
            self._add(result)
        elif not (_is_of_numbers(func, result) or _is_same_memory(func, args, result)):
            self._operated(func, args, options, result)
        return result

    def _operated(
        self, func: Any, args: Sequence[Any], options: Mapping[str, Any], result: Any
    ) -> None:
        written = _written(func, args, options)
        made = _tensors(result) if written is None else []
        known = {tensor.untyped_storage().data_ptr() for tensor in self.tensors} - {0}
        shared = any(tensor.untyped_storage().data_ptr() in known for tensor in made)
        try:
            arguments = tuple(map(self._view, args))
            kept = {name: self._view(value) for name, value in options.items()}
        except LookupError:
            self.lost()
            return
        if written is not None:  # nothing that was given, and in full
            number = self.numbers.get(written.data_ptr())
            right = number is not None and number >= len(self.given)
        else:
            fresh = bool(made) and not shared and made[0].device == self.device
            right = fresh and not func._schema.is_mutable
        if not right:
            self.lost()
            return
        self.steps.append(Operation(func, arguments, kept, written is None))
        for tensor in made:
            self._add(tensor)

    def _view(self, value: Any) -> Any:
        """A tensor as a view of one that is known, else LookupError."""
        if isinstance(value, list | tuple):
            return [self._view(part) for part in value]
        if not isinstance(value, Tensor):
            return value
        number = self.numbers.get(value.data_ptr())
        if number is None:
            raise LookupError
        known = self.tensors[number]
        if known.dtype != value.dtype and not known.is_contiguous():
            raise LookupError
        self.looked_at.add(number)
        return View(number, None if Memory.of(known) == Memory.of(value) else Memory.of(value))

    def launched(
        self, run: Callable[..., object], arguments: Sequence[Any], tensors: Sequence[int]
    ) -> None:
        """A kernel was started; of ``arguments`` those at the places ``tensors`` are addresses."""
        places = []
        for place in tensors:
            number = self.numbers.get(arguments[place])
            if number is None:
                self.lost()
                return
            places.append((place, number))
        self.steps.append(Launch(run, tuple(arguments), tuple(places)))

    def lost(self) -> None:
        """Something was done that cannot be done again."""
        self.whole = False

    def forget(self) -> None:
        """Lets go of the tensors: whatever keeps the mode is not to keep memory, which a compiler
        that manages a graph's pool would find."""
        self.tensors.clear()
        self.numbers.clear()

    def call(self, result: Any) -> Call | None:
        """What is kept of a call that gave ``result``."""
        single = isinstance(result, Tensor)
        results = []
        for tensor in (result,) if single else tuple(result):
            number = self._number_of(tensor)
            if number is None or number < len(self.given):
                return None
            if tensor.dtype != self.tensors[number].dtype:
                return None
            results.append(self._result(number, tensor))
        does = any(not isinstance(step, Memory) for step in self.steps)
        if not self.whole or not does:
            return None
        return Call(self.device, self.given, tuple(self.steps), tuple(results), single)

    def _number_of(self, tensor: Tensor) -> int | None:
        """An empty tensor has no address, but may be known itself."""
        if tensor.numel():
            return self.numbers.get(tensor.data_ptr())
        same = (number for number, known in enumerate(self.tensors) if known is tensor)
        return next(same, None)

    def _result(self, number: int, tensor: Tensor) -> View:
        """A tensor that is allocated as it is to be, where nobody minds, or a view."""
        memory, wanted = Memory.of(self.tensors[number]), Memory.of(tensor)
        if memory == wanted:
            return View(number, None)
        same_size = tensor.numel() == self.tensors[number].numel()
        free = number not in self.looked_at and self.steps.count(memory) == 1
        if free and same_size and _is_dense(tensor):
            self.steps[self.steps.index(memory)] = wanted
            return View(number, None)
        return View(number, wanted)


def _written(func: Any, args: Sequence[Any], options: Mapping[str, Any]) -> Tensor | None:
    """The tensor that an operation writes to, in place or as ``out``; None: it makes its own."""
    places = func._schema.arguments
    written = [
        i for i, place in enumerate(places) if place.alias_info and place.alias_info.is_write
    ]
    if len(written) != 1:
        return None
    target = args[0] if written == [0] and args else options.get(places[written[0]].name)
    return target if isinstance(target, Tensor) else None


def _tensors(result: Any) -> list[Tensor]:
    values = (result,) if isinstance(result, Tensor) else result
    if not isinstance(values, list | tuple):
        return []
    return [value for value in values if isinstance(value, Tensor)]


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill memory, in whatever order of its axes."""
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != step:
                return False
            step *= size
    return True


def _is_of_numbers(func: Any, result: Any) -> bool:
    """Whether an operation has nothing to do with tensors, such as `promote_types`."""
    takes = any("Tensor" in str(argument.type) for argument in func._schema.arguments)
    return not takes and isinstance(result, int | float | bool | torch.dtype)


def _is_same_memory(func: Any, args: Any, result: Any) -> bool:
    """Whether an operation did nothing but look at a tensor from its beginning on."""
    if func._schema.is_mutable or not isinstance(result, Tensor):
        return False
    of = [arg for arg in args if isinstance(arg, Tensor)]
    return len(of) == 1 and of[0].data_ptr() == result.data_ptr() and result.data_ptr() != 0
