"""The engine on one GPU: what each rank's device would do, and what a link adds to it.

    python -m bench.gpu_engine --output DIR                 # Llama-3.2-1B's shape, 4k to 32k tokens
    python -m bench.gpu_engine --device cpu --small         # tries it, on any machine

One GPU stands for every rank in turn. The ranks run once together, as threads on one device, and
what each of them receives is recorded; then each rank runs alone, as quickly as it can, and its
codes from the others lie ready. Its time is taken by events on the device, by stage and by block.
Weights and codewords are random and made on the device: times do not depend on them.

Writes <output>/<device>/engine.json after every case:

    engine_single_T…         the model alone, to the logits of the last token
    engine_rank_T…_N…_r…     one rank of N; `stages`: milliseconds of a block, in the median
    engine_graphs_T…_N…_r…   the same as CUDA graphs between its exchanges
    engine_T…_N…_…mbit       N such devices on links of that rate, from the ranks' stages

Before that it checks, on a smaller model in fp32, that ranks as threads on this device give the
logits and the codes that ranks on the CPU give, and so do ranks whose codes stay on the device as
over NCCL; the exit status is 1 if they do not.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from astra_runtime import Codebook, Engine
from astra_runtime.codes.base import geometry
from astra_runtime.models import adapt
from astra_runtime.transport import Mesh
from bench.gpu.environment import device_folder
from bench.gpu.graphs import capture
from bench.gpu.memory import run_on_device
from bench.gpu.ranks import Received, Replaying, record
from bench.gpu.stages import Rank, Stopwatch, linked, run_rank
from bench.report import Case, Times, command_line, cores, cpu_name, write

COMPILED = ("check", "measure")
RATES = (10, 100, 1000, 10_000)  # Mbit/s
DELAY_MS = 1.0
LOGITS_ERROR = 1e-3  # in the norm, between devices that add up in other orders
CODES_DIFFERENT = 1e-3  # the share of codes that rounding may change


@dataclass(frozen=True)
class Shape:
    """A Llama and its codebook: `groups` codes a token, one a KV head."""

    name: str
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    codewords: int = 1024
    dtype: torch.dtype = torch.bfloat16


LLAMA_1B = Shape("llama-3.2-1b", 2048, 8192, 16, 32, 8, 64, 128_256)
CHECKED = Shape("llama, checked", 512, 1024, 3, 8, 4, 64, 1024, 256, torch.float32)
TINY = Shape("llama, tiny", 64, 128, 2, 4, 2, 16, 256, 32, torch.float32)


def make_model(shape: Shape, device: torch.device) -> nn.Module:
    """The shape with random weights, made where they are to be."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
    )
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(shape.dtype)
    try:
        with device:
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def make_codebook(model: nn.Module, shape: Shape) -> Codebook:
    """Random codewords in space "kv", one code a KV head, as far apart as keys and values are."""
    adapter = adapt(model)
    size = (shape.layers, shape.kv_heads, shape.codewords, 2 * shape.head_dim)
    generator = torch.Generator().manual_seed(1)
    return Codebook(
        "kv",
        groups=shape.kv_heads,
        codewords=shape.codewords,
        geometry=geometry(adapter),
        model=adapter.digest(),
        tables=torch.randn(size, generator=generator),
        scales=torch.ones(shape.layers, shape.kv_heads, 2),
    )


@dataclass
class Report:
    """The result file."""

    args: argparse.Namespace
    device: torch.device
    cases: list[Case] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def write(self, complete: bool) -> Path:
        folder, name = f"cpu-{cores()}core", f"{cpu_name()}, {cores()} cores"
        if self.device.type == "cuda":
            card = torch.cuda.get_device_name(self.device)
            folder, name = device_folder(card), f"{card}, {name}"
        return write(
            "engine_small" if self.args.small else "engine",
            self.cases,
            command=command_line("bench.gpu_engine", without_places(self.args.given)),
            packages=("torch", "transformers"),
            folder=folder,
            device=name,
            results=self.args.output,
            link={"model": "see linked", "delay_ms": DELAY_MS},
            extra={**self.extra, "complete": complete},
        )

    def add(self, case: Case) -> None:
        self.cases.append(case)
        over = "".join(f"  {name} {ms / case.ms.p50:.2f}x" for name, ms in case.peers.items())
        stages = case.extra.get("stages", {})
        parts = "".join(f"  {name} {ms:.3g}" for name, ms in stages.items())
        print(f"{case.name:36s} {case.ms.p50:9.4g} ms{over}{parts}", flush=True)
        self.write(complete=False)


def without_places(given: Sequence[str]) -> list[str]:
    """The arguments less where results went, which is this machine's affair."""
    place = given.index("--output") if "--output" in given else len(given)
    return [*given[:place], *given[place + 2 :]]


def codes_of(received: Received, blocks: int) -> bytes:
    return b"".join(data for (block, _), data in sorted(received.items()) if block < blocks)


def check_equal(shape: Shape, device: torch.device, tokens: int, world_size: int) -> dict[str, Any]:
    """Ranks as threads on `device` beside the same on the CPU: their logits and their codes."""
    model = make_model(shape, torch.device("cpu"))
    codebook = make_codebook(model, shape)
    ids = torch.randint(
        0, shape.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(2)
    )
    want_received, want = record(model, codebook, ids, world_size)
    model.to(device)
    received, logits = record(model, codebook, ids.to(device), world_size)
    error = float((logits.cpu() - want).norm() / want.norm())
    direct = run_on_device(world_size, device, partial(logits_of, model, codebook, ids.to(device)))
    direct_error = max(float((got.cpu() - want).norm() / want.norm()) for got in direct)
    pairs = zip(received, want_received, strict=True)
    both = [(codes_of(a, shape.layers), codes_of(b, shape.layers)) for a, b in pairs]
    size = sum(len(a) for a, _ in both)
    if not size:
        raise ValueError(f"tokens: expected so many that codes are sent, got {tokens}")
    share = sum(x != y for a, b in both for x, y in zip(a, b, strict=True)) / size
    passed = max(error, direct_error) <= LOGITS_ERROR and share <= CODES_DIFFERENT
    return {
        **{"model": shape.name, "tokens": tokens, "world_size": world_size},
        **{"logits_error": error, "logits_error_on_device": direct_error},
        **{"bytes_different": share, "passed": passed},
    }


def logits_of(model: nn.Module, codebook: Codebook, ids: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    with Engine(model, codebook, mesh) as engine:
        logits: torch.Tensor = engine(input_ids=ids).logits
    return logits


def check(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    small = dataclasses.replace(TINY, name="llama, checked")
    shape, tokens = (small, 96) if args.small else (CHECKED, 384)
    return check_equal(shape, device, tokens, 3)


def compile_only(args: argparse.Namespace, device: torch.device) -> int:
    """Runs the ranks once, so that the compiled form of their kernels is in Triton's cache."""
    if args.compile == "check":
        check(args, device)
        return 0
    shape = TINY if args.small else LLAMA_1B
    model = make_model(shape, device)
    ids = torch.randint(0, shape.vocabulary, (1, args.tokens[0]), device=device)
    record(model, make_codebook(model, shape), ids, 2)
    return 0


def measure(args: argparse.Namespace, report: Report) -> bool:
    """Whether every case was tried before the time was up."""
    device, shape = report.device, TINY if args.small else LLAMA_1B
    began = time.monotonic()
    model = make_model(shape, device)
    codebook = make_codebook(model, shape)
    watch = Stopwatch(device, args.repeats)
    about: dict[str, Any] = {"model": shape.name, "H": shape.heads, "Hkv": shape.kv_heads}
    about |= {"d": shape.head_dim, "K": shape.codewords, "space": "kv", "groups": shape.kv_heads}
    kind = str(shape.dtype).removeprefix("torch.")
    for tokens in args.tokens:
        if args.seconds and time.monotonic() - began > args.seconds:
            return False
        ids = torch.randint(0, shape.vocabulary, (1, tokens), device=device)
        with torch.inference_mode():
            single = watch.time(partial(model, ids, use_cache=False, logits_to_keep=1))
        sizes = {**about, "tokens": tokens}
        report.add(Case(f"engine_single_T{tokens}", sizes, kind, "transformers sdpa", single))
        for world_size in args.world_sizes:
            if args.seconds and time.monotonic() - began > args.seconds:
                return False
            many = {**sizes, "world_size": world_size}
            for case in cases_of(model, codebook, ids, watch, single, many, kind):
                report.add(case)
    return True


def cases_of(
    model: nn.Module,
    codebook: Codebook,
    ids: torch.Tensor,
    watch: Stopwatch,
    single: Times,
    shape: dict[str, Any],
    dtype: str,
) -> Iterator[Case]:
    """Each rank alone, and all of them on links."""
    tokens, world_size = shape["tokens"], shape["world_size"]
    received, _ = record(model, codebook, ids, world_size)
    ranks = []
    for n in range(world_size):
        mesh = Replaying(n, world_size, received[n])
        rank = run_rank(model, codebook, ids, mesh, watch)
        ranks.append(rank)
        medians = {name: statistics.median(times) for name, times in rank.stages.items()}
        extra = {"stages": medians, "own_tokens": rank.tokens}
        extra["bytes_a_block"] = max(rank.sent.values(), default=0)
        name = f"engine_rank_T{tokens}_N{world_size}_r{n}"
        peers = {"single": single.p50}
        yield Case(name, {**shape, "rank": n}, dtype, "astra kv", rank.ms, None, peers, extra)
    yield from graph_cases(model, codebook, ids, watch, received, shape, dtype, ranks)
    for rate in RATES:
        ms = linked(ranks, rate, DELAY_MS)
        name = f"engine_T{tokens}_N{world_size}_{rate}mbit"
        sizes = {**shape, "mbit_per_s": rate, "rtt_ms": 2 * DELAY_MS}
        extra = {"from": "the ranks alone and the link model"}
        peers = {"single": single.p50}
        yield Case(name, sizes, dtype, "astra kv", Times(ms, ms, ms), None, peers, extra)


def graph_cases(
    model: nn.Module,
    codebook: Codebook,
    ids: torch.Tensor,
    watch: Stopwatch,
    received: Sequence[Received],
    shape: Mapping[str, Any],
    dtype: str,
    ranks: Sequence[Rank],
) -> Iterator[Case]:
    """The first and the last rank as graphs; where something cannot be captured, none, and why."""
    tokens, world_size = shape["tokens"], shape["world_size"]
    for n in (0, world_size - 1):
        mesh = Replaying(n, world_size, received[n])
        name = f"engine_graphs_T{tokens}_N{world_size}_r{n}"
        try:
            with Engine(model, codebook, mesh) as engine:
                pieces = capture(engine, watch.device, ids)
            ms = watch.time(pieces.replay)
            error = float((pieces.hidden - pieces.want).norm() / pieces.want.norm())
        except RuntimeError as reason:
            print(f"{name}: {type(reason).__name__}: {reason}"[:300], flush=True)
            if watch.device.type == "cuda":
                torch.cuda.synchronize(watch.device)
            continue
        extra = {"graphs": pieces.num_graphs, "error": error, "eager_ms": ranks[n].ms.p50}
        yield Case(name, {**shape, "rank": n}, dtype, "astra kv, graphs", ms, None, {}, extra)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model; as engine_small")
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths; 4k, 16k and 32k")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="results folder instead of bench/results")
    parser.add_argument("--seconds", type=float, help="start no case after so many")
    parser.add_argument(
        "--compile", choices=COMPILED, help="only run what it names once, to compile its kernels"
    )
    args = parser.parse_args(given)
    args.given = list(sys.argv[1:] if given is None else given)
    args.tokens = args.tokens or ([128] if args.small else [4096, 16_384, 32_768])
    return args


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu_engine: there is no CUDA device; --device cpu --small tries it")
        return 2
    report = Report(args, torch.device(args.device))
    if args.compile:
        return compile_only(args, report.device)
    equal = check(args, report.device)
    report.extra["equality"] = equal
    print(f"ranks on {args.device} beside ranks on the CPU: {equal}", flush=True)
    report.write(complete=False)
    complete = measure(args, report)
    print(report.write(complete))
    return int(not equal["passed"])


if __name__ == "__main__":
    raise SystemExit(main())
