"""Attention and products of integer weights in C++, beside torch's, on one thread.

    python -m bench.native              # writes bench/results/<device>/native.json; four minutes
    python -m bench.native --no-write --seconds 0.02 --samples 3    # whether everything runs

Calls are timed in turns. The roofline is the two products of attention alone, over all keys, also
under a causal mask, where half of them are in vain; `decode_*` are single queries, whose roofline
is one pass over keys and values. `coded` cases stand beside C++ over keys that are dense already
(`dense`) and torch's flash kernel over those (`sdpa`); `counting_*` show from how many tokens on
counting codes is faster (coded_attention/cpu.py). `linear_int8` and `linear_int4` are `M` rows of
`K` inputs and `N` outputs beside torch's product in fp32; their roofline is that product of as many
fewer rows as integers are multiplied faster by this instruction set, four with VNNI.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.functional import scaled_dot_product_attention as sdpa

import astra_kernels as ak
from astra_kernels.codeword_attention import cpu as codeword_cpu
from astra_kernels.count_codes.cpu import count as count_codes
from astra_runtime.models.quantized import QuantizedLinear
from bench.ops import Calls, products, rotary
from bench.report import Case, measure, write

K = 1024
# Integers multiplied in the time of one float, by instruction set.
INTEGER_RATE = {"avx512vnni": 4}


class Bench:
    """Times cases with the given effort."""

    def __init__(self, seconds: float, samples: int) -> None:
        self._seconds, self._samples = seconds, samples

    def timed(self, name: str, shape: dict[str, int], calls: Calls) -> Case:
        """`calls` holds `ours`, maybe `roofline`, and the baselines."""
        times = measure(calls, seconds=self._seconds, samples=self._samples)
        baselines = {n: t.p50 for n, t in times.items() if n not in ("ours", "roofline")}
        roofline = times["roofline"].p50 if "roofline" in times else None
        case = Case(name, shape, "float32", "native", times["ours"], roofline, baselines)
        others = "  ".join(f"{n} {t.p50:.3f}" for n, t in times.items() if n != "ours")
        print(f"{name:24s} {shape}\n    ours {case.ms.p50:.3f} ms  {others}", flush=True)
        return case

    def dense(self, name: str, heads: int, kv_heads: int, rows: int, keys: int, dim: int) -> Case:
        query = torch.randn(1, heads, rows, dim)
        key, value = torch.randn(2, 1, kv_heads, keys, dim)
        causal = name.endswith("causal")
        calls: dict[str, Callable[[], object]] = {
            "ours": lambda: ak.attention(query, key, value, is_causal=causal, impl="native"),
            "roofline": products(query, key, value) if rows > 1 else one_pass(key, value),
            "sdpa": lambda: sdpa(query, key, value, is_causal=causal, enable_gqa=True),
        }
        shape = {"B": 1, "M": rows, "N": keys, "H": heads, "Hkv": kv_heads, "d": dim}
        return self.timed(name, shape, calls)

    def coded(self, name: str, heads: int, kv_heads: int, rows: int, tokens: int, dim: int) -> Case:
        query, tables = torch.randn(1, heads, rows, dim), torch.randn(2, kv_heads, 1, K, dim)
        codes = torch.randint(0, K, (1, tokens, kv_heads), dtype=torch.int32)
        packed = ak.pack(codes, 10)[None]
        key, value = torch.randn(2, 1, kv_heads, tokens, dim)
        rope = rotary(tokens, dim)
        calls: dict[str, Callable[[], object]] = {
            "ours": lambda: ak.coded_attention(
                query, packed, *tables, code_bits=10, num_tokens=tokens, rope=rope, impl="native"
            ),
            "int32 codes": lambda: ak.coded_attention(
                query, codes, *tables, rope=rope, impl="native"
            ),
            "dense": lambda: ak.attention(query, key, value, impl="native"),
            "sdpa": lambda: sdpa(query, key, value, enable_gqa=True),
        }
        shape = {"B": 1, "M": rows, "N": tokens, "H": heads, "Hkv": kv_heads, "d": dim, "K": K}
        return self.timed(name, shape, calls)

    def counting(self, heads: int, kv_heads: int, rows: int, tokens: int, own: int) -> Case:
        query, tables = torch.randn(1, heads, rows, 64), torch.randn(2, kv_heads, 1, K, 64)
        codes = torch.randint(0, K, (1, tokens, own), dtype=torch.int32)
        calls: dict[str, Callable[[], object]] = {
            "ours": lambda: ak.coded_attention(query, codes, *tables, impl="native"),
            "count": lambda: codeword_cpu.codeword_attention(query, count_codes(codes, K), *tables),
        }
        shape = {"M": rows, "N": tokens, "H": heads, "Hkv": kv_heads, "d": 64, "K": K}
        return self.timed("counting_codes", shape, calls)

    def linear(self, bits: int, rows: int, inputs: int, outputs: int) -> Case:
        weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs)
        layer = QuantizedLinear.of(weight, None, bits)
        part = x[: max(1, rows // INTEGER_RATE.get(ak._C.linear_isas()[-1], 2))]
        calls: dict[str, Callable[[], object]] = {
            "ours": lambda: layer(x),
            "roofline": lambda: linear(part, weight),
            "fp32": lambda: linear(x, weight),
        }
        return self.timed(f"linear_int{bits}", {"M": rows, "K": inputs, "N": outputs}, calls)


def one_pass(key: Tensor, value: Tensor) -> Callable[[], object]:
    return lambda: (key.sum(), value.sum())


def cases(bench: Bench) -> Iterator[Case]:
    for dim in (64, 128):
        for rows in (256, 512, 1024):
            yield bench.dense("attention_causal", 8, 8, rows, rows, dim)
        for keys in (1024, 4096, 8192):
            yield bench.dense("attention", 4, 4, 512, keys, dim)
    for heads, kv_heads, dim in ((9, 3, 64), (32, 8, 128), (12, 12, 64)):
        for keys in (1024, 8192, 32768):
            yield bench.dense("decode_dense", heads, kv_heads, 1, keys, dim)
    for heads, kv_heads, dim in ((9, 3, 64), (32, 8, 128)):
        yield bench.coded("fused_lookup_rotary", heads, kv_heads, 256, 768, dim)
        yield bench.coded("fused_lookup_rotary", heads, kv_heads, 512, 512, dim)
        yield bench.coded("decode_rotary", heads, kv_heads, 1, 1024, dim)
        yield bench.coded("decode_rotary", heads, kv_heads, 1, 8192, dim)
    for heads, kv_heads, rows, own in ((12, 12, 256, 1), (9, 3, 256, 3), (12, 12, 1, 1)):
        for tokens in (512, 1024, 1536, 2048):
            yield bench.counting(heads, kv_heads, rows, tokens, own)
    for tokens in (2048, 4096, 8192):
        yield bench.counting(9, 3, 1, tokens, 3)

    for inputs, outputs in ((576, 576), (576, 192), (576, 1536), (1536, 576)):
        for rows in (1, 4, 33, 129, 512, 1024):
            yield bench.linear(8, rows, inputs, outputs)
    for bits, inputs, outputs in ((4, 576, 1536), (4, 1536, 576), (8, 2048, 8192), (8, 8192, 2048)):
        for rows in (1, 512):
            yield bench.linear(bits, rows, inputs, outputs)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.native", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="a call, over all its samples")
    parser.add_argument("--samples", type=int, default=25, help="of a call")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.inference_mode():
        measured = list(cases(Bench(args.seconds, args.samples)))
    if not args.no_write:
        extra = {"isa": ak._C.attention_isas()[-1], "linear_isa": ak._C.linear_isas()[-1]}
        command = "python -m bench.native"
        print(write("native", measured, command=command, packages=("torch",), extra=extra))


if __name__ == "__main__":
    main()
