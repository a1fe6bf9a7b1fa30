"""Where one strategy overtakes another, from measured cases.

The result has the form of `Crossover` in astra_kernels/_triton/strategies.py. Between two measured
points the crossing is interpolated on logarithmic scales; several series give their median.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Point = tuple[float, float]  # rows or tokens, time of the newcomer over time of fused

FEW_ROWS = 64  # as astra_kernels/_triton/attention.py has it
BEYOND = 2.0  # a crossing past the last point is put so much farther


def crossing(points: Iterable[Point]) -> float | None:
    """From where on the newcomer stays quicker; before the first point, that; None: nowhere."""
    ordered = sorted(points)
    from_here = None
    for place, (x, ratio) in reversed(list(enumerate(ordered))):
        if ratio >= 1:
            break
        from_here = x
        if place > 0:
            before, slower = ordered[place - 1]
            if slower >= 1:
                part = math.log(slower) / (math.log(slower) - math.log(ratio))
                from_here = before * (x / before) ** part
    return from_here


def series(
    cases: Sequence[Mapping[str, Any]], impl: str, fused: str, prefix: tuple[str, ...], axis: str
) -> dict[tuple[Any, ...], list[Point]]:
    """Times of `impl` over those of `fused` on the same shape, along an axis ("M" or "N")."""
    times: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for case in cases:
        if case["name"].startswith(prefix) and case["impl"] in (impl, fused):
            kind = case["name"].split("_M")[0].split("_", 1)[1].removeprefix("lookup_")
            family = kind if axis == "M" else ""
            shape = tuple(sorted(case["shape"].items()))
            times[(family, shape)][case["impl"]] = case["ms"]["p50"]
    ratios: dict[tuple[Any, ...], list[Point]] = defaultdict(list)
    for (family, shape), pair in times.items():
        if len(pair) == 2:
            sizes = dict(shape)
            rest = tuple(item for item in shape if item[0] != axis)
            ratio = pair[impl] / pair[fused]
            if axis == "M":
                x = sizes["M"] * sizes["H"] / sizes["Hkv"]
            else:
                x = sizes["N"] / sizes["K"]
            ratios[(family, *rest)].append((x, ratio))
    return ratios


def summary(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The three constants of a Crossover, and every series that they come from."""
    looked_up = series(cases, "expanded", "fused", ("fused_lookup", "expanded_lookup"), "M")
    counted = series(cases, "counted", "fused", ("plain_",), "N")
    few: dict[Any, Any] = {}
    many: dict[Any, Any] = {}
    for key, points in counted.items():
        sizes = dict(key[1:])
        rows = sizes["M"] * sizes["H"] / sizes["Hkv"]
        (few if rows <= FEW_ROWS else many)[key] = points
    values = {
        "counted_from": _median(many),
        "counted_from_few_rows": _median(few),
        "expanded_from": _median(looked_up),
    }
    if values["expanded_from"] is not None:
        values["expanded_from"] = round(values["expanded_from"])
    return {
        **values,
        "series": [
            {"of": name, "fixed": [str(part) for part in key], "points": sorted(points)}
            for name, group in (("expanded", looked_up), ("counted", counted))
            for key, points in group.items()
        ],
    }


def as_code(capability: int, values: Mapping[str, Any]) -> str:
    """The line for MEASURED; a constant that was not measured shows as `...`."""
    fields = ", ".join(
        f"{name}={'...' if values[name] is None else format(values[name], '.4g')}"
        for name in ("counted_from", "counted_from_few_rows")
    )
    rows = values["expanded_from"]
    return f"{capability}: Crossover({fields}, expanded_from={'...' if rows is None else rows}),"


def _median(ratios: Mapping[Any, Sequence[Point]]) -> float | None:
    crossings = []
    for points in ratios.values():
        if len(points) < 2:
            continue
        at = crossing(points)
        crossings.append(max(x for x, _ in points) * BEYOND if at is None else at)
    return statistics.median(crossings) if crossings else None
