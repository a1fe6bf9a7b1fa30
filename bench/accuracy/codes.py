"""Which quantizer? Product, residual, gain-shape, scalar and lattice codes of the same vectors.

    python -m bench.accuracy codes [--codes product:3 residual:3 …] [--windows 4]

All code SmolLM2's keys and values of a token in one block, scaled as in space "kv", one vector of
384 channels, without knowledge of anything else; four ranks are simulated as in `bench.accuracy`,
the first token exact everywhere, no halo. Bits are those of fixed-length codes, but for "lattice",
where they are the entropy of its points on the calibration vectors, which an ideal entropy coder
would come near to. Space "transform" with the same windows stands beside them. Calibrated on a part
of the text of `bench.accuracy.calibrate`. Adds to codes.json after each row.

- product:C — C equal parts of the channels, 1,024 codewords each;
- residual:S — S stages of 1,024 codewords, each for what the stages before left (Chen et al. 2010);
- gain_shape:C — C parts; of each its length in 4 bits and its direction in 10;
- scalar:B — a random rotation, then B bits a channel of a Gaussian's best quantizer, and the
  vector's length in 16 bits (as TurboQuant, arXiv 2504.19874);
- principal:B — principal axes, B bits a token shared out by reverse water-filling, a Gaussian's
  best scalar quantizer each;
- lattice:STEP — a random rotation, then the nearest point of the lattice E8 in steps of STEP
  standard deviations (Conway & Sloane 1982; QuIP#, arXiv 2402.04396).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import astra_kernels as ak
from astra_runtime import Codebook
from astra_runtime.codes.base import geometry
from astra_runtime.codes.kv import KeyValueCodes
from astra_runtime.console import say
from astra_runtime.models import adapt
from astra_runtime.parallel import map_cores
from astra_runtime.store import load_model, load_tokenizer
from astra_runtime.train.calibration import as_windows, record
from astra_runtime.train.kmeans import kmeans
from astra_runtime.train.navq import Quantized
from bench import codebooks
from bench.accuracy import calibrate
from bench.accuracy.corpora import held_out
from bench.accuracy.simulated import control_losses, figures, losses
from bench.report import Rows, command_line, quiet_transformers

TEXT = ("documentation:4", "manpages:3", "fortunes:3", "source:2")
DOMAINS = ("documentation", "handbook")
CODEWORDS, ITERATIONS, GAIN_BITS, RANKS = 1024, 4, 4, 4
FIGURES = ("perplexity", "gap_recovered", "gap_spread")  # of each text
CODES = (
    *("product:1", "product:3", "product:12"),
    *("residual:3", "residual:10", "gain_shape:2", "gain_shape:8"),
    *("principal:30", "principal:100", "principal:300", "principal:600", "principal:1500"),
    *("lattice:2", "lattice:1", "lattice:0.5", "scalar:1", "scalar:2", "scalar:4"),
    *("transform:30", "transform:100"),
)


class Code(nn.Module):
    """What a block's vectors [n, 384] become: a function, and its bits a vector."""

    def __init__(self, estimate: Callable[[Tensor], Tensor], bits: float) -> None:
        super().__init__()
        self.of, self.bits = estimate, bits

    def forward(self, vectors: Tensor, counted: Tensor | None = None) -> Quantized:
        """As a `NAVQ` of one group, [B, S, 1, 384]."""
        estimate = self.of(vectors.flatten(0, -2)).view_as(vectors)
        none = torch.zeros(vectors.shape[:-1], dtype=torch.int32)
        return Quantized(none, estimate, estimate, vectors.new_zeros(()))


def parts_of(vectors: Tensor, count: int) -> Tensor:
    """[n, E] as [n, C, E/C]."""
    return vectors.unflatten(-1, (count, -1)).contiguous()


def nearest(vectors: Tensor, tables: Tensor) -> Tensor:
    """The nearest codewords of [n, C, w] in [C, K, w]."""
    return ak.decode(ak.encode(vectors, tables), tables)


def product(vectors: Tensor, count: int, seed: int) -> Code:
    tables = kmeans(parts_of(vectors, count), CODEWORDS, iterations=ITERATIONS, seed=seed)
    return Code(lambda x: nearest(parts_of(x, count), tables).flatten(1), 10 * count)


def residual(vectors: Tensor, stages: int, seed: int) -> Code:
    residuals, tables = vectors[:, None].clone(), []
    for stage in range(stages):
        tables.append(kmeans(residuals, CODEWORDS, iterations=ITERATIONS, seed=seed + stage))
        residuals -= nearest(residuals, tables[-1])

    def estimate(x: Tensor) -> Tensor:
        total = torch.zeros_like(x[:, None])
        for table in tables:
            total = total + nearest((x[:, None] - total).contiguous(), table)
        return total[:, 0]

    return Code(estimate, 10 * stages)


def gain_shape(vectors: Tensor, count: int, seed: int) -> Code:
    """Directions by k-means on the sphere, where the nearest is that of the largest product."""
    mean = vectors.mean(0)
    parts = parts_of(vectors - mean, count)
    gains = parts.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    shapes = kmeans(parts / gains, CODEWORDS, iterations=ITERATIONS, seed=seed)
    shapes = shapes / shapes.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    levels = kmeans(gains.log(), 1 << GAIN_BITS, iterations=ITERATIONS, seed=seed)

    def estimate(x: Tensor) -> Tensor:
        of_x = parts_of(x - mean, count)
        gain = of_x.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        shape = nearest((of_x / gain).contiguous(), shapes)
        gain = of_x.mul(shape).sum(-1, keepdim=True).clamp(min=1e-9)  # what is left along it
        return mean + (nearest(gain.log(), levels).exp() * shape).flatten(1)

    return Code(estimate, (10 + GAIN_BITS) * count)


def gaussian_levels(bits: int) -> Tensor:
    """[1, 2^bits, 1], the best quantizer of a standard normal (Lloyd 1982, Max 1960)."""
    draws = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(20_000) + 0.5) / 20_000)
    return kmeans(draws[:, None, None], 1 << bits, iterations=30, seed=0)


def quantized(values: Tensor, levels: Tensor) -> Tensor:
    """The nearest levels of values of any shape."""
    return nearest(values.reshape(-1, 1, 1), levels).view_as(values)


def rotation(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]


def scalar(vectors: Tensor, bits: int, seed: int) -> Code:
    mean, turn, levels = vectors.mean(0), rotation(vectors.shape[1], seed), gaussian_levels(bits)

    def estimate(x: Tensor) -> Tensor:
        turned = (x - mean) @ turn
        size = turned.square().mean(-1, keepdim=True).sqrt().half().float().clamp(min=1e-6)
        return mean + (quantized(turned / size, levels) * size) @ turn.T

    return Code(estimate, bits * vectors.shape[1] + 16)


def principal(vectors: Tensor, bits: float, seed: int) -> Code:
    """Bits go one by one to the axis with the largest error, which a bit divides by four."""
    mean = vectors.mean(0)
    variance, axes = torch.linalg.eigh((vectors - mean).T @ (vectors - mean) / len(vectors))
    error = variance.clamp(min=1e-12).clone()
    spent = torch.zeros(len(variance), dtype=torch.int64)
    for _ in range(int(bits)):
        axis = int(torch.where(spent < 8, error, 0.0).argmax())
        spent[axis] += 1
        error[axis] /= 4
    deviation = variance.clamp(min=1e-12).sqrt()
    levels = {b: gaussian_levels(b) for b in spent.unique().tolist() if b}

    def estimate(x: Tensor) -> Tensor:
        z = ((x - mean) @ axes) / deviation
        levels_of_z = torch.zeros_like(z)
        for b, of_bits in levels.items():
            chosen = spent == b
            levels_of_z[:, chosen] = quantized(z[:, chosen].contiguous(), of_bits)
        return mean + (levels_of_z * deviation) @ axes.T

    return Code(estimate, int(spent.sum()))


def lattice_point(x: Tensor) -> Tensor:
    """The nearest point of E8 = D8 ∪ (D8 + ½) to each of [..., 8] (Conway & Sloane 1982)."""

    def of_d8(y: Tensor) -> Tensor:
        near = y.round()
        odd = near.sum(-1, keepdim=True).remainder(2) != 0
        miss = y - near
        worst = miss.abs().argmax(-1, keepdim=True)
        step = torch.where(miss.gather(-1, worst) >= 0, 1.0, -1.0)
        return torch.where(odd, near.scatter_add(-1, worst, step), near)

    whole, half = of_d8(x), of_d8(x - 0.5) + 0.5
    nearer = (x - whole).square().sum(-1) <= (x - half).square().sum(-1)
    return torch.where(nearer[..., None], whole, half)


def lattice(vectors: Tensor, step: float, seed: int) -> Code:
    mean, turn = vectors.mean(0), rotation(vectors.shape[1], seed)
    size = step * float(((vectors - mean) @ turn).std())

    def points(x: Tensor) -> Tensor:
        return lattice_point((((x - mean) @ turn) / size).unflatten(-1, (-1, 8)))

    def estimate(x: Tensor) -> Tensor:
        return mean + (points(x).flatten(1) * size) @ turn.T

    # coordinates are coded one by one, the last of eight being known up to its parity
    doubled = (2 * points(vectors)).long().flatten()
    share = doubled.unique(return_counts=True)[1].double() / len(doubled)
    entropy = -float((share * share.log2()).sum())
    # all eight are whole or all are half, which seven of them need not say again; and one parity
    return Code(estimate, vectors.shape[1] / 8 * (8 * entropy - 7 - 1))


MAKERS: dict[str, Callable[[Tensor, Any, int], Code]] = {
    "product": lambda x, n, seed: product(x, int(n), seed),
    "residual": lambda x, n, seed: residual(x, int(n), seed),
    "gain_shape": lambda x, n, seed: gain_shape(x, int(n), seed),
    "scalar": lambda x, n, seed: scalar(x, int(n), seed),
    "principal": principal,
    "lattice": lattice,
}


def codebook_of(
    model: Any, name: str, vectors: list[tuple[Tensor, Tensor]]
) -> tuple[Codebook, Any]:
    """Codebook and quantizers of a row of the table; None: the codebook's own."""
    kind, _, size = name.partition(":")
    if kind not in MAKERS:
        return Codebook.from_pretrained(codebooks.folder(float(size), 0)), None

    def of_block(numbered: tuple[int, tuple[Tensor, Tensor]]) -> Code:
        block, (of_one, _) = numbered
        return MAKERS[kind](of_one[:, 0], float(size), 1000 * block)

    codes = list(map_cores(of_block, list(enumerate(vectors))))
    adapter = adapt(model)
    scales = torch.stack([scale for _, scale in vectors])
    book = Codebook(
        "kv", 1, 2, True, geometry=geometry(adapter), model=adapter.digest(), scales=scales
    )
    return replace(book, prefix=1), nn.ModuleList(codes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.accuracy codes", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--codes", nargs="+", default=CODES)
    parser.add_argument("--windows", type=int, default=4, help="of 1024 tokens, a domain")
    options = parser.parse_args(arguments)
    quiet_transformers()
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    adapter = adapt(model)
    drawn = as_windows(calibrate.windows(tokenizer, TEXT, 0))
    recorded = record(adapter, KeyValueCodes.early, drawn, lambda what, done, steps: None, 1)
    vectors = []
    for block in range(len(adapter.blocks)):
        of_block, scales = recorded.vectors(KeyValueCodes, block, 1, True)
        assert scales is not None, "key/value codes are scaled"
        vectors.append((of_block, scales))
    windows = held_out(tokenizer, DOMAINS, calibrate.TOKENS, options.windows)
    controls = {name: control_losses(model, of_text, RANKS) for name, of_text in windows.items()}
    rows = Rows(
        "codes",
        command=command_line("bench.accuracy codes", arguments),
        extra={
            "calibration_vectors": len(vectors[0][0]),
            "threads": torch.get_num_threads(),
        },
        say=say,
    )

    def row(name: str) -> dict[str, Any]:
        book, quantizers = codebook_of(model, name, vectors)
        bits = book.bits
        if quantizers is not None:
            bits = statistics.fmean(code.bits for code in quantizers)
        measured: dict[str, Any] = {"bits_per_token_block": bits}
        for domain, of_text in windows.items():
            ours = losses(model, book, of_text, world_size=RANKS, quantizers=quantizers)
            all_figures = figures(model, book, ours, controls[domain])
            measured[domain] = {key: all_figures[key] for key in FIGURES}
        return measured

    for name in options.codes:
        rows.measured({"codes": name, "windows": options.windows}, partial(row, name))


if __name__ == "__main__":
    main()
