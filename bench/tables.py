"""README's tables, generated from the committed results.

    python -m bench.tables [--check]

Rewrites what stands between `<!-- table NAME -->` and `<!-- end -->` in README.md. With --check it
changes nothing and fails if the tables are not what the results say.
"""

import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from bench.gpt2 import tables as tables_gpt2
from bench.latency import tables as tables_latency
from bench.lossy import tables as tables_lossy
from bench.report import faults as tables_faults
from bench.report import load, source, spread, table
from bench.vision import tables as tables_vision

ROOT = Path(__file__).resolve().parent.parent


def demo(report: dict) -> str:
    names = {"single": "one device", "dense": "dense exchange, fp32", "astra": "**ASTRA**"}
    rows = []
    for result in report["demos"]:
        link = f"{result['link']['mbit_per_s']:g} Mbit/s, {result['link']['delay_ms']:g} ms"
        rows += [
            [
                link,
                names[run["method"]],
                f"{run['seconds_to_first_token']:.2f}",
                f"{run['speedup']:.2f}×",
                f"{run['bits_per_token_block']:.0f}",
                f"{run['perplexity']:.2f}",
            ]
            for run in result["runs"]
        ]
        dropped = f"{result['local_only_perplexity']:.2f}"
        rows.append([link, "remote tokens dropped", "", "", "0", dropped])
    head = [
        "link, one-way delay",
        "",
        "first token (s)",
        "speedup",
        "bits/token/block",
        "perplexity",
    ]
    return table(head, rows) + source(report)


def demo_short(report: dict) -> str:
    """README's: the slowest link without delay."""
    return demo(report | {"demos": report["demos"][:1]})


def pack(report: dict) -> str:
    rows = []
    for case in report["cases"]:
        count, width = case["shape"]["N"], case["shape"]["K"].bit_length() - 1
        if width not in (1, 4, 8, 10, 12, 16) or (count < 1e6 and width != 10):
            continue  # the rest is in the file
        ours, peers = case["ms"]["p50"], case["peers"]
        rows.append(
            [
                case["name"],
                f"{count / ours / 1e3:,.0f}",
                f"{case['floor_ms'] / ours:.0%}",
                f"{peers['numpy'] / ours:.0f}×",
                f"{peers['numpy_tuned'] / ours:.0f}×",
                f"{peers['faiss'] / ours:.1f}×",
            ]
        )
    head = ["case", "M codes/s", "of memcpy", "over numpy", "over the best numpy", "over faiss"]
    return table(head, rows) + source(report)


def exchange(report: dict) -> str:
    rows = []
    for case in report["cases"]:
        p99 = case.get("peers_p99", {})
        rows.append(
            [
                case["name"],
                f"{case['ms']['p50']:.3f} / {case['ms'].get('p99', float('nan')):.3f}",
                *(
                    f"{case['peers'][peer]:.3f} / {p99.get(peer, float('nan')):.3f}"
                    for peer in ("gloo", "zeromq")
                ),
                f"{case['peers']['gloo'] / case['ms']['p50']:.1f}×",
            ]
        )
    head = ["case, p50 / p99 in ms", "ASTRA", "gloo", "ZeroMQ", "over gloo, p50"]
    return table(head, rows) + source(report)


def ops(report: dict) -> str:
    rows = []
    for case in report["cases"]:
        if not case["peers"] or not case["name"].endswith("_1threads"):
            continue  # the rest is in the file
        shape = ", ".join(f"{k}={v}" for k, v in case["shape"].items() if k not in ("B", "model"))
        others = {name: ms for name, ms in case["peers"].items() if name != "reference"}
        peers = ", ".join(f"{name} {ms:.3g}" for name, ms in others.items()) or "–"
        ours, plain = case["ms"]["p50"], case["peers"].get("reference")
        reference = "–" if plain is None else f"{plain:.3g}"
        rows.append(
            [case["name"].removesuffix("_1threads"), shape, f"{ours:.3g}", reference, peers]
        )
    head = ["case, one thread", "shape", "ms", "reference (ms)", "peers (ms)"]
    return table(head, rows) + source(report)


def accuracy_lm(report: dict) -> str:
    """Codes by domain and bits, seeds in one row; ± is the deviation between windows."""
    groups: dict[tuple, list[dict]] = {}
    for row in report["rows"]:
        if row["codes"] not in ("exact", "local_only"):
            key = (row["domain"], row["world_size"], row["codes"], row["halo"], row["lost"])
            groups.setdefault(key, []).append(row)
    shown = [
        [
            "remote tokens dropped" if codes.startswith("local_prefix") else codes,
            domain,
            str(ranks),
            str(halo),
            f"{lost:.0%}",
            f"{found[0]['bits_per_token_block'] or 0:.0f}",
            f"{found[0]['flops_over_ideal']:.2f}",
            f"{found[0]['exact']:.2f}",
            f"{statistics.fmean(row['perplexity'] for row in found):.2f}",
            f"{found[0]['local_only']:.2f}",
            f"{statistics.fmean(row['gap_recovered'] for row in found):.2f} ± "
            f"{statistics.fmean(row['gap_spread'] for row in found):.2f}",
            _between_seeds([row["gap_recovered"] for row in found]),
        ]
        for (domain, ranks, codes, halo, lost), found in groups.items()
    ]
    shown.sort(key=lambda line: (line[1], int(line[2]), line[4], float(line[5]), int(line[3])))
    head = ["codes", "text", "ranks", "halo", "lost", "bits/token/block", "FLOPs/ideal"]
    head += ["exact", "ASTRA", "dropped", "gap kept", "seeds"]
    return table(head, shown) + source(report)


def codes(report: dict) -> str:
    """Quantizers of the same vectors: the share of the gap kept, by text."""
    rows = [
        [
            row["codes"],
            f"{row['bits_per_token_block']:.0f}",
            *(
                f"{row[domain]['gap_recovered']:.2f} ± {row[domain]['gap_spread']:.2f}"
                for domain in ("documentation", "handbook")
            ),
        ]
        for row in sorted(report["rows"], key=lambda row: row["bits_per_token_block"])
    ]
    head = ["codes", "bits/token/block", "documentation", "handbook (unseen)"]
    return table(head, rows) + source(report)


def _between_seeds(values: list[float]) -> str:
    if len(values) == 1:
        return "1"
    return f"{len(values)} (± {statistics.stdev(values):.3f})"


def accuracy_encoder(report: dict) -> str:
    """Seeds in one row."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in report["rows"]:
        groups.setdefault((row["domain"], row["codes"]), []).append(row)
    rows = [
        [
            "remote tokens dropped" if codes == "drop" else codes,
            domain,
            f"{found[0]['bits_per_token_block']:.0f}",
            f"{found[0]['flops_over_ideal']:.2f}",
            spread([row["cosine"] for row in found]),
            spread([row["first_neighbour_agrees"] for row in found]),
            spread([row["ten_neighbours_shared"] for row in found]),
        ]
        for (domain, codes), found in groups.items()
    ]
    rows.sort(key=lambda line: (line[1], float(line[2])))
    head = ["codes", "text", "bits/token/block", "FLOPs/ideal", "cosine", "first neighbour agrees"]
    return table([*head, "ten neighbours shared"], rows) + source(report)


# Cases that README shows; the rest is in the file.
SHOWN = (
    r"codeword_(counted_)?M1024_N(4096|32768|131072)_H32",
    r"(fused|expanded)_lookup_(rotary|subvectors)_M(64|256|1024)_N8192_H32",
    r"fused_lookup_rotary_packed_M256_N8192_H32",
    r"decode_rotary_fused_(packed_)?M1_N(131072|1048576)",
    r"decode_plain_(counts|counted_packed)_M1_N(131072|1048576)",
    r"encode_(bfloat16|float32)_D768_G",
    r"mixed_|merge_state|lookup_linear_T8192|pack_10bit_1048576|unpack_10bit_1048576",
)


def kernels(report: dict) -> str:
    rows = []
    for case in report["cases"]:
        if not any(re.match(pattern, case["name"]) for pattern in SHOWN):
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
    head = ["case", "µs", "in a graph", "floor", "over the best peer", "over others"]
    text = table(head, rows) + source(report)
    if report.get("failed"):
        text += "\n\nFailed their check, not timed: "
        text += ", ".join(case["name"] for case in report["failed"]) + "."
    return text


TABLES: dict[str, tuple[str, Callable[[dict], str]]] = {
    "demo": ("cpu-2core/latency_demo", demo),
    "demo_short": ("cpu-2core/latency_demo", demo_short),
    "pack": ("cpu-2core/pack", pack),
    "exchange": ("cpu-2core/exchange", exchange),
    "ops": ("cpu-2core/ops", ops),
    "accuracy_encoder": ("cpu-2core/accuracy_encoder", accuracy_encoder),
    **tables_vision.TABLES,
    **tables_faults.TABLES,
    **tables_lossy.TABLES,
    "gpt2_bits": ("cpu-2core/accuracy_gpt2", tables_gpt2.gpt2_bits),
    "gpt2_wide": ("cpu-2core/accuracy_gpt2_wide", tables_gpt2.gpt2_wide),
    "codes": ("cpu-2core/codes", codes),
    "accuracy_lm": ("cpu-2core/accuracy_lm", accuracy_lm),
    "latency_vit": ("cpu-2core/latency_vit-base_1024", tables_latency.latency),
    "latency_vit_stages": ("cpu-2core/latency_vit-base_1024", tables_latency.stages),
    "latency_vit_real": ("cpu-2core/latency_real_vit-base", tables_latency.real),
    "latency_smollm2": ("cpu-2core/latency_smollm2_1024", tables_latency.latency),
    "latency_smollm2_stages": ("cpu-2core/latency_smollm2_1024", tables_latency.stages),
    "latency_smollm2_real": ("cpu-2core/latency_real_smollm2", tables_latency.real),
    "latency_others": ("cpu-2core/latency_vit-base_256", tables_latency.others),
    "link": ("cpu-2core/link", tables_latency.links),
    "latency_scaled": ("cpu-2core/latency_scaled", tables_latency.scaled),
    "scaling": ("cpu-2core/scaling", tables_latency.scaling),
    "kernels_h100": ("h100/kernels", kernels),
    "kernels_h200": ("h200/kernels", kernels),
}


def filled(readme: str) -> str:
    def one(match: re.Match[str]) -> str:
        name, make = TABLES[match[1]]
        report = load(name)
        body = "*not measured yet*" if report is None else make(report)
        return f"<!-- table {match[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", one, readme, flags=re.S)


def main() -> int:
    path = ROOT / "README.md"
    readme = path.read_text()
    if "--check" in sys.argv:
        return int(filled(readme) != readme)
    path.write_text(filled(readme))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
