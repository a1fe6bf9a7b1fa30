"""What is measured: every case's name, shape, floor, and how its calls are made.

A spec makes tensors once and measures several ways of ours on them, each a case of its own in the
file: its name begins with what it measures, and its `impl` says which way.

    codeword_            attention to codewords, their counts at hand
    codeword_counted_    the same, counting included
    fused_lookup_        codes looked up inside the attention loop
    expanded_lookup_     codes looked up first, then attention to dense keys
    decode_rotary_       one query; int32 codes, or packed ones
    decode_plain_        one query, no positions: counts at hand, counted, or looked up
    plain_               without positions, from few to many tokens a codeword: where counting pays
    encode_ mixed_ merge_state_ pack_ unpack_ count_codes_ decode_codes_ lookup_linear_

Floors are those of the arithmetic and bytes alone, from the ceilings of the device. That of
decoding is the time to read dense keys and values, which is what codes are there to avoid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench.kernels.timing import Call, Ceilings

Shape = Mapping[str, Any]

# What a case's shape says in the result file; d of encoding is the width of a group, D / groups.
SHAPE_KEYS = ("B", "M", "N", "H", "Hkv", "d", "K", "S", "T", "groups")

FULL = {"H": 32, "Hkv": 8, "d": 128}  # Llama-3-8B's attention
SMALL = {"H": 12, "Hkv": 12, "d": 64}  # ViT-Base's, GPT-2's
K, BITS = 1024, 10


@dataclass(frozen=True)
class Calls:
    """`error` is the relative error of a call's result, against float64 or an exact reference.

    `error` of ours may be twice that of the best peer, and `slack`. `whole` picks the tensor that
    must also be near the best peer's everywhere (`error` may look at some rows only). `unlike`:
    peers whose result is another thing, so that they are timed only. `yardstick`: a comparable
    result, where no peer gives one.
    """

    ours: Mapping[str, Call]
    peers: Mapping[str, Call]
    error: Callable[[Any], float]
    slack: float = 0.0
    whole: Callable[[Any], torch.Tensor] | None = None
    unlike: frozenset[str] = frozenset()
    yardstick: Call | None = None


@dataclass(frozen=True)
class Spec:
    """ways: {impl: name of the case}; `build` gives a call of ours for every impl."""

    family: str
    shape: Shape
    dtype: torch.dtype
    ways: Mapping[str, str]
    floor: Callable[[Shape, Ceilings], float]  # seconds
    build: Callable[[Shape, torch.dtype, torch.device], Calls]
    notes: Mapping[str, Any] = field(default_factory=dict)

    def floor_ms(self, ceilings: Ceilings) -> float:
        return self.floor(self.shape, ceilings) * 1e3


# Floors, in seconds.


def attention_floor(shape: Shape, top: Ceilings, keys: int) -> float:
    """Two products and the exponentials of M queries and some keys, on units of their own."""
    scores = shape.get("B", 1) * shape["M"] * shape["H"] * keys
    return max(4 * scores * shape["d"] / top.dense, scores / top.exp)


def codeword_floor(shape: Shape, top: Ceilings) -> float:
    return attention_floor(shape, top, shape["K"])


def fused_floor(shape: Shape, top: Ceilings) -> float:
    return attention_floor(shape, top, shape["N"])


def plain_floor(shape: Shape, top: Ceilings) -> float:
    return attention_floor(shape, top, min(shape["N"], shape["K"]))


def mixed_floor(shape: Shape, top: Ceilings) -> float:
    near = shape["L"] / 2 if shape["causal"] else shape["L"]
    return attention_floor(shape, top, near + shape["N"])


def decode_floor(shape: Shape, top: Ceilings) -> float:
    """Reading dense 16-bit keys and values."""
    return 4 * shape["N"] * shape["Hkv"] * shape["d"] / top.copy


def encode_floor(shape: Shape, top: Ceilings) -> float:
    rate = top.fp32 if shape["itemsize"] == 4 else top.dense
    return 2 * shape["T"] * shape["K"] * shape["D"] / rate


def bytes_floor(shape: Shape, top: Ceilings) -> float:
    return shape["bytes"] / top.copy


def linear_floor(shape: Shape, top: Ceilings) -> float:
    tokens, channels, outputs = shape["T"], shape["D"], shape["out"]
    moved = 2 * (tokens * outputs + channels * outputs) + 4 * tokens * shape["groups"]
    return max(2 * tokens * channels * outputs / top.dense, moved / top.copy)


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
    from bench.kernels import _attention

    for heads in (FULL, SMALL):
        for tokens in (1024, 4096, 32768, 131072):
            shape = {"B": 1, "M": 1024, "N": tokens, **heads, "K": K, "S": 1}
            ways = {
                "counts": named("codeword", shape),
                "counted": named("codeword_counted", shape),
            }
            build = _attention.coded
            yield Spec("codeword", shape, torch.bfloat16, ways, codeword_floor, build)


def fused_specs() -> Iterator[Spec]:
    from bench.kernels import _attention

    def one(kind: str, shape: Shape, packed: bool = False) -> Spec:
        tail = "_packed" if packed else ""
        impls = {"fused": "fused_packed", "expanded": "expanded_packed"} if packed else {}
        ways = {
            impls.get(way, way): named(f"{way}_lookup_{kind}{tail}", shape)
            for way in ("fused", "expanded")
        }
        build = _attention.coded_rotary if kind == "rotary" else _attention.coded
        family = f"fused_lookup_{kind}{tail}"
        return Spec(family, shape, torch.bfloat16, ways, fused_floor, build)

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
    from bench.kernels import _attention

    for kind in ("rotary", "plain"):
        for tokens in (4096, 32768, 131072, 1048576):
            shape = {"B": 1, "M": 1, "N": tokens, **FULL, "K": K, "S": 1}
            impls = ("fused", "fused_packed")
            if kind == "plain":
                impls = ("counts", "counted", "counted_packed", *impls)
            ways = {impl: named(f"decode_{kind}_{impl}", shape) for impl in impls}
            build = _attention.coded_rotary if kind == "rotary" else _attention.coded
            notes = {"floor_of": "reading dense keys and values"}
            yield Spec(f"decode_{kind}", shape, torch.bfloat16, ways, decode_floor, build, notes)


def plain_specs() -> Iterator[Spec]:
    from bench.kernels import _attention

    for rows in (1024, 1):
        for tokens in (512, 1024, 2048, 4096, 8192):
            shape = {"B": 1, "M": rows, "N": tokens, **FULL, "K": K, "S": 1}
            ways = {impl: named(f"plain_{impl}", shape) for impl in ("fused", "counted")}
            yield Spec("plain", shape, torch.bfloat16, ways, plain_floor, _attention.coded)


def encode_specs() -> Iterator[Spec]:
    from bench.kernels import _codes

    for dtype in (torch.bfloat16, torch.float32):
        for channels in (768, 4096):
            for groups in (1, 32):
                shape = grouped(4096, channels, groups)
                shape["itemsize"] = dtype.itemsize
                kind = str(dtype).removeprefix("torch.")
                ways = {
                    "encode": f"encode_{kind}_D{channels}_G{groups}",
                    "encode_packed": f"encode_packed_{kind}_D{channels}_G{groups}",
                }
                yield Spec("encode", shape, dtype, ways, encode_floor, _codes.encode)


def other_specs() -> Iterator[Spec]:
    from bench.kernels import _attention, _codes

    for causal in (False, True):
        shape = {"B": 1, "M": 1024, "L": 1024, "N": 3072, **FULL, "K": K, "S": 1, "causal": causal}
        name = "mixed_causal" if causal else "mixed"
        ways = {"fused": named(name, shape)}
        yield Spec(name, shape, torch.bfloat16, ways, mixed_floor, _attention.mixed)
    for channels, outputs in ((768, 1536),):
        for tokens in (768, 8192):
            for groups in (1, 32):
                shape = {**grouped(tokens, channels, groups), "out": outputs}
                ways = {"auto": f"lookup_linear_T{tokens}_G{groups}"}
                build = _codes.linear
                yield Spec("lookup_linear", shape, torch.bfloat16, ways, linear_floor, build)
    shape = {"B": 1, "M": 1024, **FULL}
    numbers = 1024 * FULL["H"]
    shape["bytes"] = numbers * (3 * FULL["d"] * 2 + 3 * 4)
    ways = {"auto": "merge_state_M1024_H32_d128"}
    yield Spec("merge_state", shape, torch.bfloat16, ways, bytes_floor, _attention.merge)
    for count in (8192, 2**20):
        shape = {"N": count, "K": K, "bytes": count * 4 + count * BITS // 8}
        for op, build in (("pack", _codes.pack), ("unpack", _codes.unpack)):
            ways = {"auto": f"{op}_{BITS}bit_{count}"}
            yield Spec(op, shape, torch.int32, ways, bytes_floor, build)
    for tokens in (4096, 131072):
        shape = {"B": 1, "N": tokens, "Hkv": 8, "K": K}
        shape["bytes"] = tokens * 8 * 4 + 8 * K * 4
        ways = {"auto": f"count_codes_N{tokens}"}
        yield Spec("count_codes", shape, torch.int32, ways, bytes_floor, _codes.count)
    for groups in (1, 32):
        shape = grouped(8192, 768, groups)
        shape["bytes"] = 8192 * (768 * 2 + groups * 4)
        ways = {"auto": f"decode_codes_D768_G{groups}"}
        yield Spec("decode_codes", shape, torch.bfloat16, ways, bytes_floor, _codes.decode)


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
