"""Codebooks of SmolLM2 for `bench.accuracy`, fitted on real text of several kinds.

    python -m bench.accuracy calibrate [--bits 30 100 …] [--fine-bits 120 400 …] [--seeds 0 1 2]

No text is of a domain that `bench.accuracy` calls unseen (handbook, devref). Seeds differ in the
windows drawn, in the labels that the sensitivity is estimated from, and in k-means. Writes two
folders a seed and budget to build/codebooks, with fine codes (`--fine-bits`, one number for all
budgets or one for each) and the same without; what is there already is not fitted again.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from astra_runtime.console import say
from astra_runtime.models import adapt
from astra_runtime.store import load_model, load_tokenizer
from astra_runtime.texts import token_windows
from astra_runtime.train.budgets import TransformFit, TransformOptions, default_basis, default_rank
from astra_runtime.train.calibration import as_windows
from bench import codebooks
from bench.accuracy.corpora import UNSEEN, corpus
from bench.report import quiet_transformers, stages

TEXT = ("documentation:16", "manpages:14", "fortunes:14", "source:12")
TOKENS = 1024
CANDIDATES = 200  # windows of a domain, evenly spread over its text, that a seed draws from
CHARACTERS = 3_000_000  # at most, of a domain


def windows(tokenizer: Any, text: Sequence[str], seed: int) -> list[Tensor]:
    """Windows int64 [1024] of DOMAIN:COUNT each, in an order of the seed."""
    generator, drawn = torch.Generator().manual_seed(seed), []
    for item in text:
        domain, _, count = item.partition(":")
        if domain in UNSEEN:
            raise ValueError(f"text: expected no domain that is to be unseen, got {domain}")
        candidates = token_windows(tokenizer, corpus(domain)[0][:CHARACTERS], TOKENS, CANDIDATES)
        order = torch.randperm(len(candidates), generator=generator)[: int(count)]
        drawn += [candidates[i] for i in order.tolist()]
    return [drawn[i] for i in torch.randperm(len(drawn), generator=generator).tolist()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.accuracy calibrate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--bits", nargs="+", type=float, default=[10, 30, 100, 300, 600, 1500])
    parser.add_argument(
        "--fine-bits", nargs="+", type=float, default=[400], help="for tokens before a cut"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--text", nargs="+", default=TEXT, metavar="DOMAIN:WINDOWS")
    options = parser.parse_args(arguments)
    fine_bits = options.fine_bits * (len(options.bits) if len(options.fine_bits) == 1 else 1)
    if len(fine_bits) != len(options.bits):
        parser.error("--fine-bits: expected one number, or one for each of --bits")
    quiet_transformers()
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    basis = default_basis(adapt(model))
    rank = default_rank(adapt(model), basis)
    for seed in options.seeds:
        missing = [
            (bits, fine)
            for bits, fine in zip(options.bits, fine_bits, strict=True)
            if not codebooks.folder(bits, seed, fine).is_dir()
        ]
        if not missing:
            continue
        drawn = windows(tokenizer, options.text, seed)
        settings = TransformOptions(
            prefix=1,
            codewords=None,
            rank=rank,
            iterations=8,
            seed=seed,
            basis=basis,
            fine_tokens=codebooks.FINE_TOKENS,
        )
        fit = TransformFit(model, as_windows(drawn), settings, stages(say))
        for bits, fine in missing:
            codebook = fit.codebook(bits, fine)
            codebook.notes["text"] = list(options.text)
            coarse = codebooks.folder(bits, seed)
            if not coarse.is_dir():
                codebooks.without_fine(codebook).save_pretrained(coarse)
            if codebook.fine:
                codebook.save_pretrained(codebooks.folder(bits, seed, fine))
            say(f"{coarse}: {codebook.bits:.1f} bits, fine ones {codebook.fine_bits:.1f}")


if __name__ == "__main__":
    main()
