"""The attention kernel in every setting: dense, coded, mixed, counted; few rows and many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import astra_kernels as ak
from astra_kernels._triton import attention as launcher
from astra_kernels._triton.launch import record
from astra_kernels._triton.sources import Coded, Dense
from astra_kernels._triton.strategies import STRATEGIES
from astra_kernels._triton.tiles import Tile
from astra_kernels.coded_attention.kernel import coded_attention
from astra_kernels.mixed_attention.kernel import mixed_attention
from tests.triton_kernels.cases import Case, assert_as_exact_as_torch, examples, make

FEW, MANY = 5, 35  # queries; times two query heads a KV head: 10 and 70 rows


pytestmark = pytest.mark.usefixtures("poisoned")


def mixed(case: Case, **options):
    return mixed_attention(
        *case.mixed_arguments, **case.dense, **case.coded, scale=case.scale, **options
    )


def coded(case: Case, **options):
    return coded_attention(*case.coded_arguments, **case.coded, scale=case.scale, **options)


@pytest.mark.parametrize(
    ("m", "d"),
    [*((FEW, d) for d in (16, 72, 80, 128, 144, 256)), (MANY, 72), (MANY, 128)],
)  # fmt: skip
@pytest.mark.parametrize("rope", [False, True])
def test_head_dimensions(dtype, d, rope, m):
    case = make(h=2, kv=1, m=m, near=20, n=40, d=d, rope=rope, causal=False, dtype=dtype)
    assert_as_exact_as_torch(mixed(case, strategy="fused"), case)


@pytest.mark.parametrize(("groups", "stages"), [(1, 2), (2, 1), (3, 3), (4, 2)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rope", [False, True])
def test_sub_vectors_and_stages(groups, stages, shared, rope):
    case = make(n=30, d=24, groups=groups, stages=stages, shared=shared, rope=rope)
    assert_as_exact_as_torch(coded(case, strategy="fused"), case)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("m", "shared", "masked"), [(FEW, False, True), (FEW, True, False), (MANY, True, True)]
)
def test_strategies_agree(dtype, strategy, m, shared, masked):
    case = make(b=2 if m == FEW else 1, m=m, n=70, shared=shared, code_mask=masked, dtype=dtype)
    assert_as_exact_as_torch(coded(case, strategy=strategy), case)


@pytest.mark.parametrize("strategy", ["fused", "expanded"])
@pytest.mark.parametrize("value_codes", [False, True])
@pytest.mark.parametrize("rope", [False, True])
def test_batches_with_masks(strategy, value_codes, rope):
    case = make(
        b=3, near=33, n=70, groups=2, rope=rope, key_mask=True, code_mask=True,
        value_codes=value_codes, m=FEW, scale=0.3,
    )  # fmt: skip
    case.dense["key_mask"][1] = False
    case.coded["code_mask"][1] = False  # this batch row sees nothing
    assert_as_exact_as_torch(mixed(case, strategy=strategy), case)


@pytest.mark.parametrize(
    ("strategy", "m", "near"),
    [*(("fused", *sizes) for sizes in ((1, 1), (FEW, 90), (MANY, MANY), (MANY, 80))),
     ("counted", FEW, 90), ("expanded", MANY, 80)],
)  # fmt: skip
def test_causal(dtype, strategy, m, near):
    case = make(h=2, kv=1, m=m, near=near, n=33, causal=True, dtype=dtype)
    assert_as_exact_as_torch(mixed(case, strategy=strategy), case)


@pytest.mark.parametrize(("h", "kv"), [(3, 1), (9, 3), (12, 2)])
@pytest.mark.parametrize("m", [1, 23])
def test_grouped_queries(h, kv, m):
    case = make(b=2, h=h, kv=kv, m=m, near=20, n=50)
    assert_as_exact_as_torch(mixed(case, strategy="fused"), case)


def test_value_codes_of_other_tables():
    case = make(groups=2, value_codes=True)
    case.value_codebook = torch.randn(3, 2, 4, 11, 4)
    case.coded["value_codes"] = torch.randint(0, 11, (1, 40, 3 * 4), dtype=torch.int32)
    assert_as_exact_as_torch(coded(case), case)


@pytest.mark.parametrize(
    ("bits", "strategy"),
    [*((bits, "fused") for bits in (1, 5, 9, 16)), (10, "counted"), (16, "expanded")],
)  # fmt: skip
def test_packed_codes_give_the_same_bits(bits, strategy):
    case = make(b=2, n=45, k=min(2**bits, 100), code_mask=True)
    packed = torch.stack([ak.pack(row.cpu(), bits) for row in case.codes]).to(case.codes.device)
    want = ak.coded_attention(*case.coded_arguments, **case.coded, impl="triton")
    got = ak.coded_attention(
        case.query, packed, *case.coded_arguments[2:], **case.coded, code_bits=bits, impl="triton"
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    shape = ak._checks.CodedShape(45, 2, 2, 100, 100)
    got = coded_attention(
        case.query, packed, *case.coded_arguments[2:], **case.coded,
        code_bits=bits, shape=shape, strategy=strategy,
    )  # fmt: skip
    assert_as_exact_as_torch(got, case)


def test_the_largest_codebook():
    case = make(d=16, k=65536, kv=1, h=2)
    case.codes[0, 0] = 65535
    assert_as_exact_as_torch(coded(case, strategy="fused"), case)


@pytest.mark.parametrize(
    ("splits", "m", "rope"),
    [(1, 1, True), (2, 20, True), (3, 20, False), (7, 1, True), (20, 1, False)],
)
def test_any_number_of_splits(dtype, splits, m, rope):
    case = make(kv=1, h=2, m=m, near=m + 20, n=60, rope=rope, causal=True, dtype=dtype)
    got = launcher.attend(
        case.query,
        None,
        dense=Dense(case.key, case.value, is_causal=True),
        coded=described(case),
        splits=splits,
        tile=Tile(16, 16, 4, 2),
    )
    assert_as_exact_as_torch(got, case)


def described(case: Case) -> Coded:
    shared = case.codes.shape[2] == case.key_codebook.shape[0] * case.key_codebook.shape[2]
    return Coded(
        *(case.codes.shape[1], case.codes, case.key_codebook, shared),
        *(case.codes, case.value_codebook, shared),
        rope=case.coded.get("rope"),
        mask=case.coded.get("code_mask"),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_codes(strategy):
    case = make(n=0, near=20)
    assert_as_exact_as_torch(mixed(case, strategy=strategy), case)
    out, lse = coded(case)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_no_queries_and_no_batch():
    for case in (make(m=0, near=3), make(b=0, near=3)):
        out, lse = mixed(case)
        assert out.shape == case.query.shape
        assert lse.shape == case.query.shape[:-1]


@pytest.mark.parametrize(
    ("counts_of", "m", "kind"),
    [("head", FEW, torch.int32), ("all", FEW, torch.int64), ("head", FEW, torch.uint8),
     ("head", MANY, torch.int32), ("all", MANY, torch.int16)],
)  # fmt: skip
def test_codeword_attention(counts_of, m, kind):
    case = make(b=2, m=m, n=0, k=60)
    counts = torch.randint(0, 4, (2, 2 if counts_of == "head" else 1, 60)).to(kind)
    tables = (case.key_codebook[0], case.value_codebook[0])
    got = ak.codeword_attention(case.query, counts, *tables, impl="triton")
    query, *tables = (x.double() for x in (case.query, *tables))
    want = ak.codeword_attention(query, counts, *tables, impl="reference")
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-5)


def test_absent_codewords_and_hidden_tokens_may_hold_anything():
    case = make(near=20, code_mask=True, key_mask=True, groups=2, rope=True)
    want = mixed(case, strategy="fused")
    hidden = ~case.coded["code_mask"]
    case.codes[hidden] = -(2**31)
    case.coded["rope"] = tuple(
        x.masked_fill(hidden[0].unsqueeze(1), torch.nan) for x in case.coded["rope"]
    )
    case.key.masked_fill_(~case.dense["key_mask"][:, None, :, None], torch.nan)
    case.value.masked_fill_(~case.dense["key_mask"][:, None, :, None], torch.nan)
    for a, b in zip(mixed(case, strategy="fused"), want, strict=True):
        assert torch.equal(a, b)
    case = make(n=0)
    counts = torch.randint(0, 3, (1, 2, 24))
    tables = [t[0].masked_fill((counts[0] == 0)[:, None, :, None], torch.nan) for t in
              (case.key_codebook, case.value_codebook)]  # fmt: skip
    out, lse = ak.codeword_attention(case.query, counts, *tables, impl="triton")
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_codes_out_of_range_read_the_last_codeword():
    case = make()
    wrong = case.codes.clone()
    case.codes[0, 3:6] = 23
    wrong[0, 3:6] = torch.tensor([24, -1, 2**31 - 1], dtype=torch.int32).unsqueeze(1)
    got = ak.coded_attention(
        case.query, wrong, *case.coded_arguments[2:], impl="triton", check=False
    )
    assert_as_exact_as_torch(got, case)
    with pytest.raises(ValueError, match="codes must be in"):
        ak.coded_attention(case.query, wrong, *case.coded_arguments[2:], impl="triton", check=True)


def test_strided_inputs_and_tables_of_another_dtype():
    case = make(b=2, near=20, n=30, rope=True, dtype=torch.float16)
    plain = mixed(case)
    case.query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    case.key = case.key.mT.contiguous().mT
    case.value = torch.stack((case.value, case.value), dim=-2)[..., 0, :]
    case.codes = torch.stack((case.codes, case.codes), dim=-1)[..., 0].long()
    for a, b in zip(mixed(case), plain, strict=True):
        assert torch.equal(a, b)
    case.key_codebook, case.value_codebook = case.key_codebook.float(), case.value_codebook.double()
    for a, b in zip(mixed(case), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_rope_tables_for_one_and_for_all_batch_rows():
    case = make(b=2, rope=True)
    cos, sin = case.coded["rope"]
    own = torch.randn(2, 40, 8).repeat(1, 1, 2)
    for rope in ((cos, own), (own, sin), (cos.unsqueeze(0), own), (cos, sin.unsqueeze(0))):
        case.coded["rope"] = rope
        assert_as_exact_as_torch(coded(case, strategy="fused"), case)
        assert_as_exact_as_torch(coded(case, strategy="expanded"), case)


@pytest.mark.parametrize("scale", [-0.4, 0.0, -0.0])
def test_scales_that_are_not_positive(scale):
    for case in (make(near=20, rope=True, code_mask=True, scale=scale), make(n=150, scale=scale)):
        assert_as_exact_as_torch(mixed(case, strategy="fused"), case)
    assert_as_exact_as_torch(coded(case, strategy="counted"), case)


def test_views_of_much_memory_are_copied_and_larger_rows_refused():
    """Offsets within a batch row are 32-bit."""
    with record(90) as launches:
        # tokens, layers, heads, channels
        cache = torch.empty(1, 2**17, 2**10, 2, 16, device="meta")
        key = cache[:, :, 3].transpose(1, 2)
        query = torch.empty(1, 2, 70, 16, device="meta")
        launcher.attend(query, None, dense=Dense(key, key))
        (given, *strides), *_ = (launch.args[6:10] for launch in launches)
        assert given.shape == key.shape
        unit = launches[0].constants["UNIT"]
        assert [stride * unit for stride in strides] == [2**22, 2**21, 16]
        large = torch.empty(1, 2, 2**26, 16, device="meta")
        with pytest.raises(ValueError, match="too large"):
            launcher.attend(large, None, dense=Dense(key, key))
        with pytest.raises(ValueError, match="too large"):
            launcher.attend(query, None, dense=Dense(large, large))


def test_large_scores_do_not_overflow():
    case = make(near=20, n=50, scale=40.0)
    assert_as_exact_as_torch(mixed(case), case)


@pytest.mark.timeout(
    600
)  # many kernels in one test: 15 s on an idle machine, minutes on a busy one
@examples(6)
@given(st.data())
def test_any_shape(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))  # what fails once fails again
    kv, fold = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3, 5]))
    width = draw(st.sampled_from([2, 4, 6, 16]))
    m, near = draw(st.integers(1, 40)), draw(st.integers(0, 60))
    causal = near >= m and draw(st.booleans())
    case = make(
        b=draw(st.integers(1, 2)), h=kv * fold, kv=kv, m=m, near=near, n=draw(st.integers(0, 60)),
        d=groups * width, k=draw(st.integers(1, 40)), groups=groups, stages=draw(st.integers(1, 2)),
        shared=draw(st.booleans()), rope=groups * width % 2 == 0 and draw(st.booleans()),
        causal=causal, key_mask=near > 0 and draw(st.booleans()), code_mask=draw(st.booleans()),
        value_codes=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
    )  # fmt: skip
    got = mixed(case, strategy=draw(st.sampled_from(["fused", "expanded", None])))
    assert_as_exact_as_torch(got, case)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("m", [FEW, MANY])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_no_number_is_no_answer(m, value):
    """A row of queries that is NaN gives NaN; scores that are all -inf are no keys at all."""
    case = make(h=2, kv=1, m=m, near=20, n=60)
    for tensor in (case.query, case.key, case.key_codebook):
        tensor.abs_()
    case.query[0, 1, 2] = value
    for splits in (1, 3):
        for keys in (
            {"dense": Dense(case.key, case.value)},
            {"coded": described(case)},
        ):
            out, lse = launcher.attend(case.query, None, **keys, splits=splits)
            if value == -torch.inf:
                assert (out[0, 1, 2] == 0).all()
                assert lse[0, 1, 2] == -torch.inf
            else:
                assert out[0, 1, 2].isnan().all()
                assert lse[0, 1, 2].isnan()
            assert int(lse.isfinite().sum()) == lse.numel() - 1
            assert int(out.isnan().any(-1).sum()) == int(value != -torch.inf)
