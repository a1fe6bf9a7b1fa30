"""What is done to scores: masks per query, windows, softcap, sinks; values of another width."""

from __future__ import annotations

import exact
import pytest
import torch

import astra_kernels as ak

INF = float("inf")
B, H, HKV, M, L, N, D, K = 2, 4, 2, 4, 6, 5, 8, 3


def masks(tokens):
    return {
        "bool": torch.rand(B, H, M, tokens) > 0.4,
        "row": torch.rand(M, 1) > 0.4,
        "key": torch.rand(B, 1, 1, tokens) > 0.4,
        "float": torch.randn(H, M, tokens, dtype=torch.float64),
        "hides": torch.randn(M, tokens, dtype=torch.float64).masked_fill(
            torch.rand(M, tokens) > 0.6, -INF
        ),
    }


OPTIONS = [
    *({"attn_mask": name} for name in masks(1)),
    {"window": (1, 0)},
    {"window": (0, 2), "is_causal": True},
    {"window": (-1, 1), "key_mask": True},
    {"softcap": 0.7},
    {"sinks": True},
    {"attn_mask": "hides", "window": (2, -1), "softcap": 1.5, "sinks": True, "key_mask": True},
    {"attn_mask": "bool", "is_causal": True, "sinks": True, "scale": -0.4},
]


def options_of(given, tokens=L, mask_name="key_mask"):
    made = dict(given)
    if "attn_mask" in made:
        made["attn_mask"] = masks(tokens)[made["attn_mask"]]
    if made.pop("key_mask", False):
        made[mask_name] = torch.rand(B, tokens) > 0.3
    if "sinks" in made:
        made["sinks"] = torch.randn(H, dtype=torch.float64)
    return made


def dense(rows=M, width=D):
    query = torch.randn(B, H, rows, D, dtype=torch.float64)
    key = torch.randn(B, HKV, L, D, dtype=torch.float64)
    return query, key, torch.randn(B, HKV, L, width, dtype=torch.float64)


def coded(width=D, groups=2):
    codes = torch.randint(0, K, (B, N, HKV * groups), dtype=torch.int32)
    return codes, *(
        torch.randn(HKV, groups, K, size // groups, dtype=torch.float64) for size in (D, width)
    )


def assert_exact(got, *case, **options):
    want = exact.attend(exact.Case(*case, options=options))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [D, 3, 11])
@pytest.mark.parametrize("given", OPTIONS, ids=str)
def test_attention(impl, given, width):
    inputs, options = dense(width=width), options_of(given)
    assert_exact(ak.attention(*inputs, **options, impl=impl), *inputs, **options)


@pytest.mark.parametrize("given", OPTIONS[:5] + OPTIONS[8:10], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_coded_attention(impl, given, groups):
    query, *_ = dense()
    options, inputs = options_of(given, N, "code_mask"), coded(6, groups)
    got = ak.coded_attention(query, *inputs, **options, impl=impl)
    assert_exact(got, query, None, None, *inputs, **options)


@pytest.mark.parametrize("given", OPTIONS, ids=str)
def test_mixed_attention(impl, given):
    inputs, options = (*dense(width=6), *coded(6)), options_of(given)
    options["code_attn_mask"] = masks(N)["hides"]
    got = ak.mixed_attention(*inputs, **options, return_lse=True, impl=impl)
    assert_exact(got, *inputs, **options)


def test_codewords_of_another_value_width(impl):
    query, *_ = dense()
    codes, keys, values = coded(5, 1)
    got = ak.codeword_attention(query, ak.count_codes(codes, K), keys, values, impl=impl)
    assert_exact(got, query, None, None, codes, keys, values)


@pytest.mark.parametrize("sinks", [False, True])
def test_causal_with_more_queries_than_keys(impl, sinks):
    inputs = dense(rows=9)
    options = {"is_causal": True} | ({"sinks": torch.randn(H).double()} if sinks else {})
    out, lse = ak.attention(*inputs, **options, impl=impl)
    assert_exact((out, lse), *inputs, **options)
    assert (out[:, :, :3] == 0).all()
    unseen = options["sinks"][None, :, None] if sinks else torch.tensor(-INF).double()
    assert torch.equal(lse[:, :, :3], unseen.expand(B, H, 3))


def test_the_smallest_number_hides_nothing(impl):
    query, key, value = (x.float() for x in dense())
    mask = torch.full((M, L), torch.finfo(torch.float32).min)
    out, _ = ak.attention(query, key, value, attn_mask=mask, impl=impl)
    mean = value.mean(dim=2, keepdim=True).repeat_interleave(2, dim=1)
    torch.testing.assert_close(out, mean.expand_as(out))


def test_what_masks_hide_from_all_never_matters(impl):
    query, key, value = dense()
    mask = torch.randn(M, L, dtype=torch.float64)
    mask[:, 1] = -INF
    options = {"attn_mask": mask, "window": (2, 1), "impl": impl}
    want = ak.attention(query, key, value, **options)
    key[:, :, 1], value[:, :, 1] = float("nan"), INF
    for a, b in zip(ak.attention(query, key, value, **options), want, strict=True):
        torch.testing.assert_close(a, b)


def test_merge_states(impl):
    query, key, value = dense()
    parts = [ak.attention(query, key[:, :, i::3], value[:, :, i::3]) for i in range(3)]
    outs, lses = (torch.stack(states) for states in zip(*parts, strict=True))
    for a, b in zip(
        ak.merge_states(outs, lses, impl=impl), ak.attention(query, key, value), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_merging_states_without_keys(impl):
    outs, lses = torch.randn(3, 5, 2), torch.randn(3, 5)
    lses[1, 0], outs[1, 0] = -INF, float("nan")
    lses[:, 1], outs[:, 1] = -INF, float("nan")
    lses[2, 2], lses[0, 3] = INF, float("nan")
    out, lse = ak.merge_states(outs, lses, impl=impl)
    torch.testing.assert_close(out[0], ak.merge_states(outs[::2, 0], lses[::2, 0], impl=impl)[0])
    assert (out[1] == 0).all()
    assert lse[1] == -INF
    assert out[2:4].isnan().all()
    assert lse[2:4].isnan().all()
    none = ak.merge_states(outs[:0], lses[:0], impl=impl)
    assert torch.equal(none[0], torch.zeros(5, 2))
    assert (none[1] == -INF).all()


def test_an_argument_that_the_triton_kernel_lacks_is_named(monkeypatch):
    monkeypatch.setattr(
        "astra_kernels._dispatch.TRITON_LACKS", {"attention": frozenset(("window",))}
    )
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: .* does not take window"):
        ak.attention(*(x.float() for x in dense()), window=(1, 1), impl="triton")
