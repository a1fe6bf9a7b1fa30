"""Calls that a GPU was given before: the same launches again, without asking anew which they are.

A launcher asks some sixty things of shapes, strides and dtypes before it starts a kernel, and all
of its answers follow from them. So what a call did is kept under all that it may depend on: tensors
to allocate, and compiled kernels with their arguments. A call of the same kind allocates, fills in
addresses and starts the kernels, which takes about a tenth of the time.

It is done where nothing can go wrong unseen. What a call does is watched by a dispatch mode: beside
launches it may allocate, and take views that begin where a tensor begins. Every address that a
kernel was given has to be that of one argument, or of one allocation. Any other call is not kept.
Nor is one that is differentiated, traced, compiled or seen by anybody's dispatch mode.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")
Key = tuple[Any, ...]

# Kernels are started by one thread at a time. A kernel that one thread is still loading, Triton
# (3.6 to 3.9) would start for another without its code; and its interpreter keeps the number of the
# program that runs in one place.
starting = threading.Lock()

# Calls that are kept, and such as were seen once; at more, all are forgotten.
MOST = 4096

# Addresses with the same remainder are aligned alike, whatever a launcher looks at.
ALIGNMENT = 16

_TENSORS = (Tensor, nn.Parameter)
_NUMBERS = (int, float, bool, str, type(None))
_ALLOCATIONS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("new_empty", "empty_like", "new_empty_strided", "empty_strided")
) | {torch.ops.aten.empty.memory_format}


class Memory(NamedTuple):
    """A tensor to allocate."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Launch(NamedTuple):
    """A kernel to start: arguments, of which those at ``places`` are addresses of tensors, by their
    numbers among a call's arguments and what it allocates."""

    run: Callable[..., object]
    arguments: tuple[Any, ...]
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Call:
    """What a call does. ``results``: numbers among what it allocates; ``single``: no tuple."""

    device: torch.device
    given: tuple[int, ...]
    allocated: tuple[Memory, ...]
    launches: tuple[Launch, ...]
    results: tuple[int, ...]
    single: bool

    def __call__(self, args: Sequence[Any]) -> Any:
        fresh = [
            torch.empty_strided(size, stride, dtype=dtype, device=self.device)
            for size, stride, dtype in self.allocated
        ]
        addresses = [args[place].data_ptr() for place in self.given]
        addresses += [tensor.data_ptr() for tensor in fresh]
        with starting, current(self.device):
            for run, arguments, places in self.launches:
                filled = list(arguments)
                for place, number in places:
                    filled[place] = addresses[number]
                run(*filled)
        if self.single:
            return fresh[self.results[0]]
        return tuple([fresh[number] for number in self.results])


class _State(threading.local):
    trace: Trace | None = None


_state = _State()
_calls: dict[Key, Call | None] = {}  # None: cannot be done again
_seen: set[Key] = set()
_kinds: dict[tuple[type, ...], tuple[tuple[int, ...], tuple[int, ...]] | None] = {}
_choices: str = ""
_suspended = 0


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Kernels start on the current device, so another one is made current."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def run(op: str, args: tuple[Any, ...]) -> Any:
    """The result of a call of ``op`` that was kept, from its arguments as the schema has them; None
    where none was."""
    if torch.compiler.is_compiling() or not _calls:
        return None
    key = _key(op, args)
    call = None if key is None else _calls.get(key)
    return None if call is None else call(args)


def kept(op: str, kernel: Callable[..., T]) -> Callable[..., T]:
    """``kernel``, whose calls on a GPU are kept when they come for the second time."""

    def watched(*args: Any) -> T:
        if not serves(args[0].device) or _state.trace is not None:
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
        trace = _state.trace = Trace(args)
        try:
            with trace:
                result = kernel(*args)
        finally:
            _state.trace = None
        if len(_calls) >= MOST:
            _calls.clear()
        _calls[key] = trace.call(result)
        return result

    return watched


def serves(device: torch.device) -> bool:
    return device.type == "cuda"


def tracing() -> Trace | None:
    """What the call that this thread is in is kept by, if it is."""
    return _state.trace


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
    if _suspended or not _plain():
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
    key: list[Any] = [op, _choices, kinds]
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


def _plain() -> bool:
    """Whether nobody follows the operations of this thread, or transforms them."""
    if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    modes = range(torch._C._len_torch_function_stack())
    return all(type(torch._C._get_function_stack_at(i)) is DeviceContext for i in modes)


class Trace(TorchDispatchMode):
    """What one call does, while it runs."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.whole = True  # so far nothing was done that could not be done again
        self.given = tuple(i for i, arg in enumerate(args) if isinstance(arg, Tensor))
        self.device = args[0].device
        self.numbers: dict[int, int | None] = {}  # by address; None: of several tensors
        self.allocated: list[Tensor] = []  # kept, so that no address comes twice
        self.launches: list[Launch] = []
        for number, place in enumerate(self.given):
            self._number(args[place], number)

    def _number(self, tensor: Tensor, number: int) -> None:
        address = tensor.data_ptr()
        self.numbers[address] = None if address in self.numbers or not address else number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self._number(result, len(self.given) + len(self.allocated))
            self.allocated.append(result)
            self.whole = self.whole and result.device == self.device
        elif not (_is_of_numbers(func, result) or _is_same_memory(func, args, result)):
            self.whole = False
        return result

    def launched(
        self, run: Callable[..., object], arguments: Sequence[Any], tensors: Sequence[int]
    ) -> None:
        """A kernel was started; of ``arguments`` those at the places ``tensors`` are addresses."""
        places = [(place, self.numbers.get(arguments[place])) for place in tensors]
        if any(number is None for _, number in places):
            self.whole = False
            return
        known = [(place, number) for place, number in places if number is not None]
        self.launches.append(Launch(run, tuple(arguments), tuple(known)))

    def lost(self) -> None:
        """Something was done that cannot be done again."""
        self.whole = False

    def call(self, result: Any) -> Call | None:
        """What is kept of a call that gave ``result``."""
        single = isinstance(result, Tensor)
        results = (result,) if single else tuple(result)
        memory = [Memory(tuple(t.shape), t.stride(), t.dtype) for t in self.allocated]
        first, places = len(self.given), []
        for tensor in results:
            number = self.numbers.get(tensor.data_ptr())
            if number is None or number < first:
                return None
            place = number - first
            whole = tensor.numel() == self.allocated[place].numel()
            if not whole or not _is_dense(tensor) or place in places:
                return None
            if tensor.dtype != memory[place].dtype:
                return None
            memory[place] = Memory(tuple(tensor.shape), tensor.stride(), tensor.dtype)
            places.append(place)
        if not (self.whole and self.launches):
            return None
        return Call(
            *(self.device, self.given, tuple(memory), tuple(self.launches), tuple(places), single)
        )


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
    return not takes and type(result) in (*_NUMBERS, torch.dtype)


def _is_same_memory(func: Any, args: Any, result: Any) -> bool:
    """Whether an operation did nothing but look at a tensor from its beginning on."""
    if func._schema.is_mutable or not isinstance(result, Tensor):
        return False
    of = [arg for arg in args if isinstance(arg, Tensor)]
    return len(of) == 1 and of[0].data_ptr() == result.data_ptr() and result.data_ptr() != 0
