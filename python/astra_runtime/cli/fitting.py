"""The codebook that a command asks for, found or fitted, with progress and a verdict."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..console import say, working
from ..errors import AstraError
from ..files import CONFIG_FILE, TENSOR_FILE
from .options import DENSE

WINDOWS, MORE_WINDOWS = 12, 26  # of the text, of a codec that learns from few, and of the others
OTHERS = 8  # windows of the built-in text's second domain
WHOLE = 4  # of a decoder's windows; of the others the first half
CHARACTERS = 10  # more than a token has
SAMPLED_TOKENS = 512  # of a window that the model writes
FINE_TOKENS = 64  # before a cut that have fine codes
# Bits of those, for each bit of the others.
FINE_SHARE = 4
# Of the default fit: raised when it changes, so that no codebook cached before passes for one.
DEFAULT_FIT = 6


def cached_codebook(name: str, model: Any) -> Path | None:
    """The folder of the default codebook for the model `name`, if it was fitted before."""
    folder = _cache_folder(name, model)
    return folder if _is_whole(folder) else None


def codebook_at_hand(options: argparse.Namespace) -> bool:
    """Whether --codebook names one, or one was fitted before for a model of this name.

    Only the loaded model tells whether it is for this very model; if not, one is fitted then.
    """
    from ..core import cache_folder

    if options.codebook:
        return True
    fitted = f"{default_name(options.model, '*')}/astra_config.json"
    return any((cache_folder() / "codebooks").glob(fitted))


def default_name(name: str, checkpoint: str) -> str:
    """What the folder of the default codebook for the model `name` is called."""
    return f"{Path(name).name}-{checkpoint}-transform-{DEFAULT_FIT}"


def _cache_folder(name: str, model: Any) -> Path:
    from astra_kernels._cache import cache_folder

    from ..models import adapt

    return cache_folder() / "codebooks" / default_name(name, adapt(model).checkpoint())


def ensure_codebook(options: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[Any, Path]:
    """The codebook asked for, or the cached default, fitted now if there is none."""
    from ..codes.codebook import Codebook
    from ..models import adapt

    if options.codebook == DENSE:
        return Codebook.dense(), Path(DENSE)
    if options.codebook:
        folder = Path(options.codebook)
        codebook = Codebook.from_pretrained(folder)
        codebook.check_model(adapt(model))
        _say_form(model)
        return codebook, folder
    folder = _cache_folder(options.model, model)
    if not _is_whole(folder):  # else a cache that can only be read will do
        _fit_default(options, model, tokenizer, folder)
    _say_form(model)
    return Codebook.from_pretrained(folder), folder


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (CONFIG_FILE, TENSOR_FILE))


def _fit_default(options: argparse.Namespace, model: Any, tokenizer: Any, folder: Path) -> None:
    """Fits the default codebook into `folder`, unless another process does."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        with working("waiting for another process, which fits the codebook"):
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several ranks on one machine, one fits
        if not _is_whole(folder):
            say(f"no codebook for {options.model} yet: fitting one, once, into {folder}")
            codebook = fit_builtin(_in_float32(options, model), tokenizer)
            codebook.save_pretrained(folder)


def _say_form(model: Any) -> None:
    """Codes that serve another form than they were fitted for are told of."""
    from ..models import adapt

    form = adapt(model).form()
    if form != "float32":
        say(f"the weights are kept in {form}; the codes were fitted for the same checkpoint")


def _in_float32(options: argparse.Namespace, model: Any) -> Any:
    """The model that the codes of every form are fitted on."""
    from ..models import adapt
    from ..store import load_model

    if adapt(model).form() == "float32":
        return model
    say("codes are fitted on the weights in float32, which takes their memory this once")
    return load_model(options.model)


def fit_builtin(model: Any, tokenizer: Any, *, space: str | None = None, **options: Any) -> Any:
    """A codebook fitted on the calibration part of the built-in text.

    That is documentation; for a codec that gains by it, also source code. `space` None: the
    codec that is fitted where nobody names one.
    """
    from ..codes.registry import codec_named, default_space
    from ..texts import builtin_text

    space = space or default_space(groups=False)
    others = builtin_text("source")[0] if codec_named(space).gains_by_variety else None
    text = builtin_text()[0]
    return fit_text(model, tokenizer, text, space=space, others=others, **options)


def fit_text(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    space: str,
    tokens: int = 1024,
    windows: int | None = None,
    sampled: int = 0,
    others: str | None = None,
    fine_bits: float | None = None,
    **options: Any,
) -> Any:
    """A codebook fitted on windows of a text, with progress and a plain word on its worth.

    A few windows more are of the text `others`, and `sampled` ones are written by the model itself.
    `windows` None: as many of the text as serve the codec. `fine_bits` None: `default_fine_bits`.
    """
    from ..codes.registry import codec_named
    from ..models import adapt, is_language_model
    from ..store import token_limit
    from ..texts import token_windows
    from ..train.fit import fit

    if sampled and not is_language_model(model):
        raise AstraError("--sampled: expected a language model, which writes text, or 0 windows")
    if fine_bits is None:
        fine_bits = default_fine_bits(model, space, options.get("bits"))
    options["fine_bits"] = fine_bits
    length = min(tokens, token_limit(model) or tokens)
    halves = windows is None and codec_named(space).gains_by_variety and adapt(model).causal
    if windows is None:
        few = WINDOWS if others else WINDOWS + OTHERS
        windows = few if codec_named(space).gains_by_variety else MORE_WINDOWS
    with progress_bar() as progress:
        progress("reading", 0, 1)
        calibration = token_windows(tokenizer, text, length, windows)
        extra = _excerpts(tokenizer, others, length) if others else []
        if halves and len(calibration) == windows:
            calibration, extra = halved(calibration, extra)
        if sampled:
            extra += _sampled(model, tokenizer, sampled, length, options.get("seed", 0), progress)
        codebook = fit(model, calibration, space=space, extra=extra, progress=progress, **options)
    say(verdict(codebook.notes.get("held_back")))
    return codebook


def halved(calibration: list[Any], extra: list[Any]) -> tuple[list[Any], list[Any]]:
    """The same windows, but WHOLE evenly spaced ones cut to their first halves, all of them extra.

    Many short pieces of a text say more than few long ones of as many tokens.
    """
    step = len(calibration) // WHOLE
    whole = calibration[step // 2 :: step]
    others = [w for i, w in enumerate(calibration) if i % step != step // 2]
    return whole, [window[: len(window) // 2] for window in others + extra]


def _excerpts(tokenizer: Any, text: str, tokens: int) -> list[Any]:
    """Windows of a long text, of which only these parts are made tokens of."""
    from ..texts import excerpts, first_tokens

    parts = excerpts(text, OTHERS, CHARACTERS * tokens)
    return [first_tokens(tokenizer, part, tokens) for part in parts]


def _sampled(
    model: Any, tokenizer: Any, windows: int, tokens: int, seed: int, progress: Any
) -> list[Any]:
    from ..train.sample import BATCH, document_token, sampled_windows

    size = min(tokens, SAMPLED_TOKENS)
    steps = -(-windows // BATCH) * size
    return sampled_windows(
        model,
        windows,
        size,
        start=document_token(tokenizer),
        seed=seed,
        progress=lambda done: progress("sampling", done, steps),
    )


def default_fine_bits(model: Any, space: str, bits: float | None) -> float:
    """Of the last tokens before a cut, of a decoder whose codec is given a budget of `bits`."""
    from ..codes.registry import codec_named
    from ..models import adapt
    from ..train.budgets import DEFAULT_BITS

    adapter = adapt(model)
    if not (codec_named(space).allots_bits and adapter.causal):
        return 0
    dense = 64.0 * adapter.num_key_value_heads * adapter.head_dim
    return min(FINE_SHARE * (bits or DEFAULT_BITS), dense)


@contextlib.contextmanager
def progress_bar() -> Iterator[Any]:
    """A `fit.Progress` for people: a bar on stderr if it is a terminal, else lines.

    A line begins each stage, and one says how far it is where nothing else was said for a while.
    """
    from tqdm import tqdm

    bar: Any = None
    stage, terminal = "", sys.stderr.isatty()

    def show(what: str, done: int, steps: int) -> None:
        nonlocal bar, stage
        if what != stage:
            if bar is not None:
                bar.close()
            stage = what
            bar = tqdm(total=steps, desc=what, file=sys.stderr, disable=not terminal)
            if not terminal:
                say(f"{what} ({steps} steps)")
        bar.update(done - bar.n)
        bar.n = done  # also where the bar is not shown, for the reminders

    def far() -> str:
        return "preparing" if bar is None else f"{stage}: {bar.n} of {bar.total}"

    reminders = contextlib.nullcontext() if terminal else working(far)
    try:
        with reminders:
            yield show
    finally:
        if bar is not None:
            bar.close()


def verdict(held_back: dict[str, Any] | None) -> str:
    """What a codebook is worth on the windows held out of its fit, in a sentence."""
    if held_back is None:
        return "not evaluated: too few windows to hold one out"
    exact, astra, dropped = (held_back[key] for key in ("exact", "astra", "local_only"))
    figures = (
        f"{held_back['metric']} on {held_back['windows']} windows held out, "
        f"{held_back['world_size']} ranks: exact {exact:.4g}, "
        f"ASTRA {astra:.4g}, remote tokens dropped {dropped:.4g}"
    )
    if dropped <= exact or math.isnan(held_back["gap_recovered"]):
        return f"{figures}: remote tokens are worth nothing on these windows, so neither are codes"
    if astra >= dropped:
        return (
            f"WARNING: these codes are worse than dropping the remote tokens ({figures}). "
            "Calibrate on more text, or use more groups."
        )
    recovered = held_back["gap_recovered"]
    return f"{figures}; {100 * recovered:.0f} % of the gap that remote tokens close is recovered"
