"""Packing and unpacking beside memcpy of the int32 codes (the roofline), numpy and faiss.

    python -m bench.pack                # writes bench/results/<device>/pack.json; about two minutes
    python -m bench.pack --isa portable --no-write

One thread, all in the same run; ours and faiss's write to buffers allocated beforehand. "15360" is
what 512 tokens of 30 codes make, one exchange of a Transformer block; our time includes the Python
call. The baseline "numpy" is the layout written down in numpy; "numpy_tuned" is the fastest known.
A vector kernel is bound by memory, so its rate is nearly the same at every width, while a codec
that goes bit by bit is the slower the wider the code: at 1 or 2 bits nothing is 100 times numpy.
"""

import argparse
from collections.abc import Callable
from typing import Any

import faiss
import faiss.loader
import numpy as np
import numpy.typing as npt

from astra_kernels import _C
from astra_kernels.pack import pack, packed_size, unpack
from bench.report import Case, measure, write

SIZES = {"15360": 512 * 30, "1M": 1 << 20}
Array = npt.NDArray[Any]


def buffer(count: int, dtype: type, page_offset: int) -> Array:
    """Memory at a chosen offset in its page.

    Where two arrays lie at the same offset, loads wait for unrelated stores; that would favour one
    contestant or another by chance.
    """
    size = count * np.dtype(dtype).itemsize
    raw = np.zeros(size + 2 * 4096, np.uint8)
    start = -raw.ctypes.data % 4096 + page_offset
    return raw[start : start + size].view(dtype)


def numpy_pack(codes: Array, bits: int) -> Array:
    stream = (codes[:, None] >> np.arange(bits)) & 1
    return np.packbits(stream.astype(np.uint8), bitorder="little")


def numpy_unpack(data: Array, bits: int, count: int) -> Array:
    stream = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    places = np.arange(bits, dtype=np.int32)
    codes: Array = (stream.astype(np.int32) << places).sum(axis=1, dtype=np.int32)
    return codes


def numpy_tuned_pack(codes: Array, bits: int) -> Array:
    halves = codes.astype("<u2").view(np.uint8).reshape(-1, 2)
    stream = np.unpackbits(halves, axis=1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(-1), bitorder="little")


def numpy_tuned_unpack(data: Array, bits: int, count: int) -> Array:
    stream = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    codes: Array = stream.astype(np.int32) @ (1 << np.arange(bits, dtype=np.int32))
    return codes


def faiss_pack(codes: Array, bits: int, out: Array) -> None:
    pointers = faiss.swig_ptr(codes), faiss.swig_ptr(out)
    faiss.loader.pack_bitstrings(1, codes.size, bits, *pointers, out.size)


def faiss_unpack(data: Array, bits: int, out: Array) -> None:
    faiss.loader.unpack_bitstrings(
        1, out.size, bits, faiss.swig_ptr(data), data.size, faiss.swig_ptr(out)
    )


def bench_width(bits: int, label: str, count: int) -> list[Case]:
    size = packed_size(count, bits)
    codes, back, copy = (buffer(count, np.int32, offset) for offset in (0, 1024, 2048))
    codes[:] = np.random.default_rng(bits).integers(0, 1 << bits, count)
    packed, theirs = buffer(size, np.uint8, 3072), buffer(size, np.uint8, 3072)

    expected = numpy_pack(codes, bits)
    pack(codes, bits, out=packed)
    faiss_pack(codes, bits, theirs)
    for result in (packed, theirs, numpy_tuned_pack(codes, bits)):
        if not np.array_equal(result, expected):
            raise SystemExit(f"{bits} bits: the packed bytes differ; nothing was measured")
    for restored in (
        unpack(packed, bits, count, out=back),
        numpy_unpack(packed, bits, count),
        numpy_tuned_unpack(packed, bits, count),
    ):
        if not np.array_equal(restored, codes):
            raise SystemExit(f"{bits} bits: the unpacked codes differ; nothing was measured")

    contests: dict[str, dict[str, Callable[[], object]]] = {
        "pack": {
            "ours": lambda: pack(codes, bits, out=packed),
            "memcpy": lambda: np.copyto(copy, codes),
            "numpy": lambda: numpy_pack(codes, bits),
            "numpy_tuned": lambda: numpy_tuned_pack(codes, bits),
            "faiss": lambda: faiss_pack(codes, bits, theirs),
        },
        "unpack": {
            "ours": lambda: unpack(packed, bits, count, out=back),
            "memcpy": lambda: np.copyto(copy, codes),
            "numpy": lambda: numpy_unpack(packed, bits, count),
            "numpy_tuned": lambda: numpy_tuned_unpack(packed, bits, count),
            "faiss": lambda: faiss_unpack(packed, bits, back),
        },
    }
    cases = []
    for action, calls in contests.items():
        times = measure(calls, seconds=0.1, samples=11)
        case = Case(
            name=f"{action}_{bits}bit_{label}",
            shape={"N": count, "K": 1 << bits},
            dtype="int32",
            impl=f"native {_C.isa()}",
            ms=times["ours"],
            floor_ms=times["memcpy"].p50,
            peers={name: times[name].p50 for name in ("numpy", "numpy_tuned", "faiss")},
        )
        cases.append(case)
        rates = {name: count / time.p50 / 1e3 for name, time in times.items()}
        print(
            f"{action:>6} {bits:2} bits {label:>5}  "
            + "  ".join(f"{name} {rate:7.0f}" for name, rate in rates.items())
            + f"  M codes/s; x numpy {rates['ours'] / rates['numpy']:.0f}, "
            f"x faiss {rates['ours'] / rates['faiss']:.1f}, "
            f"of memcpy {rates['ours'] / rates['memcpy']:.0%}",
            flush=True,
        )
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.pack", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--isa", choices=_C.available_isas(), default=_C.isa())
    parser.add_argument("--bits", type=int, nargs="+", default=list(range(1, 17)))
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    _C.set_isa(arguments.isa)
    faiss.omp_set_num_threads(1)
    cases = [
        case
        for label, count in SIZES.items()
        for bits in arguments.bits
        for case in bench_width(bits, label, count)
    ]
    if not arguments.no_write:
        packages = ("torch", "numpy", "faiss-cpu", "astra-inference")
        print(write("pack", cases, command="python -m bench.pack", packages=packages))


if __name__ == "__main__":
    main()
