"""Tables of the page on kernels: bit packing and the ops on a CPU."""

from __future__ import annotations

from typing import Any

from .markdown import Report, Table, source, table

WIDTHS = (1, 10, 16)  # bits of the codes in the table of bit packing


def _bits(case: dict[str, Any]) -> int:
    return int(case["shape"]["K"]).bit_length() - 1


def pack(report: Report) -> str:
    rows = []
    for case in report["cases"]:
        ours, peers = case["ms"]["p50"], case["peers"]
        rows.append(
            [
                case["name"],
                f"{case['shape']['N'] / ours / 1e3:,.0f}",
                f"{case['floor_ms'] / ours:.0%}",
                f"{peers['numpy'] / ours:.0f}×",
                f"{peers['numpy_tuned'] / ours:.0f}×",
                f"{peers['faiss'] / ours:.1f}×",
            ]
        )
    head = ["case", "M codes/s", "of memcpy", "over numpy", "over the best numpy", "over faiss"]
    return table(head, rows) + source(report)


def ops(report: Report) -> str:
    rows = []
    for case in report["cases"]:
        shape = ", ".join(f"{k}={v}" for k, v in case["shape"].items() if k not in ("B", "model"))
        others = {name: ms for name, ms in case["peers"].items() if name != "reference"}
        baselines = ", ".join(f"{name} {ms:.3g}" for name, ms in others.items()) or "–"
        plain = case["peers"].get("reference")
        rows.append(
            [
                case["name"].removesuffix("_1threads"),
                shape,
                f"{case['ms']['p50']:.3g}",
                "–" if plain is None else f"{plain:.3g}",
                baselines,
            ]
        )
    head = ["case, one thread", "shape", "ms", "reference (ms)", "baselines (ms)"]
    return table(head, rows) + source(report)


def beside(report: Report) -> str:
    """Times beside the baselines', and peaks of memory where they were measured."""
    peaks = any("peak_bytes" in case for case in report["cases"])
    rows = []
    for case in report["cases"]:
        ours, names = case["ms"]["p50"], ("B", "blocks")
        shape = ", ".join(f"{k}={v}" for k, v in case["shape"].items() if k not in names)
        row = [
            case["name"].removesuffix("_2threads"),
            shape or "–",
            f"{ours:.3g}",
            ", ".join(f"{name} {ms:.3g}" for name, ms in case["peers"].items()) or "–",
            ", ".join(f"{ours / ms:.2f}" for ms in case["peers"].values()) or "–",
        ]
        if peaks:
            row.append(_peaks(case.get("peak_bytes", {})))
        rows.append(row)
    head = ["case", "shape", "ms", "baselines (ms)", "of their time"]
    return table(head + ["peak memory (MB)"] * peaks, rows) + source(report)


def _peaks(peaks: dict[str, int]) -> str:
    return ", ".join(f"{name} {count / 1e6:.1f}" for name, count in peaks.items()) or "–"


# By name and the shape's first two sizes: an op where it is faster, and those where it is slower.
OPS = {
    ("attention_causal", 512),
    ("fused_lookup_rotary", 512),
    ("codeword", 768),
    ("codeword", 3072),
    ("decode_rotary", 1024),
    ("decode_plain", 3072),
    ("mixed_causal", 512),
    ("mixed", 768),
}


def _shown(case: dict[str, Any]) -> bool:
    shape = case["shape"]
    size = shape.get("N", shape.get("M"))
    return case["name"].endswith("_1threads") and (
        (case["name"].removesuffix("_1threads"), size) in OPS
        or (case["name"] == "encode_1threads" and shape["d"] in (128, 768))
    )


TABLES = {
    "pack": Table(
        ("cpu-2core/pack",),
        pack,
        lambda case: _bits(case) in WIDTHS and (case["shape"]["N"] >= 1e6 or _bits(case) == 10),
        "1, 10 and 16 bits of a million codes, 10 bits of 15,360",
    ),
    "ops": Table(
        ("cpu-2core/ops",),
        ops,
        _shown,
        "attention with and without codes, encoding in one and in three groups, the slower cases "
        "among them",
    ),
    "native": Table(
        ("cpu-2core/native",),
        beside,
        lambda case: case["shape"].get("d", 64) == 64 and not case["name"].startswith("counting"),
        "heads of 64 channels, without the counts of codes, and linear layers",
    ),
    "ops_drop_in": Table(("cpu-2core/ops_drop_in",), beside),
    "finetune": Table(("cpu-2core/finetune",), beside),
}
