"""Figures of latency_*.json: speedup against bandwidth and ranks, and where the time goes.

    python -m bench.latency.plots [NAME …] [--results DIR]

One SVG beside every result file, or those named: latency_<model>_<tokens>.svg, with the cases of
latency_<model>_<tokens>_many.json, of more ranks, where that is there. Needs matplotlib:
pip install 'astra-inference[plots]'.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.latency.tables import BASELINES, RTT_MS
from bench.report import RESULTS

Case = Mapping[str, Any]
STAGES = ("compute", "attend", "encode", "pack", "send", "unpack", "merge")
MANY = "_many"
COLOURS = ("#4c78a8", "#72b7b2", "#e45756", "#f2cf5b", "#b279a2", "#ff9da6", "#9d755d")


def chosen(report: Mapping[str, Any]) -> list[Case]:
    """Cases at the round trip that tables show, on this machine's own speed."""
    return [
        case
        for case in report["cases"]
        if case.get("speed", 1) == 1 and case["shape"]["rtt_ms"] == RTT_MS
    ]


def curves(cases: Sequence[Case], axis: str) -> dict[str, list[tuple[float, float]]]:
    """Speedup over one device of each method along an axis of `shape`, sorted."""
    speedups: dict[str, dict[float, float]] = {}
    for case in cases:
        at, single = float(case["shape"][axis]), case["peers"]["single"]
        speedups.setdefault(case["impl"], {})[at] = single / case["ms"]["p50"]
        for name, ms in case["peers"].items():
            if name in BASELINES:
                speedups.setdefault(BASELINES[name], {})[at] = single / ms
    return {name: sorted(points.items()) for name, points in speedups.items()}


def draw(report: Mapping[str, Any], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "astra"  # the same file for the same figures
    from matplotlib import pyplot

    cases = chosen(report)
    shape = cases[0]["shape"]
    ranks = sorted({case["shape"]["world_size"] for case in cases})
    rates = sorted({case["shape"]["mbit_per_s"] for case in cases})
    most = 4 if 4 in ranks else ranks[-1]
    figure, (of_rate, of_ranks, of_stages) = pyplot.subplots(1, 3, figsize=(15, 4.4))
    at_ranks = [case for case in cases if case["shape"]["world_size"] == most]
    at_rate = [case for case in cases if case["shape"]["mbit_per_s"] == rates[0]]
    for axis, lines, title in (
        (of_rate, curves(at_ranks, "mbit_per_s"), f"{most} ranks"),
        (of_ranks, curves(at_rate, "world_size"), f"{rates[0]:g} Mbit/s"),
    ):
        for name, points in lines.items():
            ours = name.startswith("astra ")
            style = "o-" if ours else "s--"
            axis.plot(*zip(*points, strict=True), style, ms=4, lw=2 if ours else 1, label=name)
        axis.axhline(1, color="black", lw=0.8)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda times, _: f"{times:g}×")
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("speedup over one device")
        axis.grid(True, alpha=0.25)
        axis.legend(fontsize=6)
    of_rate.axhline(most, color="black", ls=":", lw=1)
    of_rate.set_xscale("log")
    of_rate.set_xlabel("Mbit/s")
    of_rate.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
    of_rate.minorticks_off()
    of_ranks.plot(ranks, ranks, ":", color="black", lw=1)
    of_ranks.set_xscale("log", base=2)
    of_ranks.set_xlabel("ranks")
    of_ranks.set_xticks(ranks, [f"{number}" for number in ranks])
    bars = {(c["shape"]["world_size"], c["impl"]): c["stages_ms"] for c in cases}
    labels = [f"N={n}\n{impl.removeprefix('astra ')}" for n, impl in sorted(bars)]
    bottom = [0.0] * len(bars)
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        heights = [stages.get(stage, 0.0) for _, stages in sorted(bars.items())]
        of_stages.bar(labels, heights, bottom=bottom, color=colour, label=stage)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    of_stages.set_title("the busiest rank, without waiting", fontsize=10)
    of_stages.set_ylabel("ms")
    of_stages.tick_params(axis="x", labelsize=6)
    of_stages.legend(fontsize=6)
    device = report["device"].split(",")[0]
    figure.suptitle(
        f"{shape['model']}, {shape['tokens']} tokens, round trip {RTT_MS:g} ms; {device}, "
        "virtual clock",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.latency.plots", description=__doc__.splitlines()[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of results; all")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    for path in sorted(options.results.glob("*/latency_*.json")):
        if path.stem.endswith(MANY) or (options.names and path.stem not in options.names):
            continue
        report = json.loads(path.read_text())
        more = path.with_stem(path.stem + MANY)
        if more.is_file():
            report["cases"] += json.loads(more.read_text())["cases"]
        if report["cases"] and "stages_ms" in report["cases"][0]:
            print(draw(report, path.with_suffix(".svg")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
