"""What every op owes torch on a CUDA device: `pytest tests/gpu --device cuda`."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import astra_kernels as ak
from tests.kernels.test_library import OPS, inputs, operator_calls

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_device(device: str) -> None:
    if device != "cuda":
        pytest.skip("runs with --device cuda")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    torch.manual_seed(0)


def call_of(name, tokens=37, rows=21):
    args, options = inputs(name, tokens, rows, device="cuda")
    return args, options


def assert_same(got, want) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def clones(result):
    return tuple(x.clone() for x in result) if isinstance(result, tuple) else result.clone()


@pytest.mark.parametrize("name", OPS)
def test_auto_is_the_kernel(name):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("there is no Triton")
    args, options = call_of(name)
    want = clones(getattr(ak, name)(*args, **options, impl="triton"))
    assert_same(getattr(ak, name)(*args, **options), want)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(monkeypatch, name):
    args, options = call_of(name)
    op, calls = operator_calls(monkeypatch, name, args, options)
    assert len(calls) == 1
    torch.library.opcheck(op, calls[0])


@pytest.mark.parametrize("name", OPS)
def test_compiles_whole_with_dynamic_shapes(name):
    torch._dynamo.reset()
    op = getattr(ak, name)
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="eager")
    for tokens, rows in ((11, 5), (14, 9)):
        args, options = call_of(name, tokens, rows)
        assert_same(compiled(*args, **options), op(*args, **options))


def test_compiles_with_inductor():
    torch._dynamo.reset()
    args, options = call_of("mixed_attention")

    def block(*args):
        return ak.mixed_attention(*args, **options) * 2 + 1

    torch.testing.assert_close(torch.compile(block, fullgraph=True)(*args), block(*args))


@pytest.mark.parametrize("name", OPS)
def test_captured_in_a_graph(name):
    """A graph that is replayed reads what its inputs hold then, not what they held."""
    op = getattr(ak, name)
    args, options = call_of(name)
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op(*args, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(*args, **options)
    for seed in (1, 2):
        torch.manual_seed(seed)
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor))
            else:
                tensor.copy_(tensor.flip(0))
        graph.replay()
        assert_same(clones(captured), op(*args, **options))


@pytest.mark.parametrize("name", OPS)
def test_no_call_waits_for_the_device(name):
    op = getattr(ak, name)
    args, options = call_of(name)
    op(*args, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*args, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPS)
def test_on_another_stream(name):
    """The kernels run on the current stream, after what that stream was given before."""
    op = getattr(ak, name)
    args, options = call_of(name)
    want = clones(op(*args, **options))
    held = [x.clone() for x in args if isinstance(x, torch.Tensor)]
    for x in args:
        if isinstance(x, torch.Tensor):
            x.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for x, old in zip([x for x in args if isinstance(x, torch.Tensor)], held, strict=True):
            x.copy_(old)
        got = op(*args, **options)
    stream.synchronize()
    assert_same(got, want)


def test_packing_in_a_graph():
    codes = torch.randint(0, 1024, (999,), dtype=torch.int32, device="cuda")
    ak.unpack(ak.pack(codes, 10), 10, codes.numel())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        data = ak.pack(codes, 10)
        again = ak.unpack(data, 10, codes.numel())
    codes.copy_(codes.flip(0))
    graph.replay()
    assert torch.equal(again, codes)
    assert torch.equal(data.cpu(), ak.pack(codes.cpu(), 10))


def test_a_bad_code_is_found_when_asked_for():
    args, options = call_of("decode")
    args[0][3, 1] = 99
    with pytest.raises(ValueError, match="got 99"):
        ak.decode(*args, **options, check=True)
    ak.decode(*args, **options)  # reads no value, and nothing outside the table
