"""The way that codes take on a GPU, on the CPU: packed and unpacked by the ops, sent late.

A GPU's rank sends the same bytes as a CPU's, whatever it does in between.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from astra_runtime import Codebook, Engine, outgoing, wire
from astra_runtime.codes import dense
from astra_runtime.codes import packed as packed_codec
from astra_runtime.codes.staging import ReceivedCodes, Staging, packed_right, read_later
from astra_runtime.core import _C
from astra_runtime.errors import NotFinite, PeerLost, WireError
from astra_runtime.evaluate import run_ranks
from astra_runtime.models import adapt
from astra_runtime.trace import Trace, tracing
from astra_runtime.transport import Mesh

from ..models import KINDS, fitted, inputs_for, tiny
from ..ranks import as_ranks, gloo_mesh

CASES = {
    "kv": ("llama", {"space": "kv", "groups": 3}),
    "kv-shared": ("gpt2", {"space": "kv", "groups": 1, "shared": True}),
    "hidden-1": ("llama", {"space": "hidden", "groups": 1}),
    "hidden-4": ("vit", {"space": "hidden", "groups": 4}),
    "hidden-4-rms": ("qwen2", {"space": "hidden", "groups": 4}),
    "hidden-4-no-norm": ("bert", {"space": "hidden", "groups": 4}),
    "hidden-4-conv": ("gpt2", {"space": "hidden", "groups": 4}),
    "differential": ("gpt2", {"space": "differential", "groups": 4}),
    "differential-rms": ("llama", {"space": "differential", "groups": 4}),
    "transform": ("llama", {"space": "transform", "bits": 40}),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    def switch() -> None:
        for codec in (packed_codec, dense):
            monkeypatch.setattr(codec, "stays_packed", lambda device: True)

    return switch


@pytest.fixture
def without_the_host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whatever brings codes to the host, or waits for the device before the end, is an error."""

    def refuse(*args: Any) -> Any:
        raise AssertionError("codes came to the host")

    def switch() -> None:
        monkeypatch.setattr(Staging, "download", refuse)
        monkeypatch.setattr(Staging, "upload", refuse)
        monkeypatch.setattr(outgoing, "read_later", refuse)

    return switch


class Sent:
    """A mesh's `send`, and a copy of what went through it, by block."""

    def __init__(self, mesh: Mesh) -> None:
        self.frames: dict[int, bytes] = {}
        plain = mesh.send

        def send(payload: Any, *, block: int, **how: Any) -> None:
            content = getattr(payload, "payload", payload)
            on_device = isinstance(content, torch.Tensor)
            self.frames[block] = content.numpy().tobytes() if on_device else bytes(content)
            plain(payload, block=block, **how)

        mesh.send = send  # type: ignore[method-assign]


def run(
    model: Any, book: Any, inputs: dict[str, Any], world_size: int = 3, on_device: bool = False
) -> list[Any]:
    """By rank: logits and what it sent, through TCP or from one device's memory to another's."""

    def work(mesh: Mesh) -> tuple[torch.Tensor, dict[int, bytes]]:
        sent = Sent(mesh)
        with Engine(model, book, mesh) as engine:
            sent.frames.clear()
            output = engine(**inputs, logits="all")
            name = "logits" if "logits" in output else "last_hidden_state"  # BERT's, without a head
            return output[name], sent.frames

    if on_device:
        return as_ranks(gloo_mesh(world_size, timeout=60, on_device=True), work)
    return run_ranks(world_size, work, timeout=60)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "qwen3"])
def test_a_projection_as_one_product(kind: str) -> None:
    import astra_kernels as ak

    model = tiny(kind)
    adapter = adapt(model)
    for tensor in model.parameters():  # gains and shifts as well
        tensor.data += 0.1 * torch.randn_like(tensor)
    table, codes = torch.randn(2, 7, 24), torch.randint(0, 7, (1, 5, 2), dtype=torch.int32)
    for block in range(3):
        projection = adapter.projection(block)
        assert projection is not None
        y = ak.lookup_linear(
            *(codes, table, projection.weight, projection.bias),
            norm=projection.norm,
            eps=projection.eps,
        )
        key, value = adapter.project(block, ak.decode(codes, table).flatten(2))
        both = torch.cat([key, value], 1).transpose(1, 2).flatten(2)
        torch.testing.assert_close(y, both, rtol=1e-4, atol=1e-4)


def test_a_projection_that_does_more_is_left_to_the_model() -> None:
    model = tiny("llama")
    layers = model.model.layers
    layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, output: output * 2)
    layers[1].input_layernorm = torch.nn.Identity()
    layers[2].self_attn.v_proj = torch.nn.Sequential(layers[2].self_attn.v_proj)
    adapter = adapt(model)
    assert [adapter.projection(block) for block in range(3)] == [None] * 3


@pytest.mark.parametrize(("name", "batch"), [*((name, 2) for name in CASES), ("kv", 1)])
def test_a_gpu_sends_what_a_cpu_sends(name: str, batch: int, as_on_a_gpu: Any) -> None:
    kind, options = CASES[name]
    model = tiny(kind)
    if options["space"] == "transform":
        pytest.importorskip("scipy", reason="fitting transform codes")
    book = fitted(kind, model, **options)
    inputs = inputs_for(kind, 26, batch)
    plain = run(model, book, inputs)
    as_on_a_gpu()
    packed = run(model, book, inputs)
    for (logits, frames), (want, wanted) in zip(packed, plain, strict=True):
        assert frames.keys() == wanted.keys()
        blocks = [block for block in wanted if block < 3]
        assert all(frames[block] == wanted[block] for block in blocks)
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"space": "kv", "groups": 3}),
        ("vit", {"space": "hidden", "groups": 4}),
        ("gpt2", {"space": "differential", "groups": 4}),
        ("llama", {"space": "transform", "bits": 40, "fine_bits": 30, "fine_tokens": 3}),
        ("llama", {"space": "none", "dtype": "int8"}),
    ],
    ids=lambda value: value["space"] if isinstance(value, dict) else value,
)
def test_codes_stay_on_their_devices(
    kind: str, options: dict[str, Any], as_on_a_gpu: Any, without_the_host: Any
) -> None:
    """gloo stands for NCCL and the CPU for a device: the same bytes, and no copy to the host."""
    model, inputs = tiny(kind), inputs_for(kind, 26, 2)
    if options["space"] == "none":
        book = Codebook.dense(options["dtype"])
    else:
        book = fitted(kind, model, **options)
    plain = run(model, book, inputs)
    as_on_a_gpu()
    without_the_host()
    direct = run(model, book, inputs, on_device=True)
    for (logits, frames), (want, wanted) in zip(direct, plain, strict=True):
        assert frames.keys() == wanted.keys()
        assert any(wanted)
        for block in [block for block in wanted if block < 3]:
            assert frames[block] == wanted[block]
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)


def test_local_attention_is_queued_before_the_host_waits(as_on_a_gpu: Any) -> None:
    model, inputs = tiny("llama"), inputs_for("llama")
    book = fitted("llama", model, space="kv", groups=3)

    def order(mesh: Mesh) -> list[str]:
        trace = Trace()
        with Engine(model, book, mesh) as engine, tracing(trace):
            engine(**inputs)
        return [name for name, block, *_ in trace.spans if block == 1]

    assert run_ranks(2, order)[0] == ["pack", "encode", "send", "attend"]
    as_on_a_gpu()
    assert run_ranks(2, order)[0] == ["pack", "encode", "attend", "send"]


@pytest.mark.parametrize(
    ("space", "on_device"), [("kv", False), ("hidden", False), ("kv", True), ("hidden", True)]
)
def test_what_is_not_finite_is_no_answer(space: str, on_device: bool, as_on_a_gpu: Any) -> None:
    as_on_a_gpu()
    model, inputs = tiny("llama"), inputs_for("llama")
    book = fitted("llama", model, space=space, groups=3)
    weight = model.model.layers[0].mlp.down_proj.weight.data
    weight[0, 0] = torch.nan
    book = fitted_for(book, model)
    with pytest.raises((NotFinite, PeerLost), match="NaN or infinity in block 1"):
        run(model, book, inputs, 2, on_device)


def fitted_for(book: Any, model: Any) -> Any:
    """The codebook, as if it had been fitted for this model."""
    from dataclasses import replace

    from astra_runtime.models import adapt

    return replace(book, model=adapt(model).digest())


@pytest.mark.parametrize("counts", [(5,), (8, 3), (4, 4, 7), (3, 5)])
def test_sources_that_follow_each_other_stay_packed(counts: tuple[int, ...]) -> None:
    import astra_kernels as ak

    groups, bits, batch = 3, 5, 2
    codes = [torch.randint(0, 32, (batch, n, groups), dtype=torch.int32) for n in counts]
    rows = [
        [memoryview(bytearray(ak.pack(part[b].flatten(), bits).numpy())) for part in codes]
        for b in range(batch)
    ]
    data = Staging(torch.device("cpu")).upload(rows)
    packed = ReceivedCodes(data, counts, groups, bits)
    want = torch.cat(codes, 1)
    assert torch.equal(packed.unpacked(), want)
    assert packed.tokens == sum(counts)
    assert packed.joined == (counts in ((5,), (8, 3)))
    if packed.joined:
        whole = torch.stack([ak.pack(row.flatten(), bits) for row in want])
        assert torch.equal(data, whole)


def test_staging_copies_both_ways() -> None:
    staging = Staging(torch.device("cpu"))
    out = memoryview(bytearray(6))
    wait = staging.download(torch.arange(6, dtype=torch.uint8).view(2, 3), out)
    wait()
    assert bytes(out) == bytes(range(6))
    first = staging.upload([[memoryview(bytearray(b"ab"))], [memoryview(bytearray(b"cd"))]])
    second = staging.upload([[memoryview(bytearray(b"ef"))], [memoryview(bytearray(b"gh"))]])
    assert bytes(first.numpy()) == b"abcd"  # though the buffer was written again
    assert bytes(second.numpy()) == b"efgh"
    assert read_later(torch.tensor(True))()
    assert not read_later(torch.tensor(False))()


@pytest.mark.parametrize(("bits", "codewords"), [(5, 32), (5, 20), (8, 256), (10, 1000)])
def test_codes_that_stay_packed_are_checked_alike(bits: int, codewords: int) -> None:
    import astra_kernels as ak

    generator = torch.Generator().manual_seed(bits + codewords)
    for count in (0, 1, 7, 8):
        codes = torch.randint(0, codewords, (count,), generator=generator, dtype=torch.int32)
        good = bytes(ak.pack(codes, bits).numpy())
        wire.check_codes(good, bits, codewords, count)
        for data in (good + b"\0", good[:-1], *flipped(good)):
            error = refused(wire.check_codes, data, bits, codewords, count)
            assert error == refused(wire.read_codes, data, bits, codewords, count)
            if len(data) == len(good):
                rows = torch.tensor([list(data)], dtype=torch.uint8)
                assert bool(packed_right(rows, count, bits, codewords)) == (error is None)


def flipped(data: bytes) -> list[bytes]:
    """With each bit changed."""
    return [
        data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]
        for place in range(len(data))
        for bit in range(8)
    ]


def refused(check: Any, data: bytes, bits: int, codewords: int, count: int) -> str | None:
    try:
        if check is wire.read_codes:
            out = memoryview(bytearray(4 * max(count, 1))).cast("i")[:count]
            check(data, bits, codewords, out, count)
        else:
            check(data, bits, codewords, count)
    except WireError as error:
        return str(error)
    return None


def test_no_code_of_a_payload_is_out_of_range() -> None:
    """Attention would read outside of its table, or clamp."""
    assert _C.packed_size(3, 5) == 2
    with pytest.raises(WireError, match="below 20"):
        wire.check_codes(bytes([31, 0]), 5, 20, 3)


def test_angles_are_those_that_the_model_rotates_with() -> None:
    """In bf16 as in fp32: undone by them, a key is what it was before, to its own rounding."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from astra_runtime.codes.rotary import unrotate
    from astra_runtime.models import adapt

    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama").to(dtype)
        positions = torch.arange(200)[None]
        rope = adapt(model).rope(positions)
        assert rope is not None
        cos, sin = model.model.rotary_emb(torch.empty(0, dtype=dtype), positions)
        assert rope[0].dtype == dtype
        assert torch.equal(rope[0], cos)
        assert torch.equal(rope[1], sin)
        key = torch.randn(1, 3, 200, 16, dtype=dtype)
        rotated, _ = apply_rotary_pos_emb(key, key, cos, sin)
        again = unrotate(rotated.float(), rope)
        error = (again - key.float()).norm() / key.float().norm()
        assert error < 2 * torch.finfo(dtype).eps
