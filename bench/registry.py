"""Every benchmark: the commands that measure it, how long they take, the results they write.

The one list that `make bench`, `python -m bench --list` and the tests read. The arguments are those
of the committed results, so that a run is comparable with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

FEW = "--methods sp_int8 bp_ag_nb1 bp_sp_nb1 segment_means"  # the fastest baseline of each kind


@dataclass(frozen=True)
class Run:
    """A command and the results that it writes, DEVICE/NAME; what prepares others writes none.

    `command` is what follows `python -m`, or begins with `make`.
    """

    command: str
    writes: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """As one types it."""
        return self.command if self.command.startswith("make ") else f"python -m {self.command}"


@dataclass(frozen=True)
class Bench:
    """One benchmark.

    Attributes:
        minutes: about, on two cores without other work; estimated where no run was timed.
        runs: in this order.
        needs: beside `make setup`: "root", "GPU", "clang", "corpora" (Debian's texts, see
            `bench.accuracy corpora`), "codebooks" (what the benchmark `calibrate` makes), "rivals"
            (`make rivals`).
    """

    name: str
    about: str
    minutes: int
    runs: tuple[Run, ...]
    needs: tuple[str, ...] = ()


def _cpu(command: str, result: str) -> Run:
    return Run(command, (f"cpu-2core/{result}",))


def _gpu(*results: str) -> tuple[str, ...]:
    return tuple(f"{device}/{result}" for device in ("h100", "h200") for result in results)


def _latency(model: str, arguments: str, tokens: int = 1024, name: str = "") -> Run:
    length = "" if tokens == 1024 else f" --tokens {tokens}"
    command = f"bench.latency --models {model}{length} {arguments}"
    if name:
        command += f" --name {name}"
    return _cpu(command, name or f"latency_{model}_{tokens}")


# What `make bench` runs.
DEFAULT = (
    Bench(
        "pack",
        "bit packing beside memcpy, numpy and faiss",
        2,
        (_cpu("bench.pack", "pack"),),
    ),
    Bench("ops", "the ops on the CPU", 3, (_cpu("bench.ops", "ops"),)),
    Bench(
        "ops_drop_in",
        "masks, windows and gradients beside torch's own",
        2,
        (_cpu("bench.ops_drop_in", "ops_drop_in"),),
    ),
    Bench(
        "exchange",
        "one block's exchange beside gloo and ZeroMQ, in plain and inside TLS",
        5,
        (_cpu("bench.exchange", "exchange"), _cpu("bench.exchange --tls", "exchange_tls")),
    ),
    Bench(
        "demo",
        "the demo at several links",
        8,
        (_cpu("bench.demo", "latency_demo"),),
    ),
    Bench(
        "forms",
        "SmolLM2 in float32, bfloat16, int8 and int4, on one device and on two",
        20,
        (_cpu("bench.forms", "latency_forms"),),
    ),
    Bench(
        "calibrate",
        "transform codes of SmolLM2, kept in build/codebooks for the next ones",
        10,
        (Run("bench.accuracy calibrate --bits 30 100"),),
        ("corpora",),
    ),
    Bench(
        "accuracy",
        "perplexity of SmolLM2 against bits; rows that are there already stay",
        10,
        (_cpu("bench.accuracy --codes transform:30 transform:100", "accuracy_lm"),),
        ("corpora", "codebooks"),
    ),
    Bench(
        "link",
        "whether the emulated links agree",
        1,
        (_cpu("bench.link", "link"),),
    ),
    Bench(
        "latency",
        "time to first token beside the baselines, on a virtual clock",
        15,
        (
            _latency("vit-base", "--ranks 2 4 --repeats 2"),
            _latency("smollm2", f"--ranks 2 4 --repeats 2 {FEW}"),
        ),
        ("codebooks",),
    ),
    Bench(
        "real",
        "the same with real processes behind a user-space switch",
        20,
        (
            _cpu("bench.latency.real --models vit-base --repeats 7", "latency_real_vit-base"),
            _cpu("bench.latency.real --models smollm2 --repeats 5", "latency_real_smollm2"),
        ),
        ("root", "codebooks"),
    ),
    Bench(
        "scaling",
        "closed form: up to 1,024 devices",
        1,
        (_cpu("bench.scaling", "scaling"),),
    ),
)
# What it leaves out: what takes long, or another machine.
OTHERS = (
    Bench(
        "latency-others",
        "other models, lengths and numbers of ranks",
        45,
        (
            _latency("vit-base", f"--ranks 2 4 --repeats 3 {FEW}", 256),
            _latency("vit-base", f"--ranks 2 4 --repeats 1 {FEW}", 4096),
            _latency("vit-base-int8", "--ranks 2 4 --repeats 3 --methods"),
            _latency("gpt2", f"--ranks 2 4 --repeats 2 {FEW}"),
            _latency("gpt2-medium", f"--ranks 2 4 --repeats 2 {FEW}"),
            _latency("llama", f"--ranks 2 4 --repeats 2 {FEW}"),
            _latency(
                "vit-base", f"--ranks 8 16 32 --repeats 2 {FEW}", name="latency_vit-base_1024_many"
            ),
        ),
    ),
    Bench(
        "curve",
        "ASTRA on 2 to 32 ranks beside what bounds it, and from 1k to 8k tokens, with memory",
        20,
        (
            _cpu("bench.latency.curve --model vit-base --repeats 4", "latency_curve_vit-base"),
            _cpu(
                "bench.latency.curve --model vit-base --pack-weights --repeats 4 "
                "--name latency_curve_vit-base_packed",
                "latency_curve_vit-base_packed",
            ),
            _cpu(
                "bench.latency.curve --model smollm2 --codes default kv:3", "latency_curve_smollm2"
            ),
            _cpu("bench.latency.curve --model smollm2-int8", "latency_curve_smollm2-int8"),
            _cpu("bench.latency.curve --lengths", "latency_lengths_smollm2"),
        ),
    ),
    Bench(
        "sessions",
        "the second question about a document beside the first, two processes at 10 Mbit/s",
        8,
        (_cpu("bench.latency.sessions", "latency_sessions"),),
    ),
    Bench(
        "frames",
        "a steady stream of pictures over two processes, and what its tail is made of",
        9,
        (_cpu("bench.latency.frames", "latency_frames"),),
    ),
    Bench(
        "service",
        "concurrent chats on two processes at 10 Mbit/s beside one; lone requests, several answers",
        22,
        (
            _cpu("bench.service", "service"),
            _cpu("bench.service --pack-weights --name service_packed", "service_packed"),
            _cpu("bench.service.lone", "service_lone"),
            _cpu("bench.service.several", "service_several"),
            _cpu("bench.service.beside", "service_beside"),
        ),
    ),
    Bench(
        "rivals",
        "llama.cpp, CTranslate2 and torch beside ours, on one device and on two",
        8,
        (_cpu("bench.rivals", "latency_rivals"),),
        ("root", "rivals"),
    ),
    Bench(
        "service-faults",
        "a service whose workers are killed at random moments; malformed requests, slow clients",
        24,
        (
            _cpu("bench.service.faults", "service_faults"),
            _cpu("bench.service.malformed", "service_malformed"),
        ),
    ),
    Bench(
        "service-soak",
        "an hour of a service's ordinary life: memory, threads, descriptors",
        62,
        (_cpu("bench.service.soak", "service_soak"),),
    ),
    Bench(
        "latency-scaled",
        "measured stage times divided by a factor, as of faster devices",
        5,
        (
            _latency(
                "vit-base",
                "--ranks 2 4 --repeats 3 --mbit 10 --rtt-ms 2 --speeds 1 10 20 30 50 100 "
                "--methods bp_ag_nb1 segment_means",
                name="latency_scaled",
            ),
        ),
    ),
    Bench(
        "lossy",
        "codes as datagrams beside TCP on a link that loses packets",
        10,
        (_cpu("bench.lossy latency --seconds 12 --calls 8", "lossy"),),
        ("root",),
    ),
    Bench(
        "lossy-perplexity",
        "what lost datagrams cost",
        15,
        tuple(
            _cpu(
                f"bench.lossy perplexity --losses 0 0.05 0.2 --windows 6 {codes}",
                "lossy_perplexity",
            )
            for codes in (
                "--codes transform:100 --halo 32 --after-loss stale",
                "--codes transform:100+400 --halo 0",
                "--codes transform:100+400 --halo 0 --after-loss stale",
            )
        ),
        ("codebooks",),
    ),
    Bench(
        "degraded",
        "what missing frames cost, by what a receiver does afterwards",
        10,
        (_cpu("bench.lossy degraded --windows 4", "degraded"),),
        ("corpora", "codebooks"),
    ),
    Bench(
        "accuracy-more",
        "the other rows of SmolLM2's perplexity; --seed 1 and 2 for more codebooks",
        120,
        (
            Run("bench.accuracy calibrate --bits 10 30 100 300 600 1500 --seeds 0 1 2"),
            _cpu("bench.accuracy --codes transform:100 --ranks 2 4 8", "accuracy_lm"),
            _cpu(
                "bench.accuracy --codes transform:10 transform:30 transform:300 transform:600 "
                "transform:1500 none:int8 kv:1 kv:3 differential:8 --halos 0",
                "accuracy_lm",
            ),
            _cpu("bench.accuracy --codes transform:100 --lost 0.05", "accuracy_lm"),
        ),
        ("corpora",),
    ),
    Bench(
        "accuracy-ranks",
        "bits, FLOPs and accuracy of SmolLM2 on 2 to 16 ranks and six kinds of text",
        90,
        (
            Run("bench.accuracy calibrate --bits 100 --seeds 0"),
            _cpu(
                "bench.accuracy ranks --codes transform:100+400 transform:100 kv:3",
                "accuracy_ranks",
            ),
        ),
        ("corpora",),
    ),
    Bench(
        "codes",
        "product, residual, gain-shape, scalar and lattice codes of the same vectors",
        60,
        (_cpu("bench.accuracy codes", "codes"),),
        ("corpora", "codebooks"),
    ),
    Bench(
        "fitting",
        "the default fit of SmolLM2 and of a 1B shape: seconds, memory, what the codes keep",
        40,
        (_cpu("bench.accuracy fitting --models smollm2 llama-1b", "fitting"),),
        ("corpora",),
    ),
    Bench(
        "encoder",
        "embeddings of MiniLM against bits",
        15,
        (
            _cpu(
                "bench.accuracy encoder --codes drop none:int8 transform:100 --seeds 0",
                "accuracy_encoder",
            ),
        ),
        ("corpora",),
    ),
    Bench(
        "gpt2",
        "perplexity of a small GPT-2, trained here, against bits and settings",
        40,
        (_cpu("bench.gpt2", "accuracy_gpt2"),),
        ("corpora",),
    ),
    Bench(
        "gpt2-wide",
        "a GPT-2 of twice the width",
        10,
        (_cpu("bench.gpt2 --wide", "accuracy_gpt2_wide"),),
        ("corpora",),
    ),
    Bench(
        "vision",
        "accuracy of a ViT, trained here, against bits and settings",
        150,
        (_cpu("bench.vision --keep build/vision", "accuracy_vision"),),
    ),
    Bench(
        "vision-wide",
        "a ViT of twice the width",
        25,
        (_cpu("bench.vision --wide --keep build/vision", "accuracy_vision_wide"),),
    ),
    Bench(
        "finetune",
        "a step of `astra finetune` beside one masked softmax over all tokens",
        3,
        (_cpu("bench.finetune", "finetune"),),
    ),
    Bench(
        "native",
        "attention and integer weights in C++ beside torch's, on one thread",
        4,
        (_cpu("bench.native", "native"),),
    ),
    Bench(
        "choices",
        "what the constants of the CPU ops rest on",
        5,
        (_cpu("bench.ops --choices", "ops_choices"),),
    ),
    Bench(
        "gpu",
        "all that needs a GPU; what it writes goes into bench/results/<device>",
        10,
        (
            Run("bench.gpu --part A", _gpu("kernels", "engine")),
            Run("bench.gpu --part B", _gpu("kernels", "kernels_tuned")),
        ),
        ("GPU",),
    ),
    Bench(
        "faults",
        "ranks killed, stopped, cut off and lied to; 3 million exchanges; the decoder fuzzed",
        40,
        tuple(_cpu(f"make {target}", "faults") for target in ("test-faults", "soak", "fuzz")),
        ("root", "clang"),
    ),
)
BENCHES = DEFAULT + OTHERS


def chosen(names: Sequence[str]) -> list[Bench]:
    """The benchmarks of these names in the list's order; of none, those of `make bench`.

    Raises:
        ValueError: there is no such benchmark.
    """
    known = {bench.name for bench in BENCHES}
    for name in names:
        if name not in known:
            raise ValueError(f"bench: expected one of {', '.join(sorted(known))}, got {name!r}")
    return [bench for bench in BENCHES if bench.name in names] if names else list(DEFAULT)


def writers(result: str) -> Iterator[Run]:
    """The commands that write a result, DEVICE/NAME, or add to it."""
    return (run for bench in BENCHES for run in bench.runs if result in run.writes)
