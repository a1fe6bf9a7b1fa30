"""Payloads: what a codec writes is what it reads, byte for byte as many as it said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import astra_kernels as ak
from astra_runtime import Codebook, WireError
from astra_runtime.codes.base import Payload
from astra_runtime.codes.registry import CODECS, codec_named
from astra_runtime.models import adapt

from ..models import tiny, windows_for


def pair(batch: int = 2, tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = torch.randn(2, batch, 3, tokens, 16, generator=torch.Generator().manual_seed(0))
    return key, value


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 2e-3), ("int8", 0.02)])
def test_dense_tensors_cross(dtype: str, error: float) -> None:
    model = tiny("llama")
    space = Codebook.dense(dtype).make_codec(adapt(model))
    shards = [pair(tokens=5), pair(tokens=3)]
    payloads = []
    for shard in shards:
        tokens = shard[0].shape[2]
        buffer = bytearray(b"\xa5" * space.payload_bytes(0, 2, tokens))
        space.encode(0, shard, None, memoryview(buffer))
        payloads.append(Payload(memoryview(buffer), tokens, tokens))
    kept = space.decode(0, payloads, 2, None)
    for got, want in zip((kept.key, kept.value), zip(*shards, strict=True), strict=True):
        whole = torch.cat(want, 2)
        worst = (got - whole).abs().amax(-1) / whole.abs().amax(-1)
        assert float(worst.max()) <= error


def test_int8_survives_zeros_and_extremes() -> None:
    model = tiny("llama")
    space = Codebook.dense("int8").make_codec(adapt(model))
    key, value = torch.zeros(1, 3, 2, 16), torch.full((1, 3, 2, 16), 3e4)
    buffer = bytearray(space.payload_bytes(0, 1, 2))
    space.encode(0, (key, value), None, memoryview(buffer))
    kept = space.decode(0, [Payload(memoryview(buffer), 2, 2)], 1, None)
    assert torch.equal(kept.key, key)
    torch.testing.assert_close(kept.value, value, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    "options",
    [{"groups": 3}, {"space": "hidden", "groups": 4}, {"space": "differential", "groups": 4}],
)
def test_codes_cross_with_rows_of_whole_bytes(options: dict[str, Any]) -> None:
    model = tiny("llama")
    book = Codebook.fit(model, windows_for("llama"), codewords=32, held_back=0, **options)
    space: Any = book.make_codec(adapt(model))
    groups = options["groups"]
    codes = torch.randint(0, 32, (2, 5, groups), dtype=torch.int32)
    vectors = ak.decode(codes, book.tables[1])  # type: ignore[index]
    size = space.payload_bytes(1, 2, 5)
    assert size == 2 * -(-5 * groups * 5 // 8)
    buffer = memoryview(bytearray(b"\xa5" * size))
    space.write(1, vectors, buffer)
    assert torch.equal(space.read(0, [Payload(buffer, 5, 5)], 2), codes)
    twice = space.read(0, [Payload(buffer, 5, 5), Payload(buffer, 5, 5)], 2)
    assert torch.equal(twice, torch.cat([codes, codes], 1))


def test_codes_that_no_codeword_has_are_refused() -> None:
    model = tiny("llama")
    book = Codebook.fit(model, windows_for("llama"), groups=3, codewords=21, held_back=0)
    space: Any = book.make_codec(adapt(model))
    forged = ak.pack(torch.tensor([0, 20, 21], dtype=torch.int32), 5).numpy().tobytes()
    with pytest.raises(WireError, match="wrong code: expected below 21, got 21"):
        space.read(0, [Payload(memoryview(bytearray(forged)), 1, 1)], 1)


@pytest.mark.parametrize("kind", ["llama", "vit"])
@pytest.mark.parametrize("key", CODECS)
def test_payloads_have_as_many_bits_as_the_class_says(key: str, kind: str) -> None:
    model = tiny(kind)
    adapter, codec = adapt(model), codec_named(key)
    if codec.needs_token_ids and not adapter.token_ids:
        pytest.skip("images have no token ids")
    book = Codebook(key)
    if codec.coded:
        size: dict[str, Any] = {"bits": 40} if codec.allots_bits else {"groups": 6}
        windows = windows_for(kind)
        book = Codebook.fit(model, windows, space=key, codewords=32, held_back=0, **size)
    made, tokens = book.make_codec(adapter), 64  # rows of whole bytes
    bits = [book.token_bits(adapter, block) for block in range(3)]
    assert [8 * made.payload_bytes(block, 2, tokens) for block in range(3)] == [
        2 * tokens * each for each in bits
    ]
    assert book.token_bits(adapter) == pytest.approx(sum(bits) / 3)
    assert codec.sends is any(bits)
    for block in range(3):
        layout = made.token_layout(block, 2, tokens) if bits[block] else []
        assert sum(place.bits for place in layout if place.row == 1) == bits[block]
