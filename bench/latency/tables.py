"""Tables of latency_*.json, link.json and scaling.json: a report in, markdown out."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from astra_runtime.codes.registry import codec_named
from bench.report.markdown import Report, Table, source, table

BASELINES = {
    "tp": "TP",
    "sp": "SP",
    "sp_int8": "SP int8",
    "bp_ag_nb1": "BP+AG Nb=1",
    "bp_ag_nb4": "BP+AG Nb=4",
    "bp_sp_nb1": "BP+SP Nb=1",
    "segment_means": "segment means",
}
FEW = ("sp_int8", "bp_ag_nb1", "bp_sp_nb1", "segment_means")  # the fastest of each kind
RTT_MS = 2.0  # of the rows shown; the file has more


def _speedup(case: dict[str, Any], ms: float | None) -> str:
    return "" if ms is None else f"{case['peers']['single'] / ms:.2f}×"


def _rows(report: Report, cases: Iterable[dict[str, Any]]) -> tuple[list[str], list[Any]]:
    """One row a number of ranks, link and speed; a column for each method."""
    chosen = list(cases)
    settings = list(dict.fromkeys(case["impl"] for case in chosen))
    baselines = [name for name in BASELINES if any(name in case["peers"] for case in chosen)]
    rows: dict[Any, dict[str, dict[str, Any]]] = {}
    for case in chosen:
        shape = case["shape"]
        key = (shape["world_size"], case.get("speed", 1), shape["mbit_per_s"], shape["rtt_ms"])
        rows.setdefault(key, {})[case["impl"]] = case
    lines = []
    for (ranks, _speed, mbit, _), by_setting in sorted(rows.items()):
        any_case = next(iter(by_setting.values()))
        lines.append(
            [
                f"{ranks}",
                f"{mbit:g}",
                f"{any_case['peers']['single'] / 1e3:.3f}",
                *(_speedup(by_setting[name], by_setting[name]["ms"]["p50"]) for name in settings),
                *(_speedup(any_case, any_case["peers"].get(name)) for name in baselines),
            ]
        )
    head = ["ranks", "Mbit/s", "one device (s)", *(f"**{name}**" for name in settings)]
    return [*head, *(BASELINES[name] for name in baselines)], lines


def latency(report: Report) -> str:
    """Speedup over one device by ranks and rate; ideal is the number of ranks."""
    shown = [
        case
        for case in report["cases"]
        if case["shape"]["rtt_ms"] == RTT_MS and case.get("speed", 1) == 1
    ]
    return table(*_rows(report, shown)) + source(report)


def others(*reports: Report) -> str:
    """At 10 Mbit/s: of each shape and number of ranks the setting that is fastest."""
    head = ["model", "tokens", "ranks", "one device (s)", "setting", "**ASTRA**"]
    rows = []
    for report in reports:
        of_ranks: dict[int, list[dict[str, Any]]] = {}
        for case in report["cases"]:
            shape = case["shape"]
            if (shape["mbit_per_s"], shape["rtt_ms"], case.get("speed", 1)) == (10, RTT_MS, 1):
                of_ranks.setdefault(shape["world_size"], []).append(case)
        for ranks, cases in sorted(of_ranks.items()):
            best = min(cases, key=lambda case: case["ms"]["p50"])
            shape = best["shape"]
            rows.append(
                [
                    shape["model"],
                    f"{shape['tokens']}",
                    f"{ranks}",
                    f"{best['peers']['single'] / 1e3:.3f}",
                    best["impl"].removeprefix("astra "),
                    f"{_speedup(best, best['ms']['p50'])}",
                    *(_speedup(best, best["peers"].get(name)) for name in FEW),
                ]
            )
    commands = ", ".join(f"`{report['command'].strip()}`" for report in reports)
    return table([*head, *(BASELINES[name] for name in FEW)], rows) + "\n\n" + commands


def scaled(report: Report) -> str:
    """The same on devices so much faster: stage times divided by a factor."""
    shown = [case for case in report["cases"] if case.get("speed", 1) != 1]
    if not shown:
        return "*not measured yet*"
    rows = []
    for case in shown:
        ours, baseline = case["ms"]["p50"], case["peers"]["bp_ag_nb1"]
        rows.append(
            [
                f"{case['shape']['world_size']}",
                f"{case['speed']:g}×",
                f"{case['shape']['mbit_per_s']:g}",
                f"{case['peers']['single'] / 1e3:.3f}",
                case["impl"],
                _speedup(case, ours),
                f"{baseline / ours:.2f}×",
            ]
        )
    head = ["ranks", "device", "Mbit/s", "one device (s)", "setting", "over one device"]
    return table([*head, "over BP+AG Nb=1"], rows) + source(report)


def stages(report: Report) -> str:
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


def real(report: Report, baselines: Iterable[str] = tuple(BASELINES)) -> str:
    """Real processes behind the switch, beside what the virtual clock says."""
    first = report["cases"][0]
    rows = []
    for case in report["cases"]:
        name, ours = case["impl"], case["ms"]["p50"]
        rows.append([f"**{name}**", *_real(first, name, ours)])
    peers = first["peers"]
    rows += [
        [BASELINES.get(name, "one device"), *_real(first, name, peers[name])]
        for name in ("single", *baselines)
        if name in peers
    ]
    head = ["", "first token (s)", "speedup", "virtual clock (s)", "over real"]
    head += ["`astra plan` (s)", "over real"]
    return table(head, rows) + source(report)


def _real(case: dict[str, Any], name: str, ms: float) -> list[str]:
    cells = [f"{ms / 1e3:.3f}", _speedup(case, ms)]
    for kind in ("virtual_ms", "planned_ms"):
        other = case[kind].get(name)
        cells += ["", ""] if other is None else [f"{other / 1e3:.3f}", f"{other / ms:.2f}"]
    return cells


def links(report: Report) -> str:
    """One small exchange on every link, and how late the switch is with single packets."""
    rows, late = [], []
    for case in report["cases"]:
        shape, ours = case["shape"], case["ms"]["p50"]
        if case["impl"] == "switch":
            times = " / ".join(f"{ms:.2f}" for ms in case["late_ms"].values())
            late.append(f"{times} ms at {shape['mbit_per_s']:g} Mbit/s")
            continue
        peers = (case["peers"][name] for name in ("paced", "switch"))
        codes = shape["space"] if codec_named(shape["space"]).coded else "dense"
        row = [f"{shape['model']}, {shape['tokens']} tokens", codes, f"{ours:.1f}"]
        rows.append([*row, *(f"{ms:.1f} ({ms / ours:.2f})" for ms in peers)])
    head = ["10 Mbit/s, two ranks", "exchange", "virtual clock (ms)", "emulated link", "switch"]
    sizes = " / ".join(next(case["late_ms"] for case in report["cases"] if "late_ms" in case))
    note = f"The switch is late with packets of {sizes} by {', '.join(late)}."
    return f"{table(head, rows)}{source(report)}. {note}"


def scaling(report: Report) -> str:
    """Closed form: the number of devices that is best, full mesh and two-level."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        key = (row["model"], row["flops"], row["mbit_per_s"], row["tokens"])
        groups.setdefault(key, []).append(row)
    lines = []
    for (model, flops, mbit, tokens), worlds in groups.items():
        line = [model, f"{flops / 1e9:g}", f"{mbit:g}", f"{tokens:,}"]
        for name in ("full", "two_level"):
            best = max(worlds, key=lambda row: row[f"{name}_speedup"])
            line.append(f"{best['world_size']}: {best[f'{name}_speedup']:.1f}×")
        lines.append([*line, f"{worlds[-1]['full_speedup']:.1f}×"])
    head = ["model", "GFLOP/s a device", "Mbit/s", "tokens", "best, full mesh", "best, two levels"]
    return table([*head, "1,024 devices, full mesh"], lines) + source(report)


def demo(report: Report) -> str:
    """Every link and method."""
    rows = []
    for result in report["demos"]:
        link = f"{result['link']['mbit_per_s']:g} Mbit/s, {result['link']['delay_ms']:g} ms"
        rows += [[link, *line] for line in _demo_rows(result)]
    return table(["link, one-way delay", *DEMO], rows) + source(report)


DEMO = ["method", "first token (s)", "speedup", "bits/token/block", "perplexity"]


def demo_short(report: Report) -> str:
    """Four rows: the first link alone."""
    result = report["demos"][0]
    rate = f"{result['link']['mbit_per_s']:g} Mbit/s"
    rows = _demo_rows(result)
    return table([f"{result['world_size']} devices, {rate}", *DEMO[1:]], rows) + source(report)


def _demo_rows(result: dict[str, Any]) -> list[list[str]]:
    names = {"single": "one device", "dense": "dense exchange, fp32", "astra": "**ASTRA**"}
    rows = [
        [
            names[run["method"]],
            f"{run['seconds_to_first_token']:.2f}",
            _in_rounds(run),
            f"{run['bits_per_token_block']:.0f}",
            f"{run['perplexity']:.2f}",
        ]
        for run in result["runs"]
    ]
    return [*rows, ["local-only", "", "", "0", f"{result['local_only_perplexity']:.2f}"]]


def rivals(report: Report) -> str:
    """Every method, beside ours in float32 on one device."""
    single = next(row for row in report["rows"] if row["name"] == "astra float32")["ms"]["p50"]
    lines = [
        [
            f"**{row['name']}**" if row["method"] == "astra" else row["name"],
            f"{row['threads']}",
            f"{row['ms']['p50'] / 1e3:.2f}",
            f"{row['processor_ms'] / 1e3:.2f}",
            f"{single / row['ms']['p50']:.2f}×",
            "yes" if row["same_token"] else "no",
        ]
        for row in report["rows"]
    ]
    head = ["first token of 1,024", "threads", "seconds", "processor seconds"]
    head += ["over **astra float32**", "torch's token"]
    versions = "".join(f", {name} {version}" for name, version in report["rivals"].items())
    return f"{table(head, lines)}{source(report)}{versions}"


def _in_rounds(run: dict[str, Any]) -> str:
    """The median speedup, and its range where there were several rounds."""
    low, high = run.get("speedup_range", (1, 1))
    text = f"{run['speedup']:.2f}×"
    return text if low == high else f"{text} ({low:.2f}–{high:.2f})"


def frames(report: Report) -> str:
    """Percentiles of a steady stream, and what its slowest hundredth has over the mean."""
    rows, parts = [], ("late", "cpu", "away", "steal", "wait", "gc")
    for case in report["cases"]:
        times = (case["ms"]["p50"], case["p99_ms"], case["p99.9_ms"], case["max_ms"])
        ratio = f"{case['p99_ms'] / case['ms']['p50']:.2f}"
        name = case["impl"] if case["impl"] == "one device" else f"**{case['impl']}**"
        added = [_over_mean(case, rank) for rank in range(len(case["tail_ms"]))]
        first = [f"{added[0][key]:+.0f}" for key in parts]
        others = [f"{max(one[key] for one in added[1:]):+.0f}" for key in ("cpu", "away")]
        if not case["peers"]:
            others = ["", ""]  # they do nothing
        rows.append([name, f"{case['pictures']}", *(f"{t:.0f}" for t in times), ratio])
        rows[-1] += [*first, *others]
    head = ["", "pictures", "p50 (ms)", "p99", "p99.9", "max", "p99/p50", "late", "computing"]
    head += ["without its core", "of it stolen", "waiting", "collecting", "other rank: computing"]
    return table([*head, "without its core"], rows) + source(report)


def _over_mean(case: dict[str, Any], rank: int) -> dict[str, float]:
    tail, mean = case["tail_ms"][rank], case["mean_ms"][rank]
    return {key: tail[key] - mean[key] for key in tail}


OTHERS = (
    *("vit-base_256", "vit-base_4096", "vit-base-int8_1024", "gpt2_1024", "gpt2-medium_1024"),
    *("llama_1024", "vit-base_1024_many"),
)


def _of(name: str) -> tuple[str]:
    return (f"cpu-2core/latency_{name}",)


def _rates(case: dict[str, Any]) -> bool:
    return case["shape"]["mbit_per_s"] in (10, 100, 500)


def _scaled(case: dict[str, Any]) -> bool:
    return case.get("speed", 1) in (10, 20, 50, 100) and case["impl"] == "astra hidden:1"


def _closed_form(row: dict[str, Any]) -> bool:
    chosen = row["model"] in ("vit-base", "llama-3-8b") and row["tokens"] in (1024, 131072)
    return chosen and row["mbit_per_s"] == 10


_RATES = "10, 100 and 500 Mbit/s at a round trip of 2 ms"
_BASELINES = "the fastest baseline of each kind"


def forms(report: Report) -> str:
    """The first token by forms of the weights, on one device and on two."""
    rows = []
    for case in report["cases"]:
        ours, single = case["ms"]["p50"] / 1e3, case["peers"]["single"] / 1e3
        plain = case["peers"]["single_float32"] / 1e3
        ratios = [f"{single / ours:.2f}×", f"{plain / ours:.2f}×"]
        rows.append([case["dtype"], f"{single:.2f}", f"{ours:.2f}", *ratios])
    head = ["form", "one device (s)", "two (s)", "over one", "over one in float32"]
    return table(head, rows) + source(report)


TABLES = {
    "demo": Table(
        _of("demo"),
        demo,
        lambda result: "link" not in result or result["link"]["delay_ms"] == 0,
        "links without delay",
    ),
    "demo_short": Table(_of("demo"), demo_short),
    "latency_forms": Table(_of("forms"), forms),
    "latency_vit": Table(_of("vit-base_1024"), latency, _rates, _RATES),
    "latency_vit_stages": Table(_of("vit-base_1024"), stages),
    "latency_vit_real": Table(_of("real_vit-base"), partial(real, baselines=FEW), shown=_BASELINES),
    "latency_smollm2": Table(_of("smollm2_1024"), latency, _rates, _RATES),
    "latency_smollm2_stages": Table(_of("smollm2_1024"), stages),
    "latency_smollm2_real": Table(
        _of("real_smollm2"), partial(real, baselines=FEW), shown=_BASELINES
    ),
    "latency_others": Table(
        tuple(_of(name)[0] for name in OTHERS),
        others,
        lambda case: case["shape"]["world_size"] in (4, 8, 32),
        "4, 8 and 32 ranks",
    ),
    "latency_frames": Table(_of("frames"), frames),
    "latency_scaled": Table(
        _of("scaled"), scaled, _scaled, "`hidden:1`, the faster of the two settings"
    ),
    "rivals": Table(_of("rivals"), rivals),
    "link": Table(("cpu-2core/link",), links),
    "scaling": Table(
        ("cpu-2core/scaling",), scaling, _closed_form, "10 Mbit/s, two models and two lengths"
    ),
}
