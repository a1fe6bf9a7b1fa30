"""A spec to cases: the results are checked, then timed; what is wrong gets no time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.kernels.ceilings import Ceilings
from bench.kernels.spec import SHAPE_KEYS, Calls, Shape, Spec
from bench.kernels.timing import Call, Gpu, Measured, on_cpu
from bench.report import Case, Times

# Error of ours over the best baseline's; over the whole result, between ours and that baseline.
MOST_OF_BASELINE, MOST_APART = 2.0, 4.0

# What a call may raise on a device that is too small, or in a library that lacks the case.
REFUSALS: tuple[type[Exception], ...] = (
    *(RuntimeError, ValueError, TypeError, NotImplementedError, ImportError, AttributeError),
)
with contextlib.suppress(ImportError):  # too much shared memory, or no code made of a kernel
    from triton import TritonError

    REFUSALS += (TritonError,)


class DeviceLost(RuntimeError):
    """The device answers no call any more; a new process has to go on."""


@dataclass
class Outcome:
    """Cases that were measured, and those that were not, with the reason."""

    cases: list[Case] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Clock:
    """How calls are timed on a device, and what its ceilings are."""

    device: torch.device
    ceilings: Ceilings
    gpu: Gpu | None = None
    seconds: float = 0.3  # a call, on a CPU
    samples: int = 15  # of a call, on a CPU

    def measure(
        self, calls: Mapping[str, Call], not_captured: Collection[str] = ()
    ) -> dict[str, Measured]:
        if self.gpu is None:
            return on_cpu(calls, seconds=self.seconds, samples=self.samples)
        return self.gpu.measure(calls, not_captured)


def run(spec: Spec, clock: Clock) -> Outcome:
    """DeviceLost carries no outcome: every variant of the spec counts as failed."""
    outcome = Outcome()
    torch.manual_seed(0)
    try:
        calls = spec.build(spec.shape, spec.dtype, clock.device)
        good, errors = check(spec, calls, clock.device, outcome)
        if not good:
            return outcome
        timed = {f"ours {impl}": calls.ours[impl] for impl in good}
        timed |= {name: call for name, call in calls.baselines.items() if name in errors}
        times = clock.measure(timed, calls.not_captured)
    except REFUSALS as reason:
        still_there(clock.device)
        failed = [_failure(spec, impl, _first_line(reason)) for impl in spec.variants]
        return Outcome(failed=failed, notes=outcome.notes)
    for impl in good:
        outcome.cases.append(_case(spec, impl, times, errors, calls.notes(), clock))
    return outcome


def check(
    spec: Spec, calls: Calls, device: torch.device, outcome: Outcome
) -> tuple[list[str], dict[str, float | None]]:
    """Variants of ours that are right, and the error of everything that ran."""
    errors: dict[str, float | None] = {}
    best, best_result = math.inf, None
    for name, call in calls.baselines.items():
        try:
            result = call()
            error = None if name in calls.not_comparable else calls.error(result)
        except REFUSALS as reason:
            still_there(device)
            outcome.notes.append(f"{spec.family} {name}: {_first_line(reason)}")
            continue
        errors[name] = error
        if error is not None and error < best:
            best, best_result = error, result
        del result
    if best_result is None and calls.reference is not None:
        best_result = calls.reference()
        best = calls.error(best_result)
    bound = MOST_OF_BASELINE * best + calls.slack
    if not math.isfinite(bound):
        bound = 4 * torch.finfo(spec.dtype).eps if spec.dtype.is_floating_point else 0.0
    good = []
    for impl in spec.variants:
        why = None
        try:
            _poison(best_result)
            result = calls.ours[impl]()
            error = calls.error(result)
            errors[f"ours {impl}"] = error
            if not error <= bound:  # NaN is not
                why = f"error {error:.2e}, allowed {bound:.2e}"
            elif calls.whole is not None and best_result is not None:
                apart = _apart(calls.whole(result), calls.whole(best_result))
                if not apart <= MOST_APART * best + calls.slack:
                    why = f"{apart:.2e} from the best baseline somewhere"
            del result
        except REFUSALS as reason:
            still_there(device)
            why = _first_line(reason)
        if why is None:
            good.append(impl)
        else:
            outcome.failed.append(_failure(spec, impl, why))
    return good, errors


def _case(
    spec: Spec,
    impl: str,
    times: Mapping[str, Measured],
    errors: Mapping[str, float | None],
    notes: Mapping[str, Any],
    clock: Clock,
) -> Case:
    ours = times[f"ours {impl}"]
    others = {name: t for name, t in times.items() if not name.startswith("ours ")}
    roofline = spec.roofline_ms(clock.ceilings)
    extra: dict[str, Any] = {
        "error": errors[f"ours {impl}"],
        "peer_errors": {name: errors[name] for name in others if errors[name] is not None},
        "share_of_floor": roofline / ours.warm.p50,
        "over": {name: t.warm.p50 / ours.warm.p50 for name, t in others.items()},
        **spec.notes,
        **notes,
    }
    if spec.gathered is not None and impl.startswith("fused") and clock.ceilings.gather < math.inf:
        extra["gather_ms"] = spec.gathered(spec.shape) / clock.ceilings.gather * 1e3
    shape, detail = agreed(spec.shape)
    if detail:
        extra["detail"] = detail
    for kind in ("cold", "graph", "eager"):
        time: Times | None = getattr(ours, kind)
        if time is not None:
            extra[f"{kind}_ms"] = time.p50
            baselines = {name: getattr(t, kind) for name, t in others.items()}
            extra[f"peers_{kind}"] = {name: t.p50 for name, t in baselines.items() if t is not None}
    baselines_p50 = {name: t.warm.p50 for name, t in others.items()}
    dtype = str(spec.dtype).removeprefix("torch.")
    return Case(spec.variants[impl], shape, dtype, impl, ours.warm, roofline, baselines_p50, extra)


def _failure(spec: Spec, impl: str, why: str) -> dict[str, Any]:
    return {"name": spec.variants[impl], "shape": agreed(spec.shape)[0], "impl": impl, "why": why}


def agreed(shape: Shape) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys that every reader of result files knows, and what else there is to say."""
    known = {key: shape[key] for key in SHAPE_KEYS if key in shape}
    skipped = {"itemsize", "bytes", *known}
    return known, {key: value for key, value in shape.items() if key not in skipped}


def failures(spec: Spec, why: str) -> list[dict[str, Any]]:
    return [_failure(spec, impl, why) for impl in spec.variants]


def _apart(ours: torch.Tensor, baseline: torch.Tensor) -> float:
    return float((ours.float() - baseline.float()).norm() / baseline.float().norm())


def _poison(like: Any) -> None:
    """The allocator's next blocks of that size hold NaN, or an impossible code."""
    for tensor in _tensors(like):
        torch.full_like(tensor, math.nan if tensor.is_floating_point() else 119)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def still_there(device: torch.device) -> None:
    """After an error: whether the device goes on. An illegal access ends a process's work on it."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.zeros(1, device=device).item()
    except RuntimeError as reason:
        raise DeviceLost(_first_line(reason)) from reason


def _first_line(reason: BaseException) -> str:
    text = str(reason).strip().splitlines()
    return f"{type(reason).__name__}: {text[0] if text else ''}"[:300]
