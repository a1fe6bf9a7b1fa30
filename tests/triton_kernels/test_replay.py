"""Calls that are done again from what was kept of them.

On the CPU a stand-in starts kernels: what it keeps of a launch are addresses, as a compiled kernel
takes them, and it makes tensors of them again for the interpreter.
"""

from __future__ import annotations

import ctypes
import gc
import math
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import astra_kernels as ak
from astra_kernels import _dispatch, _recording
from astra_kernels import _replay as replay
from astra_kernels._triton import launch, tiles
from tests.triton_kernels.test_graphs import CALLS, near, query, state, tables
from tests.triton_kernels.test_graphs import codes as random_codes
from tests.triton_kernels.test_graphs import few_rows_are_many as few_rows_are_many


def at(address: int, like: Tensor) -> Tensor:
    """The memory at ``address`` as a tensor of the other's shape, strides and dtype."""
    sizes = zip(like.shape, like.stride(), strict=True)
    size = (1 + sum((size - 1) * stride for size, stride in sizes)) * like.itemsize
    memory = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


@pytest.fixture
def started(monkeypatch, device) -> list[str]:
    """The names of kernels that were started from what was kept."""
    names: list[str] = []
    if device == "cuda":
        run = _recording.Call.__call__

        def counted(call, args):
            names.extend("kernel" for step in call.steps if type(step) is _recording.Launch)
            return run(call, args)

        monkeypatch.setattr(_recording.Call, "__call__", counted)
        return names

    def start(kernel, grid, args, constants, options, index):
        with _disable_current_modes():  # the interpreter works in torch
            kernel[grid](*args, **constants, **options)
        recorder = _recording.current_recorder()
        if recorder is None:
            return
        places = [place for place, arg in enumerate(args) if isinstance(arg, Tensor)]

        def run(*given):
            names.append(kernel.fn.__name__)
            rebuilt = list(given)
            for place in places:
                rebuilt[place] = at(given[place], args[place])
            kernel[grid](*rebuilt, **constants, **options)

        given = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
        recorder.launched(run, given, places)

    monkeypatch.setattr(launch, "start", start)
    monkeypatch.setattr(replay, "serves", lambda device: True)
    return names


@pytest.fixture
def impl(device) -> str:
    return "auto" if device == "cuda" else "triton"


def test_memory_is_let_go_of(monkeypatch):
    """Without a collection of garbage: what a call used for itself, and what it gave."""
    monkeypatch.setattr(replay, "serves", lambda device: True)
    used = []

    def kernel(x):
        part, out = x.new_empty(7), torch.empty_like(x)
        used.extend(weakref.ref(tensor) for tensor in (part, out))
        return out.copy_(x)

    call, given = replay.kept("a call of its own", kernel), torch.ones(3)
    gc.disable()
    try:
        for _ in range(3):
            assert torch.equal(call(given), given)
            assert [tensor() for tensor in used] == [None] * len(used)
        assert len(used) == 4  # the third one was done by what was kept
    finally:
        gc.enable()


def inputs_of(call):
    """Codes that are looked at first are never kept; on a GPU nobody looks."""
    args, options = call.inputs()
    takes = call.op in ("decode", "count_codes", "lookup_linear") or "attention" in call.op
    takes = takes and call.op != "attention"
    return args, {**options, **({"check": False} if takes else {})}


def without_launchers(monkeypatch) -> None:
    """Whoever asks for an implementation is refused."""

    def refuse(*args):
        raise AssertionError("the call was not kept")

    monkeypatch.setattr(_dispatch, "choose", refuse)


@pytest.mark.parametrize("call", [c for c in CALLS if c.takes_impl], ids=lambda call: call.name)
def test_other_tensors_of_the_same_shapes(monkeypatch, started, call, impl):
    for _ in range(3):  # compiled, seen, kept
        before = call(inputs_of(call), impl)
    inputs = inputs_of(call)
    want = call(inputs, "reference")
    without_launchers(monkeypatch)
    started.clear()
    got = call(inputs, impl)
    assert started
    for a, b, c in zip(got, want, before, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (c.dtype, c.shape, c.stride())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def kept() -> int:
    return sum(call is not None for call in replay._calls.values())


def test_the_same_tensor_twice_is_not_kept(started, impl):
    """One address stands for two arguments, which need not be equal the next time."""
    one = state()
    for _ in range(4):
        ak.merge_state(*one, *one, impl=impl)
    two = state()
    got = ak.merge_state(*one, *two, impl=impl)
    want = ak.merge_state(*one, *two, impl="reference")
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)


def test_what_a_call_depends_on(started, impl):
    keys, values = tables()
    codes, q = random_codes(2, 40, 2), query(5)
    strided = q.transpose(2, 3).contiguous().transpose(2, 3)

    def calls():
        ak.coded_attention(q, codes, keys, values, impl=impl, check=False)

    for _ in range(4):
        calls()
    assert kept() == 1
    want, _ = ak.coded_attention(q, codes, keys, values, impl="reference")
    for given, options in (
        ((q, codes[:, :39], keys, values), {}),
        (
            (strided, codes, keys, values),
            {},
        ),
        ((q, codes.long(), keys, values), {}),
        ((q, codes, keys, values), {"scale": 0.5}),
        ((q, codes, keys, values), {"softcap": 2.0}),
        ((q, codes, keys, values), {"code_mask": torch.rand(2, 40) > 0.5}),
        ((q[:, :, :4], codes, keys, values), {}),
    ):
        started.clear()
        got, lse = ak.coded_attention(*given, **options, impl=impl, check=False)
        assert not started
        right, right_lse = ak.coded_attention(*given, **options, impl="reference")
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lse, right_lse, rtol=1e-4, atol=1e-4)
    started.clear()
    calls()
    assert started
    torch.testing.assert_close(
        ak.coded_attention(q, codes, keys, values, impl=impl, check=False)[0], want,
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_codes_that_are_read_are_not_kept(started, impl):
    keys, values = tables()
    codes, q = random_codes(2, 40, 2), query(5)
    for _ in range(4):
        ak.coded_attention(q, codes, keys, values, impl=impl, check=True)
    assert not kept()
    codes[1, 3, 1] = 99
    with pytest.raises(ValueError, match="codes"):
        ak.coded_attention(q, codes, keys, values, impl=impl, check=True)


def test_masks_that_are_reduced(monkeypatch, started, impl):
    """Which keys a mask shows to anybody is found by operations of torch, and these are kept."""

    def inputs():
        return query(5), *near(9), torch.rand(4, 5, 9) > 0.8

    for _ in range(3):
        *given, mask = inputs()
        ak.attention(*given, attn_mask=mask, impl=impl)
    *given, mask = inputs()
    want, _ = ak.attention(*given, attn_mask=mask, impl="reference")
    without_launchers(monkeypatch)
    got, _ = ak.attention(*given, attn_mask=mask, impl=impl)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_gradients_and_modes_see_every_call(started, impl):
    q, (k, v) = query(5), near(9)
    for _ in range(4):
        ak.attention(q, k, v, impl=impl)
    assert kept() == 1
    leaf = q.clone().requires_grad_()
    out, _ = ak.attention(leaf, k, v, impl=impl)
    assert out.requires_grad
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        ak.attention(q, k, v, impl=impl)
    assert torch.ops.astra.attention.default in seen
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(RuntimeError, match="forward-mode"):
            ak.attention(dual, k, v, impl=impl)


def test_a_chosen_tile_is_another_call(started, impl):
    q, (k, v) = query(5), near(90)

    def call():
        return ak.attention(q, k, v, impl=impl)

    for _ in range(4):
        call()
    assert kept() == 1
    with tiles.watch() as problems:
        call()
    assert len(problems) == 1  # those who measure tiles see the choice
    tiles.remember(problems[0], tiles.candidates(problems[0])[-1])
    assert not kept()
    tiles.forget()


def test_other_rules_are_other_calls(started, impl):
    q, (k, v) = query(5), near(9)
    for _ in range(4):
        ak.attention(q, k, v, impl=impl)
    started.clear()
    with replay.choosing("another"):
        ak.attention(q, k, v, impl=impl)
    assert not started
    ak.attention(q, k, v, impl=impl)
    assert started


def test_errors_stay(started, impl):
    q, (k, v) = query(5), near(9)
    for _ in range(4):
        ak.attention(q, k, v, scale=1.0, impl=impl)
    with pytest.raises(TypeError, match="scale"):
        ak.attention(q, k, v, scale=True, impl=impl)
    with pytest.raises(ValueError, match="value"):
        ak.attention(q, k, v[:, :, :8], scale=1.0, impl=impl)
    with pytest.raises(TypeError, match="value"):
        ak.attention(q, k, v.double(), scale=1.0, impl=impl)
    with pytest.raises(ValueError, match="impl"):
        ak.attention(q, k, v, scale=1.0, impl="best")


def test_operations_of_torch_alone(monkeypatch, started):
    """What cuDNN is to a launcher: results of its own, of which some are views or empty."""
    calls = []

    def product(x, y):
        calls.append(1)
        out, extremes = x @ y, x.new_empty(2)
        extremes.fill_(1.0)
        low, high = torch.aminmax(out)
        both = torch.cat([x, x])
        torch.threshold_(both, 0.0, 7.0)
        return out.transpose(0, 1), low + high, extremes, both

    op = replay.kept("product", product)
    for count in (1, 2, 2, 2):
        x, y = torch.randn(3, 4), torch.randn(4, 5)
        out, middle, extremes, both = op(x, y)
        assert torch.equal(both, torch.where(x > 0, x, 7.0).repeat(2, 1))
        torch.testing.assert_close(out, (x @ y).T)
        torch.testing.assert_close(middle, out.min() + out.max())
        assert torch.equal(extremes, torch.ones(2))
        assert out.stride() == (1, 5)
        assert len(calls) == count


def test_operations_of_a_kept_call_are_not_autocast(started):
    op = replay.kept("product", lambda x, y: x @ y)
    x, y = torch.randn(3, 4), torch.randn(4, 5)
    for _ in range(3):
        op(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        out = replay.run("product", (x, y))
    assert torch.equal(out, x @ y)


def test_a_result_that_lies_elsewhere(started):
    """As the seed of cuDNN's dropout may, which nobody takes."""
    library = torch.library.Library("replay_test", "FRAGMENT")
    library.define("twice(Tensor x) -> (Tensor, Tensor)")
    library.impl(
        "twice", lambda x: (x * 2, torch.empty(2, device="meta")), "CompositeExplicitAutograd"
    )
    op = replay.kept("twice", lambda x: torch.ops.replay_test.twice(x)[0])
    for _ in range(4):
        x = torch.randn(3, 4)
        assert torch.equal(op(x), x * 2)
    assert kept() == 1
    replay.forget()
    op = replay.kept("twice", lambda x: torch.ops.replay_test.twice(x)[1])
    for _ in range(4):
        op(torch.randn(3, 4))
    assert not kept()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x + x.sum().item(),  # reads
        lambda x: x[1:] * 2,  # from the middle
        lambda x: x.mul_(2) + 1,  # writes to its argument
        lambda x: torch.frexp(x, out=(torch.empty_like(x), x.new_empty(3, 4).int()))[0] + 0,
        lambda x: x.unbind()[0] + 1,
        lambda x: x,  # gives back what it was given
    ],
)
def test_what_is_not_kept(started, wrong):
    op = replay.kept("wrong", wrong)
    for _ in range(4):
        x = torch.randn(3, 4)
        want = wrong(x.clone())
        torch.testing.assert_close(op(x), want)
    assert not kept()


def test_keys_are_told_apart_by_what_nothing_equals(started, impl):
    """A scale of NaN equals no other: it is never found again, and never wrong."""
    q, (k, v) = query(5), near(9)
    for _ in range(3):
        out, _ = ak.attention(q, k, v, scale=math.nan, impl=impl)
    assert out.isnan().all()


@pytest.mark.parametrize("shape", [(3, 4), (4, 3)])
def test_dense(shape):
    x = torch.empty(2, *shape)
    assert _recording._is_dense(x)
    assert _recording._is_dense(x.transpose(1, 2))
    assert not _recording._is_dense(x[:, ::2])
    assert not _recording._is_dense(x[:, :1].expand(2, *shape))
