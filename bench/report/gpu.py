"""Tables of what was measured on a GPU: the kernels, and the engine on one that is every rank."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from .markdown import Report, Table, source, table

# GPU cases that the page shows.
GPU = (
    r"codeword_(counted_)?M1024_N(4096|32768|131072)_H32",
    r"(fused|expanded)_lookup_(rotary|subvectors)_M(64|256|1024)_N8192_H32",
    r"fused_lookup_rotary_packed_M256_N8192_H32",
    r"decode_rotary_fused_(packed_)?M1_N(131072|1048576)",
    r"decode_plain_(counts|counted_packed)_M1_N(131072|1048576)",
    r"encode_(bfloat16|float32)_D768_G",
    r"mixed_|merge_state|lookup_linear_T8192|pack_10bit_1048576|unpack_10bit_1048576",
)


def kernels(report: Report) -> str:
    rows = []
    for case in report["cases"]:
        if not any(re.match(pattern, case["name"]) for pattern in GPU):
            continue
        ours, peers = case["ms"]["p50"], case["peers"]
        best = min(peers, key=peers.__getitem__) if peers else None
        over = {name: f"{ms / ours:.2f}×" for name, ms in peers.items()}
        rest = ", ".join(f"{name} {x}" for name, x in over.items() if name != best)
        graph = case.get("graph_ms")
        rows.append(
            [
                case["name"],
                f"{ours * 1e3:,.1f}",
                "–" if graph is None else f"{graph * 1e3:,.1f}",
                f"{case['floor_ms'] * 1e3:,.1f}",
                "–" if best is None else f"{over[best]} ({best})",
                rest or "–",
            ]
        )
    head = ["case", "µs", "in a graph", "roofline", "over the best baseline", "over others"]
    text = table(head, rows) + source(report)
    if report.get("failed"):
        text += "\n\nFailed their check, not timed: "
        text += ", ".join(case["name"] for case in report["failed"]) + "."
    return text


RATES = ((10_000, "10 Gbit/s"), (1000, "1 Gbit/s"), (100, "100 Mbit/s"))


def engine(report: Report) -> str:
    """A row for each length and number of ranks: the slowest rank alone, and links from a model."""
    found: dict[tuple[int, int], dict[str, list[dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    single: dict[int, float] = {}
    for case in report["cases"]:
        shape = case["shape"]
        kind = case["name"].split("_T")[0]
        if kind == "engine_single":
            single[shape["tokens"]] = case["ms"]["p50"]
        else:
            found[shape["tokens"], shape["world_size"]][kind].append(case)
    rows = []
    for (tokens, ranks), kinds in sorted(found.items()):
        alone = single[tokens]
        slowest = [
            max((case["ms"]["p50"] for case in kinds[kind]), default=None)
            for kind in ("engine_rank", "engine_graphs")
        ]
        linked = {case["shape"]["mbit_per_s"]: case["ms"]["p50"] for case in kinds["engine"]}
        rows.append(
            [f"{tokens:,}", str(ranks), f"{alone:.1f}"]
            + ["–" if ms is None else f"{ms:.1f} ({alone / ms:.2f}×)" for ms in slowest]
            + [f"{alone / linked[rate]:.2f}×" if rate in linked else "–" for rate, _ in RATES]
        )
    head = ["tokens", "ranks", "one device, ms", "slowest rank, ms", "as graphs, ms"]
    return table(head + [name for _, name in RATES], rows) + source(report)


TABLES = {
    "kernels_h200": Table(("h200/kernels",), kernels),
    "engine_h200": Table(("h200/engine",), engine),
}
