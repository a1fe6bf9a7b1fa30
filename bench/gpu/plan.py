"""The stages of both parts, what they run and how long they may take."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.environment import cuda_ptxas, find_tool
from bench.gpu.running import SECONDS, Stage
from bench.tree import ROOT

# Ignored by version control, and kept between the parts: the second finds compiled what the first
# compiled, and goes on with its results.
CACHE = ROOT / "build" / "gpu-cache"
WHEELS = ROOT / "build" / "gpu-wheels"
SITE = CACHE / "site"

PARTS = {"A": 285.0, "B": 295.0}  # seconds

# What is tuned, in a file of its own: one case of each kernel that has tiles to choose from.
TUNED = (
    "^(codeword_M1024_N4096_|fused_lookup_(rotary|subvectors)_M256_N8192_H32"
    "|expanded_lookup_rotary_M1024_N8192_H32|decode_rotary_fused_M1_N131072"
    "|encode_(bfloat16|float32)_D(768|4096)_G)"
)
WGMMA_NOTE = (
    "the sanitizers are known to take operands of wgmma, and copies of the asynchronous proxy, for "
    "faults (NVIDIA/compute-sanitizer-samples#19): read what it says before believing it"
)
GRAPHS = "tests/triton_kernels/test_graphs.py"

Group = tuple[Stage, ...]


@dataclass(frozen=True)
class Setup:
    """What a run is of.

    Attributes:
        output: the folder of its results.
        cores: that it may use.
        rehearse: 0: on a GPU. Else Triton's interpreter stands in for it, with small shapes, and
            each n-th of the calls, cases and tests is run.
    """

    output: Path
    cores: int
    rehearse: int = 0

    @property
    def workers(self) -> int:
        return max(1, min(14, self.cores - 2))

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def every(self) -> int:
        return max(1, self.rehearse)

    def python(self, module: str, *rest: str) -> tuple[str, ...]:
        return (sys.executable, "-m", module, *rest)

    def smoke(self, parts: int) -> tuple[tuple[str, ...], ...]:
        """Every kernel once, in so many processes."""
        words = self.python("bench.kernels.smoke", "--device", self.device)
        many = parts * self.every
        return tuple((*words, "--part", f"{part}/{many}") for part in range(parts))

    def bench(self, *rest: str) -> tuple[str, ...]:
        words = self.python("bench.kernels", "--output", str(self.output), *rest)
        if self.rehearse:
            words += ("--device", "cpu", "--small", "--interpret", "--samples", "1")
            words += ("--every", str(self.every))
        return words

    def compile(self, *rest: str) -> tuple[tuple[str, ...], ...]:
        """The kernels of benchmarks, compiled by as many processes as there are cores for."""
        many = self.workers
        return tuple(self.bench("--compile", f"{part}/{many}", *rest) for part in range(many))

    def pytest(self, *rest: str, workers: int) -> tuple[str, ...]:
        """pytest as it can be run here: with what plugins there are, and no warning an error."""
        words = ["-v", "--tb=short", "-p", "no:cacheprovider", "-p", "bench.gpu.pytest_log"]
        words += ["--device", self.device, "--every", str(self.every), "-W", "default"]
        words += ["--maxfail=50"]
        if workers > 1 and importlib.util.find_spec("xdist"):
            words += ["-n", str(workers)]
        if importlib.util.find_spec("pytest_timeout") is None:  # then pyproject's option is unknown
            words += ["-o", "addopts=-ra", "-o", "filterwarnings="]
        return self.python("pytest", *words, *rest)


def part_a(setup: Setup) -> list[Group]:
    """Whether the kernels are right, how fast the decisive cases are, and the engine with them."""
    ptxas = cuda_ptxas()
    other = (("TRITON_PTXAS_PATH", ptxas or ""), ("TRITON_CACHE_DIR", str(CACHE / "triton-ptxas")))
    engine = setup.python("bench.gpu_engine", "--output", str(setup.output))
    if setup.rehearse:
        engine += ("--device", "cpu", "--small")
    compiling = setup.compile("--decisive")
    compiling += tuple((*engine, "--compile", part) for part in ("check", "measure"))
    return [
        beginning(setup),
        (Stage("smoke", setup.smoke(setup.workers), 60, 20),),
        (
            Stage(
                *("smoke_cuda_ptxas", setup.smoke(setup.workers), 50, 12),
                env=other if ptxas else (),
                missing=None if ptxas or setup.rehearse else "no ptxas but Triton's is here",
                note="a call that is wrong here alone, or in `smoke` alone, is the assembler's",
            ),
        ),
        (Stage("compile", compiling, 55, 20),),
        (Stage("decisive", (setup.bench("--decisive", "--seconds", SECONDS),), 110, 60),),
        (Stage("engine", ((*engine, "--seconds", SECONDS),), 110, 45),),
    ]


def part_b(setup: Setup) -> list[Group]:
    """The tests and sanitizers side by side; then, alone, what is left to measure."""
    workers = max(1, setup.workers - 4)
    # Ahead-of-time compilation needs no GPU and is tested elsewhere.
    left_out = [f"--ignore={path}" for path in ("tests/triton_kernels/test_aot.py", GRAPHS)]
    tests = setup.pytest("tests/triton_kernels", *left_out, workers=workers)
    library = setup.pytest(GRAPHS, workers=min(3, setup.workers))
    every = setup.bench("--resume", "--seconds", SECONDS)
    tuned = setup.bench("--tune", "--name", "kernels_tuned", "--only", TUNED, "--seconds", SECONDS)
    return [
        beginning(setup),
        (
            Stage("tests", (tests,), 150, 40),
            Stage("library", (library,), 120, 25),
            sanitizer(setup, "memcheck", parts=min(3, setup.workers), seconds=110),
            sanitizer(setup, "racecheck", parts=1, seconds=60),
        ),
        (Stage("compile", setup.compile("--resume"), 45, 15),),
        (Stage("benchmarks", (every,), 140, 50),),
        (Stage("tuned", (tuned,), 240, 0, spare=True),),
    ]


def beginning(setup: Setup) -> Group:
    wheels = sorted(str(path) for path in WHEELS.glob("*.whl"))
    # Every package is pure Python, and its needs are among them or there already.
    install = ("install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade")
    packages = setup.python("pip", *install, "--target", str(SITE), *wheels)
    absent = None if wheels else f"no wheels in {WHEELS.relative_to(ROOT)}; see --prepare"
    return (
        Stage("environment", (setup.python("bench.gpu.environment"),), 40, 8),
        Stage("build", (build_command(),), 90, 8),
        Stage("packages", (packages,), 30, 5, missing=absent),
    )


def sanitizer(setup: Setup, tool: str, *, parts: int, seconds: float) -> Stage:
    """Smoke calls under compute-sanitizer; in a rehearsal as they are."""
    program = find_tool("compute-sanitizer")
    words: tuple[str, ...] = ()
    if not setup.rehearse:
        words = (program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
        words += ("--launch-timeout", "120", "--target-processes", "application-only")
        words += ("--print-limit", "20")
    # Without the caching allocator every tensor is an allocation of its own.
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),) if tool == "memcheck" else ()
    return Stage(
        *(tool, tuple((*words, *smoke) for smoke in setup.smoke(parts)), seconds, 25),
        env=uncached,
        missing=None if program or setup.rehearse else "compute-sanitizer is not here",
        note=WGMMA_NOTE,
    )


def build_command() -> tuple[str, ...]:
    """Nothing where the extension loads already; else in place, with the tools that are there."""
    # the runtime refuses a build of other sources
    loads = "import astra_kernels._C as c, astra_runtime.wire; print('already built:', c.__file__)"
    build = "import runpy, sys; sys.argv = ['setup.py', 'build_ext', '--inplace']; "
    build += "runpy.run_path('setup.py', run_name='__main__')"
    return (
        sys.executable,
        "-c",
        f"try:\n    {loads}\nexcept ImportError:\n    {build}\n",
    )


def environment(scratch: Path, commit: str, rehearse: bool) -> Mapping[str, str]:
    """Compiled kernels are kept in `CACHE`; what was tuned before is not used."""
    env = dict(os.environ)
    path = [str(ROOT), str(ROOT / "python"), env.get("PYTHONPATH", ""), str(SITE)]
    env.pop("TRITON_INTERPRET", None)
    env |= {
        "BENCH_COMMIT": commit,
        "TRITON_CACHE_DIR": str(CACHE / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # the stages are parallel themselves
        "ASTRA_CACHE": str(scratch / "astra"),
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return env | {"TRITON_INTERPRET": "1"} if rehearse else env
