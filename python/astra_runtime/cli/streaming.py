"""Showing an answer as it comes: how far the prompt is read, then the text, piece by piece."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..console import show
from ..errors import AstraError
from .options import group, positive


def add_sampling(parser: argparse.ArgumentParser) -> None:
    sampling = group(parser, "how tokens are chosen")
    sampling.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="0: always the likeliest token (default: 0)",
    )
    sampling.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens of this mass (default: 1)",
    )
    sampling.add_argument(
        "--top-k", metavar="K", type=positive, help="draw from so many of the likeliest tokens"
    )
    sampling.add_argument(
        "--seed", type=int, default=0, help="the same seed draws the same text (default: 0)"
    )


def sampling_of(options: argparse.Namespace) -> Any:
    """--temperature, --top-p, --top-k and --seed, judged: a `Sampling`."""
    from ..serve.service import Sampling

    if not 0 <= options.temperature <= 100:
        raise AstraError(f"--temperature: expected 0 to 100, got {options.temperature:g}")
    if not 0 < options.top_p <= 1:
        raise AstraError(f"--top-p: expected above 0, at most 1, got {options.top_p:g}")
    return Sampling(options.temperature, options.top_p, options.top_k, options.seed)


class Streaming:
    """Writes the text on stdout as its tokens come; on a terminal, how far the prompt is read.

    Args:
        tokenizer: the model's.
        blocks: of the model.
    """

    def __init__(self, tokenizer: Any, blocks: int) -> None:
        from ..serve.text import TextStream

        self._text, self._blocks = TextStream(tokenizer), blocks
        self._terminal = sys.stderr.isatty()
        self._shown = False

    def on_block(self, block: int) -> None:
        self.show_progress((block + 1) / self._blocks)

    def show_progress(self, share: float) -> None:
        if self._terminal:
            self._shown = True
            print(f"\rreading the prompt: {share:4.0%}", end="", file=sys.stderr, flush=True)

    def end_progress(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False

    def on_token(self, token: Any) -> None:
        self.end_progress()
        self.write(self._text.add(int(token)))

    def write(self, piece: str) -> None:
        if piece:
            show(piece)

    def finish(self) -> None:
        self.end_progress()
        self.write(self._text.finish() + "\n")
