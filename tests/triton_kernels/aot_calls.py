"""The calls whose kernels are compiled ahead of time: a few for every test run, and all.

A call runs an op's launcher on the CPU under ``launch.record``, so what is compiled is what the
launcher would start on the chip: its tile, its constants, the alignment of its arguments.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from astra_kernels._checks import CodedShape
from astra_kernels._elementwise import kernel as steps
from astra_kernels._elementwise.vectors import key_value_vectors
from astra_kernels._triton.attention import Scores, attend
from astra_kernels._triton.augment import augment
from astra_kernels._triton.expand import expand
from astra_kernels._triton.gradient import attention_gradient
from astra_kernels._triton.sources import Coded, Counted, Dense
from astra_kernels.codeword_attention.kernel import codeword_attention
from astra_kernels.count_codes.kernel import count_codes
from astra_kernels.decode.kernel import decode
from astra_kernels.encode.kernel import encode
from astra_kernels.encode_packed.kernel import encode_packed
from astra_kernels.lookup_linear.kernel import lookup_linear
from astra_kernels.merge_state.kernel import merge_state
from astra_kernels.merge_states.kernel import merge_states
from astra_kernels.mixed_attention.kernel import mixed_attention
from astra_kernels.pack.kernel import pack, unpack

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
TOKENS, CODEWORDS, KV_HEADS, HEADS = 8192, 1024, 2, 8

# Bytes that a thread of the gradient of fp32 queries with a mask spills beyond 64 channels.
MASKED_FLOAT_SPILL = 128


@dataclass(frozen=True)
class Call:
    """``channels`` of vectors that a program holds whole, 0 where it goes over them in steps.
    ``options``: what tells it from other calls of its op. ``decisive``: what the goals for a GPU
    are measured on, whose loops must read wide. ``spill``: bytes a thread may, where no tile holds
    all of it."""

    name: str
    channels: int
    run: Callable[[], object]
    options: dict[str, Any]
    decisive: bool = False
    spill: int = 0


def attention(
    d: int, dtype: torch.dtype, *, m: int = 512, near: int = 0, rope: bool = False,
    causal: bool = False, groups: int = 1, stages: int = 1, bits: int | None = None,
    code_mask: bool = False, counted: bool = False, splits: int | None = None,
    heads: int = HEADS, kv_heads: int = KV_HEADS, tokens: int = TOKENS, name: str = "",
    angles_dtype: torch.dtype | None = None,
    mask: bool = False, width: int = 0,
) -> Call:  # fmt: skip
    """Mixed attention; without local tokens (``near``) attention over codes alone."""
    options: dict[str, Any] = {
        "m": m, "near": near, "rope": rope, "causal": causal, "groups": groups, "stages": stages,
        "bits": bits, "mask": code_mask, "counted": counted, "attn_mask": mask, "d_v": width,
    }  # fmt: skip
    said = " ".join(f"{key}={value}" for key, value in options.items() if value)

    def run() -> object:
        query = torch.empty(1, heads, m, d, dtype=dtype)
        tables = [
            torch.empty(stages, kv_heads, groups, CODEWORDS, size // groups, dtype=dtype)
            for size in (d, width or d)
        ]
        per_token = stages * kv_heads * groups
        codes = torch.empty(1, tokens, per_token, dtype=torch.int32)
        if bits is not None:
            codes = torch.empty(1, tokens * per_token * bits // 8, dtype=torch.uint8)
        angles = torch.empty(tokens, d, dtype=angles_dtype or dtype)
        options: dict[str, Any] = {
            "rope": (angles, angles) if rope else None,
            "code_mask": torch.empty(1, tokens, dtype=torch.bool) if code_mask else None,
            "code_bits": bits,
            "shape": CodedShape(tokens, per_token, per_token, CODEWORDS, CODEWORDS),
            "strategy": "counted" if counted else "fused",
        }
        if near:
            key = torch.empty(1, kv_heads, near, d, dtype=dtype)
            return mixed_attention(query, key, key, codes, *tables, is_causal=causal, **options)
        if counted:
            counts = torch.empty(1, kv_heads, CODEWORDS, dtype=torch.int32)
            return codeword_attention(query, counts, *(table[0] for table in tables))
        coded = Coded(
            *(tokens, codes, tables[0], False, codes, tables[1], False, bits),
            *(options["rope"], options["code_mask"]),
            torch.empty(m, tokens, dtype=dtype) if mask else None,
        )
        return attend(query, None, coded=coded, splits=splits)

    options |= {"op": "attention", "d": d, "dtype": dtype, "splits": splits}
    return Call(name or f"attention d={d} {short(dtype)} {said}", d, run, options)


def dense(
    d: int, dtype: torch.dtype, *, m: int = 512, causal: bool = False,
    mask: torch.dtype | None = None, window: tuple[int, int] | None = None,
    softcap: float | None = None, sinks: bool = False, width: int = 0, name: str = "",
) -> Call:  # fmt: skip
    """Dense attention; ``mask``: of one per query, the same for all heads."""
    options: dict[str, Any] = {"window": window, "softcap": softcap, "sinks": sinks, "d_v": width}
    said = f"{' causal' * causal}{'' if mask is None else f' mask={short(mask)}'}" + "".join(
        f" {key}={value}" for key, value in options.items() if value
    )

    def run() -> object:
        query = torch.empty(1, HEADS, m, d, dtype=dtype)
        key = torch.empty(1, KV_HEADS, 2048, d, dtype=dtype)
        value = torch.empty(1, KV_HEADS, 2048, width or d, dtype=dtype)
        attn_mask = None if mask is None else torch.empty(1, 1, m, 2048, dtype=mask)
        scores = Scores(None, softcap, torch.empty(HEADS) if sinks else None)
        return attend(query, scores, dense=Dense(key, value, causal, None, attn_mask, window))

    options |= {"op": "dense", "d": d, "dtype": dtype, "m": m, "causal": causal, "mask": mask}
    return Call(name or f"dense d={d} {short(dtype)} m={m}{said}", max(d, width), run, options)


def gradient(
    d: int, dtype: torch.dtype, *, causal: bool = False, mask: torch.dtype | None = None,
    window: tuple[int, int] | None = None, softcap: float | None = None, width: int = 0,
) -> Call:  # fmt: skip
    """The gradient of dense attention, of 512 queries to 2,048 keys."""
    options: dict[str, Any] = {
        "causal": causal, "mask": mask, "window": window, "softcap": softcap, "d_v": width,
    }  # fmt: skip
    said = "".join(f" {key}={value}" for key, value in options.items() if value)

    def run() -> object:
        query = torch.empty(1, HEADS, 512, d, dtype=dtype)
        key = torch.empty(1, KV_HEADS, 2048, d, dtype=dtype)
        value = torch.empty(1, KV_HEADS, 2048, width or d, dtype=dtype)
        attn_mask = None if mask is None else torch.empty(1, 1, 512, 2048, dtype=mask)
        grad_out = torch.empty(1, HEADS, 512, width or d, dtype=dtype)
        rows = torch.empty(1, HEADS, 512)
        dense = Dense(key, value, causal, None, attn_mask, window)
        return attention_gradient(query, dense, rows, grad_out, rows, d**-0.5, softcap)

    options |= {"op": "gradient", "d": d, "dtype": dtype}
    channels = max(d, width)
    spill = MASKED_FLOAT_SPILL if dtype == FLOAT and mask is not None and channels > 64 else 0
    return Call(f"gradient d={d} {short(dtype)}{said}", channels, run, options, spill=spill)


def search(
    width: int, groups: int, dtype: torch.dtype, bits: int | None = None, name: str = ""
) -> Call:
    def run() -> object:
        vectors = torch.empty(1, 4096, groups, width, dtype=dtype)
        codebook = torch.empty(groups, CODEWORDS, width, dtype=dtype)
        if bits is None:
            return encode(vectors, codebook)
        return encode_packed(vectors, codebook, bits)

    packed = "" if bits is None else f" {bits} bits"
    channels = width if width <= 128 else 0
    options = {"op": "encode", "width": width, "groups": groups, "dtype": dtype, "bits": bits}
    said = name or f"encode w={width} groups={groups} {short(dtype)}{packed}"
    return Call(said, channels, run, options)


def linear(
    width: int, groups: int, dtype: torch.dtype, norm: str | None, estimate: bool,
    tokens: int = 4096, name: str = "",
) -> Call:  # fmt: skip
    channels = width * groups

    def run() -> object:
        codes = torch.empty(tokens, groups, dtype=torch.int32)
        codebook = torch.empty(1, groups, CODEWORDS, width, dtype=dtype)
        weight = torch.empty(1536, channels, dtype=dtype)
        state = torch.empty(tokens, channels, dtype=dtype) if estimate else None
        return lookup_linear(codes, codebook[0], weight, estimate=state, norm=norm)

    said = f"{norm or 'no norm'}{' estimate' * estimate}"
    options = {
        "op": "lookup_linear", "width": width, "groups": groups, "dtype": dtype, "norm": norm,
        "estimate": estimate,
    }  # fmt: skip
    said = name or f"lookup_linear w={width} groups={groups} {short(dtype)} {said}"
    return Call(said, 0, run, options)


def helpers(dtype: torch.dtype, bits: int, d: int = 128) -> Iterator[Call]:
    """The kernels around attention."""
    codes = torch.empty(1, TOKENS, KV_HEADS, dtype=torch.int32)
    packed = torch.empty(1, TOKENS * KV_HEADS * bits // 8, dtype=torch.uint8)
    table = torch.empty(1, KV_HEADS, 1, CODEWORDS, d, dtype=dtype)
    angles = torch.empty(TOKENS, d, dtype=dtype)
    out, lse = torch.empty(1, 512, HEADS, d, dtype=dtype), torch.empty(1, HEADS, 512)
    state = (out.transpose(1, 2), lse)
    four = (out.expand(4, *out.shape), torch.empty(4, 1, 512, HEADS))
    key, turns = out.transpose(1, 2)[:, :KV_HEADS], (angles[None, :512], angles[None, :512])
    calls = {
        "pack": lambda: pack(codes, bits),
        "unpack": lambda: unpack(packed[0], bits, codes.numel()),
        "count": lambda: count_codes(codes, CODEWORDS),
        "count packed": lambda: count_codes(
            packed, CODEWORDS, code_bits=bits, num_tokens=TOKENS, codes_per_token=KV_HEADS
        ),
        "decode": lambda: decode(codes, table[0, :, 0]),
        "expand": lambda: expand(
            codes, table, 1, TOKENS, shared=False, code_bits=None, dtype=dtype,
            rope=(angles, angles),
        ),
        "augment": lambda: augment(
            torch.empty(1, HEADS, 64, d, dtype=dtype),
            Counted(torch.empty(1, KV_HEADS, CODEWORDS, dtype=torch.int32), table[0], table[0]),
            0.1,
        ),
        "merge": lambda: merge_state(*state, *state),
        "merge states": lambda: merge_states(*four),
        "norm": lambda: steps.rms_norm(table, table[0, 0, 0, 0], 1e-5),
        "gate": lambda: steps.gated_silu(out, out),
        "rotate": lambda: steps.rotate(key, *turns),
        "key-value vectors": lambda: key_value_vectors(
            key, key, *turns, torch.empty(KV_HEADS, 2), bits % 2 + 1, bits > 12, HALF
        ),
    }  # fmt: skip
    for name, run in calls.items():
        options = {"op": name, "d": d, "dtype": dtype, "bits": bits}
        yield Call(f"{name} d={d} {short(dtype)} bits={bits}", d, run, options)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def few() -> list[Call]:
    """One of each kind, beside the decisive ones."""
    pick = ("augment", "count packed", "expand", "merge", "unpack")
    return [
        attention(64, HALF),
        attention(64, BF16, rope=True, groups=4, stages=2),
        attention(128, BF16, m=1, rope=True, bits=10),
        attention(128, BF16, counted=True),
        attention(128, BF16, near=1024, rope=True, causal=True),
        attention(128, FLOAT, rope=True),
        attention(80, HALF, code_mask=True),
        dense(128, BF16, causal=True),
        dense(128, BF16, mask=BF16, window=(256, 0), softcap=30.0, sinks=True),
        gradient(128, BF16, causal=True),
        search(768, 1, BF16, bits=10),
        linear(24, 32, BF16, "rms", True),
        *(call for call in helpers(BF16, 10) if call.name.startswith(pick)),
    ]


# Llama-3-8B's attention, and ViT-Base's and GPT-2's.
_FULL: dict[str, Any] = {"heads": 32, "kv_heads": 8}
_SMALL: dict[str, Any] = {"heads": 12, "kv_heads": 12}


def decisive() -> list[Call]:
    """What the goals for a GPU are measured on (bench/kernels/cases.py), in its shapes."""
    decode: dict[str, Any] = {**_FULL, "m": 1, "tokens": 131_072}
    calls = [
        attention(128, BF16, m=1024, counted=True, **_FULL, name="codeword d=128"),
        attention(64, BF16, m=1024, counted=True, **_SMALL, name="codeword d=64"),
        attention(128, BF16, m=1, counted=True, **_FULL, name="codeword decode"),
        attention(128, BF16, m=256, rope=True, **_FULL, name="rotary d=128"),
        attention(
            128, BF16, m=256, rope=True, angles_dtype=FLOAT, **_FULL, name="rotary, angles in fp32"
        ),
        attention(64, BF16, m=256, rope=True, **_SMALL, name="rotary d=64"),
        attention(128, BF16, m=256, rope=True, bits=10, **_FULL, name="rotary packed"),
        attention(128, BF16, m=256, groups=4, **_FULL, name="sub-vectors"),
        attention(128, BF16, rope=True, **decode, name="decode rotary"),
        attention(128, BF16, rope=True, bits=10, **decode, name="decode rotary packed"),
        attention(128, BF16, **decode, name="decode plain"),
        attention(128, BF16, groups=4, **decode, name="decode sub-vectors"),
        attention(
            128, BF16, m=1024, near=1024, rope=True, causal=True, tokens=3072, **_FULL,
            name="mixed causal",
        ),
        search(768, 1, BF16, name="encode D=768"),
        search(24, 32, BF16, name="encode D=768 in 32 groups"),
        search(768, 1, FLOAT, name="encode D=768 fp32"),
        linear(768, 1, BF16, "rms", False, 8192, name="lookup_linear"),
        linear(24, 32, BF16, "rms", False, 8192, name="lookup_linear, 32 groups"),
    ]  # fmt: skip
    return [replace(call, decisive=True) for call in calls]


def spilled_before() -> list[Call]:
    """What spilled by a version of Triton until it got other tiles."""
    return [
        attention(128, BF16, counted=True),
        dense(128, BF16, window=(512, 0)),
        attention(128, BF16, near=1024, causal=True, rope=True),
        attention(128, BF16, near=1024, counted=True),
        attention(80, HALF, code_mask=True),
        attention(128, BF16, m=8, rope=True, code_mask=True),
        attention(32, HALF, m=8),
        attention(128, BF16, mask=True, rope=True),
        attention(128, BF16, mask=True, groups=4, width=64),
        gradient(128, FLOAT),
        gradient(64, BF16, mask=BF16, window=(256, 0)),
        *(gradient(d, FLOAT, mask=FLOAT, window=(256, 0)) for d in (64, 128)),
        attention(64, BF16, rope=True, bits=12),
        *(
            call
            for dtype in (BF16, FLOAT)
            for call in helpers(dtype, 4, 72)
            if call.name.startswith("merge states")
        ),
    ]


def all_calls() -> Iterator[Call]:
    yield from few()
    yield from decisive()
    dims, dtypes = (16, 32, 64, 72, 80, 96, 128, 192, 256), (HALF, BF16, FLOAT)
    for d, dtype, m, rope in itertools.product(dims, dtypes, (1, 8, 512), (False, True)):
        yield attention(d, dtype, m=m, rope=rope)
    for d, dtype, m in itertools.product((64, 128), (BF16, FLOAT), (1, 8, 512)):
        yield attention(d, dtype, m=m, counted=True)
        yield dense(d, dtype, m=m)
        yield dense(d, dtype, m=m, causal=True)
        yield attention(d, dtype, m=m, code_mask=True, rope=True)
        yield attention(d, dtype, m=m, rope=True, groups=4)
        yield attention(d, dtype, m=m, rope=True, stages=2, groups=4, bits=10)
        yield attention(d, dtype, m=m, stages=3)
        yield attention(d, dtype, m=m, near=1024, causal=True)
        yield attention(d, dtype, m=m, near=1024, causal=True, rope=True)
        yield attention(d, dtype, m=m, near=1024, counted=True)
        yield gradient(d, dtype)
        yield gradient(d, dtype, causal=True, softcap=50.0)
        yield gradient(d, dtype, mask=dtype, window=(256, 0))
        yield dense(d, dtype, m=m, mask=dtype)
        yield dense(d, dtype, m=m, mask=torch.bool, causal=True)
        yield dense(d, dtype, m=m, window=(512, 0))
        yield dense(d, dtype, m=m, causal=True, softcap=50.0, sinks=True)
        yield attention(d, dtype, m=m, mask=True, rope=True)
        yield attention(d, dtype, m=m, mask=True, groups=4, width=64)
    for d, bits in itertools.product((64, 128), (1, 4, 8, 10, 12, 16)):
        yield attention(d, BF16, rope=True, bits=bits)
        yield attention(d, BF16, m=1, rope=True, bits=bits)
    for d in (64, 128):
        yield attention(d, BF16, m=128, rope=True, splits=4)
        yield attention(d, BF16, m=512, splits=2)
    for (width, groups), dtype in itertools.product(
        ((768, 1), (4096, 1), (128, 32), (24, 32), (64, 8), (16, 3)), dtypes
    ):
        yield search(width, groups, dtype)
        yield search(width, groups, dtype, bits=10)
    norms = (None, "rms", "layer")
    shapes = ((768, 1), (24, 32), (64, 9), (16, 24))
    for (width, groups), dtype, norm, estimate in itertools.product(
        shapes, dtypes, norms, (False, True)
    ):
        yield linear(width, groups, dtype, norm, estimate)
    for dtype, bits, d in itertools.product(dtypes, (1, 4, 10, 16), (64, 72, 128)):
        yield from helpers(dtype, bits, d)
