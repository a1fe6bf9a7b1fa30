"""Measures the kernels beside their baselines and their rooflines.

    python -m bench.kernels                          # everything, on a GPU: a few minutes
    python -m bench.kernels --decisive               # what decides whether the goals are met
    python -m bench.kernels --only 'decode|codeword' # cases whose name the pattern finds
    python -m bench.kernels --device cpu --small     # tries the harness, on any machine

Writes bench/results/<device>/kernels.json after every case, and prints a table and what the times
say of the constants in astra_kernels/_triton/strategies.py. A case that fails its check gets no
time, is listed under "failed", and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu.environment import device_folder, nvidia_smi
from bench.kernels import cases as table
from bench.kernels import crossovers
from bench.kernels.ceilings import NOMINAL, measured_ceilings
from bench.kernels.run import REFUSALS, Clock, DeviceLost, failures, run
from bench.kernels.spec import Spec
from bench.kernels.timing import SAMPLES, Gpu
from bench.report import RESULTS, cores, cpu_name, write

COMPILED_BASELINES = {"flex_attention"}
PACKAGES = ("torch", "triton", "vector-quantize-pytorch", "flashinfer-python")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases to run, a regex")
    parser.add_argument("--decisive", action="store_true", help="the decisive cases alone")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th of them")
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes; written as kernels_small"
    )
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="on a CPU: the Triton kernels in its interpreter, in place of a CPU's own paths",
    )
    parser.add_argument("--output", type=Path, help="results folder instead of bench/results")
    parser.add_argument("--seconds", type=float, help="start no case after so many")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--name", default="kernels", help="of the result file")
    parser.add_argument("--tune", action="store_true", help="find the quickest tiles first")
    parser.add_argument("--resume", action="store_true", help="go on with the result file")
    parser.add_argument("--compile", metavar="I/N", help="only run every N-th case's kernels once")
    args = parser.parse_args(given)
    if args.interpret and not (args.device == "cpu" and args.small):
        parser.error("--interpret goes with --device cpu --small")
    if args.small and args.name == "kernels":
        args.name = "kernels_small"
    return args


def chosen(args: argparse.Namespace, done: Collection[str] = ()) -> list[Spec]:
    """The specs to run, without the variants whose cases are `done`."""
    largest = table.LARGEST_INTERPRETED if args.interpret else table.LARGEST
    specs = [s for s in table.specs() if not args.decisive or table.rank(s) < len(table.DECISIVE)]
    left = []
    for spec in specs[:: args.every]:
        variants = {
            impl: name
            for impl, name in spec.variants.items()
            if re.search(args.only, name) and name not in done
        }
        if variants:
            spec = dataclasses.replace(spec, variants=variants)
            left.append(table.small(spec, largest) if args.small else spec)
    if args.interpret:  # whose product of bf16 is wrong
        half = {torch.bfloat16: torch.float16}
        left = [dataclasses.replace(spec, dtype=half.get(spec.dtype, spec.dtype)) for spec in left]
    return left


class Report:
    """The result file of a run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.cases: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []
        self.extra: dict[str, Any] = {}
        self.device: str | None
        if args.device == "cuda":
            name = torch.cuda.get_device_name()
            self.folder, self.device = device_folder(name), name
            self.device += f", {cpu_name()}, {cores()} cores"
        else:
            self.folder, self.device = f"cpu-{cores()}core", None

    @property
    def path(self) -> Path:
        return (self.args.output or RESULTS) / self.folder / f"{self.args.name}.json"

    def resume(self) -> None:
        if self.path.is_file():
            old = json.loads(self.path.read_text())
            self.cases, self.failed = old["cases"], old["failed"]

    def done(self) -> set[str]:
        return {case["name"] for case in [*self.cases, *self.failed]}

    def write(self, complete: bool) -> Path:
        return write(
            self.args.name,
            self.cases,
            command=command(self.args),
            packages=installed(PACKAGES),
            folder=self.folder,
            device=self.device,
            results=self.args.output,
            extra={**self.extra, "complete": complete, "failed": self.failed},
        )


def installed(packages: Sequence[str]) -> list[str]:
    present = []
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        present.append(package)
    return present


def command(args: argparse.Namespace) -> str:
    words = ["python -m bench.kernels"]
    if args.device != "cuda":
        words.append(f"--device {args.device}")
    flags = ("decisive", "small", "interpret", "tune")
    words += [f"--{flag}" for flag in flags if getattr(args, flag)]
    if args.only:
        words.append(f"--only '{args.only}'")
    return " ".join(words)


def compile_only(args: argparse.Namespace, report: Report) -> int:
    """Runs what is compiled once, so that its compiled form is in a cache."""
    part, parts = (int(number) for number in args.compile.split("/"))
    wrong = 0
    for spec in chosen(args, report.done())[part::parts]:
        try:
            calls = spec.build(spec.shape, spec.dtype, torch.device(args.device))
            for impl in spec.variants:
                calls.ours[impl]()
            for name in COMPILED_BASELINES & calls.baselines.keys():
                calls.baselines[name]()
        except REFUSALS as reason:  # the run proper will say it in its place
            print(f"{next(iter(spec.variants.values()))}: {reason}"[:300], file=sys.stderr)
            wrong += 1
    return int(wrong > 0)


def tune(spec: Spec, device: torch.device) -> dict[str, Any]:
    import astra_kernels as ak

    calls = spec.build(spec.shape, spec.dtype, device)
    tiles: dict[str, Any] = {}
    for impl in spec.variants:
        tiles.update(ak.warmup(calls.ours[impl]))
    return tiles


def show(case: dict[str, Any]) -> None:
    over = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in case["over"].items())
    roofline, ours = case["floor_ms"], case["ms"]["p50"]
    rest = "".join(
        f" {kind} {case[f'{kind}_ms']:.4g}"
        for kind in ("cold", "graph", "eager")
        if f"{kind}_ms" in case
    )
    print(
        f"{case['name']:58s} {ours:9.4g} ms ({roofline / ours:4.0%} of the roofline){rest}"
        f" | over: {over} | error {case['error']:.1e}",
        flush=True,
    )


def measure(args: argparse.Namespace, report: Report) -> bool:
    """Whether every chosen case was tried."""
    started = time.monotonic()
    device = torch.device(args.device)
    clock = clock_of(args, report, device)
    for spec in chosen(args, report.done()):
        if args.seconds and time.monotonic() - started > args.seconds:
            return False
        try:
            if args.tune:
                try:
                    report.extra.setdefault("tiles", {}).update(tune(spec, device))
                except REFUSALS as reason:  # the run proper says whether the kernel works at all
                    print(f"    not tuned: {spec.family}: {reason}"[:300], flush=True)
            outcome = run(spec, clock)
        except DeviceLost as reason:
            report.failed += failures(spec, str(reason))
            report.write(complete=False)
            go_on_in_a_new_process(args, time.monotonic() - started)
        for note in outcome.notes:
            print(f"    left out: {note}", flush=True)
        for case in outcome.cases:
            report.cases.append(case.as_dict())
            show(report.cases[-1])
        for failure in outcome.failed:
            print(f"{failure['name']:58s} FAILED: {failure['why']}", flush=True)
        report.failed += outcome.failed
        report.write(complete=False)
        del outcome
        if clock.gpu is not None:
            torch.cuda.empty_cache()
    return True


def clock_of(args: argparse.Namespace, report: Report, device: torch.device) -> Clock:
    """How this run takes times; the device's ceilings are measured first, and reported."""
    cuda = args.device == "cuda"
    samples = min(args.samples, 15)
    ceilings = measured_ceilings(
        device, small=args.small, kernels=cuda or args.interpret, samples=samples
    )
    report.extra["ceilings"] = {
        "measured": {name: rate for name, rate in ceilings.known().items() if name != "fp32"},
        "nominal": NOMINAL.known(),
    }
    said = "  ".join(f"{name} {rate / 1e12:.3g}e12/s" for name, rate in ceilings.known().items())
    print(f"ceilings: {said}", flush=True)
    if cuda:  # clocks and temperature right behind a long matrix product
        report.extra["nvidia_smi"] = nvidia_smi()
    gpu = Gpu(args.samples) if cuda else None
    seconds = 0.0 if args.samples == 1 else 0.02 if args.small else 0.3
    return Clock(device, ceilings, gpu, seconds, samples)


def go_on_in_a_new_process(args: argparse.Namespace, spent: float) -> None:
    words = [word for word in sys.argv[1:] if word != "--resume"]
    if args.seconds:
        words += ["--seconds", str(max(1.0, args.seconds - spent))]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "bench.kernels", *words, "--resume"])


@contextlib.contextmanager
def interpreted(wanted: bool) -> Iterator[None]:
    """The ops' own choice on a CPU is Triton's kernels, which need TRITON_INTERPRET=1."""
    if not wanted:
        yield
        return
    from astra_kernels import _dispatch

    dispatch: Any = _dispatch
    plain = dispatch.choose

    def choose(op: str, impl: str, device: torch.device, dtype: torch.dtype, *uses: Any) -> Any:
        triton = impl == "auto" and dtype != torch.float64
        return plain(op, "triton" if triton else impl, device, dtype, *uses)

    dispatch.choose = choose
    try:
        yield
    finally:
        dispatch.choose = plain


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.kernels: there is no CUDA device; --device cpu --small tries the harness")
        return 2
    report = Report(args)
    if args.resume:
        report.resume()
    with torch.inference_mode(), interpreted(args.interpret):
        if args.compile:
            return compile_only(args, report)
        complete = measure(args, report)
    measured = crossovers.summary(report.cases)
    if args.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        measured["code"] = crossovers.as_code(10 * major + minor, measured)
        print(f"MEASURED in astra_kernels/_triton/strategies.py:\n    {measured['code']}")
    report.extra["crossovers"] = measured
    print(report.write(complete))
    if report.failed:
        print(f"{len(report.failed)} of {len(report.done())} cases failed their check")
    return int(bool(report.failed))


if __name__ == "__main__":
    raise SystemExit(main())
