"""Time to first token beside llama.cpp, CTranslate2 and torch: SmolLM2, one prompt, one run.

    make rivals                 # their packages, once, into .venv-rivals: compiles llama.cpp;
                                # not needed for `--methods astra torch_eager`
    python -m bench.rivals [--rounds 4] [--tokens 1024] [--mbit 10] [--rtt-ms 2]

Every method is a process of its own with one thread (single devices also with two), which stays
loaded and sleeps while the others run; in each round all run once, in turns. Our two ranks and
llama.cpp's two processes (`--rpc`) are in network namespaces behind one user-space switch; there
llama.cpp keeps half of the layers on the other one, ours halves the tokens. Single devices are on
core 0. The clock starts with the prompt's token ids in memory and stops with the first token known.
A method in full precision that gives another first token than torch fails the run; that of the
others is noted. Writes latency_rivals.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from astra_runtime.console import say
from astra_runtime.store import load_model, load_tokenizer, model_folder
from astra_runtime.texts import builtin_text, token_windows
from astra_runtime.transport.certificates import ephemeral_keys
from bench import codebooks
from bench.link.model import Link
from bench.link.rank import popen_options
from bench.link.switch import Namespaces
from bench.report import ROOT, Case, command_line, percentiles, quiet_transformers, write
from bench.rivals.methods import METHODS, SERVER, Settings

PYTHON: Final = ROOT / ".venv-rivals/bin/python"
FILES: Final = ROOT / "build/rivals"
REFERENCE: Final = "torch eager float32"
EXACT: Final = ("float32", "F32")  # forms whose first token has to be torch's


@dataclass(frozen=True)
class Method:
    """One row: `ranks` processes of `threads` threads each."""

    method: str
    form: str
    threads: int = 1
    ranks: int = 1

    @property
    def name(self) -> str:
        words = self.method.replace("_", " ").replace("llama cpp", "llama.cpp")
        devices = f", {self.ranks} devices" if self.ranks > 1 else ""
        return f"{words} {self.form}{devices}" + (f", {self.threads} threads" * (self.threads > 1))

    @property
    def ours(self) -> bool:
        return self.method == "astra"

    @property
    def own_environment(self) -> bool:
        """Whether the rivals' packages are needed."""
        return not (self.ours or self.method.startswith("torch"))


def methods(threads: Sequence[int], rpc: Sequence[str]) -> list[Method]:
    """All that is compared."""
    single = [("torch_eager", "float32"), ("torch_compiled", "float32")]
    single += [("astra", form) for form in ("float32", "int8")]
    single += [("ctranslate2", form) for form in ("float32", "int8")]
    single += [("llama_cpp", form) for form in ("F32", "Q8_0", "Q4_0")]
    found = [Method(*each, count) for count in threads for each in single]
    found += [Method("astra", form, ranks=2) for form in ("float32", "int8")]
    return found + [Method("llama_cpp_rpc", form, ranks=2) for form in rpc]


class Running:
    """The processes of a method, the first of which say how long each run takes."""

    def __init__(self, method: Method, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self.method, self.processes = method, processes
        self.samples: list[dict[str, Any]] = []

    def wait_ready(self) -> None:
        for process in self.processes:
            self._line(process)

    def run(self) -> None:
        """Once, on all its processes."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(b"run\n")
            process.stdin.flush()
        answers = [self._line(process) for process in self.processes]
        known = [answer for answer in answers if answer["token"] is not None]
        first = min(known, key=lambda answer: float(answer["seconds"]))
        busiest = max(float(answer["processor"]) for answer in answers)
        self.samples.append({**first, "processor": busiest})

    def _line(self, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.method.name} has ended; what it said stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def row(self, torch_token: int) -> dict[str, Any]:
        """As the result has it."""
        seconds = [1e3 * sample["seconds"] for sample in self.samples]
        token = self.samples[-1]["token"]
        return {
            "method": self.method.method,
            "name": self.method.name,
            "form": self.method.form,
            "devices": self.method.ranks,
            "threads": self.method.threads,
            "ms": asdict(percentiles(seconds)),
            "samples_ms": seconds,
            "processor_ms": percentiles([1e3 * s["processor"] for s in self.samples]).p50,
            "token": token,
            "same_token": token == torch_token,
        }


class Launcher:
    """Starts the methods' processes, and ends them all."""

    def __init__(self, options: argparse.Namespace, shared: Settings, net: Namespaces) -> None:
        self.options, self.shared, self.net = options, shared, net
        self._processes: list[subprocess.Popen[bytes]] = []
        self._port = 5000

    def start(self, method: Method) -> Running:
        setup = replace(self.shared, method=method.method, form=method.form, threads=method.threads)
        self._port += 1
        if method.method == "llama_cpp_rpc":
            setup = replace(setup, server=f"{self.net.addresses[1]}:{self._port}")
            self._launch(replace(setup, method=SERVER, core=1), method, rank=1)
            return Running(method, [self._launch(setup, method, rank=0)])
        if method.ranks == 1:
            return Running(method, [self._launch(setup, method)])
        addresses = [f"{address}:{self._port}" for address in self.net.addresses]
        setup = replace(setup, addresses=addresses)
        ranks = range(method.ranks)
        return Running(
            method,
            [self._launch(replace(setup, rank=r, core=r), method, rank=r) for r in ranks],
        )

    def _launch(
        self, setup: Settings, method: Method, rank: int | None = None
    ) -> subprocess.Popen[bytes]:
        python = self.options.python if method.own_environment else sys.executable
        command = [str(python), "-m", "bench.rivals.methods", json.dumps(asdict(setup))]
        options = popen_options() | {"stdin": subprocess.PIPE}
        options["env"] |= {"OMP_NUM_THREADS": str(setup.threads)}
        start = subprocess.Popen if rank is None else lambda *a, **k: self.net.launch(rank, *a, **k)
        process: subprocess.Popen[bytes] = start(command, **options)
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


@contextlib.contextmanager
def launcher(options: argparse.Namespace, prompt: Path) -> Iterator[Launcher]:
    """Two namespaces behind a switch, and keys for our ranks."""
    shared = Settings(
        "", "", 1, 0, str(model_folder("smollm2")), str(FILES), str(prompt),
        codebook=str(Path(options.codebook).resolve()),
    )  # fmt: skip
    with Namespaces(2, Link(options.mbit, rtt_ms=options.rtt_ms)) as net, ephemeral_keys(2) as keys:
        running = Launcher(options, replace(shared, keys=str(keys)), net)
        try:
            yield running
        finally:
            running.close()


def measure(options: argparse.Namespace, prompt: Path) -> list[dict[str, Any]]:
    """The row of every method."""
    every = [m for m in methods(options.threads, options.rpc) if m.method in options.methods]
    with launcher(options, prompt) as starter:
        running = []
        for method in every:  # one at a time, or all would load and compile at once
            say(f"starting {method.name}")
            running.append(starter.start(method))
            running[-1].wait_ready()
        for number in range(options.rounds):
            for each in running[:: -1 if number % 2 else 1]:
                each.run()
                sample = each.samples[-1]
                say(
                    f"round {number + 1} of {options.rounds}: {each.method.name} "
                    f"{sample['seconds']:.2f} s, processor {sample['processor']:.2f} s"
                )
    reference = next(each for each in running if each.method.name == REFERENCE)
    rows = [each.row(reference.samples[-1]["token"]) for each in running]
    check_tokens(rows)
    return rows


def check_tokens(rows: Sequence[dict[str, Any]]) -> None:
    """Refuses a method of full precision that computes something else than torch."""
    for row in rows:
        one_device = row["devices"] == 1 or row["method"] != "astra"  # codes are no full precision
        if one_device and row["form"] in EXACT and not row["same_token"]:
            raise RuntimeError(f"{row['name']}: expected torch's first token, got {row['token']}")


def cases_of(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> list[Case]:
    """Our two ranks, beside everything on one thread a device."""
    by_name = {row["name"]: row for row in rows}
    peers = {
        row["name"]: row["ms"]["p50"]
        for row in rows
        if row["threads"] == 1 and not (row["method"] == "astra" and row["devices"] == 2)
    }
    cases = []
    for form in ("float32", "int8"):
        row, single = by_name[f"astra {form}, 2 devices"], by_name[f"astra {form}"]
        shape = {
            "model": "smollm2",
            "tokens": options.tokens,
            "world_size": 2,
            "mbit_per_s": options.mbit,
            "rtt_ms": options.rtt_ms,
        }
        times, floor = percentiles(row["samples_ms"]), single["ms"]["p50"] / 2
        cases.append(Case(f"rivals_{form}", shape, form, "astra", times, floor, peers))
    return cases


def write_prompt(file: Path, tokens: int) -> None:
    """Real text, as the demo has it: a first token of noise would depend on rounding."""
    tokenizer = load_tokenizer("smollm2")
    ids = token_windows(tokenizer, builtin_text()[1], tokens, 1)[0].tolist()
    file.write_text(json.dumps({"ids": ids, "words": tokenizer.convert_ids_to_tokens(ids)}))


def versions(python: Path) -> dict[str, str]:
    """Of the rivals."""
    names = ("llama-cpp-python", "ctranslate2")
    code = (
        f"import importlib.metadata as m, json; print(json.dumps([m.version(n) for n in {names}]))"
    )
    found = json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True).stdout)
    return dict(zip(names, found, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.rivals", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--mbit", type=float, default=10.0)
    parser.add_argument("--rtt-ms", type=float, default=2.0)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="of single devices")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rpc", nargs="*", default=["Q8_0"], help="llama.cpp's forms over RPC")
    parser.add_argument("--codebook", help="a folder; default: the commands' own")
    parser.add_argument("--python", type=Path, default=PYTHON, help="where the rivals are")
    parser.add_argument("--name", default="latency_rivals", help="of the result")
    options = parser.parse_args(arguments)
    if not {"torch_eager", "astra"} <= {*options.methods}:
        parser.error("--methods: expected torch_eager and astra among them, the yardsticks")
    quiet_transformers()
    chosen = [m for m in methods(options.threads, options.rpc) if m.method in options.methods]
    others = any(method.own_environment for method in chosen)
    if others:
        say("making the rivals' files, once")
        make = [str(options.python), "-m", "bench.rivals.files", str(model_folder("smollm2"))]
        subprocess.run([*make, str(FILES)], check=True, **_environment())
    with tempfile.TemporaryDirectory() as folder:
        prompt = Path(folder) / "prompt.json"
        write_prompt(prompt, options.tokens)
        if options.codebook is None:
            options.codebook = str(Path(folder) / "codebook")
            book = codebooks.default("smollm2", load_model("smollm2"))
            book.save_pretrained(options.codebook)
        rows = measure(options, prompt)
    path = write(
        options.name,
        cases_of(options, rows),
        command=command_line("bench.rivals", arguments),
        packages=("torch", "numpy", "transformers"),
        link={
            "emulator": "user-space switch",
            "mbit_per_s": options.mbit,
            "rtt_ms": options.rtt_ms,
        },
        extra={"rivals": versions(options.python) if others else {}, "rows": rows},
    )
    say(f"wrote {path}")


def _environment() -> dict[str, Any]:
    """Of a process that answers with files."""
    options = popen_options()
    return {"cwd": options["cwd"], "env": options["env"] | {"PYTHONWARNINGS": "ignore"}}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
