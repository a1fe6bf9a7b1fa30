"""What is measured: every case's name, shape, roofline, and how its calls are made.

A spec makes tensors once and measures several variants of ours on them, each a case of its own in
the file: its name begins with what it measures, and its `impl` names the variant.

    codeword_            attention to codewords, their counts at hand
    codeword_counted_    the same, counting included
    fused_lookup_        codes looked up inside the attention loop
    expanded_lookup_     codes looked up first, then attention to dense keys
    decode_rotary_       one query; int32 codes, or packed ones
    decode_plain_        one query, no positions: counts at hand, counted, or looked up
    plain_               without positions, from few to many tokens a codeword: where counting pays
    encode_ mixed_ merge_state_ pack_ unpack_ count_codes_ decode_codes_ lookup_linear_

Rooflines are those of the arithmetic and bytes alone, from the ceilings of the device. That of
decoding is the time to read dense keys and values, which is what codes are there to avoid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from bench.kernels import _attention, _codes
from bench.kernels.ceilings import Ceilings
from bench.kernels.spec import BITS, Calls, Shape, Spec

FULL = {"H": 32, "Hkv": 8, "d": 128}  # Llama-3-8B's attention
SMALL = {"H": 12, "Hkv": 12, "d": 64}  # ViT-Base's, GPT-2's
K = 2**BITS


# Rooflines, in seconds.


def attention_roofline(shape: Shape, ceilings: Ceilings, keys: int) -> float:
    """Two products and the exponentials of M queries and some keys, on units of their own."""
    scores = shape.get("B", 1) * shape["M"] * shape["H"] * keys
    return max(4 * scores * shape["d"] / ceilings.dense, scores / ceilings.exp)


def codeword_roofline(shape: Shape, ceilings: Ceilings) -> float:
    return attention_roofline(shape, ceilings, shape["K"])


def fused_roofline(shape: Shape, ceilings: Ceilings) -> float:
    return attention_roofline(shape, ceilings, shape["N"])


def plain_roofline(shape: Shape, ceilings: Ceilings) -> float:
    return attention_roofline(shape, ceilings, min(shape["N"], shape["K"]))


def mixed_roofline(shape: Shape, ceilings: Ceilings) -> float:
    near = shape["L"] / 2 if shape["causal"] else shape["L"]
    return attention_roofline(shape, ceilings, near + shape["N"])


def decode_roofline(shape: Shape, ceilings: Ceilings) -> float:
    """Reading dense 16-bit keys and values."""
    return 4 * shape["N"] * shape["Hkv"] * shape["d"] / ceilings.copy


TILE_ROWS = 128  # query rows, of all heads that share a KV head, that read a look-up together


def gathered(shape: Shape) -> float:
    """Bytes of looked-up 16-bit keys and values."""
    tiles = -(-shape["M"] * shape["H"] // shape["Hkv"] // TILE_ROWS)
    return 2.0 * 2 * tiles * shape["Hkv"] * shape["N"] * shape["d"]


def gathered_rotary(shape: Shape) -> float:
    """The same, and a cosine and a sine for every two channels of a key."""
    return 1.5 * gathered(shape)


def encode_roofline(shape: Shape, ceilings: Ceilings) -> float:
    rate = ceilings.fp32 if shape["itemsize"] == 4 else ceilings.dense
    return 2 * shape["T"] * shape["K"] * shape["D"] / rate


def bytes_roofline(shape: Shape, ceilings: Ceilings) -> float:
    return shape["bytes"] / ceilings.copy


def linear_roofline(shape: Shape, ceilings: Ceilings) -> float:
    tokens, channels, outputs = shape["T"], shape["D"], shape["out"]
    moved = 2 * (tokens * outputs + channels * outputs) + 4 * tokens * shape["groups"]
    return max(2 * tokens * channels * outputs / ceilings.dense, moved / ceilings.copy)


# The cases.


# What decides whether the goals are met, in the order in which it is measured.
DECISIVE = tuple(
    re.compile(pattern)
    for pattern in (
        r"codeword_M1024_N32768_H32_",
        r"fused_lookup_rotary_M256_N8192_H32_",
        r"decode_rotary_fused_M1_N131072_",
        r"decode_plain_counts_M1_N131072_",
        r"encode_bfloat16_D768_G1$",
        r"codeword_M1024_N32768_H12_",
        r"fused_lookup_subvectors_M256_N8192_H32_",
        r"encode_bfloat16_D768_G32$",
        r"lookup_linear_T8192_G32$",
        r"fused_lookup_rotary_packed_M256_N8192_H32_",
        r"encode_float32_D768_G1$",
        r"encode_bfloat16_D4096_G1$",
        r"fused_lookup_rotary_M(64|1024)_N8192_H32_",
        r"fused_lookup_rotary_M256_N8192_H12_",
        r"mixed_M1024_",
        r"codeword_M1024_N131072_H32_",
        r"lookup_linear_T8192_G1$",
        r"merge_state_",
        r"pack_10bit_1048576$",
    )
)


def rank(spec: Spec) -> int:
    """How early a spec is measured: its place in `DECISIVE`, behind all of it where it has none."""
    places = (
        place
        for place, pattern in enumerate(DECISIVE)
        if any(pattern.match(name) for name in spec.variants.values())
    )
    return min(places, default=len(DECISIVE))


def specs() -> list[Spec]:
    """All of them, the decisive ones first."""
    groups = (
        *(codeword_specs(), fused_specs(), decode_specs()),
        *(encode_specs(), plain_specs(), other_specs()),
    )
    return sorted((spec for group in groups for spec in group), key=rank)


def codeword_specs() -> Iterator[Spec]:
    for heads in (FULL, SMALL):
        for tokens in (1024, 4096, 32768, 131072):
            shape = {"B": 1, "M": 1024, "N": tokens, **heads, "K": K, "S": 1}
            variants = {
                "counts": named("codeword", shape),
                "counted": named("codeword_counted", shape),
            }
            build = _attention.coded
            yield Spec("codeword", shape, torch.bfloat16, variants, codeword_roofline, build)


def fused_specs() -> Iterator[Spec]:
    def one(kind: str, shape: Shape, packed: bool = False) -> Spec:
        tail = "_packed" if packed else ""
        impls = {"fused": "fused_packed", "expanded": "expanded_packed"} if packed else {}
        variants = {
            impls.get(variant, variant): named(f"{variant}_lookup_{kind}{tail}", shape)
            for variant in ("fused", "expanded")
        }
        build = _attention.coded_rotary if kind == "rotary" else _attention.coded
        return Spec(
            *(f"fused_lookup_{kind}{tail}", shape, torch.bfloat16),
            *(variants, fused_roofline, build),
            gathered=gathered_rotary if kind == "rotary" else gathered,
        )

    for kind, groups in (("rotary", 1), ("subvectors", 4)):
        for heads in (FULL, SMALL):
            for rows in (64, 256, 512, 1024):
                for tokens in (3072, 8192, 32768):
                    shape = {"B": 1, "M": rows, "N": tokens, **heads, "K": K, "S": groups}
                    if rows == 512 and tokens != 8192:
                        continue  # between the others, for the crossover
                    yield one(kind, shape)
                    if (rows, tokens) == (256, 8192):
                        yield one(kind, shape, packed=True)


BUILDS: dict[str, Callable[[Shape, torch.dtype, torch.device], Calls]] = {
    "rotary": _attention.coded_rotary,
    "plain": _attention.coded,
}


def decode_specs() -> Iterator[Spec]:
    for kind, build in BUILDS.items():
        for tokens in (4096, 32768, 131072, 1048576):
            shape = {"B": 1, "M": 1, "N": tokens, **FULL, "K": K, "S": 1}
            impls: tuple[str, ...] = ("fused", "fused_packed")
            if kind == "plain":
                impls = ("counts", "counted", "counted_packed", *impls)
            variants = {impl: named(f"decode_{kind}_{impl}", shape) for impl in impls}
            notes = {"floor_of": "reading dense keys and values"}
            yield Spec(
                f"decode_{kind}",
                shape,
                torch.bfloat16,
                variants,
                decode_roofline,
                build,
                notes=notes,
                gathered=gathered_rotary if kind == "rotary" else gathered,
            )


def plain_specs() -> Iterator[Spec]:
    for rows in (1024, 1):
        for tokens in (512, 1024, 2048, 4096, 8192):
            shape = {"B": 1, "M": rows, "N": tokens, **FULL, "K": K, "S": 1}
            variants = {impl: named(f"plain_{impl}", shape) for impl in ("fused", "counted")}
            yield Spec("plain", shape, torch.bfloat16, variants, plain_roofline, _attention.coded)


def encode_specs() -> Iterator[Spec]:
    for dtype in (torch.bfloat16, torch.float32):
        for channels in (768, 4096):
            for groups in (1, 32):
                shape = grouped(4096, channels, groups)
                shape["itemsize"] = dtype.itemsize
                kind = str(dtype).removeprefix("torch.")
                variants = {
                    "encode": f"encode_{kind}_D{channels}_G{groups}",
                    "encode_packed": f"encode_packed_{kind}_D{channels}_G{groups}",
                }
                yield Spec("encode", shape, dtype, variants, encode_roofline, _codes.encode)


def other_specs() -> Iterator[Spec]:
    for causal in (False, True):
        shape = {"B": 1, "M": 1024, "L": 1024, "N": 3072, **FULL, "K": K, "S": 1, "causal": causal}
        name = "mixed_causal" if causal else "mixed"
        variants = {"fused": named(name, shape)}
        yield Spec(name, shape, torch.bfloat16, variants, mixed_roofline, _attention.mixed)
    for channels, outputs in ((768, 1536),):
        for tokens in (768, 8192):
            for groups in (1, 32):
                shape = {**grouped(tokens, channels, groups), "out": outputs}
                variants = {"auto": f"lookup_linear_T{tokens}_G{groups}"}
                build = _codes.linear
                yield Spec("lookup_linear", shape, torch.bfloat16, variants, linear_roofline, build)
    shape = {"B": 1, "M": 1024, **FULL}
    numbers = 1024 * FULL["H"]
    shape["bytes"] = numbers * (3 * FULL["d"] * 2 + 3 * 4)
    variants = {"auto": "merge_state_M1024_H32_d128"}
    yield Spec("merge_state", shape, torch.bfloat16, variants, bytes_roofline, _attention.merge)
    for count in (8192, 2**20):
        shape = {"N": count, "K": K, "bytes": count * 4 + count * BITS // 8}
        for op, build in (("pack", _codes.pack), ("unpack", _codes.unpack)):
            variants = {"auto": f"{op}_{BITS}bit_{count}"}
            yield Spec(op, shape, torch.int32, variants, bytes_roofline, build)
    for tokens in (4096, 131072):
        shape = {"B": 1, "N": tokens, "Hkv": 8, "K": K}
        shape["bytes"] = tokens * 8 * 4 + 8 * K * 4
        variants = {"auto": f"count_codes_N{tokens}"}
        yield Spec("count_codes", shape, torch.int32, variants, bytes_roofline, _codes.count)
    for groups in (1, 32):
        shape = grouped(8192, 768, groups)
        shape["bytes"] = 8192 * (768 * 2 + groups * 4)
        variants = {"auto": f"decode_codes_D768_G{groups}"}
        yield Spec("decode_codes", shape, torch.bfloat16, variants, bytes_roofline, _codes.decode)


def grouped(tokens: int, channels: int, groups: int) -> dict[str, Any]:
    """Vectors of so many channels in groups, each with K codewords."""
    return {"T": tokens, "D": channels, "d": channels // groups, "K": K, "groups": groups}


def named(prefix: str, shape: Shape) -> str:
    keys = [f"{key}{shape[key]}" for key in ("M", "N", "H", "d")]
    return "_".join([prefix, *keys])


# The same, so small that a CPU runs all of them in seconds.

LARGEST = {"M": 32, "N": 192, "L": 32, "T": 48, "K": 64, "H": 4, "Hkv": 2, "D": 128, "out": 64}
LARGEST_INTERPRETED = {**LARGEST, "M": 16, "N": 72, "L": 16, "T": 20, "K": 40, "H": 2, "Hkv": 1}


def small(spec: Spec, largest: Mapping[str, int] = LARGEST) -> Spec:
    """Names stay; shapes say what was run."""
    shape = {
        key: min(value, largest[key]) if key in largest else value
        for key, value in spec.shape.items()
    }
    if "L" in shape:
        shape["M"] = shape["L"]
    if "D" in shape:
        shape["d"] = shape["D"] // shape["groups"]
    elif "d" in shape:
        shape["d"] = 32
    return replace(spec, shape=shape)
