"""Tables of latency_*.json. Each takes a file's content and returns markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.report import load, source, table

RIVALS = {
    "tp": "TP",
    "sp": "SP",
    "sp_int8": "SP int8",
    "bp_ag_nb1": "BP+AG Nb=1",
    "bp_ag_nb4": "BP+AG Nb=4",
    "bp_sp_nb1": "BP+SP Nb=1",
    "segment_means": "segment means",
}
RTT_MS = 2.0  # of the rows shown; the file has more


def _speedup(case: dict[str, Any], ms: float | None) -> str:
    return "" if ms is None else f"{case['peers']['single'] / ms:.2f}×"


def _rows(report: dict[str, Any], cases: Iterable[dict[str, Any]]) -> tuple[list[str], list[Any]]:
    """One row a number of ranks, link and speed; a column for each of our settings and rivals."""
    chosen = list(cases)
    settings = list(dict.fromkeys(case["impl"] for case in chosen))
    rivals = [name for name in RIVALS if any(name in case["peers"] for case in chosen)]
    rows: dict[Any, dict[str, dict[str, Any]]] = {}
    for case in chosen:
        shape = case["shape"]
        key = (shape["world_size"], case.get("speed", 1), shape["mbit_per_s"], shape["rtt_ms"])
        rows.setdefault(key, {})[case["impl"]] = case
    lines = []
    for (ranks, _speed, mbit, _), found in sorted(rows.items()):
        any_case = next(iter(found.values()))
        lines.append(
            [
                f"{ranks}",
                f"{mbit:g}",
                f"{any_case['peers']['single'] / 1e3:.3f}",
                *(_speedup(found[name], found[name]["ms"]["p50"]) for name in settings),
                *(_speedup(any_case, any_case["peers"].get(name)) for name in rivals),
            ]
        )
    head = ["ranks", "Mbit/s", "one device (s)", *(f"**{name}**" for name in settings)]
    return [*head, *(RIVALS[name] for name in rivals)], lines


def latency(report: dict[str, Any]) -> str:
    """Speedup over one device by ranks and rate; ideal is the number of ranks."""
    shown = [
        case
        for case in report["cases"]
        if case["shape"]["rtt_ms"] == RTT_MS and case.get("speed", 1) == 1
    ]
    return table(*_rows(report, shown)) + source(report)


# Model and tokens of the files in the table of other shapes, as far as they are there.
OTHERS = ("vit-base_256", "vit-base_4096", "vit-base-int8_1024", "gpt2_1024")
OTHERS += ("gpt2-medium_1024", "llama_1024", "vit-base_1024_many")


def others(_: dict[str, Any]) -> str:
    """At 10 Mbit/s: of each shape and number of ranks the setting that is quickest."""
    head = ["model", "tokens", "ranks", "one device (s)", "setting", "**ASTRA**"]
    rivals = ("sp_int8", "bp_ag_nb1", "bp_sp_nb1", "segment_means")
    rows, commands = [], []
    for name in OTHERS:
        report = load(f"cpu-2core/latency_{name}")
        if report is None:
            continue
        commands.append(f"`{report['command'].strip()}`")
        of_ranks: dict[int, list[dict[str, Any]]] = {}
        for case in report["cases"]:
            shape = case["shape"]
            if (shape["mbit_per_s"], shape["rtt_ms"], case.get("speed", 1)) == (10, RTT_MS, 1):
                of_ranks.setdefault(shape["world_size"], []).append(case)
        for ranks, cases in sorted(of_ranks.items()):
            best = min(cases, key=lambda case: case["ms"]["p50"])
            peers, shape = best["peers"], best["shape"]
            rows.append(
                [
                    shape["model"],
                    f"{shape['tokens']}",
                    f"{ranks}",
                    f"{peers['single'] / 1e3:.3f}",
                    best["impl"].removeprefix("astra "),
                    f"{_speedup(best, best['ms']['p50'])}",
                    *(_speedup(best, peers.get(rival)) for rival in rivals),
                ]
            )
    return table([*head, *(RIVALS[rival] for rival in rivals)], rows) + "\n\n" + ", ".join(commands)


def scaled(report: dict[str, Any]) -> str:
    """The same on devices so much faster: stage times divided by a factor."""
    shown = [case for case in report["cases"] if case.get("speed", 1) != 1]
    if not shown:
        return "*not measured yet*"
    rows = []
    for case in shown:
        ours, rival = case["ms"]["p50"], case["peers"]["bp_ag_nb1"]
        rows.append(
            [
                f"{case['shape']['world_size']}",
                f"{case['speed']:g}×",
                f"{case['shape']['mbit_per_s']:g}",
                f"{case['peers']['single'] / 1e3:.3f}",
                case["impl"],
                _speedup(case, ours),
                f"{rival / ours:.2f}×",
            ]
        )
    head = ["ranks", "device", "Mbit/s", "one device (s)", "setting", "over one device"]
    return table([*head, "over BP+AG Nb=1"], rows) + source(report)


def stages(report: dict[str, Any]) -> str:
    """Where the busiest rank's time goes, without waiting; the link makes no difference."""
    seen: dict[Any, dict[str, Any]] = {}
    for case in report["cases"]:
        if case.get("speed", 1) == 1:
            seen.setdefault((case["shape"]["world_size"], case["impl"]), case)
    names = ["compute", "attend", "encode", "pack", "send", "unpack", "merge"]
    rows = []
    for (ranks, impl), case in sorted(seen.items()):
        stages = case["stages_ms"]
        total = sum(stages.values())
        rows.append(
            [
                f"{ranks}",
                impl,
                f"{total:.0f}",
                *(f"{stages.get(name, 0.0) / total:.1%}" for name in names),
            ]
        )
    return table(["ranks", "setting", "busy (ms)", *names], rows) + source(report)


def real(report: dict[str, Any]) -> str:
    """Real processes behind the switch, beside what the virtual clock says."""
    first = report["cases"][0]
    rows = []
    for case in report["cases"]:
        name, ours = case["impl"], case["ms"]["p50"]
        rows.append([f"**{name}**", *_real(first, name, ours)])
    peers = first["peers"]
    rows += [
        [RIVALS.get(name, "one device"), *_real(first, name, peers[name])]
        for name in ("single", *RIVALS)
        if name in peers
    ]
    head = ["", "first token (s)", "speedup", "virtual clock (s)", "over real"]
    head += ["`astra plan` (s)", "over real"]
    return table(head, rows) + source(report)


def _real(case: dict[str, Any], name: str, ms: float) -> list[str]:
    told = [f"{ms / 1e3:.3f}", _speedup(case, ms)]
    for kind in ("virtual_ms", "planned_ms"):
        other = case[kind].get(name)
        told += ["", ""] if other is None else [f"{other / 1e3:.3f}", f"{other / ms:.2f}"]
    return told


def links(report: dict[str, Any]) -> str:
    """One small exchange on every link, and how late the switch is with single packets."""
    rows, late = [], []
    for case in report["cases"]:
        shape, ours = case["shape"], case["ms"]["p50"]
        if case["impl"] == "switch":
            times = " / ".join(f"{ms:.2f}" for ms in case["late_ms"].values())
            late.append(f"{times} ms at {shape['mbit_per_s']:g} Mbit/s")
            continue
        peers = (case["peers"][name] for name in ("paced", "switch"))
        codes = "dense" if shape["space"] == "none" else shape["space"]
        row = [f"{shape['model']}, {shape['tokens']} tokens", codes, f"{ours:.1f}"]
        rows.append([*row, *(f"{ms:.1f} ({ms / ours:.2f})" for ms in peers)])
    head = ["10 Mbit/s, two ranks", "exchange", "virtual clock (ms)", "emulated link", "switch"]
    sizes = " / ".join(next(case["late_ms"] for case in report["cases"] if "late_ms" in case))
    note = f"The switch is late with packets of {sizes} by {', '.join(late)}."
    return f"{table(head, rows)}{source(report)}. {note}"


def scaling(report: dict[str, Any]) -> str:
    """On paper: the number of devices that is best, full mesh and two-level."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        if row["model"] not in ("vit-base", "llama-3-8b"):
            continue  # the rest is in the file
        key = (row["model"], row["flops"], row["mbit_per_s"], row["tokens"])
        groups.setdefault(key, []).append(row)
    lines = []
    for (model, flops, mbit, tokens), found in groups.items():
        line = [model, f"{flops / 1e9:g}", f"{mbit:g}", f"{tokens:,}"]
        for name in ("full", "two_level"):
            best = max(found, key=lambda row: row[f"{name}_speedup"])
            line.append(f"{best['world_size']}: {best[f'{name}_speedup']:.1f}×")
        lines.append([*line, f"{found[-1]['full_speedup']:.1f}×"])
    head = ["model", "GFLOP/s a device", "Mbit/s", "tokens", "best, full mesh", "best, two levels"]
    return table([*head, "1,024 devices, full mesh"], lines) + source(report)
