"""Every kernel once, on small ragged shapes, beside its reference: for sanitizers.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m bench.kernels.smoke

Without torch's caching allocator every tensor is an allocation of its own, so that a sanitizer sees
what lies outside of it. Without a GPU:
TRITON_INTERPRET=1 python -m bench.kernels.smoke --device cpu

A call that is wrong, or that fails, does not stop the others: where the device is lost with it, a
new process goes on behind it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import astra_kernels as ak
from bench.kernels._attention import strategy
from bench.kernels.run import REFUSALS, DeviceLost, still_there

Call = Callable[[str], Any]  # impl -> result

CODEWORDS, TOKENS, BITS = 37, 75, 6
HEADS, KV_HEADS, NEAR = 4, 2, 77
# Rounding of fp32 products made of three in tf32, beside that of fp32 ones.
LEAST_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Layout:
    """Which codes of keys there are; `rotary` needs one code a token and head."""

    dtype: torch.dtype
    dim: int
    groups: int
    rotary: bool

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{kind} d={self.dim} S={self.groups}{' rotary' * self.rotary}"


def layouts(dtype: torch.dtype) -> list[Layout]:
    """The model's dtype at the usual widths, fp32, and the widest heads."""
    return [
        Layout(dtype, 64, 1, False),
        Layout(dtype, 64, 1, True),
        Layout(dtype, 64, 4, False),
        Layout(dtype, 128, 1, False),
        Layout(dtype, 128, 1, True),
        Layout(dtype, 128, 4, False),
        Layout(torch.float32, 64, 1, True),
        Layout(torch.float32, 128, 1, False),
        Layout(dtype, 256, 1, True),
    ]


def attention_calls(layout: Layout, device: str) -> Iterator[tuple[str, Call]]:
    options: dict[str, Any] = {"dtype": layout.dtype, "device": device}
    for rows in (1, 70):
        query = torch.randn(1, HEADS, rows, layout.dim, **options)
        near = torch.randn(2, 1, KV_HEADS, NEAR, layout.dim, **options)
        yield from coded_calls(layout, query, device)
        yield from mixed_calls(layout, query, near, device)
        if layout.groups == 1 and not layout.rotary:
            yield from plain_calls(layout, query, near, device)


@dataclass(frozen=True)
class CodedTokens:
    codes: Tensor
    packed: Tensor
    tables: tuple[Tensor, Tensor]
    angle: Tensor | None  # fp32

    def rope(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        if self.angle is None:
            return None
        return self.angle.cos().to(dtype), self.angle.sin().to(dtype)


def coded_tokens(layout: Layout, device: str) -> CodedTokens:
    width = layout.dim // layout.groups
    tables = torch.randn(
        *(2, KV_HEADS, layout.groups, CODEWORDS, width), dtype=layout.dtype, device=device
    )
    size = (1, TOKENS, KV_HEADS * layout.groups)
    codes = torch.randint(0, CODEWORDS, size, dtype=torch.int32, device=device)
    packed = torch.stack([ak.pack(row, BITS) for row in codes])
    angle = None
    if layout.rotary:
        speed = 100.0 ** -torch.arange(0, 1, 2 / layout.dim, device=device)
        angle = torch.outer(torch.arange(TOKENS, device=device), speed).repeat(1, 2)
    return CodedTokens(codes, packed, (tables[0], tables[1]), angle)


def coded_calls(layout: Layout, query: Tensor, device: str) -> Iterator[tuple[str, Call]]:
    """Attention to codes, by every strategy that the layout allows, of int32 and packed codes."""
    far = coded_tokens(layout, device)
    mask = torch.rand(1, TOKENS, device=device) > 0.3
    names = ["fused", "expanded"]
    if layout.groups == 1 and not layout.rotary:
        names.append("counted")
    for name, packed in itertools.product(names, (False, True)):
        if name == "expanded" and packed and query.shape[2] == 1:
            continue  # as without

        def coded(impl: str, name: str = name, packed: bool = packed) -> Any:
            codes = far.packed if packed and impl != "reference" else far.codes
            how: dict[str, Any] = {"rope": far.rope(layout.dtype)}
            if codes is far.packed:
                how |= {"code_bits": BITS, "num_tokens": TOKENS}
            with strategy(name, query.device):
                return ak.coded_attention(
                    query, codes, *far.tables, code_mask=mask, impl=impl, **how
                )

        tail = " packed" * packed
        yield f"coded_attention {name}{tail} M={query.shape[2]} {layout}", coded


def mixed_calls(
    layout: Layout, query: Tensor, near: Tensor, device: str
) -> Iterator[tuple[str, Call]]:
    far = coded_tokens(layout, device)
    for causal in (False, True) if layout.dim == 64 else (True,):

        def mixed(impl: str, causal: bool = causal) -> Any:
            return ak.mixed_attention(
                *(query, *near, far.codes, *far.tables),
                rope=far.rope(layout.dtype),
                is_causal=causal,
                return_lse=True,
                impl=impl,
            )

        yield f"mixed_attention M={query.shape[2]} causal={causal} {layout}", mixed


def plain_calls(
    layout: Layout, query: Tensor, near: Tensor, device: str
) -> Iterator[tuple[str, Call]]:
    counts = torch.randint(0, 3, (1, KV_HEADS, CODEWORDS), device=device)
    tables = coded_tokens(layout, device).tables
    rows, kind = query.shape[2], str(layout)
    yield (
        f"codeword_attention M={rows} {kind}",
        lambda impl: ak.codeword_attention(query, counts, *tables, impl=impl),
    )
    yield (
        f"attention M={rows} {kind}",
        lambda impl: ak.attention(query, *near, is_causal=True, impl=impl),
    )


def of_impl(op: Callable[..., Any], *operands: Any, **options: Any) -> Call:
    """The op on these operands, whatever the loop around it does to its variables afterwards."""
    return lambda impl: op(*operands, impl=impl, **options)


def code_calls(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Call]]:
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    kind = str(dtype).removeprefix("torch.")
    for groups, width in ((1, 200), (5, 24), (1, 256)):
        # Codewords far apart, so that rounding decides nothing.
        codebook = torch.randn(groups, 70, width, **options) * 4
        truth = torch.randint(0, 70, (1, 33, groups), dtype=torch.int32, device=device)
        vectors = ak.decode(truth, codebook, impl="reference")
        vectors = vectors + torch.randn_like(vectors) * 0.1
        shape = f"w={width} {kind}"
        yield (
            f"encode {shape}",
            of_impl(ak.encode, vectors, codebook),
        )
        yield (
            f"encode_packed {shape}",
            of_impl(ak.encode_packed, vectors, codebook, 7),
        )
        yield f"decode {shape}", of_impl(ak.decode, truth, codebook)
        weight = torch.randn(45, groups * width, **options) / (groups * width) ** 0.5
        known = torch.randn(1, 33, groups * width, **options)
        for norm in (None, "layer"):
            yield (
                f"lookup_linear norm={norm} {shape}",
                of_impl(ak.lookup_linear, truth, codebook, weight, estimate=known, norm=norm),
            )


def other_calls(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Call]]:
    codes = torch.randint(0, 70, (2, 33, 3), dtype=torch.int32, device=device)
    yield "count_codes", lambda impl: ak.count_codes(codes, 70, impl=impl)
    out = torch.randn(2, 1, HEADS, 70, 64, dtype=dtype, device=device)
    lse = torch.randn(2, 1, HEADS, 70, device=device)
    yield "merge_state", lambda impl: ak.merge_state(out[0], lse[0], out[1], lse[1], impl=impl)
    yield "merge_states", lambda impl: ak.merge_states(out, lse, impl=impl)
    for bits in (1, 5, 10, 16):
        numbers = torch.randint(0, 2**bits, (333,), dtype=torch.int32, device=device)

        def there_and_back(impl: str, codes: Tensor = numbers, bits: int = bits) -> Any:
            from astra_kernels.pack import kernel, reference

            module = kernel if impl == "triton" else reference
            data = module.pack(codes, bits)
            return data, module.unpack(data, bits, codes.numel())

        yield f"pack, unpack {bits} bits", there_and_back


def all_calls(dtype: torch.dtype, device: str) -> list[tuple[str, Call]]:
    """The same calls, in the same order, with the same numbers in every process."""
    torch.manual_seed(0)
    calls = [call for layout in layouts(dtype) for call in attention_calls(layout, device)]
    for kind in (dtype, torch.float32):
        calls += code_calls(kind, device)
    return [*calls, *other_calls(dtype, device)]


def differs(got: Any, want: Any) -> bool:
    """Whether a result is farther from the reference than rounding takes it."""
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    # lse is fp32 whatever the scores were multiplied in
    kinds = [t.dtype for t in (got if isinstance(got, tuple) else (got,)) if t.is_floating_point()]
    tolerance = max([4 * torch.finfo(kind).eps for kind in kinds] + [LEAST_TOLERANCE])
    for a, b in pairs:
        if not a.is_floating_point():
            if not torch.equal(a.long(), b.long()):
                return True
            continue
        a, b = a.double(), b.double()
        finite = b.isfinite()
        if not torch.equal(a.isfinite(), finite):
            return True
        if not (a[finite] - b[finite]).norm() <= tolerance * b[finite].norm() + 1e-6:
            return True
    return False


def verdict(call: Call, device: str) -> str:
    """ "ok", "WRONG", or what the call raised. DeviceLost: nothing more can be said here."""
    try:
        bad = differs(call("triton"), call("reference"))
        if device == "cuda":
            torch.cuda.synchronize()
    except REFUSALS as reason:
        still_there(torch.device(device))
        return f"WRONG ({type(reason).__name__}: {str(reason).strip().splitlines()[0][:200]})"
    return "WRONG" if bad else "ok"


def go_on_in_a_new_process(given: Sequence[str], behind: int) -> None:
    words = [word for word in given if not word.startswith("--first=")]
    sys.stdout.flush()
    command = [sys.executable, "-m", "bench.kernels.smoke", *words, f"--first={behind}", "--wrong"]
    os.execv(sys.executable, command)


def main(given: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if given is None else list(given)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--part", metavar="I/N", default="0/1", help="every N-th call, from I on")
    parser.add_argument("--first", type=int, default=0, help="skip so many of them")
    parser.add_argument("--wrong", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    part, parts = (int(number) for number in args.part.split("/"))
    # The interpreter's bf16 dot is wrong.
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float16
    wrong = args.wrong
    with torch.inference_mode():
        calls = all_calls(dtype, args.device)[part::parts]
        for place, (name, call) in enumerate(calls[args.first :], args.first):
            try:
                said = verdict(call, args.device)
            except DeviceLost as reason:
                print(f"WRONG {name} (device lost: {reason})", flush=True)
                go_on_in_a_new_process(given, place + 1)
            mark, _, rest = said.partition(" ")
            print(f"{mark:5s} {name} {rest}".rstrip(), flush=True)
            wrong |= mark != "ok"
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
