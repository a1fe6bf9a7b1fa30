"""Frames that came in part: which tokens are missing, and that nothing else is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from astra_runtime import Codebook, Engine, errors
from astra_runtime.codes.base import Payload, TokenBits, received_mask
from astra_runtime.missing import Missing
from astra_runtime.models import adapt
from astra_runtime.transport import Mesh, local_mesh

from .degraded import book_for
from .models import inputs_for, tiny
from .ranks import as_ranks


def test_tokens_with_a_bit_in_a_gap_are_missing() -> None:
    """20 tokens of 10 bits, 25 bytes a row: by hand, bit by bit."""
    strips = [TokenBits(0, 10, 0), TokenBits(25, 10, 1)]
    for start in range(50):
        for stop in range(start, 50):
            found = received_mask(strips, 2, 20, [(start, stop)])
            for row in range(2):
                bits = torch.zeros(400, dtype=torch.bool)
                bits[8 * start : 8 * stop] = True
                lost = bits[200 * row : 200 * (row + 1)].view(20, 10).any(1)
                assert torch.equal(found[row], ~lost), (start, stop, row)


@pytest.mark.parametrize("name", ["kv", "hidden-4", "dense", "int8"])
def test_a_token_depends_on_its_own_bits_only(name: str) -> None:
    """Zeros in the strips of other tokens change nothing of what is read of a token."""
    model, batch, tokens = tiny("llama"), 2, 7
    book = Codebook.none("int8") if name == "int8" else book_for("llama", name, model)
    space = book.make_codec(adapt(model))
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, batch, 3, tokens, 16, generator=generator)
    what = torch.randn(batch, tokens, 48, generator=generator) if space.early else (key, value)
    size = space.payload_bytes(1, batch, tokens)
    data = bytearray(size)
    space.encode(1, what, None, memoryview(data))

    def read(content: bytearray) -> Tensor:
        kept = space.decode(1, [Payload(memoryview(content), tokens, tokens)], batch, None)
        return (
            kept
            if isinstance(kept, Tensor)
            else torch.cat([kept.key, kept.value], 1).transpose(1, 2)
        )

    whole, strips = read(data), space.token_layout(1, batch, tokens)
    for start, stop in [(0, 1), (3, 9), (size // 2, size // 2 + 5), (size - 2, size)]:
        broken = bytearray(data)
        broken[start:stop] = bytes(stop - start)
        came = received_mask(strips, batch, tokens, [(start, stop)])
        assert not bool(came.all())
        assert bool(came.any())
        assert torch.equal(read(broken)[came], whole[came])


@Mesh.register
class Gappy:
    """A mesh like one of datagrams: some bytes of some frames did not come, and are garbage."""

    def __init__(self, mesh: Mesh, lost: Mapping[tuple[int, int], tuple[int, int]]) -> None:
        self.mesh, self.of = mesh, lost
        self.missing_ranges: dict[int, list[tuple[int, int]]] = {}
        self.lossy = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mesh, name)

    def receive(self, sizes: Any, *, block: int, **place: Any) -> Any:
        views = self.mesh.receive(sizes, block=block, **place)
        self.missing_ranges = {n: [self.of[n, block]] for n in views if (n, block) in self.of}
        for n, ((start, stop),) in self.missing_ranges.items():
            views[n][start:stop] = bytes([0xA5]) * (stop - start)
        return views


@pytest.mark.parametrize("name", ["kv", "hidden-1", "dense", "transform"])
def test_gaps_leave_out_tokens_and_no_more(name: str) -> None:
    """Rank 1 hears half of rank 0's tokens in block 1: as if the others' were masked, or, with
    codes that predict, as predicted."""
    model, inputs = tiny("llama"), inputs_for("llama", 24)
    book = book_for("llama", name, model)
    space = book.make_codec(adapt(model))
    weights = (1, 1)

    def work(mesh: Mesh) -> Any:
        plan = None
        with Engine(model, book, mesh, weights=weights, halo=0) as engine:
            plan = engine.plan(24)
        told = plan.num_sent(0)
        half = space.payload_bytes(1, 1, told) // 2
        gappy: Any = Gappy(mesh, {(0, 1): (half, half + 3)} if mesh.rank else {})
        masks = []
        options: dict[str, Any] = {"on_missing": "degrade", "deadline_ms": 60_000.0}
        with Engine(model, book, gappy, weights=weights, halo=0, **options) as engine:
            attend = engine.codec.attend if name != "transform" else None
            if attend is not None:

                def watched(
                    block: int, q: Any, kept: Any, rope: Any, mask: Any, scale: float
                ) -> Any:
                    masks.append((block, mask))
                    return attend(block, q, kept, rope, mask, scale)

                engine.codec.attend = watched  # type: ignore[method-assign]
            output = engine(**inputs)
        return output.logits, output.missing, masks, told, half

    (_, told_0, *_), (logits, missing, masks, told, half) = as_ranks(local_mesh(2), work)
    assert missing == told_0 == {0: [1]}
    assert bool(logits.isfinite().all())
    if masks:
        by_block = dict(masks)
        assert by_block[0] is None
        assert by_block[2] is None
        expected = received_mask(space.token_layout(1, 1, told), 1, told, [(half, half + 3)])
        assert torch.equal(by_block[1], expected)
        assert 0 < int(expected.sum()) < told


def test_a_lossy_mesh_wants_degraded_answers() -> None:
    (mesh,) = local_mesh(1)
    gappy: Any = Gappy(mesh, {})
    with pytest.raises(ValueError, match="on_missing: expected 'degrade' with this transport"):
        Engine(tiny("llama"), None, gappy)


def test_what_is_missing_crosses_the_wire() -> None:
    ours, theirs = Missing(11, 3), Missing(11, 3)
    ours.leave_out(1, [2, 9])
    trailer = memoryview(bytearray(ours.width))
    ours.write_recent(trailer)
    assert bytes(trailer) == bytes([0b100, 0b10])
    theirs.read_recent(2, trailer, 0)
    assert theirs.by_rank() == {2: [1], 9: [1]}
    ours.write_recent(trailer)
    assert bytes(trailer) == bytes(2)
    theirs.leave_out(theirs.answer, [4])
    whole = memoryview(bytearray(theirs.all_width))
    theirs.write_all(whole)
    ours.read_all(whole, 1)
    assert ours.by_rank() == {2: [1], 4: [3], 9: [1]}
    with pytest.raises(errors.WireError, match="missing rank: expected below 11, got 15"):
        ours.read_recent(1, memoryview(bytearray([0, 0x80])), 0)
