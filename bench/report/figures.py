"""What was measured for a goal, read from the committed results: figures of `goals`.

Each function takes what its goal names. Those that a goal needs twice return a function that reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bench import gpt2
from bench.accuracy.tables import most_windows

from .markdown import Report, load

CPU = "cpu-2core"
GPUS = ("h100", "h200")
DEFAULT_CODES = "transform:100+400"  # what `astra fit` makes of SmolLM2
Case = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """What was measured for a goal.

    Attributes:
        reached: None where the goal is to report it.
        counts: False where the task is too easy to say anything: the control does nearly as well.
    """

    text: str
    reached: bool | None
    counts: bool = True


def cases(name: str) -> list[dict[str, Any]]:
    return (load(f"{CPU}/{name}") or {"cases": []})["cases"]


def gpu(prefix: str, **shape: Any) -> list[dict[str, Any]]:
    """Cases of the first GPU that was measured, by the beginning of their names."""
    reports: Iterable[Report | None] = (load(f"{device}/kernels") for device in GPUS)
    report = next((report for report in reports if report is not None), None)
    return [
        case
        for case in (report or {"cases": []})["cases"]
        if case["name"].startswith(prefix) and shape.items() <= case["shape"].items()
    ]


def fastest(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the variants of each shape and dtype the fastest, which a user can choose."""
    best: dict[Any, dict[str, Any]] = {}
    for case in found:
        key = (case["dtype"], *sorted(case["shape"].items()))
        if key not in best or case["ms"]["p50"] < best[key]["ms"]["p50"]:
            best[key] = case
    return list(best.values())


def at_least(ratios: Iterable[float], least: float, *, most: bool = False) -> Figure | None:
    """The range of ratios, reached if all are at least (or with `most`, at most) the bound."""
    found = sorted(ratios)
    if not found:
        return None
    low, high = f"{found[0]:.3g}", f"{found[-1]:.3g}"
    text = f"{low}×" if low == high else f"{low}–{high}×"
    good = [ratio for ratio in found if (ratio <= least if most else ratio >= least)]
    if 0 < len(good) < len(found):
        text += f", {len(good)} of {len(found)} cases"
    return Figure(text, len(good) == len(found))


def over(baseline: str, found: Iterable[Case]) -> Iterator[float]:
    """How many times the baseline's time is ours."""
    for case in found:
        if baseline in case["peers"]:
            yield case["peers"][baseline] / case["ms"]["p50"]


def over_roofline(found: Iterable[Case]) -> Iterator[float]:
    return (case["ms"]["p50"] / case["floor_ms"] for case in found)


def gpu_lookup(low: float, high: float) -> list[dict[str, Any]]:
    """Gather-fused attention with low < M·H/Hkv ≤ high."""
    return [
        case
        for case in gpu("fused_lookup")
        if low < case["shape"]["M"] * case["shape"]["H"] / case["shape"]["Hkv"] <= high
    ]


def packing(baseline: str, least: float) -> Figure | None:
    return at_least(over(baseline, cases("pack")), least)


def of_memcpy() -> Figure | None:
    shares = sorted(case["floor_ms"] / case["ms"]["p50"] for case in cases("pack"))
    return Figure(f"{shares[0]:.0%}–{shares[-1]:.0%}", None) if shares else None


def exchange(baseline: str, least: float) -> Figure | None:
    """p50 and p99 of every size and number of ranks."""
    found = cases("exchange")
    p99 = (case["peers_p99"][baseline] / case["ms"]["p99"] for case in found)
    return at_least([*over(baseline, found), *p99], least)


def header() -> Figure | None:
    from astra_runtime.wire import HEADER_SIZE

    return Figure(f"{HEADER_SIZE} B", HEADER_SIZE <= 16)


def nothing() -> Figure | None:
    return None


def speedup(name: str, ranks: int, least: float) -> Callable[[], Figure | None]:
    """Over one device at 10 Mbit/s, by the best setting; on the virtual clock a trip of 2 ms."""

    def figure() -> Figure | None:
        where = {"world_size": ranks, "mbit_per_s": 10.0, "rtt_ms": 2.0}
        found = [case for case in cases(name) if where.items() <= case["shape"].items()]
        if not found:
            return None
        best = min(found, key=lambda case: case["ms"]["p50"])
        ratio = best["peers"]["single"] / best["ms"]["p50"]
        return Figure(f"{ratio:.2f}× ({best['impl'].removeprefix('astra ')})", ratio >= least)

    return figure


def curve(
    name: str, tokens: int, ranks: int, least: float, packed: str = ""
) -> Callable[[], Figure | None]:
    """Over one device on the virtual clock, by the best codes, beside what products allow; the same
    with packed weights on all devices, where there is such a result."""

    def best_of(result: str) -> tuple[float, float] | None:
        where = {"world_size": ranks, "tokens": tokens}
        found = [case for case in cases(result) if where.items() <= case["shape"].items()]
        return max(((case["speedup"], case["bound_speedup"]) for case in found), default=None)

    def figure() -> Figure | None:
        plain = best_of(name)
        if plain is None:
            return None
        text, ratio = f"{plain[0]:.2f}× (products allow {plain[1]:.2f}×)", plain[0]
        laid_out = best_of(packed) if packed else None
        if laid_out is not None:
            text += f", with packed weights {laid_out[0]:.2f}× ({laid_out[1]:.2f}×)"
            ratio = max(ratio, laid_out[0])
        return Figure(text, ratio >= least)

    return figure


def fine_over_halo(ranks: int, most: float) -> Figure | None:
    """First token with fine codes over that with a halo in their place, on the virtual clock."""
    ms = {
        case["impl"]: case["ms"]["p50"]
        for case in cases("latency_curve_smollm2")
        if case["shape"]["world_size"] == ranks
    }
    if not {"astra default", "astra transform:100"} <= ms.keys():
        return None
    ratio = ms["astra default"] / ms["astra transform:100"]
    return Figure(f"{ratio:.2f}×", ratio <= most)


def tail(most: float) -> Figure | None:
    """p99 over p50 of whole calls by two ranks, over the same of one device in the same run."""
    return at_least(
        [case["tail_over_single"] for case in cases("latency_frames") if case["peers"]],
        most,
        most=True,
    )


def scaled(least: float) -> Figure | None:
    """The largest ratio to block parallelism with all-gather where ASTRA beats one device, beside
    the bound there."""
    found = [case for case in cases("latency_scaled") if next(over("single", [case])) > 1]
    if not found:
        return None
    best = max(found, key=lambda case: next(over("bp_ag_nb1", [case])))
    ratio = next(over("bp_ag_nb1", [best]))
    bound = 1 + 7.55 / (best["peers"]["single"] / 1e3)
    text = f"{ratio:.1f}× on a device {best['speed']:g}× as fast (1 + 7.55 s/S is {bound:.0f}×)"
    return Figure(text, ratio >= least)


def round_trips() -> Figure | None:
    trips = sorted({case["shape"]["rtt_ms"] for case in cases("latency_vit-base_1024")})
    return Figure(", ".join(f"{trip:g}" for trip in trips) + " ms", None) if trips else None


def vision(name: str, compression: float) -> Callable[[], Figure | None]:
    """Points below exact, with the work beside it; 1.25 of the ideal FLOPs are permitted."""

    def figure() -> Figure | None:
        report = load(f"{CPU}/{name}")
        if report is None:
            return None
        texts, good, counts = [], [], True
        for goal in report["goals"]:
            if goal["compression"] != compression:
                continue
            keys = ("codes", "world_size", "below_exact")
            (flops,) = {
                row["flops_over_ideal"]
                for row in report["rows"]
                if row["group"] == "goals" and all(row[key] == goal[key] for key in keys)
            }
            texts.append(f"N={goal['world_size']}: {goal['below_exact']:.2f} at {flops:.2f} FLOPs")
            good.append(goal["reached"] and flops <= 1.25)
            counts = counts and goal["counts"]
        return Figure("; ".join(texts), all(good), counts) if texts else None

    return figure


def by_ranks(
    ranks: int, documentation: float, handbook: float, flops: float
) -> Callable[[], Figure | None]:
    """Of SmolLM2's default codes, the share of the gap recovered on a text like the calibration's
    and on one of another kind, and FLOPs over ideal; goals in the same order."""

    def figure() -> Figure | None:
        measured = {
            domain: [
                row
                for row in most_windows((load(f"{CPU}/accuracy_ranks") or {"rows": []})["rows"])
                if (row["codes"], row["domain"]) == (DEFAULT_CODES, domain)
                and row["world_size"] == ranks
            ]
            for domain in ("documentation", "handbook")
        }
        if not all(measured.values()):
            return None
        seen, unseen = (fmean(row["gap_recovered"] for row in rows) for rows in measured.values())
        work = max(row["flops_over_ideal"] for rows in measured.values() for row in rows)
        reached = seen >= documentation and unseen >= handbook and work <= flops
        return Figure(f"{seen:.3f} and {unseen:.3f} at {work:.3f} FLOPs", reached)

    return figure


def gpt2_wide(kind: str) -> Callable[[], Figure | None]:
    """The best codes, on text of a kind seen in training and of an unseen, at FLOPs over ideal."""

    def figure() -> Figure | None:
        report = load(f"{CPU}/accuracy_gpt2_wide")
        rows = [
            row
            for row in (report or {"rows": []})["rows"]
            if (row["group"], row["kind"]) == ("bits", kind)
        ]
        found = [
            gpt2.best(row for row in rows if row["seen_in_training"] == seen)
            for seen in (True, False)
        ]
        best = [row for row in found if row is not None]
        if not best:
            return None
        text = " and ".join(
            f"{row['ratio_to_exact'] - 1:+.1%} at {row['flops_over_ideal']:.2f}" for row in best
        )
        counts = all(map(gpt2.tells, best))
        if not counts:
            text += "; local-only costs too little to tell"
        return Figure(text, all(map(gpt2.reached, best)), counts)

    return figure


def fault(name: str, tried: int, p99_ms: float | None = None) -> Callable[[], Figure | None]:
    """Cases that ended as they have to, of at least `tried`; `p99_ms` bounds their times.

    That a wait ended within a tenth of its deadline is part of how such a case has to end.
    """

    def figure() -> Figure | None:
        report = load(f"{CPU}/faults") or {"faults": []}
        row = next((row for row in report["faults"] if row["name"] == name), None)
        if row is None:
            return None
        text = f"{row['survived']:,} of {row['tried']:,}"
        good = row["survived"] == row["tried"] >= tried
        if p99_ms is not None:
            text += f", p99 {row['p99_ms']:.3g} ms"
            good = good and row["p99_ms"] <= p99_ms
        return Figure(text, good)

    return figure


def soak() -> Figure | None:
    report = load(f"{CPU}/faults") or {"faults": []}
    row = next((row for row in report["faults"] if row["name"] == "soak"), None)
    if row is None:
        return None
    text = f"{row['tried']:,} exchanges in {row['seconds'] / 60:.0f} minutes, "
    text += f"{row['mib_per_hour']:+.2f} MiB/h"
    good = row["survived"] == row["tried"] >= 1_000_000 and row["mib_per_hour"] < 1
    return Figure(text, good)
