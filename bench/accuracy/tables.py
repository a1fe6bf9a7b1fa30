"""Tables of accuracy_lm.json, accuracy_ranks.json and accuracy_encoder.json, as markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from bench.accuracy.corpora import UNSEEN
from bench.report.markdown import Report, Table, source, sources, spread, table

Row = dict[str, Any]
BY_RANKS = ("documentation", "handbook")  # the texts that every number of ranks was measured on
BY_TEXT = "transform:100+400"  # the codes that every text was measured with
NAMES = {"exact": "exact", "local_only": "local-only", "drop": "local-only"}


def accuracy_lm(report: Report) -> str:
    """A line for codes and world size, a pair of columns for a text; seeds in one line.

    ± is the deviation between windows, the last column the number of codebooks, and the deviation
    of the gap recovered between them on the first text.
    """
    texts = list(dict.fromkeys(row["domain"] for row in report["rows"]))
    groups: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
    for row in report["rows"]:
        key = (row["world_size"], row["lost"], row["codes"], row["halo"])
        groups.setdefault(key, {}).setdefault(row["domain"], []).append(row)
    lines = []
    for (ranks, lost, codes, halo), by_text in groups.items():
        first = next(iter(by_text.values()))
        cells = [cell for text in texts for cell in _gap(by_text.get(text, []))]
        bits, flops = first[0].get("bits_per_token_block"), first[0].get("flops_over_ideal")
        line = [
            _name(codes),
            f"{ranks}",
            f"{halo}",
            f"{lost:.0%}",
            "–" if bits is None else f"{bits:.0f}",
            "–" if flops is None else f"{flops:.2f}",
            *cells,
            _between_seeds([row["gap_recovered"] for row in first if "gap_recovered" in row]),
        ]
        lines.append((ranks, lost, codes == "exact", bits or 0.0, halo, line))
    lines.sort(key=lambda entry: entry[:-1])
    head = ["codes", "ranks", "halo", "lost", "bits/token/block", "FLOPs/ideal"]
    head += [name for text in texts for name in (f"{text}: perplexity", "gap recovered")]
    return table([*head, "codebooks"], [entry[-1] for entry in lines]) + source(report)


def _name(codes: str) -> str:
    if codes.startswith("local_prefix"):  # the first token and the halo are each rank's own work
        return "local-only, with overlap"
    return NAMES.get(codes, codes)


def _gap(rows: list[Row]) -> list[str]:
    """Perplexity and gap recovered of one text; the gap only where there are codes."""
    if not rows:
        return ["–", "–"]
    perplexity = f"{statistics.fmean(row['perplexity'] for row in rows):.2f}"
    if "gap_recovered" not in rows[0]:
        return [perplexity, "–"]
    gap = statistics.fmean(row["gap_recovered"] for row in rows)
    deviation = statistics.fmean(row["gap_spread"] for row in rows)
    return [perplexity, f"{gap:.2f} ± {deviation:.2f}"]


def _between_seeds(gaps: list[float]) -> str:
    if len(gaps) > 1:
        return f"{len(gaps)} (± {statistics.stdev(gaps):.3f})"
    return "1" if gaps else "–"


def accuracy_ranks(report: Report) -> str:
    """A line for codes and world size, a column for a text; seeds in one line.

    ± is the standard error of the mean over windows; the last columns have the fewest windows of a
    text, and the number of codebooks.
    """
    shown = (row for row in report["rows"] if row["domain"] in BY_RANKS)
    rows = most_windows(row for row in shown if "gap_recovered" in row)
    texts = list(dict.fromkeys(row["domain"] for row in rows))
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["world_size"], row["codes"], row["halo"]), []).append(row)
    lines = []
    for (ranks, codes, halo), of_codes in groups.items():
        block, receiver, flops = (
            statistics.fmean(row[key] for row in of_codes)
            for key in ("bits_per_token_block", "bits_per_receiver", "flops_over_ideal")
        )
        line = [
            codes,
            f"{ranks}",
            f"{halo}",
            f"{block:.0f}",
            f"{receiver:.0f}",
            f"{flops:.2f}",
            *(_kept([row for row in of_codes if row["domain"] == text]) for text in texts),
            f"{min(row['windows'] for row in of_codes)}",
            f"{len({row['seed'] for row in of_codes})}",
        ]
        lines.append((ranks, receiver, halo, line))
    lines.sort(key=lambda entry: entry[:-1])
    head = ["codes", "ranks", "halo", "bits, block", "bits, receiver", "FLOPs/ideal"]
    names = [f"{text}, unseen" if text in UNSEEN else text for text in texts]
    head += [*names, "windows", "codebooks"]
    return table(head, [line[-1] for line in lines]) + sources(report, rows)


def accuracy_texts(report: Report) -> str:
    """A line for each kind of text, of the default codes on four ranks."""
    place = (BY_TEXT, 4, 0)
    rows = most_windows(
        row
        for row in report["rows"]
        if (row["codes"], row["world_size"], row["seed"]) == place and "gap_recovered" in row
    )
    lines = [
        [
            f"{row['domain']}, unseen" if row["domain"] in UNSEEN else row["domain"],
            *(f"{row[name]:.2f}" for name in ("exact", "perplexity", "local_only")),
            _kept([row]),
            f"{row['windows']}",
        ]
        for row in rows
    ]
    head = ["text", "one device: perplexity", "100+400", "local-only", "gap recovered", "windows"]
    return table(head, lines) + sources(report, rows)


def most_windows(rows: Iterable[Row]) -> list[Row]:
    """Of rows that were measured on fewer windows and on more, the latter."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        place = tuple(row[key] for key in ("codes", "domain", "world_size", "seed", "halo"))
        if place not in best or row["windows"] > best[place]["windows"]:
            best[place] = row
    return list(best.values())


def _kept(rows: list[Row]) -> str:
    """The share of the gap recovered on one text, over all windows and codebooks."""
    if not rows:
        return "–"
    gap = statistics.fmean(row["gap_recovered"] for row in rows)
    errors = [row["gap_spread"] / row["windows"] ** 0.5 for row in rows if row["gap_spread"]]
    return f"{gap:.3f} ± {statistics.fmean(errors):.3f}" if errors else f"{gap:.3f}"


def accuracy_encoder(report: Report) -> str:
    """Seeds in one row."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in report["rows"]:
        groups.setdefault((row["domain"], row["codes"]), []).append(row)
    rows = [
        [
            NAMES.get(codes, codes),
            domain,
            f"{of_seeds[0]['bits_per_token_block']:.0f}",
            f"{of_seeds[0]['flops_over_ideal']:.2f}",
            spread([row["cosine"] for row in of_seeds]),
            spread([row["first_neighbour_agrees"] for row in of_seeds]),
            spread([row["ten_neighbours_shared"] for row in of_seeds]),
        ]
        for (domain, codes), of_seeds in groups.items()
    ]
    rows.sort(key=lambda line: (line[1], float(line[2])))
    head = ["codes", "text", "bits/token/block", "FLOPs/ideal", "cosine", "first neighbour agrees"]
    return table([*head, "ten neighbours shared"], rows) + source(report)


# Codes and halo of the rows shown, at four ranks without loss.
SHOWN = {
    ("exact", 0),
    ("local_only", 0),
    ("local_prefix_1", 32),
    ("kv:3", 0),
    ("differential:8", 0),
    ("transform:30", 32),
    ("transform:100", 32),
    ("transform:600", 0),
}


def _shown(row: Row) -> bool:
    return (row["world_size"], row["lost"]) == (4, 0) and (row["codes"], row["halo"]) in SHOWN


TABLES = {
    "accuracy_lm": Table(
        ("cpu-2core/accuracy_lm",),
        accuracy_lm,
        _shown,
        "four ranks without losses, both controls and a few of the codes in each space",
    ),
    "accuracy_ranks": Table(("cpu-2core/accuracy_ranks",), accuracy_ranks),
    "accuracy_texts": Table(("cpu-2core/accuracy_ranks",), accuracy_texts),
    "accuracy_encoder": Table(("cpu-2core/accuracy_encoder",), accuracy_encoder),
}
