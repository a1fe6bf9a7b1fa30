"""Gradients: against numeric ones in float64, against autograd through the references, and all the
ways in which torch asks for them."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import astra_kernels as ak
from astra_kernels.attention.reference import visibility_bias

INF = float("inf")
B, H, HKV, M, L, N, D, K = 2, 4, 2, 3, 5, 6, 4, 3
PLAIN = [
    {},
    {"is_causal": True},
    {"key_mask": True, "is_causal": True},
    {"window": (1, 0)},
    {"window": (0, -1), "key_mask": True},
    {"softcap": 0.8, "scale": 0.7},
    {"sinks": True},
    {"attn_mask": "bool"},
    {"attn_mask": "key"},
    {"attn_mask": "float"},
    {"attn_mask": "row", "is_causal": True},
    {"attn_mask": "full", "window": (2, 1), "softcap": 1.5, "sinks": True, "key_mask": True},
]


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def mask_of(kind, tokens):
    if kind == "bool":
        return torch.rand(B, H, M, tokens) > 0.4
    if kind == "key":
        return torch.rand(B, 1, 1, tokens) > 0.4
    mask = leaf(*{"float": (M, tokens), "row": (H, M, 1), "full": (B, H, M, tokens)}[kind])
    with torch.no_grad():
        mask[..., 0, 0] = -INF
    return mask


def options_of(given, tokens, mask="key_mask"):
    made = dict(given)
    if "attn_mask" in made:
        made["attn_mask"] = mask_of(made["attn_mask"], tokens)
    if made.pop("key_mask", False):
        made[mask] = torch.rand(B, tokens) > 0.3
        made[mask][0] = False  # rows that see nothing
    if "sinks" in made:
        made["sinks"] = leaf(H)
    return made


def dense(width=D, rows=M):
    return leaf(B, H, rows, D), leaf(B, HKV, L, D), leaf(B, HKV, L, width)


def coded(groups=1, stages=None, shared=False, width=D, tokens=N):
    lead = () if stages is None else (stages,)
    count = (stages or 1) * groups * (1 if shared else HKV)
    codes = torch.randint(0, K, (B, tokens, count), dtype=torch.int32)
    return codes, *(leaf(*lead, HKV, groups, K, size // groups) for size in (D, width))


def rope(tokens=N):
    angle = torch.randn(tokens, D // 2, dtype=torch.float64).repeat(1, 2)
    return angle.cos(), angle.sin()


def leaves(args, options):
    given = [*args, *options.values()]
    return [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]


def loss(states, seed=1):
    """Weighs every number of out and lse; -inf of rows without keys apart."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for x in states if isinstance(states, tuple) else (states,):
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        total = total + (x * weight)[x != -INF].sum()
    return total


def assert_as_reference(name, args, options, impl, only_out=False):
    """Gradients of the op are those of autograd through its reference."""
    op = getattr(ak, name)
    flags = {"return_lse": True} if name == "mixed_attention" else {}
    inputs = leaves(args, options)
    got = op(*args, **options, **flags, impl=impl)
    want = op.reference(*args, **options)
    if only_out:
        got, want = got[0], want[0]
    grads = torch.autograd.grad(loss(got), inputs)
    expected = torch.autograd.grad(loss(want), inputs)
    for x, a, b in zip(inputs, grads, expected, strict=True):
        assert a.shape == x.shape
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("only_out", [False, True])
@pytest.mark.parametrize("given", PLAIN, ids=str)
def test_attention(impl, given, only_out):
    for width in (D, 3, 7):
        assert_as_reference("attention", dense(width), options_of(given, L), impl, only_out)


@pytest.mark.parametrize("rows", [1, L, L + 3])
def test_causal_of_any_length(impl, rows):
    for only_out in (False, True):
        args = dense(rows=rows)
        assert_as_reference("attention", args, {"is_causal": True}, impl, only_out)


@pytest.mark.parametrize("only_out", [False, True])
@pytest.mark.parametrize(
    "given", [x for x in PLAIN if not {"window", "is_causal"} & set(x)], ids=str
)
def test_coded_attention(impl, given, only_out):
    for kind in ({}, {"groups": 2, "stages": 2, "width": 6}, {"shared": True, "width": 3}):
        query, *_ = dense()
        options = options_of(given, N, "code_mask")
        assert_as_reference("coded_attention", (query, *coded(**kind)), options, impl, only_out)
        options["rope"] = rope()
        assert_as_reference("coded_attention", (query, *coded(**kind)), options, impl, only_out)


@pytest.mark.parametrize("masked", [False, True])
def test_coded_attention_with_value_codes_packed(impl, masked):
    query, *_ = dense()
    codes, keys, _ = coded(2)
    values = leaf(2, HKV, 1, 5, 6)
    value_codes = torch.randint(0, 5, (B, N, 2 * HKV), dtype=torch.int32)
    options = {"value_codes": value_codes}
    if masked:
        options |= {"code_mask": torch.rand(B, N) > 0.3}
    assert_as_reference("coded_attention", (query, codes, keys, values), options, impl)
    want = ak.coded_attention(query, codes, keys, values, **options, impl=impl)
    expected = torch.autograd.grad(loss(want), (query, keys, values))
    packed, options["value_codes"] = (
        torch.stack([ak.pack(row, 3) for row in x]) for x in (codes, value_codes)
    )
    got = ak.coded_attention(
        query, packed, keys, values, code_bits=3, num_tokens=N, **options, impl=impl
    )
    for a, b in zip(torch.autograd.grad(loss(got), (query, keys, values)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given", PLAIN, ids=str)
def test_mixed_attention(impl, given):
    options = options_of(given, L)
    options["code_attn_mask"] = mask_of("full", N)
    args = (*dense(width=6), *coded(2, width=6))
    assert_as_reference("mixed_attention", args, {**options, "rope": rope()}, impl)
    del options["code_attn_mask"]
    assert_as_reference("mixed_attention", args, options, impl, only_out=True)


def test_codeword_attention(impl):
    query, *_ = dense()
    for heads in (1, HKV):
        counts = torch.randint(0, 3, (B, heads, K))
        args = (query, counts, leaf(HKV, 1, K, D), leaf(HKV, 1, K, 6))
        for only_out in (False, True):
            assert_as_reference("codeword_attention", args, {}, impl, only_out)


def test_tokens_in_several_blocks(monkeypatch, impl):
    for module, name, size in (
        ("coded_attention.gradient", "LOOKED_UP", 0),
        ("attention.blocks", "BLOCK", 256),
        ("attention.blocks", "MOST_KEYS", 64),
    ):
        monkeypatch.setattr(importlib.import_module(f"astra_kernels.{module}"), name, size)
    query, *_ = dense()
    args = (query, *coded(2, tokens=300))
    options = {"attn_mask": leaf(H, 1, 300), "softcap": 1.1}
    assert_as_reference("coded_attention", args, options, impl)


@pytest.mark.parametrize("given", [{}, {"is_causal": True}, {"window": (40, 3)}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_at_most_twice_that_of_torch(given, dtype):
    """Rows and keys of several blocks, both by torch's flash kernel and by blocks."""
    inputs = [torch.randn(1, h, 300, 32, dtype=dtype) for h in (4, 2, 2)]
    causal, window = given.get("is_causal", False), given.get("window")
    seen = visibility_bias(inputs[0], 300, causal, None, None, window)

    def grads(to, call):
        args = [x.to(to).requires_grad_() for x in inputs]
        state = call(*args)
        return torch.autograd.grad(loss(state), args)

    def peer(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen.to(query.dtype), enable_gqa=True
        )

    exact = grads(torch.float64, peer)
    error = [(a - b).abs().max() for a, b in zip(grads(dtype, peer), exact, strict=True)]
    # Plain matrix products, by blocks, add up in fewer parts than torch's flash kernel does.
    for impl, most in (("auto", 2), ("reference", 4)):
        got = grads(dtype, lambda *args: ak.attention(*args, **given, impl=impl)[0])  # noqa: B023
        for a, b, theirs in zip(got, exact, error, strict=True):
            assert a.dtype == dtype
            assert (a - b).abs().max() <= most * theirs


@pytest.mark.parametrize("name", ["merge_state", "merge_states"])
def test_merging(impl, name):
    outs, lses = leaf(3, 4, 5), leaf(3, 4)
    with torch.no_grad():
        lses[0, 0] = lses[:, 1] = -INF
        outs[0, 0] = float("nan")
    args = (outs, lses)
    if name == "merge_state":
        args = (outs[0], lses[0], outs[1], lses[1])
    out, lse = getattr(ak, name)(*args, impl=impl)
    got = torch.autograd.grad(loss((out, lse)), (outs, lses))
    for grad in got:
        assert grad.isfinite().all()
        assert (grad[:, 1] == 0).all()
        assert (grad[0, 0] == 0).all()
    with torch.no_grad():
        outs[0, 0] = 0.0

    def call(outs, lses):
        rows = [outs[:, 2:], lses[:, 2:]]
        if name == "merge_state":
            rows = [rows[0][0], rows[1][0], rows[0][1], rows[1][1]]
        return getattr(ak, name)(*rows, impl=impl)

    assert torch.autograd.gradcheck(call, (outs, lses))


def test_decode(impl):
    codes = torch.randint(0, K, (2, 5, 3), dtype=torch.int32)
    codebook = leaf(3, K, 2)
    assert torch.autograd.gradcheck(lambda x: ak.decode(codes, x, impl=impl), codebook)
    vectors = ak.decode(codes, codebook, impl=impl)
    with torch.no_grad():
        codebook.add_(1.0)  # as moving averages do
    vectors.sum().backward()
    assert codebook.grad.sum() == codes.numel() * 2


@pytest.mark.parametrize("given", PLAIN, ids=str)
def test_gradcheck(impl, given):
    given = {name: x for name, x in given.items() if name != "key_mask"}
    query, key, value = leaf(1, 2, 2, 2), leaf(1, 1, 3, 2), leaf(1, 1, 3, 3)
    options = dict(given)
    if "attn_mask" in options:
        options["attn_mask"] = leaf(2, 3) if given["attn_mask"] != "bool" else torch.eye(2, 3) > 0
    if "sinks" in options:
        options["sinks"] = leaf(2)
    names = [name for name, x in options.items() if isinstance(x, torch.Tensor) and x.requires_grad]

    def call(*args):
        more = dict(zip(names, args[3:], strict=True))
        return ak.attention(*args[:3], **(options | more), impl=impl)

    inputs = (query, key, value, *(options[name] for name in names))
    assert torch.autograd.gradcheck(call, inputs, eps=1e-5, atol=1e-7)


def test_gradcheck_of_codes(impl):
    query = leaf(1, 2, 2, 2)
    codes, tables = torch.randint(0, 2, (1, 3, 1)), (leaf(1, 1, 2, 2), leaf(1, 1, 2, 3))
    angle = torch.randn(3, 1, dtype=torch.float64).repeat(1, 2)
    turned = {"rope": (angle.cos(), angle.sin()), "impl": impl}
    assert torch.autograd.gradcheck(
        lambda q, k, v: ak.coded_attention(q, codes, k, v, softcap=2.0, **turned),
        (query, *tables),
    )
    key, value = leaf(1, 1, 3, 2), leaf(1, 1, 3, 3)
    assert torch.autograd.gradcheck(
        lambda q, k, v, *x: ak.mixed_attention(q, k, v, codes, *x, return_lse=True, **turned),
        (query, key, value, *tables),
    )


def test_rows_that_see_nothing_have_no_gradient(impl):
    query, key, value = dense()
    mask = torch.ones(M, L, dtype=torch.bool)
    mask[1] = False
    out, lse = ak.attention(query, key, value, attn_mask=mask, impl=impl)
    (out.sum() + lse.sum()).backward()
    assert (query.grad[:, :, 1] == 0).all()
    assert all(x.grad.isfinite().all() for x in (query, key, value))


def test_hidden_content_never_matters(impl):
    """NaN in keys and values that no query sees leaves every gradient finite."""
    for options in (
        {"key_mask": torch.arange(L).expand(B, L) != 1},
        {"attn_mask": torch.arange(L) != 1},
        {"attn_mask": torch.zeros(L, dtype=torch.float64).index_fill(0, torch.tensor(1), -INF)},
    ):
        query, key, value = dense()
        with torch.no_grad():
            key[:, :, 1], value[:, :, 1] = float("nan"), INF
        out, lse = ak.attention(query, key, value, **options, impl=impl)
        for loss_of in (out.sum(), out.sum() + lse.sum()):
            for grad in torch.autograd.grad(loss_of, (query, key, value), retain_graph=True):
                assert grad.isfinite().all()


def test_scores_near_the_smallest_number(impl):
    """Masks of finfo.min over all of a row: its weights are those of equal scores."""
    query, key, value = (x.detach().float().requires_grad_() for x in dense())
    mask = torch.zeros(M, L)
    mask[1] = torch.finfo(torch.float32).min
    ak.attention(query, key, value, attn_mask=mask, impl=impl)[0][:, :, 1].sum().backward()
    torch.testing.assert_close(value.grad, torch.full_like(value, H / HKV / L))
    assert query.grad.isfinite().all()


def test_masks_that_views_repeat(impl):
    """The gradient has the view's shape; what its copies share is summed behind the op."""
    bias = leaf(1, H, 1, L)
    query, key, value = dense()
    want = ak.attention(query, key, value, attn_mask=bias, impl=impl)
    expected = torch.autograd.grad(loss(want), bias)[0]
    wide = bias.expand(B, H, M, L)
    got = ak.attention(query, key, value, attn_mask=wide, impl=impl)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss(got), bias)[0], expected)


CALLS = {
    "attention": lambda: (dense(), {"softcap": 2.0}),
    "coded_attention": lambda: ((dense()[0], *coded()), {}),
    "mixed_attention": lambda: ((*dense(), *coded()), {"is_causal": True, "return_lse": True}),
    "codeword_attention": lambda: (
        (dense()[0], torch.ones(B, 1, K).int(), leaf(HKV, 1, K, D), leaf(HKV, 1, K, D)),
        {},
    ),
    "merge_state": lambda: ((leaf(M, D), leaf(M), leaf(M, D), leaf(M)), {}),
    "merge_states": lambda: ((leaf(3, M, D), leaf(3, M)), {}),
    "decode": lambda: ((torch.zeros(4, 2).int(), leaf(2, K, D)), {}),
}
every_op = pytest.mark.parametrize("name", CALLS)


def total_of(name):
    args, options = CALLS[name]()
    first = next(i for i, x in enumerate(args) if x.is_floating_point())

    def total(x):
        states = getattr(ak, name)(*args[:first], x, *args[first + 1 :], **options)
        return loss(states.square() if name == "decode" else states)

    return total, args[first], args, options


@every_op
def test_torch_func_and_checkpoints(name):
    total, x, *_ = total_of(name)
    (want,) = torch.autograd.grad(total(x), x)
    torch.testing.assert_close(torch.func.grad(total)(x.detach()), want)
    for reentrant in (False, True):
        x.grad = None
        checkpoint(total, x, use_reentrant=reentrant).backward()
        torch.testing.assert_close(x.grad, want)


@every_op
def test_compiled_whole(name):
    torch._dynamo.reset()
    args, options = CALLS[name]()
    inputs = leaves(args, options)
    op = getattr(ak, name)
    want = torch.autograd.grad(loss(op(*args, **options)), inputs)
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    got = torch.autograd.grad(loss(compiled(*args, **options)), inputs)
    torch.testing.assert_close(got, want)


@every_op
@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's own, of forward mode
def test_derivatives_of_other_kinds_are_refused(name):
    total, x, *_ = total_of(name)
    # The gradient of decode does not depend on the codebook, but on that of its output.
    (grad,) = torch.autograd.grad(total(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"astra_kernels.{name} has no second derivative"):
        grad.square().sum().backward()
    words = f"astra_kernels.{name} has no forward-mode derivative"
    with pytest.raises(RuntimeError, match=words):
        torch.func.jvp(total, (x.detach(),), (torch.ones_like(x),))
    words = f"astra_kernels.{name} has no gradients of several outputs at once"
    with pytest.raises(RuntimeError, match=words):
        torch.func.jacrev(total)(x.detach())


@every_op
def test_the_operator_itself_has_the_gradient(monkeypatch, name):
    args, options = CALLS[name]()
    calls = []
    op = getattr(torch.ops.astra, name)
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.astra, name, lambda *given: calls.append(given) or op(*given))
        getattr(ak, name)(*args, **options)
    inputs = leaves(args, options)
    want = torch.autograd.grad(loss(getattr(ak, name)(*args, **options)), inputs)
    got = torch.autograd.grad(loss(op(*calls[0])), inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.library.opcheck(op.default, calls[0])


def test_what_has_no_gradient_is_named():
    query, *_ = dense()
    cos, sin = rope()
    with pytest.raises(RuntimeError, match="coded_attention has no gradient to sin, but sin req"):
        ak.coded_attention(query, *coded(), rope=(cos, sin.requires_grad_()))


def test_modules_of_the_gradients_use_no_reference():
    for name in ("attention", "coded_attention", "codeword_attention", "mixed_attention"):
        module = importlib.import_module(f"astra_kernels.{name}.gradient")
        assert not any("reference" in str(x) for x in vars(module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"window": (3, 2)},
        {"attn_mask": torch.arange(198).view(2, 1, 11, 9) % 4 > 0},
        {"attn_mask": torch.arange(36.0).view(1, 4, 1, 9).sin()},
        {"key_mask": torch.arange(9).expand(2, -1) > 2},
        {"softcap": 2.0},
    ],
    ids=["plain", "causal", "window", "bool", "float", "keys", "softcap"],
)
def test_some_heads_and_rows_at_a_time(monkeypatch, dtype, options):
    """Tensors that are converted for torch's kernel are so a few heads and rows at a time."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, 11, 8, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(2, 2, 9, w, dtype=dtype, requires_grad=True) for w in (8, 6))
    options = {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in options.items()
    }
    out, lse = ak.attention(query, key, value, **options)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    loss = (out.float() * torch.randn(out.shape)).sum() + (lse * torch.randn(lse.shape)).sum()

    def grads():
        return torch.autograd.grad(loss, (query, key, value), retain_graph=True)

    whole = grads()
    module = sys.modules["astra_kernels.attention.gradient"]
    monkeypatch.setattr(module, "CONVERTED", 1)
    monkeypatch.setattr(module, "BAND_ROWS", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert len(list(module.some_heads(query, key, 1))) == 4
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for found, wanted in zip(grads(), whole, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_no_batch_has_gradients_of_zero():
    query = torch.randn(0, 4, 5, 16, requires_grad=True)
    tables = torch.randn(2, 2, 2, 9, 8, requires_grad=True)
    codes = torch.randint(0, 9, (0, 7, 4), dtype=torch.int32)
    out, lse = ak.coded_attention(query, codes, *tables)
    (out.sum() + lse.sum()).backward()
    assert torch.equal(tables.grad, torch.zeros_like(tables))
    assert query.grad.shape == query.shape
