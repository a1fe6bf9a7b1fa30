"""Every kernel once, on small ragged shapes, beside its reference: for sanitizers.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m bench.kernels.smoke

Without torch's caching allocator every tensor is an allocation of its own, so that a sanitizer sees
what lies outside of it. Without a GPU:
TRITON_INTERPRET=1 python -m bench.kernels.smoke --device cpu
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import astra_kernels as ak

Call = Callable[[str], Any]  # impl -> result


def attention_calls(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Call]]:
    from astra_kernels.coded_attention import kernel, reference

    options: dict[str, Any] = {"dtype": dtype, "device": device}
    heads, kv_heads, dim, codewords, tokens = 4, 2, 64, 37, 75
    for rows in (1, 70):
        query = torch.randn(1, heads, rows, dim, **options)
        near = torch.randn(2, 1, kv_heads, 77, dim, **options)
        angle = torch.randn(tokens, dim // 2, device=device).repeat(1, 2)
        rope = (angle.cos().to(dtype), angle.sin().to(dtype))
        mask = torch.rand(1, tokens, device=device) > 0.3
        for groups, turned in ((1, False), (1, True), (4, False)):
            tables = torch.randn(2, kv_heads, groups, codewords, dim // groups, **options)
            size = (1, tokens, kv_heads * groups)
            codes = torch.randint(0, codewords, size, dtype=torch.int32, device=device)
            packed = torch.stack([ak.pack(row, 6) for row in codes])
            angles = rope if turned else None
            names = ["fused", "expanded"]
            if groups == 1 and not turned:
                names.append("counted")
            for name in names:

                def coded(impl: str, a=(query, codes, *tables), r=angles, m=mask, s=name) -> Any:
                    if impl == "triton":
                        return kernel.coded_attention(*a, rope=r, code_mask=m, strategy=s)
                    return reference.coded_attention(*a, rope=r, code_mask=m)

                yield f"coded_attention {name} M={rows} S={groups} rotary={turned}", coded

            def from_packed(impl: str, a=(query, *tables), p=packed, c=codes, r=angles) -> Any:
                if impl == "triton":
                    return ak.coded_attention(
                        a[0], p, *a[1:], code_bits=6, num_tokens=tokens, rope=r, impl=impl
                    )
                return ak.coded_attention(a[0], c, *a[1:], rope=r, impl=impl)

            yield f"coded_attention packed M={rows} S={groups} rotary={turned}", from_packed
            for causal in (False, True):

                def mixed(impl: str, a=(query, *near, codes, *tables), r=angles, c=causal) -> Any:
                    return ak.mixed_attention(*a, rope=r, is_causal=c, return_lse=True, impl=impl)

                yield f"mixed_attention M={rows} S={groups} causal={causal}", mixed
        counts = torch.randint(0, 3, (1, kv_heads, codewords), device=device)
        tables = torch.randn(2, kv_heads, 1, codewords, dim, **options)

        def codewords_of(impl: str, a=(query, counts, *tables)) -> Any:
            return ak.codeword_attention(*a, impl=impl)

        def dense(impl: str, a=(query, *near)) -> Any:
            return ak.attention(*a, is_causal=True, impl=impl)

        yield f"codeword_attention M={rows}", codewords_of
        yield f"attention M={rows}", dense
    out = torch.randn(2, 1, heads, 70, dim, **options)
    lse = torch.randn(2, 1, heads, 70, device=device)
    yield "merge_state", lambda impl: ak.merge_state(out[0], lse[0], out[1], lse[1], impl=impl)


def code_calls(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Call]]:
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    for groups, width in ((1, 200), (5, 24)):
        # Codewords far apart, so that rounding decides nothing.
        codebook = torch.randn(groups, 70, width, **options) * 4
        truth = torch.randint(0, 70, (1, 33, groups), dtype=torch.int32, device=device)
        vectors = ak.decode(truth, codebook, impl="reference")
        vectors = vectors + torch.randn_like(vectors) * 0.1
        yield (
            f"encode w={width}",
            lambda impl, a=(vectors, codebook): ak.encode(*a, impl=impl),
        )
        yield (
            f"encode_packed w={width}",
            lambda impl, a=(vectors, codebook, 7): ak.encode_packed(*a, impl=impl),
        )
        yield f"decode w={width}", lambda impl, a=(truth, codebook): ak.decode(*a, impl=impl)
        weight = torch.randn(45, groups * width, **options) / (groups * width) ** 0.5
        known = torch.randn(1, 33, groups * width, **options)
        for norm in (None, "layer"):
            yield (
                f"lookup_linear w={width} norm={norm}",
                lambda impl, a=(truth, codebook, weight), e=known, n=norm: ak.lookup_linear(
                    *a, estimate=e, norm=n, impl=impl
                ),
            )
    codes = torch.randint(0, 70, (2, 33, 3), dtype=torch.int32, device=device)
    yield "count_codes", lambda impl: ak.count_codes(codes, 70, impl=impl)


def packing(device: str) -> Iterator[tuple[str, Call]]:
    from astra_kernels.pack import kernel, reference

    for bits in (1, 5, 10, 16):
        codes = torch.randint(0, 2**bits, (333,), dtype=torch.int32, device=device)

        def there_and_back(impl: str, codes: Tensor = codes, bits: int = bits) -> Any:
            module = kernel if impl == "triton" else reference
            data = module.pack(codes, bits)
            return data, module.unpack(data, bits, codes.numel())

        yield f"pack, unpack {bits} bits", there_and_back


def differs(got: Any, want: Any, dtype: torch.dtype) -> bool:
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    for a, b in pairs:
        if not a.is_floating_point():
            if not torch.equal(a.long(), b.long()):
                return True
            continue
        a, b = a.double(), b.double()
        seen = b.isfinite()
        if not torch.equal(a.isfinite(), seen):
            return True
        eps = torch.finfo(dtype).eps
        if not (a[seen] - b[seen]).norm() <= 4 * eps * b[seen].norm() + 1e-6:
            return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--part", metavar="I/N", default="0/1", help="every N-th call, from I on")
    args = parser.parse_args()
    part, parts = (int(number) for number in args.part.split("/"))
    # The interpreter's bf16 dot is wrong.
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float16
    torch.manual_seed(0)
    wrong = 0
    with torch.inference_mode():
        calls = [
            *attention_calls(dtype, args.device),
            *code_calls(dtype, args.device),
            *packing(args.device),
        ]
        for name, call in calls[part::parts]:
            bad = differs(call("triton"), call("reference"), dtype)
            if args.device == "cuda":
                torch.cuda.synchronize()
            print(f"{'WRONG' if bad else 'ok':5s} {name}", flush=True)
            wrong += bad
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
