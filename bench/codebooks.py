"""Codebooks by the names that options and results use, and what they send.

A name is "SPACE:GROUPS", "SPACE:BITS" where a fit is given a budget (`transform`), "none:DTYPE" for
dense exchange, or "drop" for local-only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

import torch

from astra_runtime import Codebook
from astra_runtime.codes.base import geometry
from astra_runtime.codes.dense import DenseExchange
from astra_runtime.codes.local_only import LocalOnly
from astra_runtime.codes.registry import codec_named
from astra_runtime.models import Adapter

CONTROLS: Final = {"exact": Codebook.dense(), "local_only": Codebook.local_only()}
FOLDER: Final = Path("build/codebooks")  # what `bench.accuracy.calibrate` fits
CODEWORDS: Final = 1024  # of random codebooks
AfterLoss = Literal["stale", "out", "predicted"]


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
    """
    space, _, size = name.partition(":")
    if budgeted(name):
        return {"space": space, "bits": float(size)}
    return {"space": space, "groups": int(size)}


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


def folder(bits: float, seed: int) -> Path:
    """Where `bench.accuracy.calibrate` puts SmolLM2's codebook of that budget and seed."""
    return FOLDER / f"broad-{bits:g}-{seed}"


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
    )
