"""Codebooks by the names that options and results use, and what they send.

A name is "SPACE:GROUPS", "SPACE:BITS" where a fit is given a budget (`transform`), "none:DTYPE" for
dense exchange, "drop" for local-only, or "default" for what the commands use where none is named.
"transform:BITS+FINE" has FINE bits more for the last 64 tokens before a cut,
"transform:BITS+FINExTOKENS" for the last TOKENS.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from astra_runtime import Codebook
from astra_runtime.call import Sizes
from astra_runtime.cli.fitting import FINE_SHARE, ensure_codebook
from astra_runtime.codes.base import geometry
from astra_runtime.codes.dense import DenseExchange
from astra_runtime.codes.local_only import LocalOnly
from astra_runtime.codes.registry import codec_named
from astra_runtime.codes.transform import TransformCodes
from astra_runtime.models import Adapter
from astra_runtime.plan import Plan
from astra_runtime.store import load_tokenizer
from astra_runtime.train.budgets import DEFAULT_BITS
from astra_runtime.train.simulate import AfterLoss

CONTROLS: Final = {"exact": Codebook.dense(), "local_only": Codebook.local_only()}
FOLDER: Final = Path("build/codebooks")  # what `bench.accuracy.calibrate` fits
CODEWORDS: Final = 1024  # of random codebooks
FINE_TOKENS: Final = 64  # that have fine codes, where a name does not say how many
DEFAULT: Final = "default"


def control(name: str) -> Codebook | None:
    """The codebook of a name that needs no fit; None where one has to be fitted."""
    space, _, dtype = name.partition(":")
    codec = codec_named(space)
    if codec is DenseExchange:
        return Codebook.dense(dtype or "float32")
    return Codebook.local_only() if codec is LocalOnly else None


def budgeted(name: str) -> bool:
    """Whether a name gives a budget of bits."""
    return codec_named(name.partition(":")[0]).allots_bits


def size_of(name: str) -> dict[str, Any]:
    """Space and size of what has to be fitted, as `Codebook.fit` takes them.

    Example:
        >>> size_of("kv:3"), size_of("transform:100")
        ({'space': 'kv', 'groups': 3}, {'space': 'transform', 'bits': 100.0})
        >>> size_of("transform:100+400x64")
        {'space': 'transform', 'bits': 100.0, 'fine_bits': 400.0, 'fine_tokens': 64}
    """
    space, _, size = name.partition(":")
    if not budgeted(name):
        return {"space": space, "groups": int(size)}
    bits, _, fine = size.partition("+")
    if not fine:
        return {"space": space, "bits": float(bits)}
    fine_bits, _, tokens = fine.partition("x")
    return {
        "space": space,
        "bits": float(bits),
        "fine_bits": float(fine_bits),
        "fine_tokens": int(tokens or FINE_TOKENS),
    }


def after_loss(book: Codebook) -> tuple[AfterLoss, ...]:
    """What a receiver can do after it missed a block's codes, as `Simulation` takes it."""
    choices: list[AfterLoss] = ["stale"]
    if book.codec.accumulates:
        choices.append("out")
    if book.codec.predicts:
        choices.append("predicted")
    return tuple(choices)


def exact(book: Codebook) -> bool:
    """Every rank computes what one device would."""
    return book.codec is DenseExchange and book.dtype == "float32"


def local_only(book: Codebook) -> bool:
    """No rank receives anything of another's tokens."""
    return book.codec is LocalOnly


def label(book: Codebook) -> str:
    """The space, with the dtype of dense exchange where it is not exact."""
    return book.space if book.dtype == "float32" else f"{book.space}:{book.dtype}"


def bits_per_token_block(book: Codebook, adapter: Adapter) -> float:
    """On average over the blocks; of dense exchange those of its keys and values."""
    return book.token_bits(adapter)


def payload_bits(book: Codebook, adapter: Adapter, plan: Plan) -> tuple[float, float]:
    """Bits a token and block of a call of `plan`, fine codes counted: each payload once, and what
    one receiver gets on average."""
    sizes = Sizes.of(book.make_codec(adapter), len(adapter.blocks), 0, plan, 1)
    return sizes.bits_per_token_block(1), sizes.bits_per_receiver(1)


def folder(bits: float, seed: int, fine_bits: float = 0.0) -> Path:
    """Where `bench.accuracy.calibrate` puts SmolLM2's codebook of that budget and seed."""
    return FOLDER / f"broad-{bits:g}{f'+{fine_bits:g}' if fine_bits else ''}-{seed}"


def calibrated(name: str, seed: int) -> Codebook:
    """SmolLM2's codebook of a name with a budget, from `folder`."""
    size = size_of(name)
    fine_bits = size.get("fine_bits", 0.0)
    book = Codebook.from_pretrained(folder(size["bits"], seed, fine_bits))
    return replace(book, fine_tokens=size["fine_tokens"]) if fine_bits else book


def without_fine(book: Codebook) -> Codebook:
    """The same with its coarse codes alone."""
    notes = {k: v for k, v in book.notes.items() if not k.startswith("fine_")}
    return replace(book, fine=(), fine_tokens=0, fine_codewords=0, notes=notes)


def default(model_name: str, model: Any) -> Codebook:
    """The codebook that `astra serve`, `run` and `demo` use, from the cache or fitted now."""
    options = argparse.Namespace(model=model_name, codebook=None)
    return ensure_codebook(options, model, load_tokenizer(model_name))[0]


def full_name(name: str) -> str:
    """Of "default", what it stands for: SPACE:BITS+FINE."""
    if name != DEFAULT:
        return name
    return f"{TransformCodes.key}:{DEFAULT_BITS:g}+{FINE_SHARE * DEFAULT_BITS:g}"


def random_codebook(name: str, adapter: Adapter) -> Codebook:
    """A codebook of "SPACE:GROUPS" or "SPACE:GROUPS:CODEWORDS" with random tables, where only the
    work counts; 1,024 codewords where none are said."""
    space, groups, codewords = [*name.split(":"), str(CODEWORDS)][:3]
    codec, sizes = codec_named(space), geometry(adapter)
    blocks, heads = sizes["num_blocks"], sizes["num_key_value_heads"]
    shape = (blocks, int(groups), int(codewords), codec.coded_width(sizes) // int(groups))
    return Codebook(
        space,
        int(groups),
        int(codewords),
        codec.shares_heads(int(groups), sizes),
        geometry=sizes,
        model=adapter.digest(),
        tables=torch.randn(shape, generator=torch.Generator().manual_seed(1)),
        scales=None if codec.early else torch.ones(blocks, heads, 2),
    ).with_left_out([1.0] * blocks)
