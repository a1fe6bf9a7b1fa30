"""The default fit: its seconds, its memory, and what its codes keep.

    python -m bench.accuracy fitting [--models smollm2 llama-1b] [--windows 32] [--beside DIR …]

Each model is fitted in a process of its own, on all cores, as `astra fit --bits 100` does: wall and
processor seconds, and the most memory that was resident, from the start of the process to its end.
What SmolLM2's codebook keeps follows on held-out windows of two texts, four ranks, no halo, as in
`bench.accuracy`; `--beside` names folders of other codebooks of SmolLM2, whose coarse codes stand
in pairs with its own, window by window. `llama-1b` has the sizes of Llama 3.2 1B, random weights
and random windows, as many as the default fit has: seconds and memory alone. Writes fitting.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from astra_runtime import Codebook
from astra_runtime.cli.fitting import (
    OTHERS,
    WINDOWS,
    default_fine_bits,
    halved,
    progress_bar,
)
from astra_runtime.console import say
from astra_runtime.store import load_model, load_tokenizer
from bench.accuracy.corpora import held_out
from bench.accuracy.simulated import TOKENS, Losses, control_losses, figures, losses
from bench.codebooks import without_fine
from bench.report import command_line, quiet_transformers, write

BITS, RANKS = 100, 4
DOMAINS = ("documentation", "handbook")
# Sizes of Llama 3.2 1B, whose embeddings are its head's.
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
TINY = {**LLAMA_1B, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 256}
SHAPES = {"llama-1b": LLAMA_1B, "llama-tiny": TINY}  # the tiny one is for tests


def shaped(name: str) -> Any:
    """A model of these sizes with random weights."""
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPES[name])).eval()


def fit_shape(name: str) -> None:
    """The default fit of a shape, on random windows."""
    model = shaped(name)
    windows = list(torch.randint(model.config.vocab_size, (WINDOWS + OTHERS, TOKENS)))
    calibration, extra = halved(windows[:WINDOWS], windows[WINDOWS:])
    with progress_bar() as progress:
        book = Codebook.fit(
            model,
            calibration,
            space="transform",
            bits=BITS,
            fine_bits=default_fine_bits(model, "transform", BITS),
            extra=extra,
            progress=progress,
        )
    say(f"{book.bits:.1f} bits, {book.notes['held_back']}")


def usage(command: Sequence[str]) -> dict[str, float]:
    """What a command takes: seconds by the clock and of the processor, bytes resident at most.

    Raises:
        subprocess.CalledProcessError: it fails.
    """
    start = time.monotonic()
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {
        "seconds": seconds,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
    }


def command_of(name: str, folder: str) -> list[str]:
    """What fits a model: `astra fit`, whose codebook lies in `folder` then, or this module."""
    if name in SHAPES:
        return [sys.executable, "-m", "bench.accuracy", "fitting", "--fit", name]
    command = [sys.executable, "-m", "astra_runtime", "fit", "--model", name]
    return [*command, "--bits", str(BITS), "--output", folder]


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def kept(
    model: Any, book: Codebook, others: dict[str, Codebook], windows: dict[str, list[Any]]
) -> dict[str, Any]:
    """What the codes keep, by text, and how much more their coarse ones than those of `others`."""
    found = {}
    for domain, of_domain in windows.items():
        controls = control_losses(model, of_domain, RANKS)
        ours = losses(model, book, of_domain, world_size=RANKS)
        found[domain] = figures(model, book, ours, controls)
        coarse = ours
        if book.fine and others:
            coarse = losses(model, without_fine(book), of_domain, world_size=RANKS)
        for name, other in others.items():
            theirs = losses(model, without_fine(other), of_domain, world_size=RANKS)
            found[domain][name] = {
                **figures(model, other, theirs, controls),
                **paired(coarse, theirs, controls),
            }
            say(f"{domain}: {found[domain]['gap_recovered']:.4f}, {name}: {found[domain][name]}")
    return found


def paired(ours: Losses, theirs: Losses, controls: dict[str, Losses]) -> dict[str, float]:
    """The share of the gap that ours recover more than theirs: mean over windows, and its error."""
    gap = statistics.fmean(controls["local_only"]) - statistics.fmean(controls["exact"])
    more = [(b - a) / gap for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else float("nan")
    return {"ours_more": statistics.fmean(more), "standard_error": error}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.accuracy fitting", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--models", nargs="+", default=["smollm2"])
    parser.add_argument("--windows", type=int, default=32, help="of a text")
    parser.add_argument("--domains", nargs="+", default=DOMAINS)
    parser.add_argument("--beside", nargs="+", default=[], metavar="DIR")
    parser.add_argument("--fit", choices=list(SHAPES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    quiet_transformers()
    if options.fit:
        fit_shape(options.fit)
        return
    rows = [_row(name, options) for name in options.models]
    path = write(
        "fitting",
        [],
        command=command_line("bench.accuracy fitting", arguments),
        packages=("torch", "numpy", "transformers"),
        extra={"rows": rows, "threads": torch.get_num_threads()},
    )
    say(f"wrote {path}")


def _row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        row: dict[str, Any] = {"model": name, "bits": BITS, **usage(command_of(name, folder))}
        model = shaped(name) if name in SHAPES else load_model(name)
        row["model_bytes"] = weight_bytes(model)
        say(f"{name}: {row}")
        if name in SHAPES:
            return row
        book, tokenizer = Codebook.from_pretrained(folder), load_tokenizer(name)
        others = {Path(at).name: Codebook.from_pretrained(at) for at in options.beside}
        windows = held_out(tokenizer, options.domains, TOKENS, options.windows)
        return row | {"kept": kept(model, book, others, windows)}


if __name__ == "__main__":
    main()
