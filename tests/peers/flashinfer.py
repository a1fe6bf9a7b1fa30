"""FlashInfer's tests (tests/attention), by the ops of this package.

Their states have log-sum-exps in base 2, [T, H]: lse / ln 2, transposed. Layouts NHD and HND are
views here. Custom masks are `attn_mask`, sinks and logits_soft_cap are `sinks` and `softcap`.
Compared with the formula in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

import astra_kernels as ak

from .cases import Case, attend, band, close
from .flash_attention import varlen_case

DTYPES = (torch.float16, torch.bfloat16)
SIZES = ((1, 8), (1, 19), (6, 6), (5, 17), (2, 40))  # queries and keys


def states(count: int, dtype: torch.dtype, shape: tuple[int, ...] = (5, 3)) -> Any:
    return torch.randn(count, *shape, 16, dtype=dtype), torch.randn(count, *shape)


def exact_merge(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lse = lses.double().logsumexp(0)
    weights = (lses.double() - lse.masked_fill(lse == -torch.inf, 0)).exp()
    return (weights[..., None] * outs.double()).sum(0), lse


def merge_two(dtype: torch.dtype, shape: tuple[int, ...], hidden: bool) -> None:
    outs, lses = states(2, dtype, shape)
    if hidden:  # one side saw nothing, or both
        lses[0, 0] = -torch.inf
        lses[:, -1] = -torch.inf
        outs[lses == -torch.inf] = 0
    out, lse = ak.merge_state(outs[0], lses[0], outs[1], lses[1])
    want, want_lse = exact_merge(outs, lses)
    close(out, want, dtype)
    close(lse, want_lse, torch.float32)


def merge_many(dtype: torch.dtype, count: int, base_two: bool) -> None:
    outs, lses = states(count, dtype)
    given = lses / math.log(2) if base_two else lses  # as theirs are kept
    out, lse = ak.merge_states(outs, given * math.log(2) if base_two else given)
    want, want_lse = exact_merge(outs, lses)
    close(out, want, dtype)
    close(lse, want_lse, torch.float32, factor=2)


def prefill(
    sizes: tuple[int, int], heads: tuple[int, int], width: int, dtype: torch.dtype, **options: Any
) -> None:
    rows, tokens = sizes
    query = torch.randn(2, heads[0], rows, 16, dtype=dtype)
    key = torch.randn(2, heads[1], tokens, 16, dtype=dtype)
    value = torch.randn(2, heads[1], tokens, width, dtype=dtype)
    want: dict[str, Any] = {k: options[k] for k in ("softcap", "scale") if k in options}
    visible = torch.ones(rows, tokens, dtype=torch.bool)
    if options.get("is_causal"):
        visible = band(rows, tokens, right=0)
    if "window" in options:
        visible = visible & band(rows, tokens, *options["window"])
    if options.pop("custom", False):
        mask = torch.rand(2, 1, rows, tokens) > 0.3
        options["attn_mask"], visible = mask, visible & mask
    if options.pop("sink", False):
        options["sinks"] = want["sinks"] = torch.randn(heads[0])
    out, lse = ak.attention(query, key, value, **options)
    expected, expected_lse = attend(query, key, value, visible=visible, **want)
    close(out, expected, dtype)
    close(lse, expected_lse, torch.float32, factor=20)


def split_keys(dtype: torch.dtype, parts: int, tokens: int) -> None:
    """Attention over parts of the keys, merged, is attention over all (cascade inference)."""
    query = torch.randn(1, 4, 3, 16, dtype=dtype)
    key, value = torch.randn(2, 1, 2, tokens, 16, dtype=dtype)
    cuts = zip(key.chunk(parts, 2), value.chunk(parts, 2), strict=True)
    pieces = [ak.attention(query, k, v) for k, v in cuts]
    out, lse = ak.merge_states(*(torch.stack(side) for side in zip(*pieces, strict=True)))
    want, want_lse = attend(query, key, value)
    close(out, want, dtype)
    close(lse, want_lse, torch.float32, factor=20)


def paged_codes(page_tokens: int, lengths: tuple[int, ...], softcap: float | None) -> None:
    """Their caches in pages hold dense keys; ours hold codes, which are looked up."""
    count, keys, values = 4, *torch.randn(2, 2, 2, 8, 8)
    most = -(-max(lengths) // page_tokens)
    codes = torch.randint(8, (len(lengths) * most, page_tokens, count)).int()
    pages = torch.stack([ak.pack(page.flatten(), 3) for page in codes])
    table = torch.randperm(len(codes)).view(len(lengths), most).int()
    query = torch.randn(len(lengths), 4, 1, 16)
    sizes = {"code_bits": 3, "page_tokens": page_tokens}
    of = torch.tensor(lengths)
    out, lse = ak.coded_attention_paged(
        query, pages, table, of, keys, values, softcap=softcap, **sizes
    )
    for b, length in enumerate(lengths):
        mine = torch.cat([codes[page] for page in table[b]])[None, :length]
        pair = ak.decode(mine, keys.flatten(0, 1)), ak.decode(mine, values.flatten(0, 1))
        dense = [t.unflatten(2, (2, 2)).flatten(3).transpose(1, 2) for t in pair]
        want, want_lse = attend(query[b : b + 1], *dense, softcap=softcap or 0.0)
        close(out[b : b + 1], want, torch.float32)
        close(lse[b : b + 1], want_lse, torch.float32)


def cases() -> Iterator[Case]:
    for dtype, shape, hidden in product(DTYPES, ((5, 3), (1, 8), (32, 2), (7,)), (False, True)):
        yield Case(
            "merging states", f"{dtype} {shape} {hidden}", partial(merge_two, dtype, shape, hidden)
        )
    for dtype, count, base_two in product(DTYPES, (1, 2, 3, 5, 8, 16, 33), (False, True)):
        yield Case(
            "merging states",
            f"{dtype} {count} {base_two}",
            partial(merge_many, dtype, count, base_two),
        )
    for dtype, parts, tokens in product(DTYPES, (1, 2, 3, 4), (12, 60)):
        yield Case(
            "merging states", f"{dtype} {parts} {tokens}", partial(split_keys, dtype, parts, tokens)
        )
    options: dict[str, tuple[dict[str, Any], ...]] = {
        "prefill and decode": ({}, {"is_causal": True}, {"scale": 0.3}),
        "custom mask": ({"custom": True}, {"custom": True, "is_causal": True}),
        "logits_soft_cap": ({"softcap": 1.0}, {"softcap": 30.0, "is_causal": True}),
        "sliding window": ({"window": (3, 0)}, {"window": (6, -1), "is_causal": True}),
        "attention sinks": ({"sink": True}, {"sink": True, "is_causal": True, "window": (4, -1)}),
    }
    for feature, given in options.items():
        for dtype, sizes, heads, more in product(DTYPES, SIZES, ((4, 4), (4, 2), (8, 1)), given):
            run = partial(prefill, sizes, heads, 16, dtype, **more)
            yield Case(feature, f"{dtype} {sizes} {heads} {more}", run)
    for dtype, sizes, heads, width in product(DTYPES, SIZES, ((4, 4), (8, 1)), (8, 24, 32, 5)):
        run = partial(prefill, sizes, heads, width, dtype, is_causal=True)
        yield Case("values of another width", f"{dtype} {sizes} {heads} {width}", run)
    pairs = (((3, 3), (1, 4)), ((2, 9), (5, 5), (0, 1)), ((1, 1),), ((8, 3), (4, 16)))
    for dtype, lengths, heads, causal in product(DTYPES, pairs, (1, 2, 4), (False, True)):
        run = partial(varlen_case, lengths, heads, dtype, is_causal=causal)
        yield Case("ragged", f"{dtype} {lengths} {heads} {causal}", run)
        run = partial(varlen_case, lengths, heads, dtype, is_causal=causal, softcap=5.0)
        yield Case("ragged", f"softcap {dtype} {lengths} {heads} {causal}", run)
    for page, lengths, softcap in product(
        (1, 4, 16), ((3, 9), (16, 1, 7), (5,), (17, 17), (2, 30, 4, 4)), (None, 2.0, 20.0, 0.5)
    ):
        run = partial(paged_codes, page, lengths, softcap)
        yield Case("pages (of codes)", f"{page} {lengths} {softcap}", run)
