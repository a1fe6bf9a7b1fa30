"""Fitting codebooks: checks, a method for each codec, and a first honest look at the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..codes.base import Codec
from ..codes.codebook import Codebook
from ..codes.differential import DifferentialCodes
from ..codes.hidden import HiddenCodes
from ..codes.kv import KeyValueCodes
from ..codes.transform import TransformCodes
from ..evaluate import Measured, measure
from ..models import Adapter, Inputs, adapt
from ..models.base import check_runnable
from .budgets import TransformOptions, fit_transform
from .calibration import Progress, as_windows, check_weights, check_windows
from .fit_codewords import CodewordOptions, fit_closed_loop, fit_codewords
from .options import FitData, FitOptions


@dataclass(frozen=True)
class FitMethod:
    """How a codec's codewords are found.

    Attributes:
        options: those of the method, of the keywords of `Codebook.fit`; refuses, with a ValueError,
            what it cannot do. They have `prefix` and `vectors_needed`, the fewest vectors to
            calibrate on.
        run: the fit itself.
    """

    options: Callable[[FitOptions, type[Codec], Adapter], Any]
    run: Callable[[FitData, Any], Codebook]


# The method of each codec whose codewords are fitted. A new one is listed here.
METHODS: dict[type[Codec], FitMethod] = {
    KeyValueCodes: FitMethod(CodewordOptions.of, fit_codewords),
    HiddenCodes: FitMethod(CodewordOptions.of, fit_codewords),
    DifferentialCodes: FitMethod(CodewordOptions.of, fit_closed_loop),
    TransformCodes: FitMethod(TransformOptions.of, fit_transform),
}


def fit(model: nn.Module, calibration: Tensor | Sequence[Tensor], **keywords: Any) -> Codebook:
    """Learns the codewords of every block.

    Args:
        model: a supported Hugging Face model.
        calibration: token windows, int64 [W, T] or a list of [T] (with the class token, for BERT);
            or images, [W, C, h, w]. Never the text that is then prompted or evaluated.
        keywords: those of `FitOptions`.

    Raises:
        TypeError: a keyword that there is not, or a number or window of another type.
        ValueError: nothing to calibrate on, or windows that are too short, all of one token or not
            the model's; more codewords than vectors; groups that the model cannot be cut into;
            weights or activations that are not finite; a model without token ids in space
            "differential", or without gradients in space "transform".
    """
    options = FitOptions(**keywords)
    adapter = adapt(model)
    windows = as_windows(calibration)
    check_runnable(model)
    check_weights(model)
    codec = _fitted_codec(options.space)
    codec.check_model(adapter)
    method = METHODS[codec]
    chosen = method.options(options, codec, adapter)
    extra = as_windows(options.extra) if len(options.extra) else []
    windows = check_windows(adapter, windows + extra, chosen.prefix + 2)  # of two ranks
    extra = windows[len(windows) - len(extra) :]
    windows, held_out = _hold_out(windows[: len(windows) - len(extra)], options.held_back)
    windows += extra
    vectors = _check_counts(adapter, windows, held_out, options.world_size, chosen)

    def evaluate(codebook: Codebook) -> dict[str, Any]:
        return _evaluate(model, codebook, held_out, options.world_size, options.progress)

    data = FitData(
        model,
        adapter,
        codec,
        windows,
        vectors,
        evaluate if held_out else None,
        options.progress,
    )
    with adapter.hooks.unfused():
        return method.run(data, chosen)


def _fitted_codec(key: str) -> type[Codec]:
    fitted = {codec.key: codec for codec in METHODS}
    if key not in fitted:
        raise ValueError(
            f"space: expected {', '.join(map(repr, fitted))}, which are fitted, got {key!r}"
        )
    return fitted[key]


def _check_counts(
    adapter: Adapter, windows: list[Inputs], held_out: list[Inputs], world_size: int, chosen: Any
) -> int:
    """The vectors to calibrate on: enough of them, and windows long enough to be evaluated."""
    shortest = min((adapter.count(window)[1] for window in held_out), default=0)
    if held_out and not 2 <= world_size < shortest:
        raise ValueError(
            f"world_size: expected at least 2 and less than the {shortest} tokens of a window held "
            f"out for the evaluation, got {world_size}"
        )
    vectors = sum(batch * tokens for batch, tokens in map(adapter.count, windows))
    usable, codewords = vectors - chosen.prefix * len(windows), chosen.vectors_needed
    if not 2 <= codewords <= min(usable, 65536):
        raise ValueError(
            f"codewords: expected 2 to 65536 and at most the {usable} calibration vectors, "
            f"got {codewords}; give more calibration windows"
        )
    return vectors


def _hold_out(windows: list[Inputs], held_back: int) -> tuple[list[Inputs], list[Inputs]]:
    """Splits evenly spaced windows off; at least half of all stay."""
    count = min(held_back, len(windows) // 2)
    out = {len(windows) * (2 * i + 1) // (2 * count) for i in range(count)}
    remaining = [window for i, window in enumerate(windows) if i not in out]
    return remaining, [windows[i] for i in sorted(out)]


def _evaluate(
    model: nn.Module, codebook: Codebook, windows: list[Inputs], ranks: int, progress: Progress
) -> dict[str, Any]:
    def step(done: int, steps: int) -> None:
        progress("evaluating", done, steps)

    measured: Measured = measure(
        model, codebook, windows, world_size=ranks, overlap=False, progress=step
    )
    return {
        "windows": len(windows),
        "world_size": ranks,
        "metric": measured.metric,
        "exact": measured.exact,
        "astra": measured.astra,
        "local_only": measured.local_only,
        "gap_recovered": measured.gap_recovered,
    }
