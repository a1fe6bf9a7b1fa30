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

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from bench.kernels import _attention, _codes
from bench.kernels.spec import BITS, Shape, Spec
from bench.kernels.timing import Ceilings

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


def specs() -> Iterator[Spec]:
    """All of them, what matters most first."""
    yield from codeword_specs()
    yield from fused_specs()
    yield from decode_specs()
    yield from encode_specs()
    yield from plain_specs()
    yield from other_specs()


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
        family = f"fused_lookup_{kind}{tail}"
        return Spec(family, shape, torch.bfloat16, variants, fused_roofline, build)

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


def decode_specs() -> Iterator[Spec]:
    for kind in ("rotary", "plain"):
        for tokens in (4096, 32768, 131072, 1048576):
            shape = {"B": 1, "M": 1, "N": tokens, **FULL, "K": K, "S": 1}
            impls = ("fused", "fused_packed")
            if kind == "plain":
                impls = ("counts", "counted", "counted_packed", *impls)
            variants = {impl: named(f"decode_{kind}_{impl}", shape) for impl in impls}
            build = _attention.coded_rotary if kind == "rotary" else _attention.coded
            notes = {"floor_of": "reading dense keys and values"}
            yield Spec(
                f"decode_{kind}", shape, torch.bfloat16, variants, decode_roofline, build, notes
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


def small(spec: Spec) -> Spec:
    """Names stay; shapes say what was run."""
    shape = {
        key: min(value, LARGEST[key]) if key in LARGEST else value
        for key, value in spec.shape.items()
    }
    if "L" in shape:
        shape["M"] = shape["L"]
    if "D" in shape:
        shape["d"] = shape["D"] // shape["groups"]
    elif "d" in shape:
        shape["d"] = 32
    return replace(spec, shape=shape)
