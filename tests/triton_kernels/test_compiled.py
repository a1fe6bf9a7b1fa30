"""Which compiled kernel is started for which arguments, with a stand-in for Triton and a device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from astra_kernels._triton import compiled


class Compiled:
    """A compiled kernel; it says what it is started with."""

    def __init__(self, started):
        self.started = started

    def __getitem__(self, grid):
        return lambda *given: self.started.append((self, grid, given))


class Kernel:
    """x, count and fixed, an integer that is not specialized, then the constant BLOCK."""

    def __init__(self):
        names = ("x", "count", "fixed", "BLOCK")
        self.params = [
            SimpleNamespace(
                name=name,
                is_constexpr=name == "BLOCK",
                annotation_type="",
                do_not_specialize=name == "fixed",
            )
            for name in names
        ]
        self.compiled, self.started = [], []

    def __getitem__(self, grid):
        def bind(*args, **kwargs):
            self.compiled.append(Compiled(self.started))
            return self.compiled[-1]

        return bind


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(compiled, "JITFunction", Kernel)
    monkeypatch.setattr(compiled, "CompiledKernel", Compiled)
    monkeypatch.setattr(compiled, "_bindings", {})
    return Kernel()


MEMORY = torch.zeros(64)


def start(kernel, *, x=MEMORY, count=32, fixed=3, block=16, warps=4, device=0):
    args, options = (x, count, fixed), {"num_warps": warps}
    compiled.start(kernel, (5,), args, {"BLOCK": block}, options, device)


def test_the_same_is_bound_once(kernel):
    for _ in range(3):
        start(kernel)
    (one,) = kernel.compiled
    assert kernel.started == 2 * [(one, (5, 1, 1), (MEMORY.data_ptr(), 32, 3, 16))]


@pytest.mark.parametrize(
    "other",
    [
        {"x": MEMORY.clone()},
        {"x": MEMORY[4:]},  # 16 bytes behind
        {"count": 48},  # 16 divides it as well
        {"fixed": 16},  # at which Triton does not look
        {"fixed": 1},
    ],
)
def test_what_triton_does_not_look_at_is_filled_in(kernel, other):
    start(kernel)
    start(kernel, **other)
    assert len(kernel.compiled) == 1
    x, count, fixed = (other.get(name, was) for name, was in
                       (("x", MEMORY), ("count", 32), ("fixed", 3)))  # fmt: skip
    assert kernel.started[-1][2] == (x.data_ptr(), count, fixed, 16)


@pytest.mark.parametrize(
    "other",
    [
        {"x": MEMORY.double()},
        {"x": MEMORY[1:]},  # 4 bytes behind: 16 does not divide the address
        {"count": 1},
        {"count": 33},
        {"block": 32},
        {"warps": 8},
        {"device": 1},
        {"x": None},
        {"count": 2.0},
    ],
)
def test_what_triton_looks_at_binds_anew(kernel, other):
    start(kernel)
    start(kernel, **other)
    assert (len(kernel.compiled), kernel.started) == (2, [])
    start(kernel, **other)
    start(kernel)
    assert len(kernel.compiled) == 2
    assert [one for one, *_ in kernel.started] == kernel.compiled[::-1]


def test_integers_of_another_width_go_to_triton(kernel):
    for _ in range(2):
        start(kernel, count=2**31)
        start(kernel, fixed=-(2**31) - 1)
    assert (len(kernel.compiled), kernel.started) == (4, [])
