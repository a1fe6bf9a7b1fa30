"""Calls that leave torch's dispatcher out give what calls through it give, and none is lost to
those who watch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import astra_kernels as ak
from astra_kernels._plain import is_plain
from astra_kernels.attention import native
from astra_kernels.coded_attention import native as coded_native


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def tensors(rows=1, tokens=37, width=64):
    query = torch.randn(2, 6, rows, 64)
    return query, torch.randn(2, 2, tokens, 64), torch.randn(2, 2, tokens, width)


def coded(bits=None):
    query, tables = torch.randn(2, 6, 1, 64), torch.randn(2, 2, 1, 300, 64)
    codes = torch.randint(0, 300, (2, 37, 2), dtype=torch.int32)
    rope = tuple(torch.randn(2, 37, 64))
    if bits is not None:
        codes = torch.stack([ak.pack(row, bits) for row in codes])
    return query, codes, *tables, rope


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("width", [64, 32])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_that_of_the_dispatcher(rows, width, is_causal, scale):
    query, key, value = tensors(rows, width=width)
    plain = native.plain_attention(query, key, value, is_causal, scale, "native")
    op = torch.ops.astra.attention
    long = op(query, key, value, is_causal, None, None, None, scale, None, None, "native")
    for a, b in zip(plain, long, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert a.dtype == b.dtype


@pytest.mark.parametrize("bits", [None, 9])
@pytest.mark.parametrize("rotated", [False, True])
def test_coded_attention_is_that_of_the_dispatcher(bits, rotated):
    query, codes, keys, values, rope = coded(bits)
    cos, sin = rope if rotated else (None, None)
    tokens = None if bits is None else 37
    plain = coded_native.plain_coded_attention(
        *(query, codes, keys, values, bits, tokens, None, cos, sin, "native")
    )
    long = torch.ops.astra.coded_attention(
        *(query, codes, keys, values, None, bits, tokens, cos, sin),
        *(None, None, None, None, None, "native", None),
    )
    for a, b in zip(plain, long, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def test_what_has_to_be_seen_is_not_plain():
    args = tensors()
    assert is_plain(*args)
    with Seen() as seen:
        ak.attention(*args)
    assert "astra.attention.default" in seen.names
    with torch.profiler.profile() as profile:
        ak.attention(*args)
    assert any(event.key == "astra::attention" for event in profile.key_averages())
    assert not is_plain(torch.view_as_complex(torch.randn(3, 2)).conj().imag)
    assert not is_plain(torch.randn(3, dtype=torch.float64))
    assert not is_plain(torch.randn(3, 3).to_sparse())
    assert not is_plain(torch.empty(3, device="meta"))
    assert not is_plain(torch.randn(3, requires_grad=True))
    with torch.no_grad():
        assert is_plain(torch.randn(3, requires_grad=True))
    assert not is_plain(torch._efficientzerotensor(3))
    inside = []
    torch.func.vmap(lambda x: inside.append(is_plain(x)) or x)(torch.randn(3))
    assert inside == [False]


def test_gradients_and_negations_are_as_ever():
    query, key, value = tensors()
    query.requires_grad_()
    out, _ = ak.attention(query, key, value)
    out.sum().backward()
    assert query.grad is not None
    negated = torch.complex(key, key).conj().imag
    assert negated.is_neg()
    with torch.no_grad():
        expected = ak.attention(query, -key, value)[0]
        assert torch.equal(ak.attention(query, negated, value)[0], expected)


def test_zeros_without_memory_are_zeros():
    query, key, value = tensors()
    nowhere = torch._efficientzerotensor(tuple(query.shape))
    assert nowhere.data_ptr() == 0
    expected = ak.attention(torch.zeros_like(query), key, value)[0]
    assert torch.equal(ak.attention(nowhere, key, value)[0], expected)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda q, k, v: (q, k[:1], v[:1]), ValueError, "key must be"),
        (lambda q, k, v: (q, k, v[:, :, 1:]), ValueError, "value must be"),
        (lambda q, k, v: (q[:, :5], k, v), ValueError, "KV heads"),
        (lambda q, k, v: (q, k.double(), v), TypeError, "key must be of dtype"),
        (lambda q, k, v: (q[0], k, v), ValueError, r"query must be \[B, H, M, d\]"),
        (lambda q, k, v: (q, k.to_sparse(), v), TypeError, "dense tensor"),
    ],
)
def test_what_does_not_fit_gets_its_error(change, error, said):
    with pytest.raises(error, match=said):
        ak.attention(*change(*tensors()))


def test_codes_out_of_range_get_their_error():
    query, codes, keys, values, rope = coded()
    codes[1, 3, 0] = 300
    with pytest.raises(ValueError, match="300"):
        ak.coded_attention(query, codes, keys, values, rope=rope, impl="native")
