"""Sequences laid end to end, and sequences in pages of codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import astra_kernels as ak
from astra_kernels.attention.reference import attention as exact_attention
from astra_kernels.attention_varlen.reference import attention_varlen as exact_varlen
from astra_kernels.coded_attention.reference import coded_attention as exact_coded
from astra_kernels.coded_attention_paged.reference import coded_attention_paged as exact_paged

H, HKV, D, K = 4, 2, 8, 5
LENGTHS = [(3, 3), (0, 2), (5, 0), (1, 7), (4, 2), (2, 2)]  # queries and keys of each sequence
OPTIONS: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"window": (1, 0)},
    {"softcap": 0.7, "scale": 0.5},
    {"is_causal": True, "window": (2, -1), "softcap": 2.0, "sinks": True},
]


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def ragged(width: int = D, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    queries, keys = ([pair[i] for pair in LENGTHS] for i in (0, 1))
    return (
        torch.randn(sum(queries), H, D, dtype=dtype),
        torch.randn(sum(keys), HKV, D, dtype=dtype),
        torch.randn(sum(keys), HKV, width, dtype=dtype),
        offsets(queries),
        offsets(keys),
    )


def options_of(given: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    made = dict(given)
    if made.pop("sinks", False):
        made["sinks"] = torch.randn(H, dtype=dtype)
    return made


@pytest.mark.parametrize("given", OPTIONS)
@pytest.mark.parametrize("width", [D, 3])
def test_each_sequence_is_attended_by_itself(given: dict[str, Any], width: int) -> None:
    query, key, value, of_q, of_k = ragged(width)
    options = options_of(given)
    for impl in ("auto", "reference"):
        out, lse = ak.attention_varlen(query, key, value, of_q, of_k, impl=impl, **options)
        assert (out.shape, lse.shape) == ((len(query), H, width), (len(query), H))
        for b in range(len(LENGTHS)):
            rows, seen = slice(of_q[b], of_q[b + 1]), slice(of_k[b], of_k[b + 1])
            one = [t.transpose(0, 1)[None] for t in (query[rows], key[seen], value[seen])]
            want, want_lse = exact_attention(*one, **options)
            torch.testing.assert_close(out[rows], want[0].transpose(0, 1))
            torch.testing.assert_close(lse[rows], want_lse[0].transpose(0, 1))


def test_the_reference_is_the_same() -> None:
    given = ragged()
    found = ak.attention_varlen(*given, is_causal=True)
    torch.testing.assert_close(found, exact_varlen(*given, is_causal=True))


def test_no_sequences_and_no_tokens() -> None:
    query, key = torch.randn(0, H, D), torch.randn(0, HKV, D)
    for of in (torch.zeros(1, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)):
        out, lse = ak.attention_varlen(query, key, key, of, of)
        assert (out.shape, lse.shape) == ((0, H, D), (0, H))


@pytest.mark.parametrize("page_tokens", [4, 3])  # of 3 tokens: a page does not end with a byte
def test_no_sequences_of_pages(page_tokens: int) -> None:
    pages, table = paged(torch.randint(0, K, (2, 12, HKV * 2)), page_tokens)
    given = (torch.randn(0, H, 2, D), pages, table[:0], torch.zeros(0).int(), *tables())
    out, lse = ak.coded_attention_paged(*given, code_bits=3, page_tokens=page_tokens)
    assert (out.shape, lse.shape) == ((0, H, 2, D), (0, H, 2))


@pytest.mark.parametrize("given", [OPTIONS[0], OPTIONS[4]])
def test_gradients_of_sequences(given: dict[str, Any]) -> None:
    query, key, value, of_q, of_k = ragged(3)
    options = options_of(given)
    names = ["query", "key", "value", *(["sinks"] if "sinks" in options else [])]
    tensors = [query, key, value, *([options.pop("sinks")] if "sinks" in options else [])]
    tensors = [t.requires_grad_() for t in tensors]

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        named = dict(zip(names, given, strict=True))
        out, lse = ak.attention_varlen(cu_seqlens_q=of_q, cu_seqlens_k=of_k, **named, **options)
        return out, torch.where(lse.isfinite(), lse, 0)

    assert torch.autograd.gradcheck(run, tuple(tensors), fast_mode=True)


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"cu_seqlens_q": offsets([3, 0, 5, 1, 4])}, "cu_seqlens_k must be of cu_seqlens_q"),
        ({"cu_seqlens_q": offsets([3, 0, 5, 1, 4, 3])}, "cu_seqlens_q must be from 0 to 15"),
        ({"cu_seqlens_k": offsets([3, 2, -1, 8, 2, 2])}, "cu_seqlens_k must be from 0 to 16"),
        ({"cu_seqlens_k": offsets([1] * 6).float()}, "cu_seqlens_k must be"),
        ({"key": torch.randn(16, 3, D, dtype=torch.float64)}, "key|value"),
        ({"value": torch.randn(15, HKV, D, dtype=torch.float64)}, "value must be"),
        ({"query": torch.randn(15, H, D, 1, dtype=torch.float64)}, "query must be"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], wanted: str) -> None:
    names = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k")
    given = dict(zip(names, ragged(), strict=True)) | changed
    with pytest.raises((ValueError, TypeError), match=wanted):
        ak.attention_varlen(**given)


def tables(width: int = D, stages: int = 0) -> list[torch.Tensor]:
    shape = (*([stages] if stages else []), HKV, 2, K)
    return [torch.randn(*shape, w // 2, dtype=torch.float64) for w in (D, width)]


def paged(codes: torch.Tensor, page_tokens: int, bits: int = 3) -> tuple[torch.Tensor, ...]:
    """Codes [B, n * page_tokens, C] in pages that are shuffled: pages and block table."""
    batch, tokens, _ = codes.shape
    count = tokens // page_tokens
    cuts = codes.unflatten(1, (count, page_tokens)).flatten(0, 1)
    order = torch.randperm(len(cuts))
    packed = torch.stack([ak.pack(cut.flatten().int(), bits) for cut in cuts])
    pages = torch.empty_like(packed)
    pages[order] = packed
    return pages, order.view(batch, count).int()


@pytest.mark.parametrize("page_tokens", [4, 3, 1])  # of 3 tokens: a page does not end with a byte
@pytest.mark.parametrize(("shared", "stages"), [(False, 0), (True, 0), (False, 2)])
def test_pages_are_the_codes_they_hold(page_tokens: int, shared: bool, stages: int) -> None:
    keys, values = tables(6, stages)
    per_token = (stages or 1) * 2 * (1 if shared else HKV)
    codes = torch.randint(0, K, (3, 12, per_token))
    pages, table = paged(codes, page_tokens)
    lengths = torch.tensor([12, 7, 0], dtype=torch.int32)
    table[1, -(-7 // page_tokens) :] = -9  # behind the last page anything may stand
    query = torch.randn(3, H, 2, D, dtype=torch.float64)
    angles = torch.randn(12, D // 2, dtype=torch.float64).repeat(1, 2)
    options: dict[str, Any] = {
        "rope": (angles.cos(), angles.sin()),
        "attn_mask": torch.randn(3, 1, 2, 12, dtype=torch.float64),
        "softcap": 3.0,
        "sinks": torch.randn(H, dtype=torch.float64),
    }
    sizes: dict[str, Any] = {"code_bits": 3, "page_tokens": page_tokens}
    given = (query, pages, table, lengths, keys, values)
    seen = torch.arange(12) < lengths[:, None]
    want = exact_coded(query, codes, keys, values, code_mask=seen, **options)
    torch.testing.assert_close(ak.coded_attention_paged(*given, **sizes, **options), want)
    found = exact_paged(*given, **sizes, **options)
    torch.testing.assert_close(found, want)


def test_a_shared_prefix_is_one_row_merged_by_state() -> None:
    """What docs/ops.md shows."""
    keys, values = tables()
    pages, prefix = paged(torch.randint(0, K, (1, 8, 2 * HKV)), 4)
    more, own = paged(torch.randint(0, K, (3, 4, 2 * HKV)), 4)
    pages, own = torch.cat([pages, more]), own + len(pages)
    query = torch.randn(3, H, 1, D, dtype=torch.float64)
    sizes: dict[str, Any] = {"code_bits": 3, "page_tokens": 4}
    own_lengths = torch.tensor([4, 2, 1], dtype=torch.int32)

    together = query.transpose(0, 2)  # [1, H, B, d]: the queries of all are rows of one sequence
    eight = torch.tensor([8], dtype=torch.int32)
    out, lse = ak.coded_attention_paged(together, pages, prefix, eight, keys, values, **sizes)
    of_own = ak.coded_attention_paged(query, pages, own, own_lengths, keys, values, **sizes)
    found = ak.merge_state(out.transpose(0, 2), lse.transpose(0, 2), *of_own)

    whole = torch.cat([prefix.expand(3, -1), own], 1)
    lengths = own_lengths + 8
    want = ak.coded_attention_paged(query, pages, whole, lengths, keys, values, **sizes)
    torch.testing.assert_close(found, want)


def test_gradients_of_pages() -> None:
    keys, values = (t.requires_grad_() for t in tables(6))
    pages, table = paged(torch.randint(0, K, (2, 8, 2 * HKV)), 4)
    lengths = torch.tensor([8, 3], dtype=torch.int32)
    query = torch.randn(2, H, 2, D, dtype=torch.float64, requires_grad=True)

    def run(*given: torch.Tensor) -> Any:
        query, keys, values = given
        return ak.coded_attention_paged(
            query, pages, table, lengths, keys, values, code_bits=3, page_tokens=4
        )

    assert torch.autograd.gradcheck(run, (query, keys, values), fast_mode=True)


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"lengths": torch.tensor([8, 9])}, "lengths must be from 0 to 8"),
        ({"block_table": torch.tensor([[0, 4], [1, 0]])}, "block_table must be of pages"),
        ({"block_table": torch.tensor([[0, -1], [1, 0]])}, "block_table must be of pages"),
        ({"block_table": torch.zeros(3, 2).int()}, "block_table must be"),
        ({"pages": torch.zeros(4, 5, dtype=torch.uint8)}, "pages must be"),
        ({"pages": torch.zeros(4, 6)}, "pages must be"),
        ({"code_bits": 17}, "code_bits must be"),
        ({"page_tokens": 0}, "page_tokens must be"),
        ({"lengths": torch.zeros(2)}, "lengths must be"),
    ],
)
def test_pages_that_do_not_fit_are_refused(changed: dict[str, Any], wanted: str) -> None:
    keys, values = tables()
    pages, table = paged(torch.randint(0, K, (2, 8, 2 * HKV)), 4)
    given = {
        "query": torch.randn(2, H, 1, D, dtype=torch.float64),
        "pages": pages,
        "block_table": table,
        "lengths": torch.tensor([8, 5]),
        "key_codebook": keys,
        "value_codebook": values,
        "code_bits": 3,
        "page_tokens": 4,
    } | changed
    with pytest.raises((ValueError, TypeError), match=wanted):
        ak.coded_attention_paged(**given)


def test_both_are_ops_of_torch() -> None:
    query, key, value, of_q, of_k = ragged(dtype=torch.float32)
    torch.library.opcheck(
        torch.ops.astra.attention_varlen.default,
        (query, key, value, of_q, of_k, True, [2, 0], None, None, None, "auto"),
        test_utils=("test_schema", "test_faketensor"),
    )
    keys, values = (t.float() for t in tables())
    pages, table = paged(torch.randint(0, K, (2, 8, 2 * HKV)), 4)
    lengths, query = torch.tensor([8, 5]), torch.randn(2, H, 1, D)
    rest = (3, 4, None, None, None, None, None, None, "auto", None)
    torch.library.opcheck(
        torch.ops.astra.coded_attention_paged.default,
        (query, pages, table, lengths, keys, values, *rest),
        test_utils=("test_schema", "test_faketensor"),
    )
