"""What every command does: load a model, and find how long its inputs are."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from ..console import say, working
from ..errors import AstraError

TOKENS = 1024  # of an input or a window, where nobody says how many and the model reads so many


def quiet_transformers() -> None:
    """No bars and advice from libraries between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def end_at_once(status: int) -> NoReturn:
    """Ends this process, which has given everything back, without clearing its memory first."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """For imports and loading, which make hundreds of thousands of objects and hardly any garbage:
    to look through them again and again takes a second."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def load(
    options: argparse.Namespace, *, decoder: bool = False, tokenizer: bool = True
) -> tuple[Any, Any]:
    """Model and tokenizer of --model, --dtype and --checkpoint.

    Args:
        decoder: only a model that can continue a text will do.
        tokenizer: False: the model has none, and None stands for it.
    """
    name, form = options.model, options.dtype
    with uncollected():
        from ..models import adapt
        from ..store import load_model, load_tokenizer

        quiet_transformers()
        with working(f"loading {name}" + ("" if form == "float32" else f" in {form}")):
            model = load_model(name, dtype=form)
        if options.checkpoint is not None:
            adapt(model).name_checkpoint(options.checkpoint)
        if not adapt(model).generates and decoder:
            raise AstraError(f"model {name!r}: expected a language model that continues texts")
        if tokenizer and not adapt(model).token_ids:
            raise AstraError(
                f"model {name!r}: expected a model that reads text, got {type(model).__name__}, "
                "which reads images: `Codebook.fit` and `finetune` in Python adapt it"
            )
        return model, load_tokenizer(name) if tokenizer else None


def save_result(save: Callable[[Path], None], folder: Path) -> None:
    """Has `save` write what hours were spent on into `folder`, or else into a temporary folder.

    Raises AstraError, which names that folder, where `folder` takes no files any more.
    """
    from safetensors import SafetensorError

    try:
        save(folder)
    except (OSError, SafetensorError) as error:
        kept = Path(tempfile.mkdtemp(prefix="astra-"))
        save(kept)
        raise AstraError(
            f"--output: {folder} cannot be written to: {error}; what was made is in {kept}"
        ) from error


def window_tokens(options: argparse.Namespace, model: Any, *, shorten: bool = False) -> int:
    """--tokens, by default `TOKENS` or as many as the model reads, if these are fewer.

    More than it reads are refused; `shorten`: are made as many, where windows only cut a text.
    """
    from ..store import token_limit

    limit = token_limit(model)
    if options.tokens is None:
        return TOKENS if limit is None else min(TOKENS, limit)
    if limit is None or options.tokens <= limit:
        return int(options.tokens)
    if not shorten:
        raise AstraError(
            f"--tokens: expected at most {limit}, the model's limit, got {options.tokens}"
        )
    say(f"--tokens: windows of {limit} tokens, the model's limit, in place of {options.tokens}")
    return limit
