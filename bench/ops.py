"""The ops on a CPU beside their references and plain torch.

    python -m bench.ops                 # writes bench/results/<device>/ops.json; three minutes
    python -m bench.ops --choices       # ops_choices.json: what the constants of cpu.py rest on

Shapes are those of one block on one of a few devices: SmolLM2-135M (9 query heads, 3 KV heads) and
ViT-Base (12 heads), one batch row. The baseline `sdpa` attends to keys and values that are dense
already; `index_select_sdpa` looks them up first, as one would without this package. The roofline of
attention is its two matrix products alone, that of encode its one, that of merge_state an addition
of the same tensors, that of decode a copy of its output. `overhead_*` are calls so small that only
the call itself counts; their roofline is the implementation called directly, without checks and op
boundary.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import astra_kernels as ak
from astra_kernels._dispatch import choose
from astra_kernels._rotary import apply_rope
from astra_kernels.attention import cpu as attention_cpu
from astra_kernels.coded_attention import cpu as coded_cpu
from astra_kernels.codeword_attention import cpu as codeword_cpu
from astra_kernels.count_codes.cpu import count as count_codes
from astra_kernels.encode import cpu as encode_cpu
from astra_kernels.merge_state import cpu as merge_cpu
from bench.report import Case, measure, write

Calls = Mapping[str, Callable[[], object]]
MODELS = {"smollm2": (9, 3, 64), "vit-base": (12, 12, 64)}
K = 1024


def timed(name: str, shape: Mapping[str, object], calls: Calls, dtype: str = "float32") -> Case:
    """`calls` holds `ours`, maybe `roofline`, and the baselines."""
    times = measure(calls)
    baselines = {n: t.p50 for n, t in times.items() if n not in ("ours", "roofline")}
    roofline = times["roofline"].p50 if "roofline" in times else None
    full = f"{name}_{torch.get_num_threads()}threads"
    case = Case(full, shape, dtype, "auto", times["ours"], roofline, baselines)
    others = "  ".join(f"{n} {t.p50:.3f}" for n, t in times.items() if n != "ours")
    print(f"{full:32s} {dict(shape)}\n    ours {case.ms.p50:.3f} ms  {others}", flush=True)
    return case


def products(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """The two matrix products of attention, the queries of a KV head folded into one."""
    batch, heads, rows, dim = query.shape
    kv_heads = key.shape[1]
    folded = query.reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    key, value = key.contiguous(), value.contiguous()
    return lambda: torch.matmul(torch.matmul(folded, key.mT), value)


def expanded(codes: Tensor, tables: Tensor) -> list[Tensor]:
    """Keys and values [B, Hkv, N, d] of codes [B, N, C] in two tables [Hkv, S, K, d/S]."""
    index = coded_cpu.row_index(codes, tables[:1])
    shape = (codes.shape[0], codes.shape[1])
    return [coded_cpu.gather(index, t.unsqueeze(0), shape, torch.float32) for t in tables]


def rotary(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    angle = torch.randn(tokens, dim // 2).repeat(1, 2)
    return angle.cos(), angle.sin()


def attention_case(model: str, rows: int, causal: bool) -> Case:
    heads, kv_heads, dim = MODELS[model]
    query = torch.randn(1, heads, rows, dim)
    key, value = torch.randn(2, 1, kv_heads, rows, dim)
    return timed(
        "attention_causal" if causal else "attention",
        {"model": model, "B": 1, "M": rows, "H": heads, "Hkv": kv_heads, "d": dim},
        {
            "ours": lambda: ak.attention(query, key, value, is_causal=causal),
            "roofline": products(query, key, value),
            "reference": lambda: ak.attention(
                query, key, value, is_causal=causal, impl="reference"
            ),
            "sdpa": lambda: sdpa(query, key, value, is_causal=causal, enable_gqa=True),
        },
    )


def coded_case(name: str, model: str, rows: int, tokens: int, shared: bool, turned: bool) -> Case:
    heads, kv_heads, dim = MODELS[model]
    query = torch.randn(1, heads, rows, dim)
    tables = torch.randn(2, kv_heads, 1, K, dim)
    codes = torch.randint(0, K, (1, tokens, 1 if shared else kv_heads), dtype=torch.int32)
    rope = rotary(tokens, dim) if turned else None

    def look_up() -> tuple[Tensor, Tensor]:
        key, value = expanded(codes, tables)
        return (key if rope is None else apply_rope(key, rope)), value

    dense_key, dense_value = (x.contiguous() for x in look_up())

    def look_up_and_attend() -> Tensor:
        key, value = look_up()
        return sdpa(query, key, value, enable_gqa=True)

    return timed(
        name,
        {"model": model, "B": 1, "M": rows, "N": tokens, "H": heads, "Hkv": kv_heads, "d": dim}
        | {"K": K, "S": 1},
        {
            "ours": lambda: ak.coded_attention(query, codes, *tables, rope=rope),
            "roofline": products(query, dense_key, dense_value),
            "reference": lambda: ak.coded_attention(
                query, codes, *tables, rope=rope, impl="reference"
            ),
            "sdpa": lambda: sdpa(query, dense_key, dense_value, enable_gqa=True),
            "index_select_sdpa": look_up_and_attend,
        },
    )


def mixed_case(model: str, rows: int, tokens: int, causal: bool) -> Case:
    heads, kv_heads, dim = MODELS[model]
    query = torch.randn(1, heads, rows, dim)
    key, value = torch.randn(2, 1, kv_heads, rows, dim)
    tables = torch.randn(2, kv_heads, 1, K, dim)
    codes = torch.randint(0, K, (1, tokens, kv_heads), dtype=torch.int32)
    rope = rotary(tokens, dim)
    far = torch.randn(2, 1, kv_heads, tokens, dim)
    keys, values = torch.cat((key, far[0]), dim=2), torch.cat((value, far[1]), dim=2)
    visible = torch.ones(rows, rows + tokens, dtype=torch.bool)
    if causal:
        visible[:, :rows].tril_()
    return timed(
        "mixed_causal" if causal else "mixed",
        {"model": model, "B": 1, "M": rows, "N": tokens, "H": heads, "Hkv": kv_heads, "d": dim},
        {
            "ours": lambda: ak.mixed_attention(
                query, key, value, codes, *tables, is_causal=causal, rope=rope
            ),
            "roofline": products(query, keys, values),
            "sdpa": lambda: sdpa(
                query, keys, values, attn_mask=visible if causal else None, enable_gqa=True
            ),
        },
    )


def merge_case(model: str, rows: int) -> Case:
    heads, _, dim = MODELS[model]
    outs = torch.randn(2, 1, rows, heads, dim).transpose(2, 3)
    lses = torch.randn(2, 1, heads, rows)
    target = torch.empty_like(outs[0])
    state = (outs[0], lses[0], outs[1], lses[1])
    return timed(
        "merge_state",
        {"model": model, "B": 1, "M": rows, "H": heads, "d": dim},
        {
            "ours": lambda: ak.merge_state(*state),
            "roofline": lambda: torch.add(outs[0], outs[1], out=target),
            "reference": lambda: ak.merge_state(*state, impl="reference"),
        },
    )


def encode_case(rows: int, groups: int, width: int) -> Case:
    vectors, codebook = torch.randn(rows, groups, width), torch.randn(groups, K, width)
    norms = codebook.square().sum(dim=-1) / 2
    points = vectors.transpose(0, 1)
    scores = torch.empty(groups, rows, K)

    def matmul() -> Tensor:
        return torch.bmm(points, codebook.mT, out=scores)

    return timed(
        "encode",
        {"T": rows, "groups": groups, "d": width, "K": K},
        {
            "ours": lambda: ak.encode(vectors, codebook, half_norms=norms),
            "roofline": matmul,
            "matmul_argmin": lambda: (norms.unsqueeze(1) - matmul()).argmin(dim=-1),
        },
    )


def decode_case(rows: int, groups: int, width: int) -> Case:
    codes = torch.randint(0, K, (rows, groups), dtype=torch.int32)
    codebook = torch.randn(groups, K, width)
    vectors = ak.decode(codes, codebook)
    return timed(
        "vq_decode",
        {"T": rows, "groups": groups, "d": width, "K": K},
        {
            "ours": lambda: ak.decode(codes, codebook),
            "roofline": lambda: vectors.clone(),
            "reference": lambda: ak.decode(codes, codebook, impl="reference"),
        },
    )


def overhead_cases() -> Iterator[Case]:
    cpu = torch.device("cpu")
    query, key, value = torch.randn(3, 1, 2, 4, 16)
    tables = torch.randn(2, 2, 1, 8, 16)
    codes = torch.zeros(1, 4, 2, dtype=torch.int32)
    rope = rotary(4, 16)
    state = ak.attention(query, key, value)
    shape = {"B": 1, "M": 4, "N": 4, "H": 2, "Hkv": 2, "d": 16}
    dense, coded, merge = (
        choose(op, "auto", cpu, torch.float32).run
        for op in ("attention", "coded_attention", "merge_state")
    )
    yield timed(
        "overhead_attention",
        shape,
        {
            "ours": lambda: ak.attention(query, key, value),
            "roofline": lambda: dense(query, key, value),
        },
    )
    yield timed(
        "overhead_coded_attention",
        shape,
        {
            "ours": lambda: ak.coded_attention(query, codes, *tables, rope=rope),
            "roofline": lambda: coded(query, codes, *tables, rope=rope),
        },
    )
    yield timed(
        "overhead_merge_state",
        shape,
        {
            "ours": lambda: ak.merge_state(*state, *state),
            "roofline": lambda: merge(*state, *state),
        },
    )


def op_cases() -> Iterator[Case]:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        yield attention_case("smollm2", 512, causal=True)
        yield attention_case("smollm2", 256, causal=True)
        yield attention_case("vit-base", 256, causal=False)
        yield coded_case("fused_lookup_rotary", "smollm2", 512, 512, shared=False, turned=True)
        yield coded_case("fused_lookup_rotary", "smollm2", 256, 768, shared=True, turned=True)
        yield coded_case("codeword", "vit-base", 256, 768, shared=True, turned=False)
        yield coded_case("codeword", "vit-base", 256, 3072, shared=True, turned=False)
        yield coded_case("decode_rotary", "smollm2", 1, 1024, shared=False, turned=True)
        yield coded_case("decode_plain", "smollm2", 1, 3072, shared=False, turned=False)
        yield mixed_case("smollm2", 512, 512, causal=True)
        yield mixed_case("smollm2", 256, 768, causal=True)
        yield mixed_case("vit-base", 256, 768, causal=False)
        yield merge_case("smollm2", 512)
        for rows, groups, width in ((512, 3, 128), (512, 24, 16), (256, 1, 768), (256, 32, 24)):
            yield encode_case(rows, groups, width)
        yield decode_case(512, 24, 16)
    torch.set_num_threads(1)
    yield from overhead_cases()


def set_and(
    module: object, name: str, value: int, call: Callable[[], object]
) -> Callable[[], object]:
    """The call under another value of a constant."""

    def changed() -> object:
        before = getattr(module, name)
        setattr(module, name, value)
        try:
            return call()
        finally:
            setattr(module, name, before)

    return changed


def choice_cases() -> Iterator[Case]:
    """One case a choice; `ours` is the choice made, the baselines are the others."""
    torch.set_num_threads(1)
    for rows in (256, 512, 1024):
        query, (key, value) = torch.randn(1, 9, rows, 64), torch.randn(2, 1, 3, rows, 64)
        call = _partial(attention_cpu.attention, query, key, value, is_causal=True)
        others = {
            f"{n} rows": set_and(attention_cpu, "CAUSAL_ROWS", n, call) for n in (32, 128, 256)
        }
        yield timed("causal_rows", {"M": rows, "H": 9, "Hkv": 3}, {"ours": call, **others})
    for rows, groups, width in ((512, 3, 128), (512, 24, 16), (256, 1, 768)):
        call = _partial(
            encode_cpu.encode, torch.randn(rows, groups, width), torch.randn(groups, K, width)
        )
        others = {f"2^{n}": set_and(encode_cpu, "TILE", 1 << n, call) for n in (16, 17, 18)}
        others["plain argmin"] = set_and(encode_cpu, "BLOCK", K, call)
        shape = {"T": rows, "groups": groups, "d": width}
        yield timed("encode_tile", shape, {"ours": call, **others})
    for heads, kv_heads, rows, shared in ((12, 12, 256, True), (9, 3, 256, False)):
        for tokens in (256, 512, 768, 1024, 2048):
            yield _crossover(heads, kv_heads, rows, tokens, shared)
    for heads, kv_heads, shared in ((12, 12, True), (9, 3, False)):
        for tokens in (512, 1024, 2048):
            yield _crossover(heads, kv_heads, 1, tokens, shared)
    for rows, tokens, causal in ((512, 512, True), (256, 768, True), (256, 768, False)):
        yield _halves(rows, tokens, causal)
    for dtype in (torch.float16, torch.bfloat16):
        query, key, value = torch.randn(3, 1, 9, 256, 64, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        calls = {
            "ours": _partial(attention_cpu.flash, query, key, value, None),
            "sdpa": _partial(sdpa, query, key, value),
        }
        yield timed("upcast_half", {"M": 256, "H": 9, "d": 64}, calls, name)


def _partial(
    function: Callable[..., object], *args: object, **options: object
) -> Callable[[], object]:
    return lambda: function(*args, **options)


def _crossover(heads: int, kv_heads: int, rows: int, tokens: int, shared: bool) -> Case:
    query, tables = torch.randn(1, heads, rows, 64), torch.randn(2, kv_heads, 1, K, 64)
    codes = torch.randint(0, K, (1, tokens, 1 if shared else kv_heads), dtype=torch.int32)

    def expand() -> object:
        key, value = expanded(codes, tables)
        return attention_cpu.flash(query, key, value, None)

    def count() -> object:
        return codeword_cpu.codeword_attention(query, count_codes(codes, K), *tables)

    shape = {"M": rows, "N": tokens, "H": heads, "Hkv": kv_heads, "K": K}
    ours = _partial(coded_cpu.coded_attention, query, codes, *tables)
    return timed("coded_crossover", shape, {"ours": ours, "expand": expand, "count": count})


def _halves(rows: int, tokens: int, causal: bool) -> Case:
    query = torch.randn(1, 9, rows, 64)
    (key, value), far = torch.randn(2, 1, 3, rows, 64), torch.randn(2, 1, 3, tokens, 64)

    def halves() -> object:
        local = attention_cpu.attention(query, key, value, is_causal=causal)
        return merge_cpu.merge_state(*local, *attention_cpu.flash(query, far[0], far[1], None))

    def concatenated() -> object:
        bias = None
        if causal:
            bias = torch.zeros(rows, rows + tokens)
            bias[:, :rows].fill_(float("-inf")).triu_(1)
        keys, values = torch.cat((key, far[0]), dim=2), torch.cat((value, far[1]), dim=2)
        return attention_cpu.flash(query, keys, values, None, bias)

    shape = {"M": rows, "N": tokens, "H": 9, "Hkv": 3}
    return timed("mixed_halves", shape, {"ours": halves, "concatenated": concatenated})


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.ops", description=__doc__.partition("\n")[0])
    parser.add_argument("--choices", action="store_true", help="measure other constants")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        cases = list(choice_cases() if args.choices else op_cases())
    if not args.no_write:
        name = "ops_choices" if args.choices else "ops"
        command = "python -m bench.ops" + (" --choices" if args.choices else "")
        print(write(name, cases, command=command, packages=("torch",)))


if __name__ == "__main__":
    main()
