"""Codebooks by the names that options and results use, and what they send.

A name is "SPACE:GROUPS", "SPACE:BITS" where a fit is given a budget (`transform`), "none:DTYPE" for
dense exchange, or "drop" for local-only.
"""

from __future__ import annotations

import statistics
from typing import Any, Final

from astra_runtime import Codebook
from astra_runtime.deploy.predict import bits_of
from astra_runtime.models import Adapter

CONTROLS: Final = {"exact": Codebook.none(), "local_only": Codebook.drop()}
BUDGETED: Final = ("transform",)


def control(name: str) -> Codebook | None:
    """The codebook of a name that needs no fit; None where one has to be fitted."""
    space, _, dtype = name.partition(":")
    if space == "none":
        return Codebook.none(dtype or "float32")
    return Codebook.drop() if space == "drop" else None


def size_of(name: str) -> dict[str, Any]:
    """Space and size of what has to be fitted, as `Codebook.fit` takes them.

    Example:
        >>> size_of("kv:3"), size_of("transform:100")
        ({'space': 'kv', 'groups': 3}, {'space': 'transform', 'bits': 100.0})
    """
    space, _, size = name.partition(":")
    if space in BUDGETED:
        return {"space": space, "bits": float(size)}
    return {"space": space, "groups": int(size)}


def budgeted(name: str) -> bool:
    """Whether a name gives a budget of bits."""
    return name.partition(":")[0] in BUDGETED


def after_loss(book: Codebook) -> tuple[str, ...]:
    """What a receiver can do after it missed a block's codes, as `Simulation` takes it."""
    choices = {"differential": ("stale", "out"), "transform": ("stale", "out", "predicted")}
    return choices.get(book.space, ("stale",))


def exact(book: Codebook) -> bool:
    """Every rank computes what one device would."""
    return book.space == "none" and book.dtype == "float32"


def local_only(book: Codebook) -> bool:
    """No rank hears of another's tokens."""
    return book.space == "drop"


def label(book: Codebook) -> str:
    """The space, with the dtype of dense exchange where it is not exact."""
    return book.space if book.dtype == "float32" else f"{book.space}:{book.dtype}"


def bits_per_token_block(book: Codebook, adapter: Adapter) -> float:
    """On average over the blocks; of dense exchange those of its keys and values."""
    blocks = range(len(adapter.blocks))
    return statistics.fmean(bits_of(adapter, book, block) for block in blocks)
