"""Tables of the page on transport: one block's exchange, and faults."""

from __future__ import annotations

from typing import Any

from .markdown import Report, Table, source, table

# What is tried, and what a case has to end in to count as survived; by name of the row.
WORDS = {
    "kill": (
        "kill −9 in every block, before, within, after a frame; 2–4 ranks",
        "`PeerLost` names the rank killed",
    ),
    "kill_large": ("the same of a rank with 2 GiB of memory", "the same"),
    "kill_datagram": (
        "kill −9 with codes as datagrams, of which others may be left out",
        "`PeerLost`, or an answer that says whom it lacks",
    ),
    "stop": ("SIGSTOP", "`DeadlineExceeded` at the deadline ±10 %"),
    "blackhole": ("a link that swallows everything", "the same"),
    "half_open": ("a peer that vanishes without FIN", "the same"),
    "packets_vanish": ("every packet lost, between namespaces", "the same"),
    "unacknowledged": (
        "the same under a wait of a minute",
        "`PeerLost` by TCP_USER_TIMEOUT, here 6 s",
    ),
    "slow": ("a link of one byte a second", "`DeadlineExceeded` at the deadline ±10 %"),
    "frame_structured": ("frames cut, longer, repeated, replayed, misplaced", "typed error"),
    "frame_mutated": ("mutated frames through a live socket", "typed error, memory flat"),
    "datagram_structured": (
        "datagrams cut, longer, replayed, sealed by others, lies of the peer",
        "dropped or typed error",
    ),
    "datagram_mutated": ("mutated datagrams through a live socket", "the same, memory flat"),
    "abort_structured": ("abort frames cut, missing, out of range, no UTF-8", "typed error"),
    "abort_mutated": ("mutated abort frames through a live socket", "the same, memory flat"),
    "fuzz": ("libFuzzer on the decoder, ASan and UBSan", "no crash, no forgery accepted"),
    "refusals": ("who does not belong", "the reason on both sides"),
    "connections": ("1,000 silent and 1,000 garbage callers, six times", "a peer joins within 1 s"),
    "degraded": ("a rank too late for its deadline", "answered, flagged, whole again"),
    "soak": ("exchanges inside TLS", "every answer bit-identical"),
}


def exchange(report: Report) -> str:
    rows = []
    for case in report["cases"]:
        p99 = case.get("peers_p99", {})
        rows.append(
            [
                case["name"],
                f"{case['ms']['p50']:.3f} / {case['ms'].get('p99', float('nan')):.3f}",
                *(
                    f"{case['peers'][name]:.3f} / {p99.get(name, float('nan')):.3f}"
                    for name in ("gloo", "zeromq")
                ),
                f"{case['peers']['gloo'] / case['ms']['p50']:.1f}×",
            ]
        )
    head = ["case, p50 / p99 in ms", "ASTRA", "gloo", "ZeroMQ", "over gloo, p50"]
    return table(head, rows) + source(report)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _notes(row: dict[str, Any]) -> list[str]:
    """What a row has to tell beside its figures, misses first."""
    notes = [f"Missed: {failure}." for failure in row.get("failures", ())]
    if "exit_p50_ms" in row and row["name"] == "kill":
        kernel = f"{_ms(row['exit_p50_ms'])} / {_ms(row['exit_p99_ms'])}"
        notes.append(
            f"Of a kill's times the kernel takes {kernel} ms to close the process's sockets."
        )
    if "mib_per_hour" in row:
        notes.append(
            f"Memory over {row['seconds'] / 60:.0f} minutes of exchanges: "
            f"{row['mib_per_hour']:+.2f} MiB an hour."
        )
    return notes


def faults(report: dict[str, Any]) -> str:
    rows = []
    for row in report["faults"]:
        tried, ends = WORDS[row["name"]]
        counts = [f"{row['tried']:,}", f"{row['survived']:,}"]
        rows.append([tried, ends, *counts, _ms(row["p50_ms"]), _ms(row["p99_ms"])])
    notes = [note for row in report["faults"] for note in _notes(row)]
    head = ["fault", "has to end in", "tried", "so ended", "p50 (ms)", "p99 (ms)"]
    text = f"{table(head, rows)}\n\n`{report['command']}` on {report['device']}."
    return " ".join([text, *notes])


# Of each kind of fault one; what did not always end as it has to is always shown.
FAULTS = ("kill", "stop", "blackhole", "frame_mutated", "fuzz", "refusals", "connections", "soak")

TABLES = {
    "exchange": Table(("cpu-2core/exchange",), exchange),
    "faults": Table(
        ("cpu-2core/faults",),
        faults,
        lambda row: row["name"] in FAULTS or row["survived"] < row["tried"],
        "one row of each kind of fault, and every row in which a case ended otherwise",
    ),
}
