"""Pictures of kernels.json: time against remote tokens, both axes logarithmic.

    python -m bench.kernels.plots [--results DIR] [--name kernels]

One picture a family of cases, PNG and SVG, beside every result file of that name. Needs matplotlib:
pip install 'astra-inference[plots]'.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report import RESULTS

FAMILIES = {  # file name: the case names it takes, and what it shows
    "codeword": (("codeword_",), "attention to codewords, no positions"),
    "fused_lookup_rotary": (
        ("fused_lookup_rotary_M", "expanded_lookup_rotary_M"),
        "attention to codes, rotary positions",
    ),
    "fused_lookup_subvectors": (
        ("fused_lookup_subvectors_M", "expanded_lookup_subvectors_M"),
        "attention to codes, four sub-vectors a head",
    ),
    "decode_rotary": (("decode_rotary_",), "one query, rotary positions"),
    "decode_plain": (("decode_plain_",), "one query, no positions"),
}
COLOURS = {
    "sdpa": "tab:gray",
    "sdpa_cudnn": "tab:olive",
    "index_select_sdpa": "tab:brown",
    "expand_sdpa": "tab:pink",
    "flashinfer": "tab:cyan",
}
OURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")

Case = Mapping[str, Any]
Lines = dict[str, list[tuple[int, float]]]


def panels(cases: Sequence[Case], prefixes: tuple[str, ...]) -> dict[str, list[Case]]:
    """Cases that differ in the number of tokens and the variant alone."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        if case["name"].startswith(prefixes):
            shape = case["shape"]
            groups[f"M={shape['M']}, H={shape['H']}, Hkv={shape['Hkv']}, d={shape['d']}"].append(
                case
            )
    return {title: group for title, group in groups.items() if _sizes(group) > 1}


def lines(cases: Sequence[Case]) -> tuple[Lines, Lines, Lines]:
    """Ours by variant, the baselines, the roofline: points (tokens, milliseconds)."""
    groups: list[dict[str, dict[int, float]]] = [defaultdict(dict) for _ in range(3)]
    ours, baselines, roofline = groups
    for case in cases:
        tokens = case["shape"]["N"]
        ours[case["impl"]][tokens] = case["ms"]["p50"]
        roofline[case.get("floor_of", "roofline")][tokens] = case["floor_ms"]
        for name, milliseconds in case["peers"].items():
            baselines[name][tokens] = milliseconds
    ordered = [{name: sorted(points.items()) for name, points in of.items()} for of in groups]
    return ordered[0], ordered[1], ordered[2]


def _sizes(cases: Sequence[Case]) -> int:
    return len({case["shape"]["N"] for case in cases})


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for family, (prefixes, title) in FAMILIES.items():
        groups = panels(report["cases"], prefixes)
        if not groups:
            continue
        columns = min(3, len(groups))
        rows = -(-len(groups) // columns)
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(4.5 * columns, 3.6 * rows), squeeze=False
        )
        for axis in axes.flat[len(groups) :]:
            axis.set_visible(False)
        for axis, (panel, cases) in zip(axes.flat, groups.items(), strict=False):
            ours, baselines, roofline = lines(cases)
            for (name, points), colour in zip(ours.items(), OURS, strict=False):
                axis.plot(*zip(*points, strict=True), "o-", color=colour, label=f"ours, {name}")
            for name, points in baselines.items():
                axis.plot(
                    *zip(*points, strict=True), "s--", color=COLOURS.get(name), ms=4, label=name
                )
            for name, points in roofline.items():
                axis.plot(*zip(*points, strict=True), ":", color="black", label=name)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_title(panel, fontsize=9)
            axis.set_xlabel("remote tokens")
            axis.set_ylabel("ms")
            axis.grid(True, which="both", alpha=0.25)
            axis.legend(fontsize=6)
        figure.suptitle(f"{title}; {report['device'].split(',')[0]}", fontsize=11)
        figure.tight_layout()
        for kind in ("png", "svg"):
            written.append(folder / f"{report_name(family)}.{kind}")
            figure.savefig(written[-1], dpi=110)
        pyplot.close(figure)
    return written


def report_name(family: str) -> str:
    return f"kernels_{family}"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.plots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="kernels")
    args = parser.parse_args(given)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("plots need matplotlib: pip install 'astra-inference[plots]'")
        return 2
    files = sorted(args.results.glob(f"*/{args.name}.json"))
    if not files:
        print(f"no {args.name}.json in a folder of {args.results}: python -m bench.kernels first")
        return 1
    for path in files:
        for picture in draw(json.loads(path.read_text()), path.parent):
            print(picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
