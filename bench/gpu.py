"""Everything that needs a GPU, by one command: build, tests, benchmarks, sanitizers.

    python -m bench.gpu --output DIR [--minutes 7.5] [--commit SHA] [--only STAGE …] [--dry-run]

Stages have time limits of their own, and leave time for what comes after them; one that fails does
not stop the others, and what was measured until a limit is kept. DIR gets `summary.json` (stage,
result, seconds, last lines), the stages' output in `log.txt`, the benchmarks' files and pictures:
at most eight files. The exit status is 0 if no stage failed.

The tree may be a copy without its history: --commit says then what it is of. Needs torch with CUDA,
Triton, pytest; cmake, ninja and pybind11 where astra_kernels._C is not built. No network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_FILES = 8
SECONDS = "{seconds}"  # in a command: how long it may go on, so that it ends by itself
LAST_LINES = 25
KEPT_OF_LOG = 60_000  # characters of a stage's output in log.txt

# What is tuned, in a file of its own: one case of each kernel that has tiles to choose from.
TUNED = (
    "^(codeword_M1024_N4096_|fused_lookup_(rotary|subvectors)_M256_N8192_H32"
    "|expanded_lookup_rotary_M1024_N8192_H32|decode_rotary_fused_M1_N131072"
    "|encode_(bfloat16|float32)_D(768|4096)_G)"
)


@dataclass(frozen=True)
class Stage:
    """seconds: its limit; least: what earlier stages must leave it; needs: a tool on PATH."""

    name: str
    commands: tuple[tuple[str, ...], ...]  # run side by side
    seconds: float
    least: float
    env: tuple[tuple[str, str], ...] = ()
    needs: str | None = None


@dataclass(frozen=True)
class Result:
    """result: passed, failed, timed out or skipped."""

    stage: str
    result: str
    seconds: float
    status: int | None
    command: str
    last_lines: tuple[str, ...]


def pytest_command(*rest: str, workers: int) -> tuple[str, ...]:
    """pytest as it can be run here: with what plugins there are, and no warning an error."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "cuda"]
    words += ["-W", "default", "--maxfail=50"]
    if workers > 1 and importlib.util.find_spec("xdist"):
        words += ["-n", str(workers)]
    if importlib.util.find_spec("pytest_timeout") is None:  # then pyproject's option is unknown
        words += ["-o", "addopts=-ra", "-o", "filterwarnings="]
    return (*words, *rest)


def stages(results: Path, cores: int) -> list[Stage]:
    python = sys.executable
    workers = max(1, min(12, cores - 2))
    bench = (python, "-m", "bench.kernels", "--output", str(results))
    compiling = tuple(
        (python, "-m", "bench.kernels", "--compile", f"{part}/{workers}") for part in range(workers)
    )
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--launch-timeout", "120")
    sanitizer += ("--target-processes", "application-only", "--print-limit", "20")
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    smoke = (python, "-m", "bench.kernels.smoke")
    smokes = tuple((*smoke, "--part", f"{part}/{workers}") for part in range(workers))
    memcheck, racecheck = ((*sanitizer, "--tool", f"{t}check", *smoke) for t in ("mem", "race"))
    # Ahead-of-time compilation needs no GPU and is tested elsewhere.
    graphs = "tests/triton_kernels/test_graphs.py"
    left_out = [f"--ignore={path}" for path in ("tests/triton_kernels/test_aot.py", graphs)]
    tests = pytest_command("tests/triton_kernels", *left_out, workers=workers)
    on_cuda = pytest_command(graphs, workers=min(4, workers))
    pictures = (python, "-m", "bench.kernels.plots", "--results", str(results))
    return [
        Stage("build", (build_command(),), 90, 10),
        Stage("smoke", smokes, 60, 20),  # compiles what the sanitizers then run
        Stage("tests", (tests,), 150, 40),
        Stage("compile", compiling, 60, 20),
        Stage("benchmarks", ((*bench, "--seconds", SECONDS),), 200, 110),
        Stage("library", (on_cuda,), 60, 25),
        Stage("memcheck", (memcheck,), 60, 25, uncached, sanitizer[0]),
        Stage("racecheck", (racecheck,), 60, 25, (), sanitizer[0]),
        Stage("plots", (pictures,), 20, 8),
        Stage("tuned", ((*bench, "--tune", "--name", "kernels_tuned", "--only", TUNED),), 240, 0),
    ]  # fmt: skip


def build_command() -> tuple[str, ...]:
    """Nothing where the extension loads already; else in place, with the tools that are there."""
    loads = "import astra_kernels._C as c; print('already built:', c.__file__)"
    build = "import runpy, sys; sys.argv = ['setup.py', 'build_ext', '--inplace']; "
    build += "runpy.run_path('setup.py', run_name='__main__')"
    return (
        sys.executable,
        "-c",
        f"try:\n    {loads}\nexcept ImportError:\n    {build}\n",
    )


def environment(scratch: Path) -> dict[str, str]:
    """Caches in a folder of this run: nothing old is used, and a read-only home does no harm."""
    env = dict(os.environ)
    env.pop("TRITON_INTERPRET", None)
    path = [str(ROOT), str(ROOT / "python"), env.get("PYTHONPATH", "")]
    env |= {
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "ASTRA_CACHE": str(scratch / "astra"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return env


def run_stage(stage: Stage, limit: float, env: Mapping[str, str], log: Path) -> Result:
    shown = " ".join(stage.commands[0])
    if len(stage.commands) > 1:
        shown += f"   (and {len(stage.commands) - 1} more)"
    if stage.needs is not None and shutil.which(stage.needs, path=env.get("PATH")) is None:
        return Result(stage.name, "skipped", 0.0, None, shown, (f"{stage.needs} is not here",))
    start = time.monotonic()
    told = str(max(1.0, limit - 20))
    outputs = [log.with_name(f"{stage.name}.{part}") for part in range(len(stage.commands))]
    running = []
    for words, path in zip(stage.commands, outputs, strict=True):
        with path.open("wb") as output:
            running.append(
                subprocess.Popen(
                    [told if word == SECONDS else word for word in words],
                    cwd=ROOT,
                    env={**env, **dict(stage.env)},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    late = False
    for process in running:
        try:
            process.wait(max(0.1, start + limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
            stop(process)
    seconds = time.monotonic() - start
    status = max((-9 if p.returncode is None else p.returncode for p in running), key=abs)
    text = "\n".join(path.read_text(errors="replace") for path in outputs)
    with log.open("a") as output:
        output.write(f"==== {stage.name}: {shown}\n{text[-KEPT_OF_LOG:]}\n")
    result = "timed out" if late else "passed" if status == 0 else "failed"
    lines = tuple(line[:300] for line in text.strip().splitlines()[-LAST_LINES:])
    return Result(stage.name, result, round(seconds, 1), status, shown, lines)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and its children; an interrupt first, on which pytest says what it has."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(6.0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10.0)


def describe_device(env: Mapping[str, str]) -> dict[str, object]:
    code = (
        "import json, torch, sys; p = torch.cuda.get_device_properties(0);"
        "print(json.dumps({'device': p.name, 'memory': p.total_memory,"
        " 'processors': p.multi_processor_count, 'torch': torch.__version__,"
        " 'cuda': torch.version.cuda, 'python': sys.version.split()[0]}))"
    )
    words = [sys.executable, "-c", code]
    try:
        done = subprocess.run(
            words, env=dict(env), cwd=ROOT, capture_output=True, text=True, timeout=90
        )
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return {"device": None}


def copy_results(results: Path, output: Path) -> list[str]:
    """What fits beside summary.json and log.txt: the numbers first, then the pictures."""
    numbers, pictures = (sorted(results.rglob(f"*.{kind}")) for kind in ("json", "png"))
    names = []
    for path in [*numbers[:2], *pictures[: MOST_FILES - 4]]:
        shutil.copyfile(path, output / path.name)
        names.append(path.name)
    return names


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all stages together")
    parser.add_argument("--commit", help="of the tree, where it is a copy without its history")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages alone")
    parser.add_argument("--dry-run", action="store_true", help="print the stages and stop")
    args = parser.parse_args(given)
    began = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="astra-gpu-"))
    results = scratch / "results"
    chosen = stages(results, len(os.sched_getaffinity(0)))
    if args.only:
        unknown = set(args.only) - {stage.name for stage in chosen}
        if unknown:
            parser.error(f"no stage {', '.join(sorted(unknown))}")
        chosen = [stage for stage in chosen if stage.name in args.only]
    if args.dry_run:
        for stage in chosen:
            print(f"{stage.name:11s} up to {stage.seconds:3.0f} s  {' '.join(stage.commands[0])}")
        shutil.rmtree(scratch)
        return 0
    for folder in (args.output, results, scratch / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    env = environment(scratch)
    if args.commit:
        env["BENCH_COMMIT"] = args.commit
    summary: dict[str, object] = {**describe_device(env), "commit": args.commit}
    done: list[Result] = []
    for place, stage in enumerate(chosen):
        left = args.minutes * 60 - (time.monotonic() - began)
        limit = min(stage.seconds, left - sum(later.least for later in chosen[place + 1 :]))
        if limit < 5:
            command = " ".join(stage.commands[0])
            result = Result(stage.name, "skipped", 0.0, None, command, ("no time was left",))
        else:
            result = run_stage(stage, limit, env, scratch / "logs" / "log.txt")
        done.append(result)
        print(f"{stage.name:11s} {result.result:9s} {result.seconds:6.1f} s", flush=True)
        if result.result != "passed":
            print("    " + "\n    ".join(result.last_lines), flush=True)
        summary["stages"] = [{**asdict(one), "counts": counts(one)} for one in done]
        summary["files"] = copy_results(results, args.output)
        (args.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        log = scratch / "logs" / "log.txt"
        if log.is_file():
            shutil.copyfile(log, args.output / "log.txt")
    shutil.rmtree(scratch, ignore_errors=True)
    failed = [one.stage for one in done if one.result in ("failed", "timed out")]
    failed = [name for name in failed if name != "tuned"]  # it takes what time is left
    print(f"failed: {', '.join(failed) or 'nothing'}; {args.output}")
    return int(bool(failed))


def counts(result: Result) -> dict[str, int]:
    """What pytest says it passed, failed and skipped."""
    text = " ".join(result.last_lines[-3:])
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?)", text)
    return {word: int(number) for number, word in found}


if __name__ == "__main__":
    raise SystemExit(main())
