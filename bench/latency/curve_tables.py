"""Tables of latency_curve_*.json and latency_lengths_*.json: a report in, markdown out."""

from __future__ import annotations

import statistics
from typing import Any

from bench.report.markdown import Report, Table, source, table

# What stands in one column, of the stages of the rank that has the answer.
COLUMNS = {
    "compute": ("prepare", "compute"),
    "attend": ("attend",),
    "encode": ("encode", "pack"),
    "decode, merge": ("unpack", "merge"),
    "send": ("send", "sockets"),
    "wait": ("wait",),
}


def curve(*reports: Report) -> str:
    """By number of ranks: speedup beside what bounds it, and where the time goes."""
    rows = [_row(case) for report in reports for case in report["cases"]]
    head = ["model", "codes", "tokens", "ranks", "one device (s)", "first token (s)", "**speedup**"]
    head += ["bound by products", "by FLOPs", "by the link", *(f"{name} (ms)" for name in COLUMNS)]
    head += ["busiest uplink (ms)", "of it headers"]
    return table(head, rows) + _sources(reports)


def _row(case: dict[str, Any]) -> list[str]:
    shape, stages = case["shape"], case["stages_ms"]
    form = "" if case["dtype"] == "float32" else f" {case['dtype']}"
    form += ", packed weights" if case["packed_bytes"] else ""
    parts = (sum(stages.get(name, 0.0) for name in names) for names in COLUMNS.values())
    single, link = min(case["peers"].values()), max(case["uplink_ms"], case["downlink_ms"])
    return [
        shape["model"].removesuffix("-int8") + form,
        case["impl"].removeprefix("astra "),
        f"{shape['tokens']:,}",
        f"{shape['world_size']}",
        f"{single / 1e3:.2f}",
        f"{case['ms']['p50'] / 1e3:.3f}",
        f"{case['speedup']:.2f}×",
        f"{case['bound_speedup']:.2f}×",
        f"{case['flop_bound']:.2f}×",
        f"{single / link:.1f}×",
        *(f"{milliseconds:.0f}" for milliseconds in parts),
        f"{case['uplink_ms']:.0f}",
        f"{case['uplink_headers_ms']:.0f}",
    ]


def memory(report: Report) -> str:
    """Of every rank: weights, the process before its first call, and the most that it had."""
    rows = []
    for found in report["memory"]:
        ranks = found["by_rank"]
        peaks = [rank["peak_bytes"] for rank in ranks]
        values = [
            statistics.fmean(rank["weight_bytes"] for rank in ranks),
            statistics.fmean(rank["loaded_bytes"] for rank in ranks),
            max(peaks),
            max(rank["peak_bytes"] - rank["loaded_bytes"] for rank in ranks),
        ]
        columns = (f"{value / 2**20:,.0f}" for value in values)
        rows.append([f"{found['tokens']:,}", f"{found['world_size']}", *columns])
    head = [
        "tokens",
        "ranks",
        "weights (MiB)",
        "process, loaded",
        "most, of any rank",
        "for a call",
    ]
    return table(head, rows) + source(report)


def _sources(reports: tuple[Report, ...]) -> str:
    if len(reports) == 1:
        return source(reports[0])
    devices: dict[str, list[str]] = {}
    for report in reports:
        devices.setdefault(report["device"], []).append(f"`{report['command'].strip()}`")
    of_devices = [f"{', '.join(commands)} on {device}" for device, commands in devices.items()]
    return "\n\n" + "; ".join(of_devices)


_CURVES = tuple(
    f"cpu-2core/latency_curve_{model}" for model in ("vit-base", "smollm2", "smollm2-int8")
)
_PACKED = ("cpu-2core/latency_curve_vit-base_packed",)
_LENGTHS = ("cpu-2core/latency_lengths_smollm2",)

TABLES = {
    "latency_curve": Table(_CURVES, curve),
    "latency_curve_packed": Table(_PACKED, curve),  # of another machine
    "latency_lengths": Table(_LENGTHS, curve),
    "latency_memory": Table(_LENGTHS, memory),
}
