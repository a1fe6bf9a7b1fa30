"""The goals and what was reached, from the committed results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .figures import (
    Figure,
    at_least,
    by_ranks,
    curve,
    exchange,
    fastest,
    fault,
    fine_over_halo,
    gpt2_wide,
    gpu,
    gpu_lookup,
    header,
    nothing,
    of_memcpy,
    over,
    over_roofline,
    packing,
    round_trips,
    scaled,
    soak,
    speedup,
    tail,
    vision,
)
from .markdown import Table, table
from .service_figures import (
    OTHERS,
    beside,
    chats,
    hour,
    longest_wait,
    malformed,
    over_others,
    second_question,
    speedup_beside_others,
    start,
    struck,
)


@dataclass(frozen=True)
class Goal:
    """One goal. `figure` reads the results, and returns None where nothing was measured."""

    area: str
    what: str
    goal: str
    figure: Callable[[], Figure | None]


def goals() -> str:
    rows = []
    for goal in GOALS:
        figure = goal.figure()
        text = "–" if figure is None else figure.text
        rows.append([goal.area, goal.what, goal.goal, text, _verdict(figure)])
    return table(["area", "what", "goal", "measured", "result"], rows)


def _verdict(figure: Figure | None) -> str:
    if figure is None:
        return "not measured"
    if not figure.counts:
        return "does not count"
    if figure.reached is None:
        return "reported"
    return "reached" if figure.reached else "**missed**"


KERNELS, CODEC, LATENCY = "GPU kernels", "codec and exchange", "end to end"
ACCURACY, SERVICE, FAULTS = "accuracy per bit", "service", "reliability"
GOALS = (
    Goal(
        KERNELS,
        "time of attention to codewords over the roofline, M=1024",
        "≤2×",
        lambda: at_least(over_roofline(fastest(gpu("codeword_", M=1024))), 2, most=True),
    ),
    Goal(
        KERNELS,
        "attention to codewords over SDPA, M=1024, N=32k",
        "≥20×",
        lambda: at_least(over("sdpa", fastest(gpu("codeword_", M=1024, N=32768))), 20),
    ),
    Goal(
        KERNELS,
        "fused look-up over index_select + SDPA, M ≤ 900·Hkv/H",
        "≥1.3×",
        lambda: at_least(over("index_select_sdpa", gpu_lookup(0, 900)), 1.3),
    ),
    Goal(
        KERNELS,
        "fused look-up over index_select + SDPA, M ≤ 2700·Hkv/H",
        "≥1.0×",
        lambda: at_least(over("index_select_sdpa", gpu_lookup(900, 2700)), 1.0),
    ),
    Goal(
        KERNELS,
        "fused look-up over SDPA on dense keys and values",
        "≥0.75×",
        lambda: at_least(over("sdpa", gpu("fused_lookup")), 0.75),
    ),
    Goal(
        KERNELS,
        "decode with rotary positions over SDPA",
        "≥1.5×",
        lambda: at_least(over("sdpa", fastest(gpu("decode_rotary"))), 1.5),
    ),
    Goal(
        KERNELS,
        "decode without rotary positions over SDPA, N=128k",
        "≥20×",
        lambda: at_least(over("sdpa", fastest(gpu("decode_plain", N=131072))), 20),
    ),
    Goal(
        KERNELS,
        "time of encode over a matrix product's of equal accuracy",
        "≤1.5×",
        lambda: at_least((1 / ratio for ratio in over("matmul", gpu("encode_"))), 1.5, most=True),
    ),
    Goal(
        KERNELS,
        "encode over vector-quantize-pytorch",
        "≥5×",
        lambda: at_least(over("vector-quantize-pytorch", gpu("encode_")), 5),
    ),
    Goal(KERNELS, "merging and packing inside their neighbours' kernels", "no launch", nothing),
    Goal(CODEC, "pack and unpack over numpy", "≥100×", lambda: packing("numpy", 100)),
    Goal(CODEC, "pack and unpack over faiss", "≥5×", lambda: packing("faiss", 5)),
    Goal(CODEC, "share of memcpy's rate", "reported", of_memcpy),
    Goal(
        CODEC,
        "one block's exchange over gloo, p50 and p99",
        "≥4×",
        lambda: exchange("gloo", 4),
    ),
    Goal(
        CODEC,
        "one block's exchange over ZeroMQ, p50 and p99",
        "≥1×",
        lambda: exchange("zeromq", 1),
    ),
    Goal(CODEC, "header of a message", "≤16 B", header),
    Goal(CODEC, "entropy coding below log2 K where codes are skewed", "fewer bits", nothing),
    Goal(
        LATENCY,
        "ViT-Base shape, N=4, 10 Mbit/s",
        "≥3.5×",
        speedup("latency_vit-base_1024", 4, 3.5),
    ),
    Goal(LATENCY, "GPT-2 shape, N=4, 10 Mbit/s", "≥3.5×", speedup("latency_gpt2_1024", 4, 3.5)),
    Goal(
        LATENCY,
        "GPT-2 medium shape, N=4, 10 Mbit/s",
        "≥3.5×",
        speedup("latency_gpt2-medium_1024", 4, 3.5),
    ),
    Goal(
        LATENCY,
        "over BP+AG Nb=1, on rows scaled to a faster device",
        "≥15.25×",
        lambda: scaled(15.25),
    ),
    Goal(
        LATENCY,
        "ViT-Base shape, N=2 real processes, 10 Mbit/s",
        "≥1.85×",
        speedup("latency_real_vit-base", 2, 1.85),
    ),
    Goal(
        LATENCY,
        "SmolLM2, N=2 real processes, 10 Mbit/s",
        "≥1.85×",
        speedup("latency_real_smollm2", 2, 1.85),
    ),
    *(
        Goal(
            LATENCY,
            f"ViT-Base, N={ranks}, 10 Mbit/s, TLS counted, one core for all ranks in turn",
            f"≥{least:g}×",
            curve("latency_curve_vit-base", 1024, ranks, least, "latency_curve_vit-base_packed"),
        )
        for ranks, least in ((2, 1.9), (4, 3.7), (8, 6.8), (16, 12), (32, 18))
    ),
    Goal(
        LATENCY,
        "SmolLM2, 8,192 tokens, N=4, the same",
        "≥3.5×",
        curve("latency_lengths_smollm2", 8192, 4, 3.5),
    ),
    *(
        Goal(
            LATENCY,
            f"SmolLM2, N={ranks}, the same: fine codes, time over that with a halo in their place",
            f"≤{most:g}×",
            partial(fine_over_halo, ranks, most),
        )
        for ranks, most in ((4, 0.91), (8, 0.89))
    ),
    Goal(
        LATENCY,
        "p99 over p50 of whole calls of ViT-Base, N=2, over one device's",
        "≤1.05×",
        lambda: tail(1.05),
    ),
    Goal(
        LATENCY,
        "SmolLM2, N=2 real processes behind a switch of 10 Mbit/s, over one device",
        "≥1.92×",
        lambda: speedup_beside_others(1.92),
    ),
    *(
        Goal(
            LATENCY,
            f"SmolLM2 int8, N=2, the same: its time over that of {what}",
            f"≤{most:g}×",
            over_others("int8", peers, most),
        )
        for what, peers, most in (
            ("one device in fp32", ("astra float32",), 0.45),
            ("one device in int8", ("astra int8",), 0.55),
            ("the quickest of the others on one core", OTHERS, 0.4),
        )
    ),
    Goal(LATENCY, "first token with round trips of 0.2 to 20 ms", "reported", round_trips),
    Goal(
        ACCURACY,
        "ViT on two digits, 76.8× fewer bits",
        "≤0.9 points below exact, ≤1.25 of the ideal FLOPs",
        vision("accuracy_vision", 76.8),
    ),
    Goal(
        ACCURACY,
        "ViT on two digits, 2457.6× fewer bits",
        "≤3.6 points below exact, ≤1.25 of the ideal FLOPs",
        vision("accuracy_vision", 2457.6),
    ),
    Goal(
        ACCURACY,
        "a wider ViT, 76.8× fewer bits",
        "≤0.9 points below exact, ≤1.25 of the ideal FLOPs",
        vision("accuracy_vision_wide", 76.8),
    ),
    Goal(
        ACCURACY,
        "a wider GPT-2 on revised text, ≥100× fewer bits: perplexity, seen and unseen",
        "≤6 % over exact at ≤1.20 of the ideal FLOPs",
        gpt2_wide("revised"),
    ),
    Goal(
        ACCURACY,
        "a wider GPT-2 on prose, ≥100× fewer bits: perplexity, seen and unseen",
        "≤6 % over exact at ≤1.20 of the ideal FLOPs",
        gpt2_wide("prose"),
    ),
    Goal(
        ACCURACY,
        "SmolLM2, N=4, 100 bits, 150 a receiver with fine codes: gap recovered, seen and unseen",
        "≥0.95 and ≥0.92 at ≤1.10 of the ideal FLOPs",
        by_ranks(4, 0.95, 0.92, 1.10),
    ),
    Goal(
        ACCURACY,
        "SmolLM2, N=8, 100 bits, 150 a receiver with fine codes: gap recovered, seen and unseen",
        "≥0.93 and ≥0.90 at ≤1.25 of the ideal FLOPs",
        by_ranks(8, 0.93, 0.90, 1.25),
    ),
    Goal(
        SERVICE,
        "eight chats on two ranks, requests a second over one device's",
        "≥1.6×",
        lambda: chats(1.6),
    ),
    Goal(
        SERVICE,
        "the longest wait for a token while prompts are read",
        "≤0.5 s",
        lambda: longest_wait(0.5),
    ),
    Goal(
        SERVICE,
        "a prompt's first token while another answer is decoded, over alone",
        "≤1.3×",
        lambda: beside(1.3),
    ),
    Goal(
        SERVICE,
        "a second question about a document over the first, on either rank",
        "≤0.15×",
        lambda: second_question(0.15),
    ),
    Goal(SERVICE, "start, with model and codebook cached", "≤12 s", lambda: start(12)),
    Goal(SERVICE, "workers stopped, killed, started again under load", "≥200", lambda: struck(200)),
    Goal(SERVICE, "malformed requests beside slow clients", "≥1,000", lambda: malformed(1000)),
    Goal(
        SERVICE,
        "an hour of ordinary life: memory, threads, descriptors",
        "flat, no error",
        lambda: hour(60),
    ),
    Goal(FAULTS, "kill −9 names the rank", "≥324, p99 ≤50 ms", fault("kill", 324, 50)),
    Goal(FAULTS, "SIGSTOP", "≥30, at the deadline ±10 %", fault("stop", 30)),
    Goal(FAULTS, "black hole", "≥10, at the deadline ±10 %", fault("blackhole", 10)),
    Goal(FAULTS, "half-open connection", "≥10, at the deadline ±10 %", fault("half_open", 10)),
    Goal(FAULTS, "one byte a second", "≥10, at the deadline ±10 %", fault("slow", 10)),
    Goal(FAULTS, "mutated frames refused", "≥100,000", fault("frame_mutated", 100_000)),
    Goal(FAULTS, "executions of the fuzzer", "≥100,000,000", fault("fuzz", 100_000_000)),
    Goal(FAULTS, "who does not belong is refused", "≥11 kinds", fault("refusals", 11)),
    Goal(
        FAULTS,
        "peers join among idle and garbage connections",
        "≥2,000, within 1 s",
        fault("connections", 2000, 1000),
    ),
    Goal(FAULTS, "answers without a late rank", "≥50, flagged", fault("degraded", 50)),
    Goal(FAULTS, "soak", "≥1,000,000 exchanges, <1 MiB/h", soak),
)

TABLES = {"goals": Table((), goals)}
