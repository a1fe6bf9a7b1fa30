"""What a GPU codes of keys and values beside the formulas that a CPU goes by."""

from __future__ import annotations

import math

import pytest
import torch

from astra_kernels import _elementwise as elementwise
from astra_kernels._elementwise import vectors as kernel
from astra_runtime import Codebook
from astra_runtime.codes import packed
from astra_runtime.codes.base import geometry
from astra_runtime.codes.layouts import split_groups
from astra_runtime.codes.rotary import rotate, unrotate
from astra_runtime.models import adapt
from tests.runtime.models import tiny


def angles(batch, tokens, width, dtype=torch.float32, scale=1.0):
    angle = torch.randn(batch, tokens, width // 2).repeat(1, 1, 2)
    return (scale * angle.cos()).to(dtype), (scale * angle.sin()).to(dtype)


def wanted(key, value, rope, scales, parts, shared):
    groups = parts if shared else parts * key.shape[1]
    return split_groups(unrotate(key.float(), rope), value.float(), scales, groups, shared)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("rows", "rotary"), [(2, True), (1, True), (None, False)])
def test_vectors(dtype, shared, parts, rows, rotary):
    key = torch.randn(2, 37, 3, 24).transpose(1, 2).to(dtype)  # as models store them
    value = torch.randn(2, 3, 40, 24).to(dtype)[:, :, 2:39]
    scales = torch.rand(3, 2) + 0.5
    rope = angles(rows, 37, 24, dtype, scale=1.2) if rotary else None  # YaRN's angles have a length
    cos, sin = rope or (None, None)
    got, finite = kernel.key_value_vectors(
        key, value, cos, sin, scales, parts, shared, torch.float32
    )
    assert got.is_contiguous()
    assert bool(finite.all())
    torch.testing.assert_close(got, wanted(key, value, rope, scales, parts, shared))


def test_the_rotation_is_undone():
    key, value = torch.randn(2, 1, 2, 5, 16).unbind()
    rope = angles(1, 5, 16)
    got, _ = kernel.key_value_vectors(
        rotate(key, rope), value, *rope, torch.ones(2, 2), 1, False, torch.float32
    )
    torch.testing.assert_close(got[..., :16], key.transpose(1, 2))


def test_rounding_and_reach():
    key, value = torch.randn(2, 1, 2, 5, 16).unbind()
    key[0, 1, 2, 3], value[0, 0, 4, 1] = 1e6, -1e6
    got, finite = kernel.key_value_vectors(
        key, value, None, None, torch.ones(2, 2), 1, False, torch.float16
    )
    largest = torch.finfo(torch.float16).max
    want = wanted(key, value, None, torch.ones(2, 2), 1, False).clamp(-largest, largest)
    assert got.dtype == torch.float16
    assert torch.equal(got, want.half())
    assert bool(finite.all())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["key", "value"])
def test_what_is_not_finite(wrong, place):
    pair = {"key": torch.randn(1, 2, 70, 16), "value": torch.randn(1, 2, 70, 16)}
    pair[place][0, 1, 66, 15] = wrong
    given = (pair["key"], pair["value"], *angles(1, 70, 16), torch.ones(2, 2))
    _, finite = kernel.key_value_vectors(*given, 1, False, torch.float16)
    assert not bool(finite.all())


def test_no_tokens():
    key, value = torch.randn(2, 1, 2, 0, 16).unbind()
    got, finite = kernel.key_value_vectors(
        key, value, None, None, torch.ones(2, 2), 2, False, torch.float32
    )
    assert got.shape == (1, 0, 4, 16)
    assert bool(finite.all())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_the_codec_sends_what_a_cpu_sends(monkeypatch, device, kind, shared):
    """Of fp32 the same codes; of a 16-bit model, whose device searches in fp16, nearly all."""
    if device != "cpu":
        pytest.skip("a codec's bytes go through the host's memory")
    model = tiny("llama").to(kind)
    adapter = adapt(model)
    sizes = geometry(adapter)
    heads, width = sizes["num_key_value_heads"], sizes["head_dim"]
    groups, channels = (1, 2 * width * heads) if shared else (heads, 2 * width)
    book = Codebook(
        "kv", groups=groups, codewords=32, shared=shared, geometry=sizes, model=adapter.digest(),
        tables=torch.randn(sizes["num_blocks"], groups, 32, channels),
        scales=torch.rand(sizes["num_blocks"], heads, 2) + 0.5,
    )  # fmt: skip
    key, value = torch.randn(2, 1, heads, 40, width).to(kind).unbind()
    rope = angles(1, 40, width, kind)

    def sent():
        codec = book.make_codec(adapter)
        out = bytearray(codec.payload_bytes(1, 1, 40))
        with torch.inference_mode():
            pending = codec.encode(1, (key, value), rope, memoryview(out))
        if pending is not None:
            pending()
        return codec, packed.unpack_rows(memoryview(out), (1, 40, groups), 5, 32)

    codec, want = sent()
    assert codec.finite is None
    monkeypatch.setattr(packed, "stays_packed", lambda device: True)
    monkeypatch.setattr(elementwise, "runs_triton", lambda device: True)
    codec, got = sent()
    assert bool(codec.finite.all())
    assert codec.vector_dtype == (torch.float32 if kind == torch.float32 else torch.float16)
    assert (got != want).double().mean() <= (0.0 if kind == torch.float32 else 0.05)
