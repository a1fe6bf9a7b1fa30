"""Calls of the ops that make and read codes, of what they are compared with, and their errors."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

import astra_kernels as ak
from bench.kernels.spec import BITS, Calls, Shape
from bench.kernels.timing import Call

CHECKED_ROWS = 512


def share_wrong(want: Tensor) -> Callable[[Any], float]:
    """For what has to be exact: which part of the elements is not."""

    def error(result: Any) -> float:
        if result.shape != want.shape:
            return math.inf
        return float((result.to(want.dtype) != want).double().mean())

    return error


def encode(shape: Shape, dtype: torch.dtype, device: torch.device) -> Calls:
    tokens, groups, codewords = shape["T"], shape["groups"], shape["K"]
    width = shape["D"] // groups
    vectors = torch.randn(tokens, groups, width, dtype=dtype, device=device)
    codebook = torch.randn(groups, codewords, width, dtype=dtype, device=device)
    norms = codebook.float().square().sum(dim=-1) / 2
    points, turned = vectors.transpose(0, 1), codebook.mT
    products = torch.empty(groups, tokens, codewords, dtype=dtype, device=device)

    def matmul() -> Tensor:
        return torch.bmm(points, turned, out=products)

    def matmul_argmin() -> Tensor:
        scores = norms.unsqueeze(1) - matmul()
        return scores.argmin(dim=-1).T

    bits = max(1, (codewords - 1).bit_length())
    ours: dict[str, Call] = {
        "encode": lambda: ak.encode(vectors, codebook, half_norms=norms),
        "encode_packed": lambda: ak.encode_packed(
            vectors.unsqueeze(0), codebook, bits, half_norms=norms
        ),
    }
    baselines: dict[str, Call] = {"matmul": matmul, "matmul_argmin": matmul_argmin}
    if importlib.util.find_spec("vector_quantize_pytorch"):
        baselines["vector-quantize-pytorch"] = vector_quantize(vectors, codebook)

    # How much farther the chosen codewords are than the nearest, of the nearest ones' distance.
    rows = torch.randperm(tokens, device=device)[:CHECKED_ROWS]
    some, table = points[:, rows].double(), codebook.double()
    size = some.square().sum(dim=-1, keepdim=True)
    distances = size - 2 * some @ table.mT + table.square().sum(dim=-1).unsqueeze(1)
    least = distances.amin(dim=-1)

    def error(result: Any) -> float:
        if result.dtype == torch.uint8:
            result = ak.unpack(result.flatten(), bits, tokens * groups).view(tokens, groups)
        codes = result.reshape(tokens, groups)[rows].T.long()
        if codes.min() < 0 or codes.max() >= codewords:
            return math.inf
        chosen = distances.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
        return float((chosen - least).sum() / least.sum())

    # What rounding of an fp32 score may hide; the products themselves are exact in fp32.
    slack = 4 * torch.finfo(torch.float32).eps * math.sqrt(width)
    return Calls(
        *(ours, baselines, error, slack),
        not_comparable=frozenset({"matmul"}),
        not_captured=frozenset({"vector-quantize-pytorch"}),
    )


def vector_quantize(vectors: Tensor, codebook: Tensor) -> Call:
    """The codes that package finds for these codewords; imported when first called."""
    groups, codewords, width = codebook.shape

    @functools.cache
    def layer() -> torch.nn.Module:
        from vector_quantize_pytorch import VectorQuantize

        with torch.inference_mode(False):
            made = VectorQuantize(
                dim=groups * width,
                codebook_dim=width,
                codebook_size=codewords,
                heads=groups,
                separate_codebook_per_head=groups > 1,
            )
            made = made.to(vectors.device).eval()
            made._codebook.embed.data.copy_(codebook.clone())
        return made

    flat = vectors.reshape(1, vectors.shape[0], groups * width)
    return lambda: layer()(flat)[1]


def linear(shape: Shape, dtype: torch.dtype, device: torch.device) -> Calls:
    tokens, channels, groups = shape["T"], shape["D"], shape["groups"]
    codes = torch.randint(0, shape["K"], (tokens, groups), dtype=torch.int32, device=device)
    codebook = torch.randn(groups, shape["K"], channels // groups, dtype=dtype, device=device)
    weight = torch.randn(shape["out"], channels, dtype=dtype, device=device) / channels**0.5
    want = ak.decode(codes, codebook, impl="reference").reshape(tokens, channels).double()
    want = want @ weight.double().T

    def expanded() -> Tensor:
        return dense_linear(ak.decode(codes, codebook).reshape(tokens, channels), weight)

    groups_at = torch.arange(groups, device=device)

    def indexed() -> Tensor:
        return dense_linear(codebook[groups_at, codes].reshape(tokens, channels), weight)

    def error(result: Any) -> float:
        return float((result.double() - want).norm() / want.norm())

    ours = {"auto": lambda: ak.lookup_linear(codes, codebook, weight)}
    return Calls(ours, {"decode_linear": expanded, "index_linear": indexed}, error)


def pack(shape: Shape, dtype: torch.dtype, device: torch.device) -> Calls:
    codes = random_codes((shape["N"],), device)
    shifts = torch.arange(BITS, device=device, dtype=torch.int32)
    weights = 2 ** torch.arange(8, device=device, dtype=torch.int32)

    def plain() -> Tensor:
        bits = (codes.unsqueeze(1) >> shifts) & 1
        return (bits.view(-1, 8) * weights).sum(dim=1, dtype=torch.int32).to(torch.uint8)

    want = ak.pack(codes.cpu(), BITS).to(device)
    return Calls({"auto": lambda: ak.pack(codes, BITS)}, {"torch": plain}, share_wrong(want))


def unpack(shape: Shape, dtype: torch.dtype, device: torch.device) -> Calls:
    codes = random_codes((shape["N"],), device)
    data = ak.pack(codes.cpu(), BITS).to(device)
    shifts = torch.arange(8, device=device, dtype=torch.uint8)
    weights = 2 ** torch.arange(BITS, device=device, dtype=torch.int32)

    def plain() -> Tensor:
        bits = (data.unsqueeze(1) >> shifts) & 1
        return (bits.view(-1, BITS).to(torch.int32) * weights).sum(dim=1, dtype=torch.int32)

    ours = {"auto": lambda: ak.unpack(data, BITS, shape["N"])}
    return Calls(ours, {"torch": plain}, share_wrong(codes))


def count(shape: Shape, dtype: torch.dtype, device: torch.device) -> Calls:
    heads, codewords = shape["Hkv"], shape["K"]
    codes = random_codes((1, shape["N"], heads), device, codewords)
    first = torch.arange(heads, device=device, dtype=torch.int32) * codewords

    def bincount() -> Tensor:
        counts = torch.bincount((codes + first).flatten(), minlength=heads * codewords)
        return counts.view(1, heads, codewords)

    ones = torch.ones((), dtype=torch.int32, device=device).expand(shape["N"] * heads)

    def scatter() -> Tensor:
        counts = torch.zeros(heads * codewords, dtype=torch.int32, device=device)
        counts.scatter_add_(0, (codes + first).flatten().long(), ones)
        return counts.view(1, heads, codewords)

    error = share_wrong(bincount().to(torch.int32))
    ours = {"auto": lambda: ak.count_codes(codes, codewords)}
    return Calls(ours, {"bincount": bincount, "scatter_add": scatter}, error)


def decode(shape: Shape, dtype: torch.dtype, device: torch.device) -> Calls:
    groups, width = shape["groups"], shape["D"] // shape["groups"]
    codes = random_codes((shape["T"], groups), device, shape["K"])
    codebook = torch.randn(groups, shape["K"], width, dtype=dtype, device=device)
    rows, first = codebook.view(-1, width), torch.arange(groups, device=device, dtype=torch.int32)
    first = first * shape["K"]

    def select() -> Tensor:
        return rows.index_select(0, (codes + first).flatten()).view(-1, groups, width)

    want = ak.decode(codes, codebook, impl="reference")
    ours = {"auto": lambda: ak.decode(codes, codebook)}
    return Calls(ours, {"index_select": select}, share_wrong(want))


def random_codes(size: tuple[int, ...], device: torch.device, codewords: int = 2**BITS) -> Tensor:
    return torch.randint(0, codewords, size, dtype=torch.int32, device=device)
