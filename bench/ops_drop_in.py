"""What a drop-in for PyTorch's attention costs on a CPU: masks, windows, gradients, plain calls.

    python -m bench.ops_drop_in                    # writes bench/results/<device>/ops_drop_in.json
    python -m bench.ops_drop_in --before FOLDER    # plain calls beside those of an older checkout

The baseline `sdpa` is torch's own function for the same call, `index_select_sdpa` rows gathered
from the tables and torch's autograd. Backwards are timed alone, on a graph that is kept.
`peak_bytes` are what a process of its own needed at most for a forward and a backward, over what it
had after one before, with freed memory given back: the least of three processes. With `--before` a
process of each checkout makes the same calls in turns: `before` is the older one.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import astra_kernels as ak
from bench.ops import K, expanded, timed
from bench.report import Case, Times, write

HEADS, KV_HEADS, DIM = 9, 3, 64
ROUNDS = 200

# This checkout's benchmark with the `astra_kernels` of the folder that it is given.
WORKER = """
import sys, bench
sys.path.insert(0, sys.argv[1])
from bench.ops_drop_in import serve_calls
serve_calls()
"""


def inputs(rows: int, tokens: int, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(1, HEADS, rows, DIM, requires_grad=grad)
    key = torch.randn(1, KV_HEADS, tokens, DIM, requires_grad=grad)
    return query, key, torch.randn(1, KV_HEADS, tokens, DIM, requires_grad=grad)


def shape_of(rows: int, tokens: int) -> dict[str, object]:
    return {"B": 1, "M": rows, "N": tokens, "H": HEADS, "Hkv": KV_HEADS, "d": DIM}


@torch.no_grad()
def forward_cases(rows: int) -> Iterator[Case]:
    query, key, value = inputs(rows, rows)
    distance = torch.arange(rows)[:, None] - torch.arange(rows)
    masks = {
        "bias": torch.randn(1, HEADS, rows, rows),
        "bias_shared": torch.randn(rows, rows),
        "mask_bool": torch.rand(1, 1, rows, rows) > 0.3,
        "window": (distance >= 0) & (distance <= rows // 8),
    }
    for name, mask in masks.items():

        def ours(mask: Tensor = mask, name: str = name) -> object:
            if name == "window":
                return ak.attention(query, key, value, window=(rows // 8, 0))
            return ak.attention(query, key, value, attn_mask=mask)

        def theirs(mask: Tensor = mask) -> object:
            return sdpa(query, key, value, attn_mask=mask, enable_gqa=True)

        yield timed(f"drop_in_{name}", shape_of(rows, rows), {"ours": ours, "sdpa": theirs})


def backward_of(out: Tensor, args: tuple[Tensor, ...]) -> Callable[[], object]:
    weight = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, args, weight, retain_graph=True)


def backward_cases(rows: int) -> Iterator[Case]:
    for name, causal in (("backward", False), ("backward_causal", True)):
        args = inputs(rows, rows, grad=True)
        ours = backward_of(ak.attention(*args, is_causal=causal)[0], args)
        theirs = backward_of(sdpa(*args, is_causal=causal, enable_gqa=True), args)
        yield timed(f"drop_in_{name}", shape_of(rows, rows), {"ours": ours, "sdpa": theirs})
    args = inputs(rows, rows, grad=True)
    out, lse = ak.attention(*args)
    weights = (torch.randn_like(out), torch.randn_like(lse))
    theirs = backward_of(sdpa(*args, enable_gqa=True), args)

    def through_lse() -> object:
        return torch.autograd.grad((out, lse), args, weights, retain_graph=True)

    shape = shape_of(rows, rows)
    yield timed("drop_in_backward_lse", shape, {"ours": through_lse, "sdpa": theirs})


def coded_cases(rows: int, tokens: int) -> Iterator[Case]:
    query = torch.randn(1, HEADS, rows, DIM, requires_grad=True)
    tables = torch.randn(2, KV_HEADS, 1, K, DIM, requires_grad=True)
    codes = torch.randint(0, K, (1, tokens, KV_HEADS), dtype=torch.int32)
    args = (query, tables)
    ours = backward_of(ak.coded_attention(query, codes, tables[0], tables[1])[0], args)
    key, value = expanded(codes, tables)
    theirs = backward_of(sdpa(query, key, value, enable_gqa=True), args)
    shape = shape_of(rows, tokens) | {"K": K}
    yield timed("drop_in_backward_coded", shape, {"ours": ours, "index_select_sdpa": theirs})


def peak_bytes(subject: str, rows: int) -> int:
    """What a forward and a backward need at most, in processes of their own."""
    command = [sys.executable, "-m", "bench.ops_drop_in", "--peak", subject, "--rows", str(rows)]
    runs = (subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(3))
    return min(int(run.stdout) for run in runs)


def print_peak(subject: str, rows: int) -> None:
    def run() -> None:
        args = inputs(rows, rows, grad=True)
        out = ak.attention(*args)[0] if subject == "ours" else sdpa(*args, enable_gqa=True)
        out.sum().backward()

    run()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
    before = memory_kb("VmRSS")
    run()
    print((memory_kb("VmHWM") - before) * 1024)


def memory_kb(field: str) -> int:
    """Of this process: VmRSS what it has, VmHWM the most that it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def plain_calls() -> dict[str, Callable[[], object]]:
    """Calls without new arguments, the smallest and one of usual size."""
    one, many = inputs(1, 1), inputs(256, 256)
    tables = torch.randn(2, KV_HEADS, 1, K, DIM)
    codes = torch.randint(0, K, (1, 256, KV_HEADS), dtype=torch.int32)
    return {
        "attention_1": lambda: ak.attention(*one),
        "attention_256": lambda: ak.attention(*many, is_causal=True),
        "coded_1": lambda: ak.coded_attention(one[0], codes[:, :1], tables[0], tables[1]),
        "mixed_256": lambda: ak.mixed_attention(*many, codes, tables[0], tables[1]),
    }


@torch.no_grad()
def serve_calls() -> None:
    """Makes the calls that stdin names, and says how long one took, in ms."""
    torch.manual_seed(0)
    calls = plain_calls()
    for line in sys.stdin:
        name, repeats = line.split()
        start = time.perf_counter()
        for _ in range(int(repeats)):
            calls[name]()
        print((time.perf_counter() - start) / int(repeats) * 1e3, flush=True)


def before_cases(folder: Path, rounds: int) -> Iterator[Case]:
    """The older checkout has its own `astra_kernels`, and this file's calls."""
    workers = {}
    for name, root in (("ours", Path(__file__).parents[1]), ("before", folder)):
        workers[name] = subprocess.Popen(
            [sys.executable, "-P", "-c", WORKER, str(root.resolve())],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(worker: str, call: str, repeats: int) -> float:
        process = workers[worker]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{call} {repeats}\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    try:
        for call in plain_calls():
            taken: dict[str, list[float]] = {"ours": [], "before": []}
            repeats = max(1, int(5 / max(ask("ours", call, 20), 1e-3)))
            for _ in range(rounds):
                for worker, times in taken.items():
                    times.append(ask(worker, call, repeats))
            ours = sorted(taken["ours"])
            at = [ours[int(len(ours) * share)] for share in (0.2, 0.5, 0.8)]
            peers = {"before": median(taken["before"])}
            print(f"plain_{call}  ours {at[1]:.4f} ms  before {peers['before']:.4f}", flush=True)
            yield Case(f"plain_{call}", {}, "float32", "auto", Times(*at), None, peers)
    finally:
        for process in workers.values():
            process.terminate()
            process.wait()


def cases(rows: int) -> Iterator[Case]:
    yield from forward_cases(rows)
    yield from backward_cases(rows)
    yield from coded_cases(rows, rows)
    peaks = {name: peak_bytes(name, rows) for name in ("ours", "sdpa")}
    args = inputs(rows, rows, grad=True)

    def step(call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(*args).sum(), args)

    steps = {
        "ours": step(lambda query, key, value: ak.attention(query, key, value)[0]),
        "sdpa": step(lambda query, key, value: sdpa(query, key, value, enable_gqa=True)),
    }
    case = timed("drop_in_step", shape_of(rows, rows), steps)
    yield replace(case, extra={"peak_bytes": peaks})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.ops_drop_in", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--before", type=Path, help="a checkout of before, with its extension built"
    )
    parser.add_argument("--rows", type=int, default=1024, help="queries and keys")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of --before")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--peak", choices=("ours", "sdpa"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.peak:
        print_peak(args.peak, args.rows)
        return
    done = list(cases(args.rows))
    if args.before:
        done += before_cases(args.before, args.rounds)
    if not args.no_write:
        command = "python -m bench.ops_drop_in" + (" --before FOLDER" if args.before else "")
        print(write("ops_drop_in", done, command=command, packages=("torch",)))


if __name__ == "__main__":
    main()
