"""Whether a codebook's fields can be what a fit has written, before anything is made of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .fields import CodebookFields

_COUNTS = ("groups", "codewords", "prefix", "fine_tokens", "fine_codewords")
_KINDS = {"shared": bool, "model": str, "notes": dict, "geometry": dict}
MOST_CODEWORDS = 1 << 16  # a code has at most 16 bits


def check_fields(codebook: CodebookFields, coded_width: int | None) -> None:
    """Refuses fields of other types, tensors of other shapes, and values that are not finite.

    coded_width: how many numbers of a token the tables stand for; None: of any other space.

    Raises:
        ValueError: naming the field, what was expected and what it is.
    """
    for name in _COUNTS:
        value: Any = getattr(codebook, name)
        most = MOST_CODEWORDS if "codewords" in name else None
        if type(value) is not int or value < 0 or (most is not None and value > most):
            limit = "" if most is None else f", at most {most}"
            raise ValueError(f"{name}: expected a number of 0 or more{limit}, got {value!r}")
    for name, kind in _KINDS.items():
        if not isinstance(getattr(codebook, name), kind):
            raise ValueError(
                f"{name}: expected {kind.__name__}, got {getattr(codebook, name)!r:.60}"
            )
    for name, tensor in _tensors(codebook):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    if coded_width is not None:
        _check_tables(codebook, coded_width)


def _check_tables(codebook: CodebookFields, coded_width: int) -> None:
    blocks, tables = codebook.geometry.get("num_blocks"), codebook.tables
    if tables is None:  # a table a block
        made = len(codebook.transforms)
        _check_basis(codebook)
        if made != blocks or len(codebook.fine) not in (0, blocks):
            raise ValueError(f"transforms: expected one for each of {blocks} blocks, got {made}")
        return
    groups, codewords = codebook.groups, codebook.codewords
    width = coded_width // groups if groups and coded_width % groups == 0 else "?"
    expected = (blocks, groups, codewords, width)
    if tuple(tables.shape) != expected:
        raise ValueError(f"tables: expected shape {expected}, got {tuple(tables.shape)}")


def _check_basis(codebook: CodebookFields) -> None:
    """Whether the predictors read as many coordinates as the basis of embeddings has."""
    basis = codebook.basis
    if basis is None:
        return
    size = codebook.geometry.get("hidden_size")
    if basis.dim() != 2 or basis.shape[0] != size:
        raise ValueError(f"basis: expected shape [{size}, F], got {list(basis.shape)}")
    for block, transform in enumerate(codebook.transforms):
        read, width = len(transform.down), len(transform.offset)
        if read not in (0, width + basis.shape[1]):
            raise ValueError(
                f"basis: expected {read - width} coordinates, which block {block} reads, "
                f"got {basis.shape[1]}"
            )


def _tensors(codebook: CodebookFields) -> list[tuple[str, Tensor]]:
    given = [("tables", codebook.tables), ("scales", codebook.scales), ("basis", codebook.basis)]
    for block, parts in enumerate(codebook.transforms):
        given += [(f"block {block}, {name}", tensor) for name, tensor in vars(parts).items()]
    for block, fine in enumerate(codebook.fine):
        given += [(f"block {block}, {name}", tensor) for name, tensor in fine.tensors().items()]
    return [(name, tensor) for name, tensor in given if tensor is not None]
