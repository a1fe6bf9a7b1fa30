"""Bit packing in Triton: the bytes of the reference and of the C++ core."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import astra_kernels as ak
from astra_kernels import _dispatch
from astra_kernels._triton.packed import as_words
from astra_kernels.pack import kernel, reference
from tests.triton_kernels.cases import examples

pytestmark = pytest.mark.usefixtures("poisoned")

WIDTHS = range(1, 17)
RAGGED = (0, 1, 2, 7, 8, 9, 1023, 1025, 2051)


def random_codes(bits, *shape):
    return torch.randint(0, 1 << bits, shape, dtype=torch.int32)


@pytest.mark.parametrize("bits", WIDTHS)
def test_there_and_back(bits):
    for count in RAGGED:
        codes = random_codes(bits, count)
        data = kernel.pack(codes, bits)
        assert torch.equal(data, reference.pack(codes, bits)), count
        assert torch.equal(data.cpu(), ak.pack(codes.cpu(), bits)), count
        assert torch.equal(kernel.unpack(data, bits, count), codes), count


@pytest.mark.parametrize("bits", WIDTHS)
def test_extreme_codes(bits):
    for value in (0, (1 << bits) - 1, 1 << (bits - 1)):
        codes = torch.full((77,), value, dtype=torch.int32)
        data = kernel.pack(codes, bits)
        assert torch.equal(data, reference.pack(codes, bits))
        assert torch.equal(kernel.unpack(data, bits, 77), codes)


@pytest.mark.parametrize("bits", [1, 5, 10, 13])
def test_bits_beyond_the_width_are_dropped(bits):
    codes = torch.tensor([-1, 1 << bits, 5 | 1 << bits, 2**31 - 1, -(2**31)], dtype=torch.int32)
    assert torch.equal(kernel.pack(codes, bits), reference.pack(codes, bits))


def test_rows_that_are_whole_words_are_not_copied():
    codes = random_codes(10, 2, 16)
    packed = torch.stack([ak.pack(row.cpu(), 10) for row in codes]).to(codes.device)
    assert as_words(packed, 10).data_ptr() == packed.data_ptr()
    for bytes_before in (1, 2, 4):
        moved = torch.empty(bytes_before + packed.numel(), dtype=torch.uint8)[bytes_before:]
        moved = moved.view_as(packed).copy_(packed)
        assert (as_words(moved, 10).data_ptr() == moved.data_ptr()) == (bytes_before == 4)
        assert torch.equal(kernel.unpack_rows(moved, 10, 16), codes)


@examples(40)
@given(
    bits=st.sampled_from(WIDTHS), rows=st.integers(0, 3), count=st.integers(0, 1100), data=st.data()
)
def test_rows(bits, rows, count, data):
    """Every row starts at a byte, and may be longer than its codes."""
    codes = random_codes(bits, rows, count)
    spare = data.draw(st.integers(0, 3))
    size = (count * bits + 7) // 8
    packed = torch.full((rows, size + spare), 0xA5, dtype=torch.uint8)
    for row in range(rows):
        packed[row, :size] = reference.pack(codes[row], bits)
    assert torch.equal(kernel.unpack_rows(packed, bits, count), codes)
    assert torch.equal(reference.unpack_rows(packed, bits, count), codes)


def test_strided():
    codes = random_codes(10, 7, 9).t()
    data = kernel.pack(codes, 10)
    assert torch.equal(data, reference.pack(codes, 10))
    spread = torch.stack((data, data), dim=1)[:, 0]
    assert torch.equal(kernel.unpack(spread, 10, 63), codes.reshape(-1))
    rows = kernel.unpack_rows(data.expand(3, -1), 10, 63)
    assert torch.equal(rows, codes.reshape(1, -1).expand(3, -1))


def test_which_module_packs(monkeypatch):
    monkeypatch.setattr(_dispatch, "_supported", lambda index: True)
    assert _dispatch.packing(torch.device("cuda")) is kernel
    assert _dispatch.packing(torch.device("meta")) is reference


def test_streams_of_more_than_two_giga_bits(device):
    if device == "cpu":
        pytest.skip("so many codes take the interpreter hours")
    bits, count = 16, 2**28 + 11
    codes = torch.arange(count, dtype=torch.int32) & 0xFFFF
    data = ak.pack(codes, bits)
    wide = data.view(torch.int16)
    assert torch.equal(wide[-1000:].int() & 0xFFFF, codes[-1000:])
    assert torch.equal(wide[:1000].int() & 0xFFFF, codes[:1000])
    assert torch.equal(ak.unpack(data, bits, count), codes)
