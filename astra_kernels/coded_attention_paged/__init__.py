"""Attention over codes that are kept in pages, as a cache of many sequences keeps them."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels._autograd import undifferentiated
from astra_kernels._checks import check_scale, check_softcap, check_tensors, split_rope

__all__ = ["coded_attention_paged"]


def coded_attention_paged(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    code_bits: int,
    page_tokens: int = 64,
    scale: float | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    attn_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
    check: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """`coded_attention` over sequences whose packed codes lie in pages of ``page_tokens`` tokens.

    Token t of sequence b is token t % page_tokens of page block_table[b, t // page_tokens].
    Sequences may share pages. N is n * page_tokens; tokens from lengths[b] on are not seen.

    Args:
        query: [B, H, M, d], fp32, fp64, fp16 or bf16; H is a multiple of Hkv.
        pages: uint8 [P, bytes], the codes of ``page_tokens`` tokens each as ``pack`` writes them:
            bytes = ceil(page_tokens * C * code_bits / 8).
        block_table: int32 (or int64) [B, n]; entries behind a sequence's last page may be anything.
        lengths: int32 (or int64) [B], tokens of each sequence, up to n * page_tokens.
        key_codebook, value_codebook: as of `coded_attention`; values have the keys' codes.
        code_bits: 1..16.
        rope: as of `coded_attention`, [N, d] or [B, N, d]; a row for each token, by its place in
            the sequence.
        attn_mask: broadcasts to [B, H, M, N].
        scale, softcap, sinks, impl, check: as of `coded_attention`; ``check`` also reads the table
            and the lengths. Unchecked entries never lead outside of ``pages``.

    Returns:
        (out [B, H, M, d_v], lse [B, H, M]), as `coded_attention`, with the same gradients.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes, devices, pages or lengths that do not fit.
        RuntimeError: ``impl`` cannot run here or lacks an argument.

    Example:
        >>> keys, values = torch.randn(2, 2, 1, 1024, 64)  # 2 KV heads, 1024 codewords each
        >>> codes = torch.randint(0, 1024, (5, 64, 2)).int()  # five pages of 64 tokens
        >>> pages = torch.stack([ak.pack(page.flatten(), 10) for page in codes])
        >>> table = torch.tensor([[0, 1, 2], [0, 4, 0]], dtype=torch.int32)  # page 0 is shared
        >>> lengths = torch.tensor([150, 70], dtype=torch.int32)
        >>> query = torch.randn(2, 8, 1, 64)
        >>> out, lse = ak.coded_attention_paged(
        ...     query, pages, table, lengths, keys, values, code_bits=10
        ... )
        >>> out.shape
        torch.Size([2, 8, 1, 64])
    """
    op = "coded_attention_paged"
    cos, sin = split_rope(op, rope)
    optional = {"rope cos": cos, "rope sin": sin, "attn_mask": attn_mask, "sinks": sinks}
    check_tensors(
        op,
        optional,
        query=query,
        pages=pages,
        block_table=block_table,
        lengths=lengths,
        key_codebook=key_codebook,
        value_codebook=value_codebook,
        differentiable=True,
    )
    check_scale(op, scale)
    check_softcap(op, softcap)
    with undifferentiated(query, key_codebook, value_codebook, attn_mask, sinks, cos, sin):
        out, lse = torch.ops.astra.coded_attention_paged(
            query,
            pages,
            block_table,
            lengths,
            key_codebook,
            value_codebook,
            code_bits,
            page_tokens,
            cos,
            sin,
            attn_mask,
            scale,
            softcap,
            sinks,
            impl,
            check,
        )
    return out, lse
