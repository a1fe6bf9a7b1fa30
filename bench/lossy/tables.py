"""Tables of lossy.json, lossy_perplexity.json and degraded.json, as markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.report import source, table

METHODS = {
    "tcp": "TCP",
    "tcp_deadline": "TCP, deadline",
    "datagram_plain": "datagrams, no parity",
    "datagram": "**datagrams**",
}


def exchange(report: dict[str, Any]) -> str:
    """Milliseconds of a block's exchange, p50 / p99, and where there is a deadline what came."""
    rows = []
    for case in report["cases"]:
        shape = case["shape"]
        row = [f"{shape['rtt_ms']:g}", f"{shape['loss']:.0%}"]
        for method in METHODS:
            p50 = case["peers"].get(method, case["ms"]["p50"])
            p99 = case["peers_p99"].get(method, case["ms"]["p99"])
            came = "" if method == "tcp" else f", {case['came'][method]:.1%}"
            row.append(f"{p50:.1f} / {p99:.1f}{came}")
        whole = case["call_ms"]
        row.append(f"{whole['tcp']['p50'] / whole['datagram']['p50']:.1f}×")
        rows.append(row)
    head = ["round trip (ms)", "lost", *METHODS.values(), "whole call, over TCP"]
    return table(head, rows) + source(report)


def perplexity(report: dict[str, Any]) -> str:
    """By codes and loss, without and with parity parts."""
    found: dict[Any, dict[int, dict[str, Any]]] = {}
    for row in report["rows"]:
        found.setdefault((row["codes"], row["datagrams_lost"]), {})[row["parity"]] = row
    rows = []
    for (codes, lost), by_parity in found.items():
        plain = by_parity[0]
        mended = next((row for parity, row in by_parity.items() if parity), plain)
        rows.append(
            [
                codes,
                f"{lost:.0%}",
                f"{plain['perplexity']:.2f}",
                f"{plain['gap_recovered']:.2f}",
                f"{mended['perplexity']:.2f}",
                f"{mended['gap_recovered']:.2f}",
                f"{plain['exact']:.2f}",
                f"{plain['local_only']:.2f}",
            ]
        )
    head = ["codes", "datagrams lost", "no parity", "gap kept", "**parity**", "gap kept"]
    return table([*head, "exact", "dropped"], rows) + source(report)


def degraded(report: dict[str, Any]) -> str:
    """By share of frames that miss their deadline, for each way to go on afterwards."""
    told = {
        "stale": "masked in that block (**the engine**)",
        "out": "left out until the call ends",
        "predicted": "the estimate used unmasked",
    }
    shares: dict[float, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in report["rows"]:
        if "gap_recovered" in row:
            shares.setdefault(row["missing"], {})[row["codes"], row["afterwards"]] = row
    ways = list(dict.fromkeys(way for found in shares.values() for way in found))
    rows = []
    for share, found in sorted(shares.items()):
        line = [f"{share:.0%}"]
        for codes, afterwards in ways:
            row = found.get((codes, "stale" if share == 0 else afterwards))
            line.append("" if row is None else f"{row['gap_recovered']:.2f}")
        rows.append(line)
    head = ["frames missing", *(f"{codes}, {told[afterwards]}" for codes, afterwards in ways)]
    return table(head, rows) + source(report)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "degraded": ("cpu-2core/degraded", degraded),
    "lossy_exchange": ("cpu-2core/lossy", exchange),
    "lossy_perplexity": ("cpu-2core/lossy_perplexity", perplexity),
}
