"""FlashAttention's tests (tests/test_flash_attn.py), by the ops of this package.

Their queries are [B, M, H, d]; causal and windows are bottom-right aligned, as ours; the
log-sum-exp is natural, [B, H, M]. ALiBi is a float mask here. What theirs have and ours do not:
dropout, a dense cache in pages, a cache that is updated in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import astra_kernels as ak

from .cases import Case, attend, band, close

DTYPES = (torch.float16, torch.bfloat16)
LENGTHS = ((1, 9), (5, 5), (7, 12), (12, 7), (33, 20), (2, 31))
HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
WINDOWS = ((3, 0), (0, 2), (4, -1), (-1, 1), (2, 2))


def inputs(
    rows: int, tokens: int, kv_heads: int, dtype: torch.dtype, width: int = 16
) -> list[Tensor]:
    """As a model has them: tokens before heads."""
    query = torch.randn(2, rows, 4, width, dtype=dtype)
    pair = torch.randn(2, 2, tokens, kv_heads, width, dtype=dtype)
    return [tensor.transpose(1, 2) for tensor in (query, *pair)]


def compare(
    given: list[Tensor],
    dtype: torch.dtype,
    options: dict[str, Any],
    want: dict[str, Any],
    backward: bool = False,
) -> None:
    """Outputs, log-sum-exp and, if asked for, gradients, with the formula's in float64."""
    given = [tensor.detach().requires_grad_(backward) for tensor in given]
    out, lse = ak.attention(*given, **options)
    exact = [tensor.detach().double().requires_grad_(backward) for tensor in given]
    expected, expected_lse = attend(*exact, **want)
    close(out, expected, dtype)
    close(lse, expected_lse, torch.float32, factor=20)
    if backward:
        pulled = torch.randn_like(out)
        ours = torch.autograd.grad(out, given, pulled)
        theirs = torch.autograd.grad(expected, exact, pulled.double())
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, dtype, factor=6)


def window_case(
    lengths: tuple[int, int], kv_heads: int, dtype: torch.dtype, window: tuple[int, int],
    causal: bool = False, backward: bool = False, **more: Any,
) -> None:  # fmt: skip
    rows, tokens = lengths
    left, right = window
    visible = band(rows, tokens, left, right)
    if causal:
        visible &= band(rows, tokens, right=0)
    options = {"window": window, "is_causal": causal} | more
    compare(
        inputs(rows, tokens, kv_heads, dtype), dtype, options, {"visible": visible} | more, backward
    )


def causal_case(
    lengths: tuple[int, int], kv_heads: int, dtype: torch.dtype, backward: bool = False, **more: Any
) -> None:
    rows, tokens = lengths
    want = {"visible": band(rows, tokens, right=0)} | more
    given = inputs(rows, tokens, kv_heads, dtype)
    compare(given, dtype, {"is_causal": True} | more, want, backward)


def alibi_case(
    lengths: tuple[int, int], heads: int, dtype: torch.dtype, causal: bool, backward: bool
) -> None:
    rows, tokens = lengths
    slopes = 2.0 ** -torch.arange(1, 5)
    places = torch.arange(rows)[:, None] + tokens - rows
    bias = -slopes[:, None, None] * (places - torch.arange(tokens)).abs()
    want: dict[str, Any] = {"bias": bias}
    if causal:
        want["visible"] = band(rows, tokens, right=0)
    given = inputs(rows, tokens, heads, dtype)
    compare(given, dtype, {"attn_mask": bias, "is_causal": causal}, want, backward)


def varlen_case(
    pairs: tuple[tuple[int, int], ...], kv_heads: int, dtype: torch.dtype, **options: Any
) -> None:
    rows, tokens = (torch.tensor([0, *(p[i] for p in pairs)]).cumsum(0).int() for i in (0, 1))
    query = torch.randn(int(rows[-1]), 4, 16, dtype=dtype)
    key, value = torch.randn(2, int(tokens[-1]), kv_heads, 16, dtype=dtype)
    out, lse = ak.attention_varlen(query, key, value, rows, tokens, **options)
    for b, (count, length) in enumerate(pairs):
        if not count:
            continue
        here, seen = slice(rows[b], rows[b + 1]), slice(tokens[b], tokens[b + 1])
        one = [t.transpose(0, 1)[None] for t in (query[here], key[seen], value[seen])]
        right = 0 if options.get("is_causal") else -1
        visible = band(count, length, right=right)
        if options.get("window"):
            visible &= band(count, length, *options["window"])
        want, want_lse = attend(*one, visible=visible, softcap=options.get("softcap", 0.0))
        close(out[here], want[0].transpose(0, 1), dtype)
        close(lse[here], want_lse[0].transpose(0, 1), torch.float32, factor=20)


RAGGED = (
    ((3, 3), (5, 5)),
    ((1, 9), (1, 4), (1, 1)),
    ((4, 7), (0, 3), (6, 2)),
    ((7, 7), (2, 5), (3, 0)),
)


def cases() -> Iterator[Case]:
    for dtype, lengths, (kind, heads), backward in product(
        DTYPES, LENGTHS, HEADS.items(), (False, True)
    ):
        name = f"{dtype} {lengths} {kind}"
        feature = "causal, bottom-right"
        yield Case(
            feature + (", backward" if backward else ""),
            name,
            partial(causal_case, lengths, heads, dtype, backward),
        )
    for dtype, lengths, window, causal in product(DTYPES, LENGTHS, WINDOWS, (False, True)):
        run = partial(window_case, lengths, 2, dtype, window, causal)
        yield Case("sliding window", f"{dtype} {lengths} {window} {causal}", run)
    for dtype, lengths, window in product(DTYPES, LENGTHS, WINDOWS):
        run = partial(window_case, lengths, 2, dtype, window, backward=True)
        yield Case("sliding window, backward", f"{dtype} {lengths} {window}", run)
    for dtype, lengths, softcap, heads in product(DTYPES, LENGTHS, (0.8, 5.0, 50.0), (1, 4)):
        run = partial(causal_case, lengths, heads, dtype, softcap=softcap)
        yield Case("softcap", f"{dtype} {lengths} {softcap} {heads}", run)
    both = (False, True)
    for dtype, lengths, heads, causal, backward in product(DTYPES, LENGTHS, (1, 4), both, both):
        run = partial(alibi_case, lengths, heads, dtype, causal, backward)
        yield Case("ALiBi", f"{dtype} {lengths} {heads} {causal} {backward}", run)
    more: tuple[dict[str, Any], ...] = (
        *({}, {"is_causal": True}, {"window": (2, 0)}, {"softcap": 3.0}),
        {"is_causal": True, "window": (3, -1), "softcap": 10.0},
    )
    for dtype, pairs, heads, options in product(DTYPES, RAGGED, (1, 2), more):
        run = partial(varlen_case, pairs, heads, dtype, **options)
        yield Case("ragged (varlen)", f"{dtype} {pairs} {heads} {options}", run)
    query, key, value = torch.zeros(3, 1, 4, 5, 16)
    yield Case(
        "dropout",
        "attention",
        partial(ak.attention, query, key, value, dropout_p=0.1),  # type: ignore[call-arg]
        "dropout_p",
    )
    yield Case(
        "pages of dense keys",
        "attention",
        partial(ak.attention, query, key, value, block_table=None),  # type: ignore[call-arg]
        "block_table",
    )
