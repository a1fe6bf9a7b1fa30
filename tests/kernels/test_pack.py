"""Bit packing against numpy.packbits, faiss and the torch reference, at every instruction set."""

import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from astra_kernels import _C
from astra_kernels.pack import native, pack, packed_size, reference, unpack

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # SWIG's, on newer Pythons
    import faiss

Codes = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]

WIDTHS = range(1, 17)
LARGE = (4097, 8191, 12289, 65536, 262_147)
CANARY = 0xA5
IMPOSSIBLE = -0x5A5A5A5B  # no code is negative
GUARD = 64


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    widest = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(widest)


def random_codes(bits: int, *shape: int) -> Codes:
    return np.random.default_rng(bits).integers(0, 1 << bits, shape, np.int32)


def packbits(codes: Codes, bits: int) -> Bytes:
    """The layout in numpy's words."""
    stream = (codes.reshape(-1, 1) >> np.arange(bits, dtype=np.int32)) & 1
    return np.packbits(stream.astype(np.uint8).reshape(-1), bitorder="little")


def prefix(stream: Bytes, bits: int, count: int) -> Bytes:
    """The bytes of the first `count` codes of a longer stream: cut, its rest cleared."""
    used = count * bits
    head = stream[: (used + 7) // 8].copy()
    if used % 8:
        head[-1] &= (1 << used % 8) - 1
    return head


def check_between_canaries(codes: Codes, bits: int, expected: Bytes) -> None:
    size, count = expected.size, codes.size
    buffer = np.full(GUARD + size + GUARD, CANARY, np.uint8)
    pack(codes, bits, out=buffer[GUARD : GUARD + size])
    assert np.array_equal(buffer[GUARD : GUARD + size], expected), (bits, count)
    assert (buffer[:GUARD] == CANARY).all(), (bits, count)
    assert (buffer[GUARD + size :] == CANARY).all(), (bits, count)

    back = np.full(GUARD + count + GUARD, IMPOSSIBLE, np.int32)
    unpack(expected, bits, count, out=back[GUARD : GUARD + count])
    assert np.array_equal(back[GUARD : GUARD + count], codes), (bits, count)
    assert (back[:GUARD] == IMPOSSIBLE).all(), (bits, count)
    assert (back[GUARD + count :] == IMPOSSIBLE).all(), (bits, count)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_length_is_numpy_packbits(isa: str, bits: int) -> None:
    codes = random_codes(bits, 1536)  # several rounds of the widest loop, and every rest
    stream = packbits(codes, bits)
    for count in range(1537):
        check_between_canaries(codes[:count], bits, prefix(stream, bits, count))


@pytest.mark.parametrize("bits", WIDTHS)
def test_ragged_large_is_numpy_packbits(isa: str, bits: int) -> None:
    codes = random_codes(bits, max(LARGE))
    stream = packbits(codes, bits)
    for count in LARGE:
        check_between_canaries(codes[:count], bits, prefix(stream, bits, count))


@pytest.mark.parametrize("bits", WIDTHS)
def test_extreme_codes(isa: str, bits: int) -> None:
    for value in (0, (1 << bits) - 1, 1 << (bits - 1)):
        codes = np.full(1000, value, np.int32)
        check_between_canaries(codes, bits, packbits(codes, bits))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [1, 30, 777, 4096, 15360])
def test_faiss_reads_our_bytes_and_we_read_its(isa: str, bits: int, count: int) -> None:
    codes = random_codes(bits, 1, count)
    theirs = faiss.pack_bitstrings(codes, bits)
    assert np.array_equal(pack(codes, bits), theirs[0])
    assert np.array_equal(faiss.unpack_bitstrings(pack(codes, bits)[None], count, bits), codes)
    assert np.array_equal(unpack(theirs[0], bits, count), codes[0])


@pytest.mark.parametrize("bits", WIDTHS)
def test_faiss_rows_are_our_streams_row_by_row(bits: int) -> None:
    tokens, codes_per_token = 37, 5  # 5 codes end inside a byte at most widths
    codes = random_codes(bits, tokens, codes_per_token)
    theirs = faiss.pack_bitstrings(codes, bits)
    assert theirs.shape == (tokens, packed_size(codes_per_token, bits))
    assert np.array_equal(np.stack([pack(row, bits) for row in codes]), theirs)
    ours = np.stack([unpack(row, bits, codes_per_token) for row in theirs])
    assert np.array_equal(ours, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_reference_agrees(bits: int) -> None:
    for count in (0, 1, 7, 8, 9, 1000):
        codes = torch.from_numpy(random_codes(bits, count))
        packed = pack(codes, bits)
        assert torch.equal(reference.pack(codes, bits), packed)
        assert torch.equal(reference.unpack(packed, bits, count), codes)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), bits=st.integers(1, 16))
def test_round_trip(data: st.DataObject, bits: int) -> None:
    codes = data.draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=300))
    packed = pack(torch.tensor(codes, dtype=torch.int32), bits)
    assert packed.numel() == packed_size(len(codes), bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes
    value = int.from_bytes(packed.numpy().tobytes(), "little")
    assert value == sum(code << (i * bits) for i, code in enumerate(codes))


@settings(deadline=None, max_examples=100)
@given(data=st.binary(max_size=200), bits=st.integers(1, 16))
def test_any_bytes_are_a_stream(data: bytes, bits: int) -> None:
    count = len(data) * 8 // bits
    codes = unpack(data, bits, count)
    assert codes.numel() == 0 or (int(codes.min()) >= 0 and int(codes.max()) < 1 << bits)
    assert torch.equal(unpack(pack(codes, bits), bits, count), codes)


def test_kinds_in_and_out() -> None:
    array = random_codes(10, 3, 8)
    tensor = torch.from_numpy(array)
    packed = pack(array, 10)
    assert isinstance(packed, np.ndarray)
    assert packed.dtype == np.uint8
    assert packed.shape == (30,)
    as_tensor = pack(tensor, 10)
    assert isinstance(as_tensor, torch.Tensor)
    assert as_tensor.dtype == torch.uint8
    assert np.array_equal(as_tensor.numpy(), packed)
    assert isinstance(unpack(packed, 10, 24), np.ndarray)
    raw = packed.tobytes()
    for data in (as_tensor, raw, bytearray(raw), memoryview(raw), memoryview(raw + b"zzz")[:30]):
        codes = unpack(data, 10, 24)
        assert isinstance(codes, torch.Tensor)
        assert codes.dtype == torch.int32
        assert torch.equal(codes, tensor.reshape(-1))


def test_non_contiguous_inputs_are_read_in_row_major_order() -> None:
    array = random_codes(9, 6, 10)
    expected = packbits(np.ascontiguousarray(array.T), 9)
    assert np.array_equal(pack(array.T, 9), expected)
    assert np.array_equal(pack(torch.from_numpy(array).T, 9).numpy(), expected)
    doubled = np.repeat(expected, 2)[::2]
    assert np.array_equal(unpack(doubled, 9, 60), array.T.reshape(-1))
    assert np.array_equal(
        unpack(torch.from_numpy(np.repeat(expected, 2))[::2], 9, 60), array.T.reshape(-1)
    )


def test_out_is_written_in_place_and_returned() -> None:
    array = random_codes(12, 100)
    expected = packbits(array, 12)
    frame = bytearray([CANARY] * 200)
    targets: list[Any] = [
        torch.full((150,), CANARY, dtype=torch.uint8),
        np.full(150, CANARY, np.uint8),
        frame,
        memoryview(bytearray(160))[10:],
    ]
    for codes in (array, torch.from_numpy(array)):
        for out in targets:
            assert pack(codes, 12, out=out) is out
            assert bytes(out[:150]) == expected.tobytes()
    assert frame[150:] == bytes([CANARY] * 50), "a longer buffer's rest is left alone"

    for data in (expected, torch.from_numpy(expected), expected.tobytes()):
        for out in (torch.full((100,), -1, dtype=torch.int32), np.full(103, -1, np.int32)):
            assert unpack(data, 12, 100, out=out) is out
            assert np.array_equal(np.asarray(out)[:100], array)
            assert (np.asarray(out)[100:] == -1).all()


def test_native_functions_are_the_bodies_of_the_ops() -> None:
    codes = torch.from_numpy(random_codes(7, 50))
    assert torch.equal(native.unpack_tensor(native.pack_tensor(codes, 7), 7, 50), codes)


def test_compiles_to_one_graph() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def there_and_back(codes: torch.Tensor) -> torch.Tensor:
        return unpack(pack(codes, 10), 10, codes.numel())

    codes = torch.from_numpy(random_codes(10, 100))
    assert torch.equal(there_and_back(codes), codes)


def twice(bits: int) -> Any:
    return lambda codes: unpack(pack(codes, bits), bits, codes.shape[-1])


def test_a_trace_is_of_the_codes_that_it_is_given() -> None:
    first, second = (torch.randint(0, 32, (9,), dtype=torch.int32) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and vmap of any op of ours warns
        traced = torch.jit.trace(twice(5), (first,), check_trace=False)
        rows = torch.vmap(twice(5))(torch.stack([first, second]))
    assert torch.equal(traced(second), second)
    assert torch.equal(make_fx(twice(5))(first)(second), second)
    assert torch.equal(rows, torch.stack([first, second]))
    assert torch.equal(torch.func.functionalize(twice(5))(second), second)


def test_fake_tensors_have_fake_codes() -> None:
    codes, data = torch.arange(20, dtype=torch.int32), np.zeros(13, np.uint8)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(codes)
        assert pack(fake, 5).shape == (13,)
        assert unpack(pack(fake, 5), 5, 20).dtype == torch.int32
        out = torch.empty(15, dtype=torch.uint8)
        assert pack(fake, 5, out=out) is out
    with pytest.raises(TypeError, match="out must be a torch.Tensor, as what goes in has memory"):
        unpack(data, 5, 20, out=fake)
    with pytest.raises(TypeError, match="out must be a tensor"):
        pack(fake, 5, out=bytearray(13))


def test_packed_size() -> None:
    for bits in WIDTHS:
        assert [packed_size(n, bits) for n in range(20)] == [-(-n * bits // 8) for n in range(20)]
    assert packed_size(np.int64(8), np.int64(3)) == 3


EIGHT = torch.arange(8, dtype=torch.int32)
TEN_BYTES = torch.zeros(10, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack(EIGHT, 0), ValueError, "bits must be within 1..16, got 0"),
        (lambda: pack(EIGHT, 17), ValueError, "bits must be within 1..16, got 17"),
        (lambda: pack(EIGHT, 1.5), TypeError, "bits must be an integer, got float"),
        (lambda: pack(EIGHT, True), TypeError, "bits must be an integer, got bool"),
        (lambda: unpack(TEN_BYTES, 10, -1), ValueError, "count must be 0 or more, got -1"),
        (lambda: unpack(TEN_BYTES, 10, 8.0), TypeError, "count must be an integer, got float"),
        (lambda: packed_size(-1, 8), ValueError, "count must be 0 or more, got -1"),
        (lambda: packed_size(1, -8), ValueError, "bits must be within 1..16, got -8"),
        (lambda: pack(EIGHT.long(), 10), TypeError, "codes must be int32, got int64"),
        (lambda: pack(EIGHT.float(), 10), TypeError, "codes must be int32, got float32"),
        (lambda: pack(EIGHT.numpy().astype(">i4"), 10), TypeError, "codes must be int32, got >i4"),
        (
            lambda: pack([1, 2], 10),
            TypeError,
            "codes must be a torch tensor or numpy array of int32, got list",
        ),
        (lambda: unpack(EIGHT, 10, 1), TypeError, "data must be uint8, got int32"),
        (
            lambda: unpack("text", 10, 1),
            TypeError,
            "data must be a torch tensor, numpy array or buffer of uint8, got str",
        ),
        (
            lambda: unpack(TEN_BYTES, 10, 9),
            ValueError,
            "data must hold at least 12 bytes for 9 codes of 10 bits, got 10",
        ),
        (
            lambda: unpack(b"12345", 10, 8),
            ValueError,
            "data must hold at least 10 bytes for 8 codes of 10 bits, got 5",
        ),
        (
            lambda: pack(torch.ones(3, dtype=torch.int32).to_sparse(), 3),
            TypeError,
            "codes must be a dense tensor (layout torch.strided), got torch.sparse_coo",
        ),
        (
            lambda: unpack(b"", 16, 1 << 60),
            ValueError,
            f"data must hold at least {1 << 61} bytes for {1 << 60} codes of 16 bits, got 0",
        ),
        (
            lambda: unpack(memoryview(bytes(40))[::2], 10, 8),
            ValueError,
            "data must be a contiguous buffer of uint8, got a non-contiguous memoryview",
        ),
        (
            lambda: pack(EIGHT, 10, out=bytearray(9)),
            ValueError,
            "out must hold at least 10 bytes for 8 codes of 10 bits, got 9",
        ),
        (
            lambda: pack(EIGHT, 10, out=TEN_BYTES[:9]),
            ValueError,
            "out must hold at least 10 bytes for 8 codes of 10 bits, got 9",
        ),
        (
            lambda: pack(EIGHT, 10, out=bytes(10)),
            ValueError,
            "out must be a writable contiguous buffer of uint8, got a read-only bytes",
        ),
        (lambda: pack(EIGHT, 10, out=EIGHT), TypeError, "out must be uint8, got int32"),
        (
            lambda: pack(EIGHT, 3, out=TEN_BYTES[::2]),
            ValueError,
            "out must be contiguous, got strides (2,)",
        ),
        (
            lambda: pack(EIGHT, 10, out=[0] * 10),
            TypeError,
            "out must be a writable contiguous buffer of uint8, got list",
        ),
        (
            lambda: pack(EIGHT, 10, out=(0, 10)),
            TypeError,
            "out must be a tensor, array or writable buffer of uint8, got tuple",
        ),
        (
            lambda: unpack(TEN_BYTES, 10, 8, out=np.zeros(8, np.int64)),
            TypeError,
            "out must be a writable contiguous buffer of int32, got elements of format 'l'",
        ),
        (
            lambda: unpack(TEN_BYTES, 10, 8, out=np.zeros(7, np.int32)),
            ValueError,
            "out must hold at least 8 codes, got 7",
        ),
        (
            lambda: pack(torch.tensor([0, 5, 1024], dtype=torch.int32), 10),
            ValueError,
            "codes[2] is 1024, which does not fit 10 bits (0..1023)",
        ),
        (
            lambda: pack(np.array([[0, -3], [-4, 0]], np.int32), 16),
            ValueError,
            "codes[1] is -3, which does not fit 16 bits (0..65535)",
        ),
        (
            lambda: _C.set_isa("quantum"),
            ValueError,
            f"isa must be one of those that run here ({', '.join(_C.available_isas())}), "
            "got 'quantum'",
        ),
    ],
)
def test_errors_name_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_bad_code_is_named_wherever_it_is(isa: str, bits: int) -> None:
    clean = np.full(1000, (1 << bits) - 1, np.int32)
    for index in (0, 7, 8, 31, 500, 991, 999):
        for bad in (1 << bits, -1, -(2**31), 2**31 - 1):
            codes = clean.copy()
            codes[index] = bad
            with pytest.raises(ValueError, match=rf"^codes\[{index}\] is {bad}, which does not"):
                pack(codes, bits)


def test_the_gil_is_released_during_large_calls() -> None:
    codes = np.zeros(4_000_000, np.int32)
    packed = np.empty(packed_size(codes.size, 10), np.uint8)
    ticks = 0
    started, stop = threading.Event(), threading.Event()

    def tick() -> None:
        nonlocal ticks
        started.set()
        while not stop.is_set():
            ticks += 1
            time.sleep(0)

    def advanced_during(call: Any) -> bool:
        before, deadline = ticks, time.monotonic() + 30
        while ticks == before and time.monotonic() < deadline:
            call()
        return ticks > before

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=tick)
    thread.start()
    try:
        started.wait()
        sys.setswitchinterval(1000)  # from here on the GIL moves only when it is given away
        assert advanced_during(lambda: pack(codes, 10, out=packed))
        assert advanced_during(lambda: unpack(packed, 10, codes.size, out=codes))
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()


def test_the_native_module_needs_no_torch() -> None:
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {_C.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "out = bytearray(1)\n"
        "module.pack(memoryview(bytes(4)).cast('i'), 8, out)\n"
        "assert not {'torch', 'numpy'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", [1, 7, 10, 16])
def test_cuda_tensors_give_the_same_bytes(bits: int) -> None:
    codes = torch.from_numpy(random_codes(bits, 1001))
    packed = pack(codes.cuda(), bits)
    assert packed.is_cuda
    assert torch.equal(packed.cpu(), pack(codes, bits))
    out = torch.empty(1001, dtype=torch.int32, device="cuda")
    assert unpack(packed, bits, 1001, out=out) is out
    assert torch.equal(out.cpu(), codes)
    with pytest.raises(ValueError, match="out must be on cuda"):
        pack(codes.cuda(), bits, out=torch.empty(4000, dtype=torch.uint8))


def test_default_device_is_not_where_the_core_writes() -> None:
    codes = torch.arange(20, dtype=torch.int32)
    with torch.device("meta"):
        data = pack(codes, 5)
        assert torch.equal(unpack(data, 5, 20), codes)
        assert torch.equal(unpack(data.numpy().tobytes(), 5, 20), codes)
