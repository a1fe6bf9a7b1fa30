"""What a call may do with scores: masks per query, windows, softcap, sinks; values of any width."""

from __future__ import annotations

import inspect

import pytest
import torch

import astra_kernels as ak
from astra_kernels._triton import attend as kernels
from astra_kernels._triton import attention as launcher
from astra_kernels._triton.attention import Scores
from astra_kernels._triton.launch import record
from astra_kernels._triton.sources import Dense
from astra_kernels._triton.strategies import STRATEGIES
from astra_kernels._triton.tiles import Tile
from astra_kernels.attention.kernel import attention
from astra_kernels.coded_attention.kernel import coded_attention
from astra_kernels.mixed_attention.kernel import mixed_attention

pytestmark = pytest.mark.usefixtures("poisoned")

INF = float("inf")
B, H, HKV, D, K = 2, 4, 2, 16, 24
FEW, MANY = 5, 35  # queries; times two query heads a KV head: 10 and 70 rows


def mask_of(kind, rows, tokens):
    return {
        "bool": torch.rand(B, H, rows, tokens) > 0.4,
        "row": torch.rand(rows, 1) > 0.3,
        "key": torch.rand(B, 1, 1, tokens) > 0.4,
        "strided": torch.randn(tokens, H, rows).permute(1, 2, 0),
        "hides": torch.randn(rows, tokens).masked_fill(torch.rand(rows, tokens) > 0.6, -INF),
    }[kind]


def options_of(given, rows, tokens, codes=0):
    """A call's options from a case: masks by kind, sinks and masks of keys as flags."""
    made = dict(given)
    for name, length in (("attn_mask", tokens), ("code_attn_mask", codes)):
        if name in made:
            made[name] = mask_of(made[name], rows, length)
    for name, length in (("key_mask", tokens), ("code_mask", codes)):
        if made.pop(name, False):
            made[name] = torch.rand(B, length) > 0.3
    if made.pop("sinks", False):
        made["sinks"] = torch.randn(H)
        made["sinks"][1] = -INF
    return made


def dense(rows, tokens, width=D, dtype=torch.float32):
    shapes = (B, H, rows, D), (B, HKV, tokens, D), (B, HKV, tokens, width)
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def coded(tokens, width=D, groups=1):
    codes = torch.randint(0, K, (B, tokens, HKV * groups), dtype=torch.int32)
    return codes, *(torch.randn(HKV, groups, K, size // groups) for size in (D, width))


def double(x):
    if isinstance(x, tuple):
        return tuple(double(y) for y in x)
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def assert_exact(op, got, *inputs, **options):
    """Beside the reference in float64, on the very inputs."""
    options = {name: double(value) for name, value in options.items() if name != "strategy"}
    more = {} if op is ak.attention else {"check": False}
    if op is ak.mixed_attention:
        more["return_lse"] = True
    want = op(*map(double, inputs), **options, **more, impl="reference")
    tolerance = 2e-5 if inputs[0].dtype == torch.float32 else 4e-3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


DENSE = [
    (FEW, 40, 16, {"attn_mask": "bool"}),
    (FEW, 40, 24, {"attn_mask": "row", "sinks": True}),
    (FEW, 40, 16, {"attn_mask": "key", "scale": -0.4}),
    (FEW, 40, 16, {"attn_mask": "strided", "key_mask": True}),
    (FEW, 40, 72, {"attn_mask": "hides", "window": (20, -1), "softcap": 1.5, "sinks": True}),
    (FEW, 40, 16, {"window": (1, 0)}),
    (FEW, 70, 16, {"window": (33, 2), "is_causal": True, "scale": 0.0}),
    (FEW, 40, 8, {"window": (-1, 1), "key_mask": True}),
    (FEW, 40, 16, {"softcap": 0.7}),
    (FEW, 40, 16, {"softcap": 30.0, "scale": 4.0}),
    (FEW, 40, 16, {"sinks": True, "is_causal": True}),
    (FEW, 3, 16, {"is_causal": True, "sinks": True}),
    (MANY, 90, 24, {"attn_mask": "strided", "is_causal": True}),
    (MANY, 20, 16, {"is_causal": True}),
    (MANY, 80, 16, {"window": (17, 9), "attn_mask": "bool"}),
    (MANY, 80, 8, {"softcap": 2.0, "sinks": True}),
    (MANY, 80, 16, {"window": (-1, 3)}),
]


@pytest.mark.parametrize(("rows", "tokens", "width", "given"), DENSE, ids=str)
def test_attention(rows, tokens, width, given):
    inputs, options = dense(rows, tokens, width), options_of(given, rows, tokens)
    got = ak.attention(*inputs, **options, impl="triton")
    assert_exact(ak.attention, got, *inputs, **options)


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_16_bits(rows):
    inputs = dense(rows, 60, 24, torch.float16)
    given = {"attn_mask": "strided", "softcap": 3.0, "sinks": True, "window": (30, 4)}
    options = options_of(given, rows, 60)
    options["attn_mask"] = options["attn_mask"].half()
    assert_exact(ak.attention, attention(*inputs, **options), *inputs, **options)


CODED = [
    (1, 16, False, {"attn_mask": "strided", "code_mask": True, "strategy": "fused"}),
    (2, 24, True, {"attn_mask": "bool", "sinks": True, "strategy": "fused"}),
    (1, 8, True, {"softcap": 1.0, "sinks": True, "strategy": "expanded"}),
    (2, 24, False, {"attn_mask": "hides", "strategy": "expanded"}),
    (1, 24, False, {"softcap": 1.0, "sinks": True, "code_mask": True, "strategy": "counted"}),
    (1, 40, False, {"strategy": "counted"}),
]


@pytest.mark.parametrize(("groups", "width", "rope", "given"), CODED, ids=str)
def test_coded_attention(groups, width, rope, given):
    query, inputs = torch.randn(B, H, FEW, D), coded(70, width, groups)
    options = options_of(
        {name: x for name, x in given.items() if name != "attn_mask"}
        | ({"code_attn_mask": given["attn_mask"]} if "attn_mask" in given else {}),
        FEW, 0, 70,
    )  # fmt: skip
    if "attn_mask" in given:
        options["attn_mask"] = options.pop("code_attn_mask")
    if rope:
        angle = torch.randn(70, D // 2).repeat(1, 2)
        options["rope"] = (angle.cos(), angle.sin())
    got = coded_attention(query, *inputs, **options)
    assert_exact(ak.coded_attention, got, query, *inputs, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("rows", "given"),
    [
        (FEW, {"softcap": 2.0, "sinks": True, "window": (3, 1), "key_mask": True}),
        (MANY, {"attn_mask": "strided", "sinks": True}),
        (FEW, {"attn_mask": "hides", "code_attn_mask": "strided", "is_causal": True}),
    ],
    ids=str,
)
def test_mixed_attention(rows, given, strategy):
    if strategy == "counted" and "code_attn_mask" in given:
        pytest.skip("a mask over codes tells equal codes apart")
    inputs = (*dense(rows, 50, 24), *coded(40, 24))
    options = options_of(given, rows, 50, 40)
    got = mixed_attention(*inputs, **options, strategy=strategy)
    assert_exact(ak.mixed_attention, got, *inputs, **options)


def test_the_strategy_follows_from_the_mask():
    query, inputs = torch.randn(B, H, FEW, D), coded(400)
    for mask, seen in ((None, kernels.COUNTS), (mask_of("bool", FEW, 400), kernels.CODES)):
        with record(90) as launches:
            coded_attention(query, *inputs, attn_mask=mask)
        attend = next(x for x in launches if x.kernel is kernels.attend)
        assert attend.constants["REMOTE"] == seen


@pytest.mark.parametrize(
    "given",
    [
        {"attn_mask": "hides", "sinks": True},
        {"softcap": 1.0, "window": (12, 0)},
        {"sinks": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("splits", [2, 5])
def test_any_number_of_splits(given, splits):
    inputs, options = dense(FEW, 70, 24), options_of(given, FEW, 70)
    keys = Dense(*inputs[1:], attn_mask=options.get("attn_mask"), window=options.get("window"))
    scores = Scores(None, options.get("softcap"), options.get("sinks"))
    got = launcher.attend(inputs[0], scores, dense=keys, splits=splits, tile=Tile(16, 16, 4, 2))
    assert_exact(ak.attention, got, *inputs, **options)


@pytest.mark.parametrize("splits", [1, 3])
def test_the_smallest_number_hides_nothing(splits, dtype):
    query, key, value = dense(FEW, 40, dtype=dtype)
    query = query / 100  # beside such a mask the rounding of sums is what differs
    mask = torch.full((FEW, 40), torch.finfo(dtype).min, dtype=dtype)
    keys = Dense(key, value, attn_mask=mask)
    out, _ = launcher.attend(query, None, dense=keys, splits=splits, tile=Tile(16, 16, 4, 2))
    mean = value.mean(dim=2, keepdim=True).repeat_interleave(2, dim=1)
    torch.testing.assert_close(out, mean.expand_as(out), rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter's product with NaN
def test_what_masks_hide_from_all_never_matters():
    query, key, value = dense(FEW, 40)
    mask = torch.randn(FEW, 40)
    mask[:, 30] = -INF
    options = {"attn_mask": mask, "window": (20, 1)}  # which hides keys 0 to 14 from all
    want = attention(query, key, value, **options)
    for token in (3, 14, 30):
        key[:, :, token], value[:, :, token] = float("nan"), INF
    for a, b in zip(attention(query, key, value, **options), want, strict=True):
        assert torch.equal(a, b)


def arguments(launch):
    names = list(inspect.signature(launch.kernel.fn).parameters)
    return dict(zip(names, launch.args, strict=False))


def test_a_broadcast_mask_is_read_where_it_is():
    mask = torch.randn(B, 1, 1, 40)
    with record(90) as launches:
        attention(*dense(FEW, 40), attn_mask=mask)
    given = arguments(launches[0])
    assert given["attn_mask"].data_ptr() == mask.data_ptr()
    strides = [given[f"attn_mask_{axis}"] for axis in "bhml"]
    assert strides == [40, 0, 0, 1]


def test_nothing_new_is_compiled_into_a_plain_call():
    """Its static figures are in the table; here: that nothing of a new argument is passed."""
    with record(90) as launches:
        attention(*dense(MANY, 40), is_causal=True)
    given = arguments(launches[0])
    new = [name for name in given if "attn_mask" in name] + ["softcap", "sinks", "left", "right"]
    assert [given[name] for name in new] == [None] * len(new)


def test_without_keys_a_sink_is_all():
    inputs, sinks = dense(FEW, 0, 24), torch.randn(H)
    out, lse = attention(*inputs, sinks=sinks)
    assert out.shape == (B, H, FEW, 24)
    assert (out == 0).all()
    assert torch.equal(lse, sinks[None, :, None].expand_as(lse))
