"""The ops as programs on a GPU use them: in CUDA graphs, compiled, on other streams and devices.

Without a GPU the same calls run in the interpreter, and their launchers on tensors without data,
which fails if one of them waits for the device: it could not be captured then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import astra_kernels as ak
from astra_kernels._library.registration import KERNELS
from astra_kernels._triton import strategies
from astra_kernels._triton.launch import record
from astra_kernels.coded_attention import kernel as coded_kernel
from astra_kernels.mixed_attention import kernel as mixed_kernel
from astra_kernels.pack import kernel as pack_kernel
from astra_kernels.pack import reference as pack_reference
from tests import examples

drop_in = examples.load("drop_in")

BITS, CODEWORDS = 5, 32  # any bits are a code
CHANNELS, HEADS, KV_HEADS = 16, 4, 2


@dataclass(frozen=True)
class Call:
    """An op of the public interface, and what makes its arguments with fresh values each time."""

    name: str
    op: str
    make: Callable[[], tuple[Any, ...]]
    options: Callable[[], dict[str, Any]] = dict
    strategy: str | None = None  # that its shape leads to on a device that was not measured
    takes_impl: bool = True

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.make(), self.options()

    def __call__(self, inputs, impl="auto") -> list[Tensor]:
        args, options = inputs
        how = {"impl": impl} if self.takes_impl else {}
        return pytree.tree_leaves(getattr(ak, self.op)(*args, **options, **how))


def tensors(inputs) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


def codes(*shape):
    return torch.randint(0, CODEWORDS, shape, dtype=torch.int32)


def packed(batch, count):
    return torch.randint(0, 256, (batch, (count * BITS + 7) // 8), dtype=torch.uint8)


def tables(groups=1, kv_heads=KV_HEADS):
    return torch.randn(2, kv_heads, groups, CODEWORDS, CHANNELS // groups).unbind()


def query(rows, batch=2):
    return torch.randn(batch, HEADS, rows, CHANNELS)


def near(tokens, batch=2, kv_heads=KV_HEADS):
    return torch.randn(2, batch, kv_heads, tokens, CHANNELS).unbind()


def rope(tokens):
    angle = torch.randn(tokens, CHANNELS // 2).repeat(1, 2)
    return {"rope": (angle.cos(), angle.sin())}


def state():
    return query(5), torch.randn(2, 4, 5)


def mask(tokens):
    return {"code_mask": torch.rand(2, tokens) > 0.3}


def packing(count, **more):
    return {"code_bits": BITS, "num_tokens": count, **more}


MANY = 25  # queries; times four heads of one KV head: so many rows that codes are looked up once

CALLS = (
    Call(
        "coded-fused", "coded_attention", lambda: (query(5), codes(2, 40, 4), *tables(2)),
        lambda: {**rope(40), **mask(40)}, "fused",
    ),
    Call(
        "coded-counted", "coded_attention", lambda: (query(5), codes(2, 300, 2), *tables()),
        lambda: mask(300), "counted",
    ),
    Call(
        "coded-expanded", "coded_attention",
        lambda: (query(MANY, 1), codes(1, 20, 2), *tables(2, 1)),
        lambda: rope(20), "expanded",
    ),
    Call(
        "coded-fused-packed", "coded_attention",
        lambda: (query(5), packed(2, 40 * 4), *tables(2)),
        lambda: packing(40, **rope(40)), "fused",
    ),
    Call(
        "coded-counted-packed", "coded_attention",
        lambda: (query(40), packed(2, 300 * 2), *tables()),
        lambda: packing(300, **mask(300)), "counted",
    ),
    Call(
        "coded-expanded-packed", "coded_attention",
        lambda: (query(MANY, 1), packed(1, 20 * 2), *tables(2, 1)),
        lambda: packing(20, **rope(20)), "expanded",
    ),
    Call(
        "coded-decode", "coded_attention", lambda: (query(1), codes(2, 300, 2), *tables()),
        lambda: rope(300), "fused",
    ),
    Call(
        "mixed-fused", "mixed_attention",
        lambda: (query(5), *near(9), codes(2, 40, 2), *tables()),
        lambda: {"is_causal": True, **rope(40)}, "fused",
    ),
    Call(
        "mixed-counted", "mixed_attention",
        lambda: (query(40), *near(40), packed(2, 300 * 2), *tables()),
        lambda: packing(300, is_causal=True), "counted",
    ),
    Call(
        "mixed-expanded", "mixed_attention",
        lambda: (query(MANY, 1), *near(20, 1, 1), codes(1, 20, 1), *tables(1, 1)),
        lambda: rope(20), "expanded",
    ),
    Call(
        "attention", "attention", lambda: (query(5), *near(90)),
        lambda: {"is_causal": True, "key_mask": torch.rand(2, 90) > 0.3},
    ),
    Call(
        "codeword", "codeword_attention",
        lambda: (query(5), codes(2, KV_HEADS, CODEWORDS), *tables()),
    ),
    Call("encode", "encode", lambda: (torch.randn(40, 3, 8), torch.randn(3, 200, 8))),
    Call("encode-wide", "encode", lambda: (torch.randn(40, 1, 300), torch.randn(1, 200, 300))),
    Call(
        "encode_packed", "encode_packed",
        lambda: (torch.randn(2, 40, 3, 8), torch.randn(3, CODEWORDS, 8), BITS),
    ),
    Call("count_codes", "count_codes", lambda: (codes(2, 40, 3), CODEWORDS), lambda: mask(40)),
    Call(
        "count_codes-packed", "count_codes", lambda: (packed(2, 40 * 3), CODEWORDS),
        lambda: packing(40, codes_per_token=3),
    ),
    Call(
        "lookup_linear", "lookup_linear",
        lambda: (codes(40, 6), torch.randn(2, 3, CODEWORDS, 8), torch.randn(30, 24)),
        lambda: {"bias": torch.randn(30), "estimate": torch.randn(40, 24), "norm": "layer"},
    ),
    Call(
        "lookup_linear-packed", "lookup_linear",
        lambda: (packed(2, 40 * 3), torch.randn(3, CODEWORDS, 8), torch.randn(30, 24)),
        lambda: packing(40, norm="rms"),
    ),
    Call("decode", "decode", lambda: (codes(40, 3), torch.randn(3, CODEWORDS, 8))),
    Call("merge_state", "merge_state", lambda: (*state(), *state())),
    Call("merge_states", "merge_states", lambda: (torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5))),
    Call("pack", "pack", lambda: (codes(333), BITS), takes_impl=False),
    Call("unpack", "unpack", lambda: (packed(1, 333)[0], BITS, 333), takes_impl=False),
)  # fmt: skip


@pytest.fixture(autouse=True)
def few_rows_are_many(monkeypatch) -> None:
    """The interpreter takes seconds for the thousands of rows from which codes are expanded."""
    crossover = replace(strategies.DEFAULT, expanded_from=4 * MANY)
    monkeypatch.setattr(strategies, "DEFAULT", crossover)
    monkeypatch.setattr(strategies, "MEASURED", {})


every_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


@pytest.fixture
def impl(device) -> str:
    """On the CPU the kernels have to be asked for."""
    return "auto" if device == "cuda" else "triton"


@pytest.fixture
def on_gpu(device) -> None:
    if device != "cuda":
        pytest.skip("needs --device cuda")


def on_a_gpu(test):
    return pytest.mark.gpu(pytest.mark.usefixtures("on_gpu")(test))


def assert_same_bits(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


class Taken(Exception):
    """The arguments of an operator, in place of its call."""


def operator_arguments(monkeypatch, call, inputs, impl) -> tuple[Any, ...]:
    """What the public function hands to torch.ops."""
    if not call.takes_impl:
        return inputs[0]  # out of compiled code it goes straight to the implementation

    def take(*args):
        raise Taken(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.astra, call.op, take)
        # plain calls on a CPU go straight to the implementation, too, unless somebody watches
        patch.setattr("astra_kernels._replay.is_unwatched", lambda: False)
        with pytest.raises(Taken) as taken:
            call(inputs, impl)
    return taken.value.args


def test_every_op_is_called():
    elsewhere = {"fold_norm", "packed_size", "warmup", "scaled_dot_product_attention"}
    elsewhere |= {"attention_varlen", "coded_attention_paged", "quantized_linear"}
    assert {call.op for call in CALLS} == set(ak.__all__) - elsewhere


@every_call
def test_is_the_reference(monkeypatch, call, impl, device):
    chosen = []
    for module in (coded_kernel, mixed_kernel):
        monkeypatch.setattr(module, "choose_strategy", noting(coded_choice, chosen))
    inputs = call.inputs()
    got = call(inputs, impl)
    if call.takes_impl:
        want = call(inputs, "reference")
    else:
        want = [getattr(pack_reference, call.op)(*inputs[0])]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    if device == "cpu":
        assert chosen == ([call.strategy] if call.strategy else [])


coded_choice = coded_kernel.choose_strategy


def noting(choice, chosen):
    def noted(*args):
        chosen.append(choice(*args))
        return chosen[-1]

    return noted


@every_call
def test_launcher_reads_no_data(monkeypatch, call):
    """All that a launcher knows are shapes: nothing it does has to wait for the device."""
    with torch.device("meta"), record(90) as launches:
        inputs = call.inputs()
        if call.takes_impl:
            args = operator_arguments(monkeypatch, call, inputs, "triton")
            KERNELS[call.op](*args)
        else:
            getattr(pack_kernel, call.op)(*inputs[0])
    assert launches
    assert all(0 not in launch.grid for launch in launches)


@every_call
@pytest.mark.filterwarnings("ignore")  # the compiler's own, of the device
def test_opcheck(monkeypatch, call):
    args = operator_arguments(monkeypatch, call, call.inputs(), "auto")
    torch.library.opcheck(getattr(torch.ops.astra, call.op).default, args)


def renew(inputs, fresh) -> None:
    for old, new in zip(tensors(inputs), tensors(fresh), strict=True):
        old.copy_(new)


@every_call
def test_inputs_are_renewed(call):
    """What the tests of graphs and streams stand on, without a graph."""
    inputs = call.inputs()
    before = call(inputs)
    renew(inputs, call.inputs())
    after = call(inputs)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@on_a_gpu
@every_call
def test_replays_a_graph(call):
    inputs = call.inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(inputs)  # compiles the kernels, which a capture does not allow
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(inputs)
    for _ in range(3):
        renew(inputs, call.inputs())
        for tensor in captured:
            tensor.fill_(1)
        graph.replay()
        assert_same_bits(captured, call(inputs))


@on_a_gpu
@every_call
def test_runs_on_the_current_stream(call):
    """A kernel on another stream would not wait for the inputs."""
    inputs, fresh = call.inputs(), call.inputs()
    call(inputs)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # cycles: some 25 ms
        renew(inputs, fresh)
        got = call(inputs)
    torch.cuda.synchronize()
    assert_same_bits(got, call(inputs))


@on_a_gpu
@every_call
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_its_inputs_are(call):
    """Another device than the current one."""
    inputs = call.inputs()
    there = pytree.tree_map_only(Tensor, lambda x: x.to("cuda:1"), inputs)
    got, want = call(there), call(inputs)
    assert torch.cuda.current_device() == 0
    for a, b in zip(got, want, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.to(b.device), b, rtol=1e-4, atol=1e-4)


def block(layer, hidden, before):
    prefix = drop_in.to_codes(*layer.keys_values(before))
    return layer(hidden, prefix).relu()


def assert_compiles(device, **options):
    torch._dynamo.reset()
    torch.set_default_device(None)  # Dynamo takes its function mode for a part of the program
    layer = drop_in.SelfAttention().to(device)
    compiled = torch.compile(block, fullgraph=True, **options)
    with torch.no_grad():
        for before, rest in ((11, 5), (14, 9), (33, 20)):
            hidden, first = (torch.randn(3, n, 64, device=device) for n in (rest, before))
            for _ in range(3):  # a graph of the compiler's own is warmed up, captured, replayed
                got = compiled(layer, hidden, first).clone()
                torch.testing.assert_close(got, block(layer, hidden, first), rtol=1e-4, atol=1e-4)
                hidden.normal_()
    torch._dynamo.reset()


def test_a_module_compiles_whole(device):
    assert_compiles(device, backend="aot_eager", dynamic=True)


@on_a_gpu
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # the compiler's own, of the device
@pytest.mark.parametrize(
    "options", [{"dynamic": True}, {"mode": "reduce-overhead", "dynamic": False}], ids=str
)
def test_a_module_compiles_to_a_graph(device, options):
    assert_compiles(device, **options)


@on_a_gpu
def test_drop_in_proof(device):
    pytest.importorskip("transformers")
    torch.set_default_device(None)  # transformers makes its tensors where it wants them
    for differences in (drop_in.plain_module(device), drop_in.hugging_face("llama", device)):
        coded, without = differences
        assert coded <= 1e-2 * without
