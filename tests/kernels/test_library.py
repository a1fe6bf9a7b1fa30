"""What every op owes torch: schema, fake kernel, compilation, no silent loss of gradients."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import astra_kernels as ak


def inputs(name, tokens=6, rows=4, device="cpu"):
    """Positional and keyword arguments of one public call, with every option in use."""
    f = {"device": device}
    i = {"device": device, "dtype": torch.int32}
    query = torch.randn(2, 4, rows, 16, **f)
    key, value = torch.randn(2, 2, rows + 2, 16, **f), torch.randn(2, 2, rows + 2, 16, **f)
    tables = (torch.randn(2, 2, 8, 8, **f), torch.randn(2, 2, 8, 8, **f))
    codes = torch.randint(0, 8, (2, tokens, 4), **i)
    rope = (torch.randn(tokens, 16, **f), torch.randn(tokens, 16, **f))
    mask = torch.ones(2, tokens, dtype=torch.bool, device=device)
    state = (query, torch.randn(2, 4, rows, **f))
    coded = {"rope": rope, "code_mask": mask, "value_codes": codes, "scale": 0.2}
    key_mask = torch.ones(2, rows + 2, dtype=torch.bool, device=device)
    return {
        "encode": ((torch.randn(tokens, 3, 8, **f), torch.randn(3, 16, 8, **f)), {}),
        "encode_packed": (
            (torch.randn(2, tokens, 3, 8, **f), torch.randn(3, 16, 8, **f)),
            {"code_bits": 5},
        ),
        "decode": ((torch.randint(0, 8, (tokens, 3), **i), torch.randn(3, 8, 4, **f)), {}),
        "attention": ((query, key, value), {"is_causal": True, "key_mask": key_mask}),
        "coded_attention": ((query, codes, *tables), coded),
        "codeword_attention": (
            (query, torch.ones(2, 2, tokens, **i), *torch.randn(2, 2, 1, tokens, 16, **f)),
            {},
        ),
        "count_codes": ((codes,), {"codewords": 8, "code_mask": mask}),
        "lookup_linear": (
            (
                torch.randint(0, 8, (tokens, 6), **i),
                torch.randn(2, 3, 8, 4, **f),
                torch.randn(rows, 12, **f),
                torch.randn(rows, **f),
            ),
            {"estimate": torch.randn(tokens, 12, **f), "norm": "layer", "eps": 1e-5},
        ),
        "merge_state": ((*state, query.clone(), state[1].clone()), {}),
        "merge_states": (
            (torch.randn(3, 2, 4, rows, 16, **f), torch.randn(3, 2, 4, rows, **f)),
            {},
        ),
        "mixed_attention": ((query, key, value, codes, *tables), {**coded, "is_causal": True}),
    }[name]


OPS = (
    "encode",
    "encode_packed",
    "decode",
    "attention",
    "coded_attention",
    "codeword_attention",
    "count_codes",
    "lookup_linear",
    "merge_state",
    "merge_states",
    "mixed_attention",
)
FLOATING = tuple(name for name in OPS if name != "count_codes")  # take floating point
FORWARD_ONLY = ("encode", "encode_packed", "lookup_linear")


def operator_calls(monkeypatch, name, args, options):
    """The torch.ops call behind a public one."""
    calls = []
    op = getattr(torch.ops.astra, name)

    def record(*arguments):
        calls.append(arguments)
        return op(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.astra, name, record)
        getattr(ak, name)(*args, **options)
    return op.default, calls


@pytest.mark.parametrize("name", OPS)
def test_opcheck_and_one_boundary(monkeypatch, impl, name):
    args, options = inputs(name)
    op, calls = operator_calls(monkeypatch, name, args, {**options, "impl": impl})
    assert len(calls) == 1
    torch.library.opcheck(op, calls[0])


# Ops that take packed codes -> the place of their codes.
PACKED = {"coded_attention": 1, "count_codes": 0, "lookup_linear": 0, "mixed_attention": 3}


def packed_inputs(name, tokens=6, rows=4):
    """As ``inputs``, with the codes packed: 3 bits each."""
    args, options = inputs(name, tokens, rows)
    place = PACKED[name]
    codes = args[place]
    packed = torch.stack([ak.pack(row, 3) for row in (codes if codes.ndim == 3 else codes[None])])
    options = {**options, "code_bits": 3, "num_tokens": tokens}
    if "value_codes" in options:
        options["value_codes"] = packed.clone()
    if name == "count_codes":
        options["codes_per_token"] = codes.shape[2]
    if name == "lookup_linear":
        options["estimate"] = options["estimate"][None]
    return replaced(args, place, packed), options


@pytest.mark.parametrize("name", PACKED)
def test_opcheck_of_packed_codes(monkeypatch, impl, name):
    args, options = packed_inputs(name)
    op, calls = operator_calls(monkeypatch, name, args, {**options, "impl": impl})
    assert len(calls) == 1
    torch.library.opcheck(op, calls[0])


def test_opcheck_of_packing():
    codes = torch.arange(20, dtype=torch.int32)
    torch.library.opcheck(torch.ops.astra.pack.default, (codes, 5))
    data = torch.ops.astra.pack(codes, 5)
    torch.library.opcheck(torch.ops.astra.unpack.default, (data, 5, 20))
    assert torch.equal(torch.ops.astra.unpack(data, 5, 20), codes)


@pytest.mark.parametrize(
    ("name", "make"),
    [*((name, inputs) for name in OPS), *((name, packed_inputs) for name in PACKED)],
    ids=[*OPS, *(f"{name}-packed" for name in PACKED)],
)
def test_compiles_whole_with_dynamic_shapes(name, make):
    torch._dynamo.reset()
    frames = []

    def backend(graph, _):
        frames.append(graph)
        return graph.forward

    op = getattr(ak, name)
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=backend)
    # No two sizes are equal in the first call: equal ones would be taken for one dimension.
    for tokens, rows in ((11, 5), (14, 9), (20, 12)):
        args, options = make(name, tokens, rows)
        got, want = compiled(*args, **options), op(*args, **options)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert len(frames) == 1
    calls = [node for node in frames[0].graph.nodes if "astra" in str(node.target)]
    assert len(calls) == 1


def test_packing_compiles_whole():
    torch._dynamo.reset()

    def there_and_back(codes):
        return ak.unpack(ak.pack(codes, 5), 5, codes.numel())

    compiled = torch.compile(there_and_back, fullgraph=True, dynamic=True, backend="eager")
    for count in (20, 33):
        codes = torch.arange(count, dtype=torch.int32) % 32
        assert torch.equal(compiled(codes), codes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
def test_compiles_with_inductor():
    torch._dynamo.reset()
    args, options = inputs("mixed_attention")

    def block(*args):
        return ak.mixed_attention(*args, **options) * 2 + 1

    got = torch.compile(block, fullgraph=True)(*args)
    torch.testing.assert_close(got, block(*args))


@pytest.mark.parametrize("name", OPS)
def test_fake_kernel_reads_no_data(name):
    args, options = inputs(name, device="meta")
    want_args, want_options = inputs(name)
    got = getattr(ak, name)(*args, **options)
    want = getattr(ak, name)(*want_args, **want_options)
    single = isinstance(got, torch.Tensor)
    for a, b in [(got, want)] if single else zip(got, want, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("encode", "count_codes")])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_autocast_changes_nothing(impl, name, softcap):
    args, options = inputs(name, tokens=40, rows=20)
    options["impl"] = impl
    if softcap is not None:
        if name not in ("attention", "coded_attention", "mixed_attention"):
            return
        options["softcap"] = softcap
    if name not in FORWARD_ONLY:
        args = [x.requires_grad_() if x.is_floating_point() else x for x in args]
    leaves = [x for x in args if x.requires_grad]

    def run():
        result = getattr(ak, name)(*args, **options)
        result = [result] if isinstance(result, torch.Tensor) else list(result)
        ends = [x for x in result if x.requires_grad]
        return result + list(torch.autograd.grad([x.sum() for x in ends], leaves) if ends else [])

    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_gradients_are_refused(name):
    args, options = inputs(name)
    args = [x.requires_grad_() if x.is_floating_point() else x for x in args]
    with pytest.raises(RuntimeError, match=f"astra_kernels.{name} is forward-only, but"):
        getattr(ak, name)(*args, **options)
    with torch.no_grad():
        result = getattr(ak, name)(*args, **options)
    for tensor in (result,) if isinstance(result, torch.Tensor) else result:
        assert not tensor.requires_grad


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's own, of forward mode
@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_gradients_of_torch_func_are_refused(name):
    """Without a word they would be zeros."""
    args, options = inputs(name)
    first = next(i for i, x in enumerate(args) if x.is_floating_point())

    def total(x):
        result = getattr(ak, name)(*args[:first], x, *args[first + 1 :], **options)
        return (result if isinstance(result, torch.Tensor) else result[0]).sum().float()

    x = args[first]
    words = (
        f"astra_kernels.{name} (is forward-only|has no forward-mode .*), but .* is differentiated"
    )
    func = torch.func
    for transform in (func.grad, func.jacrev, func.jacfwd, func.hessian):
        with pytest.raises(RuntimeError, match=words):
            transform(total)(x)
    with pytest.raises(RuntimeError, match=words):
        torch.func.jvp(total, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=words):
        total(forward_ad.make_dual(x, torch.ones_like(x)))
    # What is not differentiated goes through.
    assert torch.func.grad(lambda y: total(x) * y)(torch.ones(())).shape == ()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("name", OPS)
def test_what_is_no_dense_tensor_is_named(name):
    args, options = inputs(name)
    for place, x in enumerate(args):
        if not isinstance(x, torch.Tensor):
            continue
        for other in (x.tolist(), x.to_sparse(), torch.nested.nested_tensor([x])):
            with pytest.raises(TypeError, match=f"astra_kernels.{name}: .* must be"):
                getattr(ak, name)(*args[:place], other, *args[place + 1 :], **options)
    for key, x in options.items():
        if isinstance(x, torch.Tensor):
            with pytest.raises(TypeError, match=f"astra_kernels.{name}: {key} must be"):
                getattr(ak, name)(*args, **(options | {key: x.tolist()}))


@pytest.mark.parametrize("name", OPS)
def test_inputs_of_any_layout(impl, name):
    """Expanded, transposed and sliced inputs give what their contiguous copies give."""
    args, options = inputs(name)

    def strided(x):
        wide = torch.stack((x, x), dim=-1).transpose(0, -2).contiguous().transpose(0, -2)
        return wide[..., 0] if x.ndim else x

    def expanded(x):
        return x[:1].expand_as(x) if x.ndim > 1 else x

    for view in (strided, expanded):
        views = [view(x) if isinstance(x, torch.Tensor) else x for x in args]
        copies = [x.clone(memory_format=torch.contiguous_format) if isinstance(x, torch.Tensor)
                  else x for x in views]  # fmt: skip
        got, want = (getattr(ak, name)(*a, **options, impl=impl) for a in (views, copies))
        for a, b in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (got, want)),
                        strict=True):  # fmt: skip
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", OPS)
def test_same_input_same_bits(impl, name):
    args, options = inputs(name, tokens=300, rows=130)
    first, second = (getattr(ak, name)(*args, **options, impl=impl) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("name", FLOATING)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(impl, name, dtype):
    args, options = inputs(name)
    if name in ("merge_state", "merge_states"):
        args = [x.to(dtype) if place % 2 == 0 else x for place, x in enumerate(args)]
    else:
        args = [x.to(dtype) if x.is_floating_point() else x for x in args]
    result = getattr(ak, name)(*args, **options, impl=impl)
    first = result if isinstance(result, torch.Tensor) else result[0]
    assert first.dtype == {"encode": torch.int32, "encode_packed": torch.uint8}.get(name, dtype)


@pytest.mark.parametrize("name", OPS)
def test_impl_that_is_not_there(monkeypatch, name):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which would run the kernels on the CPU
    args, options = inputs(name)
    op = getattr(ak, name)
    with pytest.raises(ValueError, match=r"impl must be one of auto, .*, got 'cuda'"):
        op(*args, **options, impl="cuda")
    if name not in ("attention", "coded_attention", "encode", "mixed_attention"):  # which have one
        with pytest.raises(RuntimeError, match="there is no C\\+\\+ kernel for " + name):
            op(*args, **options, impl="native")
    with pytest.raises(RuntimeError, match="impl='triton' cannot run"):
        op(*args, **options, impl="triton")


def replaced(args, place, new):
    return [*args[:place], new, *args[place + 1 :]]


Q, C, K, V = 0, 1, 2, 3  # places of the arguments
REFUSED = [
    # op, place or option, replacement, exception, message
    ("encode", 0, torch.randn(6, 4, 8), ValueError, "vectors must be [..., 3, 8]"),
    ("encode", 0, torch.ones(6, 3, 8).long(), TypeError, "vectors must be of dtype float32"),
    ("encode", 0, [1.0], TypeError, "vectors must be a torch.Tensor, got list"),
    ("encode", 1, torch.randn(3, 8), ValueError, "codebook must be [C, K, w], got shape [3, 8]"),
    ("encode", 1, torch.randn(3, 0, 8), ValueError, "codebook must be of 1 to 65536 codewords"),
    ("encode", "half_norms", torch.randn(3, 8), ValueError, "half_norms must be [3, 16]"),
    ("encode", 1, torch.randn(3, 16, 8, device="meta"), ValueError, "codebook must be on cpu"),
    ("encode_packed", 0, torch.randn(6, 3, 8), ValueError, "vectors must be [B, N, C, w]"),
    ("encode_packed", 0, torch.randn(2, 6, 4, 8), ValueError, "vectors must be [..., 3, 8]"),
    ("encode_packed", 1, torch.randn(3, 33, 8), ValueError, "codebook must be of at most 32"),
    ("encode_packed", 1, torch.ones(3, 16, 8).int(), TypeError, "codebook must be of dtype"),
    ("encode_packed", "code_bits", 3, ValueError, "at most 8 codewords K (code_bits = 3)"),
    ("encode_packed", "code_bits", 17, ValueError, "code_bits must be from 1 to 16, got 17"),
    ("encode_packed", "code_bits", 0, ValueError, "code_bits must be from 1 to 16, got 0"),
    ("encode_packed", "half_norms", torch.randn(3, 8), ValueError, "half_norms must be [3, 16]"),
    ("decode", 0, torch.zeros(6, 2).int(), ValueError, "codes must be [..., 3]"),
    ("decode", 0, torch.zeros(6, 3), TypeError, "codes must be of dtype int32 or int64"),
    ("decode", 0, torch.tensor([[0, 8, 1]]), ValueError, "in [0, 8) (K codewords), got 8 at index"),
    ("decode", 0, torch.tensor([[0, 1, -1]]), ValueError, "got -1 at index [0, 2]"),
    ("attention", Q, torch.randn(4, 4, 16), ValueError, "query must be [B, H, M, d]"),
    ("attention", Q, torch.ones(2, 4, 4, 16).int(), TypeError, "query must be of dtype"),
    ("attention", 1, torch.randn(2, 2, 6, 8), ValueError, "key must be [2, Hkv, L, 16]"),
    ("attention", 1, torch.randn(2, 2, 5, 16), ValueError, "value must be [2, "),
    ("attention", 1, torch.randn(2, 2, 6, 16).half(), TypeError, "key must be of dtype float32"),
    ("attention", "key_mask", torch.ones(2, 5).bool(), ValueError, "key_mask must be [2, 6]"),
    ("attention", "key_mask", torch.ones(2, 6), TypeError, "key_mask must be of dtype bool"),
    ("attention", Q, torch.randn(2, 3, 4, 16), ValueError, "divides H = 3, got 2"),
    ("attention", "attn_mask", torch.ones(4, 5).bool(), ValueError, "to [2, 4, 4, 6] ([B, H"),
    (
        "attention",
        "attn_mask",
        torch.ones(4, 6).int(),
        TypeError,
        "attn_mask must be of dtype bool",
    ),
    ("attention", "window", (-2, 0), ValueError, "window must be of sides from -1"),
    ("attention", "window", 3, TypeError, "window must be a pair (left, right)"),
    ("attention", "softcap", 0.0, ValueError, "softcap must be a positive number or None"),
    ("attention", "sinks", torch.zeros(2), ValueError, "sinks must be [4] (H of query)"),
    ("attention", "sinks", torch.zeros(4).half(), TypeError, "sinks must be of dtype float32"),
    (
        "coded_attention",
        C,
        torch.zeros(2, 6, 3).int(),
        ValueError,
        "C = R*Hkv*S = 4 or C = R*S = 2",
    ),
    ("coded_attention", C, torch.zeros(1, 6, 4).int(), ValueError, "codes must be [2, 6, C]"),
    ("coded_attention", C, torch.zeros(2, 6, 4), TypeError, "codes must be of dtype int32"),
    ("coded_attention", C, torch.full((2, 6, 4), 8), ValueError, "got 8 at index [0, 0, 0]"),
    ("coded_attention", "value_codes", torch.full((2, 6, 4), -1), ValueError, "value_codes must"),
    ("coded_attention", "value_codes", torch.zeros(2, 5, 4).int(), ValueError, "[2, 6, C]"),
    (
        "coded_attention",
        K,
        torch.randn(2, 8, 8),
        ValueError,
        "key_codebook must be [Hkv, S, K, d/S]",
    ),
    ("coded_attention", K, torch.randn(2, 2, 8, 9), ValueError, "with S * d/S = 16"),
    (
        "coded_attention",
        K,
        torch.ones(2, 2, 8, 8).int(),
        TypeError,
        "key_codebook must be of dtype",
    ),
    (
        "coded_attention",
        V,
        torch.randn(1, 2, 8, 8),
        ValueError,
        "value_codebook must be of Hkv = 2",
    ),
    (
        "coded_attention",
        "code_mask",
        torch.ones(2, 6),
        TypeError,
        "code_mask must be of dtype bool",
    ),
    ("coded_attention", "code_bits", 3, TypeError, "codes must be of dtype uint8"),
    ("coded_attention", "rope", torch.ones(6, 16), TypeError, "rope must be a pair (cos, sin)"),
    ("coded_attention", "rope", (1, 2), TypeError, "rope must be a pair (cos, sin)"),
    ("coded_attention", "rope", (torch.ones(6, 8),) * 2, ValueError, "rope cos must be [6, 16]"),
    ("coded_attention", "num_tokens", 5, ValueError, "codes must be [2, 5, C]"),
    (
        "codeword_attention",
        1,
        torch.ones(2, 2, 5).int(),
        ValueError,
        "counts must be [2, 2 or 1, 6]",
    ),
    ("codeword_attention", 1, torch.ones(2, 2, 6), TypeError, "counts must be of dtype"),
    ("codeword_attention", 1, torch.full((2, 2, 6), -1), ValueError, "counts must be 0 or more"),
    ("codeword_attention", 2, torch.randn(2, 2, 6, 8), ValueError, "[Hkv, 1, K, d] (S = 1)"),
    ("codeword_attention", 3, torch.randn(2, 1, 5, 16), ValueError, "must be [2, 1, 6, d_v]"),
    ("count_codes", 0, torch.zeros(2, 6, 4), TypeError, "codes must be of dtype int32 or int64"),
    ("count_codes", 0, torch.zeros(6, 4).int(), ValueError, "codes must be [B, N, C]"),
    ("count_codes", 0, torch.zeros(2, 5, 4).int(), ValueError, "codes must be [B, 6, C]"),
    ("count_codes", 0, torch.full((2, 6, 4), 8), ValueError, "codes must be in [0, 8)"),
    ("count_codes", "codewords", 65537, ValueError, "codewords must be from 1 to 65536"),
    ("count_codes", "num_tokens", -1, ValueError, "num_tokens must be 0 or more, got -1"),
    ("count_codes", "codes_per_token", 0, ValueError, "codes_per_token must be 1 or more, got 0"),
    ("count_codes", "codes_per_token", 3, ValueError, "codes must be [B, 6, 3]"),
    ("count_codes", "code_mask", torch.ones(1, 6).bool(), ValueError, "code_mask must be [2, 6]"),
    ("lookup_linear", 0, torch.zeros(6, 3).int(), ValueError, "codes must be [..., 6] (R*C of"),
    ("lookup_linear", 0, torch.zeros(6, 6), TypeError, "codes must be of dtype int32 or int64"),
    ("lookup_linear", 0, torch.full((6, 6), 8), ValueError, "got 8 at index [0, 0]"),
    ("lookup_linear", 1, torch.randn(8, 4), ValueError, "codebook must be [C, K, w] or [R, C, K"),
    ("lookup_linear", 1, torch.randn(2, 3, 0, 4), ValueError, "of 1 to 65536 codewords K"),
    ("lookup_linear", 1, torch.randn(2, 3, 8, 0), ValueError, "at least one stage, group and"),
    ("lookup_linear", 2, torch.randn(4, 13), ValueError, "weight must be [out, 12] (D = C*w"),
    ("lookup_linear", 2, [1.0], TypeError, "weight must be a torch.Tensor, got list"),
    ("merge_state", 2, torch.randn(2, 4, 5, 16), ValueError, "out_b must be of out_a's shape"),
    (
        "merge_state",
        1,
        torch.randn(2, 4, 5),
        ValueError,
        "lse_a must be of out_a's shape without d",
    ),
    ("merge_state", 3, torch.randn(2, 4, 4).double(), TypeError, "lse_b must be of dtype float32"),
    ("mixed_attention", 4, torch.randn(4, 2, 8, 8), ValueError, "key_codebook"),
    ("mixed_attention", 1, torch.randn(2, 1, 6, 16), ValueError, "value must be [2, "),
]


@pytest.mark.parametrize(
    ("name", "place", "new", "error", "message"),
    REFUSED,
    ids=[f"{row[0]}-{row[1]}-{i}" for i, row in enumerate(REFUSED)],
)
def test_bad_input_is_named(impl, name, place, new, error, message):
    args, options = inputs(name)
    if isinstance(place, str):
        options = {**options, place: new}
    else:
        args = replaced(args, place, new)
    expected = re.escape(message)
    with pytest.raises(error, match=f"astra_kernels.{name}: .*{expected}"):
        getattr(ak, name)(*args, **options, impl=impl)


def test_codes_of_keys_and_values_are_named_as_they_were_given():
    query, codes, *tables = inputs("coded_attention")[0]
    with pytest.raises(ValueError, match="coded_attention: codes must be in"):
        ak.coded_attention(query, torch.full_like(codes, 8), *tables)


@pytest.mark.parametrize(
    ("size", "bits", "options", "message"),
    [
        (7, 3, {"num_tokens": 6}, "codes must be [2, ceil(N*C*3/8)] with C = 4 or 2 and N = 6"),
        (9, 17, {"num_tokens": 6}, "code_bits must be from 1 to 16, got 17"),
        (9, 1, {}, "num_tokens must be given when a token takes fewer than 8 bits"),
        (7, 16, {}, "codes must be [2, ceil(N*C*16/8)]"),
    ],
)
def test_packed_sizes_that_do_not_fit(size, bits, options, message):
    query, _, *tables = inputs("coded_attention")[0]
    packed = torch.zeros(2, size, dtype=torch.uint8)
    with pytest.raises(ValueError, match=re.escape(message)):
        ak.coded_attention(query, packed, *tables, code_bits=bits, **options)


def test_check_can_be_left_out():
    """The caller vouches for the codes; only the ops' own reading of them is skipped."""
    args, options = inputs("coded_attention")
    want = ak.coded_attention(*args, **options)
    got = ak.coded_attention(*args, **options, check=False)
    assert torch.equal(got[0], want[0])


def test_the_reference_that_an_error_names_is_there():
    codes, codebook, weight = torch.zeros(3, 2).int(), torch.randn(2, 4, 3), torch.randn(5, 6)
    weight.requires_grad_()
    with pytest.raises(RuntimeError, match="is forward-only") as error:
        ak.lookup_linear(codes, codebook, weight)
    name = next(word for word in str(error.value).split() if word.endswith(".reference"))
    assert name == "astra_kernels.lookup_linear.reference"
    reference: Any = ak.lookup_linear
    y, _ = reference.reference(codes, codebook, weight, None)
    y.sum().backward()


def test_every_op_has_its_reference():
    for name in ak.__all__:
        op = getattr(ak, name)
        if op in (
            ak.unpack,
            ak.packed_size,
            ak.fold_norm,
            ak.warmup,
            ak.scaled_dot_product_attention,
        ):
            continue
        assert op.reference.__module__ == f"{op.__module__}.reference"
