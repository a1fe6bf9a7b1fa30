"""Tables of the results of `bench.gpt2`: a report in, markdown out.

Cells say perplexity over exact, the mean and standard deviation over seeds.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any

from astra_runtime.codes.registry import codec_named
from bench.gpt2 import FLOPS, KINDS, PERMITTED, best, reached, tells
from bench.report.markdown import Report, Table, source, table

Row = dict[str, Any]
HERE, NEW = True, False  # text of a kind seen in training, and of an unseen one


def _table(head: list[str], rows: list[list[str]], report: Report) -> str:
    return table(head, rows) + source(report)


def _find(report: Report, **facts: object) -> list[Row]:
    return [
        row for row in report["rows"] if all(row.get(name) == is_ for name, is_ in facts.items())
    ]


def _ratio(rows: list[Row]) -> str:
    if not rows:
        return "–"
    (row,) = rows
    return f"{row['ratio_to_exact']:.3f} ± {row['ratio_to_exact_std']:.3f}"


def _recovered(rows: list[Row]) -> str:
    gap = rows[0]["gap_recovered"] if rows else None
    return "–" if gap is None else f"{gap:.2f}"


def _codes(row: Mapping[str, Any]) -> str:
    named = {"none": "dense fp32", "drop": "local-only", "none:int8": "dense int8"}
    if row["space"] in named:
        return named[row["space"]]
    if codec_named(row["space"]).allots_bits:
        return f"transform:{row['bits_per_token_block']:.0f}"
    return f"{row['space']}, {row['groups']} of {row['codewords']}"


def gpt2_bits(report: Report) -> str:
    """Perplexity against bits: a line for codes, before and after adaptation."""
    firsts: dict[tuple[Any, ...], Row] = {}
    for row in report["rows"]:
        if row["group"] in ("control", "bits"):
            key = (
                row["group"],
                row["space"],
                row.get("groups"),
                row.get("codewords"),
                row["adapted"],
            )
            firsts.setdefault(key, row)
    order = sorted(firsts.items(), key=lambda item: -(item[1]["bits_per_token_block"]))
    rows = []
    for (group, space, groups, codewords, adapted), first in order:
        cells = [
            _find(
                report,
                group=group,
                space=space,
                groups=groups,
                codewords=codewords,
                adapted=adapted,
                seen_in_training=known,
                kind=kind,
            )
            for kind in reversed(KINDS)
            for known in (HERE, NEW)
        ]
        compression = first["compression"]
        rows.append(
            [
                _codes(first),
                "yes" if adapted else "no",
                f"{first['bits_per_token_block']:.3g}",
                "–" if compression is None else f"{compression:.3g}×",
                f"{first['flops_over_ideal']:.2f}",
                *map(_ratio, cells),
                f"{_recovered(cells[0])} / {_recovered(cells[1])}",
            ]
        )
    head = ["codes", "adapted", "bits/token/block", "fewer than fp32", "FLOPs over ideal"]
    head += ["revised, seen", "revised, unseen", "prose, seen", "prose, unseen"]
    head += ["gap recovered, revised"]
    return _table(head, rows, report)


def gpt2_wide(report: Report) -> str:
    """The same, and what the goal says of it."""
    return gpt2_bits(report) + "\n\n" + "\n".join(_goals(report))


def _goals(report: Report) -> list[str]:
    """Of each kind of text the codes that come nearest."""
    lines = []
    for group, kind in product(("bits", "ranks"), KINDS):
        for seen, known in (("seen", HERE), ("unseen", NEW)):
            rows = _find(report, group=group, seen_in_training=known, kind=kind)
            row = best(rows)
            if row is None:
                continue
            ratio, without = row["ratio_to_exact"], row["dropped_over_exact"]
            ends = "reached" if reached(row) else "**not reached**"
            if not tells(row):
                ends += ", and dropping all remote tokens costs too little for the row to count"
            flops = f"{row['flops_over_ideal']:.2f} of the ideal FLOPs"
            facts = [
                f"{_codes(row)}{', adapted' if row['adapted'] else ''}: {ratio - 1:+.1%}",
                f"at {row['compression']:.0f}× and {flops} (local-only {without - 1:+.1%}),",
                f"{PERMITTED:.0%} at {FLOPS:g} permitted: {ends}",
            ]
            lines.append(f"- {row['world_size']} ranks, {kind}, {seen}: {' '.join(facts)}")
    return lines


def gpt2_settings(report: Report) -> str:
    """λ, β and K, each varied on the same codes, in fewer steps."""
    names = {"noise": "λ", "commitment": "β", "codewords": "K"}
    rows = []
    for group, symbol in names.items():
        for row in _find(report, group=group, seen_in_training=HERE):
            facts = {group: row[group]}
            unseen = _find(report, group=group, seen_in_training=NEW, **facts)
            rows.append(
                [
                    f"{symbol} = {row[group]:g}",
                    f"{row['bits_per_token_block']:.3g}",
                    _ratio([row]),
                    _ratio(unseen),
                    f"{_recovered([row])} / {_recovered(unseen)}",
                ]
            )
    head = ["setting", "bits/token/block", "revised, seen", "revised, unseen", "gap recovered"]
    return _table(head, rows, report)


def gpt2_ranks(report: Report) -> str:
    """Trained for four ranks, run by others; and with codes lost on their way."""
    rows = []
    for row in _find(report, group="ranks", seen_in_training=HERE):
        ranks = row["world_size"]
        unseen = _find(report, group="ranks", seen_in_training=NEW, world_size=ranks)
        rows.append(_run(f"N = {ranks}", row, unseen))
    for row in _find(report, group="lost", seen_in_training=HERE):
        same = {name: row[name] for name in ("space", "groups", "codewords", "lost")}
        unseen = _find(report, group="lost", seen_in_training=NEW, **same)
        rows.append(_run(f"N = 4, {row['lost']:.0%} lost, {_codes(row)}", row, unseen))
    head = [
        "run",
        "FLOPs over ideal",
        "revised, seen",
        "… local-only",
        "revised, unseen",
        "… local-only",
    ]
    return _table(head, rows, report)


def _run(name: str, row: Row, unseen: list[Row]) -> list[str]:
    local_only = f"{unseen[0]['dropped_over_exact']:.3f}" if unseen else "–"
    return [
        name,
        f"{row['flops_over_ideal']:.2f}",
        _ratio([row]),
        f"{row['dropped_over_exact']:.3f}",
        _ratio(unseen),
        local_only,
    ]


def _adapted(row: Row) -> bool:
    return row["group"] not in ("control", "bits") or row["adapted"]


TABLES = {
    "gpt2_bits": Table(("cpu-2core/accuracy_gpt2",), gpt2_bits, _adapted, "after adaptation"),
    "gpt2_wide": Table(("cpu-2core/accuracy_gpt2_wide",), gpt2_wide),
    "gpt2_settings": Table(("cpu-2core/accuracy_gpt2",), gpt2_settings),
    "gpt2_ranks": Table(("cpu-2core/accuracy_gpt2",), gpt2_ranks),
}
