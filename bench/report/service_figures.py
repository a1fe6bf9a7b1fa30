"""What was measured of the service, of sessions, and beside what people run instead, for goals."""

from __future__ import annotations

from collections.abc import Callable

from .figures import CPU, Figure, at_least, cases
from .markdown import load

OTHERS = (
    "ctranslate2 float32",
    "ctranslate2 int8",
    "llama.cpp F32",
    "llama.cpp Q8_0",
    "llama.cpp Q4_0",
)


def field(name: str, result: str, what: str) -> list[float]:
    """A figure of the cases of that name that have it."""
    found = (case.get(what) for case in cases(result) if case["name"] == name)
    return [value for value in found if value is not None]


def chats(least: float) -> Figure | None:
    return at_least(field("chats", "service", "ratio"), least)


def longest_wait(seconds: float) -> Figure | None:
    waits = field("chats", "service", "longest_wait_ms")
    if not waits:
        return None
    return Figure(f"{waits[0] / 1e3:.3f} s", waits[0] <= 1e3 * seconds)


def start(seconds: float) -> Figure | None:
    found = field("chats", "service", "start_seconds")
    return Figure(f"{found[0]:.1f} s", found[0] <= seconds) if found else None


def beside(most: float) -> Figure | None:
    return at_least(field("service_beside", "service_beside", "over_idle"), most, most=True)


def second_question(most: float) -> Figure | None:
    ratios = [case["over_first"] for case in cases("latency_sessions") if "over_first" in case]
    return at_least(ratios, most, most=True)


def struck(tries: int) -> Figure | None:
    """Workers that were stopped, killed or started again under load."""
    report = load(f"{CPU}/service_faults")
    if report is None:
        return None
    survived, tried = (sum(row[key] for row in report["faults"]) for key in ("survived", "tried"))
    text = f"{survived} of {tried}, {report['wrong']} wrong answers"
    return Figure(text, survived == tried >= tries and not report["wrong"])


def malformed(requests: int) -> Figure | None:
    report = load(f"{CPU}/service_malformed")
    if report is None:
        return None
    text = f"{report['requests']:,}, {report['wrong']} answered wrongly"
    return Figure(text, report["requests"] >= requests and not report["wrong"])


def hour(minutes: float) -> Figure | None:
    """Missed as well where a request of it got an error."""
    report = load(f"{CPU}/service_soak")
    if report is None:
        return None
    grown = max(case["bytes_an_hour"] for case in report["cases"]) / 2**20
    errors = sum("503" in problem for problem in report["wrong"])
    text = f"{grown:+.1f} MiB/h, {errors} requests got a 503 on a busy machine"
    return Figure(text, report["minutes"] >= minutes and not report["wrong"])


def over_others(form: str, peers: tuple[str, ...], most: float) -> Callable[[], Figure | None]:
    """The first token on two devices over the quickest of `peers`, of one device and thread."""

    def figure() -> Figure | None:
        ratios = [
            case["ms"]["p50"] / min(case["peers"][peer] for peer in peers)
            for case in cases("latency_rivals")
            if case["name"] == f"rivals_{form}"
        ]
        return at_least(ratios, most, most=True)

    return figure


def speedup_beside_others(least: float) -> Figure | None:
    """Of two devices in fp32 over one, in the run that has the others as well."""
    ratios = [
        case["peers"]["astra float32"] / case["ms"]["p50"]
        for case in cases("latency_rivals")
        if case["name"] == "rivals_float32"
    ]
    return at_least(ratios, least)
