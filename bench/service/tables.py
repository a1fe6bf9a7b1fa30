"""Tables of service.json and service_faults.json: a report in, markdown out."""

from __future__ import annotations

from bench.report.markdown import Report, Table, source, table

NAMES = {
    "stop": "SIGSTOP, until it was noticed",
    "kill": "SIGKILL",
    "restart": "SIGTERM",
    "again": "SIGKILL, its successor killed as well",
}


def faults(report: Report) -> str:
    """How soon a fault was noticed, and the service ready after the worker's return."""
    rows = [
        [
            NAMES[row["name"]],
            f"{row['survived']} of {row['tried']}",
            *(f"{row[key]:.0f}" for key in ("p50_ms", "p99_ms", "back_p50_ms", "back_p99_ms")),
        ]
        for row in report["faults"]
    ]
    head = ["a worker gets", "survived", "noticed p50 (ms)", "p99", "ready again p50 (ms)", "p99"]
    first, last = report["samples"][0], report["samples"][-1]
    grown = (last["bytes"] - first["bytes"]) / 2**20
    note = (
        f"{report['answers']:,} answers were right, {report['wrong']} wrong, {report['errors']:,} "
        f"requests got an error; from try {first['tries']} to {last['tries']} the leader grew by "
        f"{grown:+.1f} MiB, {last['threads'] - first['threads']:+} threads and "
        f"{last['descriptors'] - first['descriptors']:+} descriptors; --timeout "
        f"{report['timeout_s']:g} s."
    )
    return f"{table(head, rows)}{source(report)}. {note}"


def service(report: Report) -> str:
    """Chats side by side, and steps of several sequences on one device beside one after another."""
    rows = []
    for case in report["cases"]:
        ours, single, shape = case["ms"]["p50"], case["peers"]["single"], case["shape"]
        count = shape.get("B", 0)
        what = f"a step of {count} sequence{'s' * (count > 1)}"
        if "clients" in case:
            what = f"{case['clients']} chats, ms a request"
        first = ("first_token_p50_ms", "first_token_p50_ms_single")
        tokens = [f"{case[name] / 1e3:.1f}" if name in case else "–" for name in first]
        rows.append([what, f"{ours:,.0f}", f"{single:,.0f}", f"{single / ours:.2f}×", *tokens])
    head = ["case", "ms", "one device (ms)", "of its rate", "first token, p50 (s)"]
    return table([*head, "one device's (s)"], rows) + source(report)


TABLES = {
    "service": Table(("cpu-2core/service",), service),
    "service_faults": Table(("cpu-2core/service_faults",), faults),
}
