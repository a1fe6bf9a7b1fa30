"""Tables of lossy.json, lossy_perplexity.json and degraded.json, as markdown."""

from __future__ import annotations

from typing import Any

from astra_runtime.codes.registry import codec_named
from bench.report.markdown import Report, Table, source, sources, table

METHODS = {
    "tcp": "TCP",
    "tcp_deadline": "TCP, deadline",
    "datagram_plain": "datagrams, no FEC",
    "datagram": "**datagrams**",
}
AFTER_LOSS = {
    "stale": "left out of that block",
    "out": "left out until the call ends",
    "predicted": "attended to as predicted",
}


def exchange(report: Report) -> str:
    """Milliseconds of a block's exchange, p50 / p99, and with a deadline the share received."""
    rows = []
    for case in report["cases"]:
        shape = case["shape"]
        row = [f"{shape['rtt_ms']:g}", f"{shape['loss']:.0%}"]
        for method in METHODS:
            p50 = case["peers"].get(method, case["ms"]["p50"])
            p99 = case["peers_p99"].get(method, case["ms"]["p99"])
            received = "" if method == "tcp" else f", {case['came'][method]:.1%}"
            row.append(f"{p50:.1f} / {p99:.1f}{received}")
        call = case["call_ms"]
        row.append(f"{call['tcp']['p50'] / call['datagram']['p50']:.1f}×")
        rows.append(row)
    head = ["round trip (ms)", "lost", *METHODS.values(), "whole call, over TCP"]
    return table(head, rows) + source(report)


def perplexity(report: Report) -> str:
    """By codes, halo and loss, without and with forward error correction."""
    groups: dict[Any, dict[int, dict[str, Any]]] = {}
    for row in report["rows"]:
        afterwards = row.get("afterwards", "stale") if row["datagrams_lost"] else ""
        place = row["codes"], row["halo"], row["datagrams_lost"], afterwards
        groups.setdefault(place, {})[row["parity"]] = row
    rows = []
    for (codes, halo, lost, afterwards), by_parity in sorted(groups.items()):
        plain = by_parity[0]
        corrected = next((row for parity, row in by_parity.items() if parity), plain)
        rows.append(
            [
                codes,
                f"{halo}",
                f"{lost:.0%}",
                AFTER_LOSS.get(afterwards, "–"),
                f"{plain['perplexity']:.2f}",
                f"{plain['gap_recovered']:.2f}",
                f"{corrected['perplexity']:.2f}",
                f"{corrected['gap_recovered']:.2f}",
                f"{plain['exact']:.2f}",
                f"{plain['local_only']:.2f}",
            ]
        )
    head = [
        "codes",
        "halo",
        "datagrams lost",
        "lost tokens",
        "no FEC",
        "gap recovered",
        "**FEC**",
        "gap recovered",
    ]
    return table([*head, "exact", "local-only"], rows) + sources(report, report["rows"])


def degraded(report: Report) -> str:
    """Gap recovered, by the share of frames that miss their deadline and by what follows."""
    shares: dict[float, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in report["rows"]:
        if "gap_recovered" in row:
            shares.setdefault(row["missing"], {})[row["codes"], row["afterwards"]] = row
    columns = list(dict.fromkeys(column for rows in shares.values() for column in rows))
    lines = []
    for share, rows in sorted(shares.items()):
        line = [f"{share:.0%}"]
        for codes, afterwards in columns:
            row_of_share = rows.get((codes, "stale" if share == 0 else afterwards))
            line.append("" if row_of_share is None else f"{row_of_share['gap_recovered']:.2f}")
        lines.append(line)
    names = [f"{codes}, {_afterwards(codes, afterwards)}" for codes, afterwards in columns]
    return table(["frames missing", *names], lines) + source(report)


def _afterwards(codes: str, afterwards: str) -> str:
    """In words; of what the engine does, that it does so."""
    predicts = codec_named(codes.partition(":")[0]).predicts
    engine = " (**the engine**)" if afterwards == ("predicted" if predicts else "stale") else ""
    return AFTER_LOSS[afterwards] + engine


TABLES = {
    "degraded": Table(("cpu-2core/degraded",), degraded),
    "lossy_exchange": Table(
        ("cpu-2core/lossy",),
        exchange,
        lambda case: case["shape"]["loss"] in (0, 0.01, 0.05, 0.2),
        "0, 1, 5 and 20 % of the packets lost",
    ),
    "lossy_perplexity": Table(("cpu-2core/lossy_perplexity",), perplexity),
}
