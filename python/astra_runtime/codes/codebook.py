"""Codebooks: what the codes stand for, known to every rank before it hears any.

On disk a folder with `astra_config.json` and `codebooks.safetensors`. The content hash names the
codebook in the handshake: two ranks with different codebooks refuse each other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .transform import Transform

if TYPE_CHECKING:
    from ..models import Adapter

_TENSORS = ("tables", "scales", "transforms")
CONFIG_FILE, TENSOR_FILE = "astra_config.json", "codebooks.safetensors"
FORMAT = 1
FITTED = ("kv", "hidden", "differential", "transform")  # spaces of codes
SPACES = (*FITTED, "none", "drop")
DENSE_DTYPES = ("float32", "float16", "int8")


@dataclass(frozen=True)
class Codebook:
    """The codewords of every block, or the choice to send dense tensors, or nothing.

    Attributes:
        space: "kv": joint keys and values before rotation; "hidden": block inputs (the paper);
            "differential": what a block's input adds to its estimate one block earlier, from the
            token embeddings on; "transform": keys and values by predictive transform codes
            (`transform.py`); "none": dense keys and values; "drop": nothing (the local-only
            control).
        groups: codes a token and block (C), 0 where there are none. Block 0 of space "differential"
            needs none: every rank embeds the token ids itself. Of space "transform", where blocks
            differ, the most that a block has.
        codewords: codewords of a group (K), 0 where there are none.
        shared: space "kv": one set of codes for all heads instead of codes of each head's own.
        dtype: space "none": "float32", "float16" or "int8" on the wire.
        prefix: attention-sink tokens, a decoder's first, kept exact: every rank computes them
            itself, which costs no bits. The first token is unlike all others: attention that has
            nothing to look at rests on it, and its code would have to be perfect.
        geometry: num_blocks, num_heads, num_key_value_heads, head_dim and hidden_size of the model.
        model: digest of the model's weights (`Adapter.digest`).
        tables: fp32 [num_blocks, C, K, w]. w = 2·d·Hkv/C in space "kv", else D/C. In space
            "differential" those of block 0 are zero, and not used.
        scales: fp32 [num_blocks, Hkv, 2], space "kv": what keys and values are multiplied with
            before the nearest codeword is sought. The tables hold scaled codewords.
        transforms: one a block, in space "transform", which has no `tables`.
        notes: where the codewords come from, and what `fit` measured.
    """

    space: str
    groups: int = 0
    codewords: int = 0
    shared: bool = False
    dtype: str = "float32"
    prefix: int = 0
    geometry: dict[str, int] = field(default_factory=dict)
    model: str = ""
    tables: Tensor | None = None
    scales: Tensor | None = None
    transforms: tuple[Transform, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise ValueError(f"space: expected one of {', '.join(SPACES)}, got {self.space!r}")
        if self.dtype not in DENSE_DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DENSE_DTYPES)}, got {self.dtype}")

    @classmethod
    def none(cls, dtype: str = "float32") -> Codebook:
        """Dense exchange: every rank computes what the single device would."""
        return cls("none", dtype=dtype)

    @classmethod
    def drop(cls) -> Codebook:
        """The control: remote tokens are not seen at all."""
        return cls("drop")

    @classmethod
    def fit(cls, model: nn.Module, calibration: Any, **options: Any) -> Codebook:
        """Learns codewords by k-means; see `astra_runtime.train.fit.fit` for the options."""
        from ..train.fit import fit

        return fit(model, calibration, **options)

    @property
    def coded(self) -> bool:
        return self.space in FITTED

    @property
    def code_bits(self) -> int:
        """Bits of one code."""
        return max(1, (self.codewords - 1).bit_length())

    @property
    def bits(self) -> float:
        """Bits a token and block, of a coded space, on average over the blocks."""
        if self.space == "transform":
            return sum(t.codes for t in self.transforms) * self.code_bits / len(self.transforms)
        bits = self.groups * self.code_bits
        if self.space != "differential":
            return bits
        blocks = self.geometry["num_blocks"]
        return bits * (blocks - 1) / blocks

    @property
    def digest(self) -> str:
        """Names the content: every field that changes what a code means."""
        told = hashlib.sha256(json.dumps(self._config(), sort_keys=True).encode())
        for _, tensor in sorted(self._tensors().items()):
            told.update(tensor.numpy().tobytes())
        return told.hexdigest()[:16]

    def _config(self) -> dict[str, Any]:
        fields = asdict(replace(self, tables=None, scales=None, transforms=(), notes={}))
        return {k: v for k, v in fields.items() if k not in (*_TENSORS, "notes")}

    def _tensors(self) -> dict[str, Tensor]:
        """What the safetensors file holds, by name."""
        found = {"tables": self.tables, "scales": self.scales}
        for block, transform in enumerate(self.transforms):
            found |= {f"{block:03}.{name}": t for name, t in transform.tensors().items()}
        return {name: t.contiguous() for name, t in found.items() if t is not None}

    def check_model(self, adapter: Adapter) -> None:
        """Refuses a model that the codewords were not made for, saying what differs."""
        if not self.coded:
            return
        check_space(self.space, adapter)
        have = geometry(adapter)
        if have != self.geometry:
            wrong = [
                f"{name} {self.geometry.get(name)} (codebook) and {value} (model)"
                for name, value in have.items()
                if self.geometry.get(name) != value
            ]
            raise ValueError(f"codebook: made for another model: {'; '.join(wrong)}")
        if self.model not in adapter.digests():
            raise ValueError(
                f"codebook: made for a model with weights {self.model}, this model has "
                f"{adapter.digest()}; "
                "fit a codebook for this model"
            )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the codebook into `folder`, whole or not at all for each of its two files."""
        from safetensors.torch import save_file

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        save_file(self._tensors(), path / (TENSOR_FILE + ".part"))
        os.replace(path / (TENSOR_FILE + ".part"), path / TENSOR_FILE)
        config = {"format": FORMAT, "digest": self.digest, **self._config(), "notes": self.notes}
        part = path / (CONFIG_FILE + ".part")
        part.write_text(json.dumps(config, indent=2) + "\n")
        os.replace(part, path / CONFIG_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Codebook:
        """Reads a codebook and checks its content against the hash it was saved with."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(folder)
        for name in (CONFIG_FILE, TENSOR_FILE):
            if not (path / name).is_file():
                raise FileNotFoundError(
                    f"codebook: expected {CONFIG_FILE} and {TENSOR_FILE} in {path}, "
                    f"found no {name}; make one with `astra fit --output {path}`"
                )
        try:
            config = json.loads((path / CONFIG_FILE).read_text())
            tensors = load_file(path / TENSOR_FILE)
            if config.pop("format") != FORMAT:
                raise ValueError(f"expected format {FORMAT}")
            digest = config.pop("digest")
            made = cls(**config, **_parts(tensors))
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"codebook: {path} cannot be read: {error}") from error
        if made.digest != digest:
            raise ValueError(
                f"codebook: {path} is damaged: expected content {digest}, got {made.digest}"
            )
        return made


def _parts(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The inverse of `Codebook._tensors`, as keyword arguments."""
    of_blocks: dict[str, dict[str, Tensor]] = {}
    found: dict[str, Any] = {}
    for name, tensor in sorted(tensors.items()):
        block, _, part = name.partition(".")
        if part:
            of_blocks.setdefault(block, {})[part] = tensor
        else:
            found[name] = tensor
    return {**found, "transforms": tuple(Transform(**parts) for parts in of_blocks.values())}


def geometry(adapter: Adapter) -> dict[str, int]:
    """The sizes that a codebook depends on."""
    return {
        "num_blocks": len(adapter.blocks),
        "num_heads": adapter.num_heads,
        "num_key_value_heads": adapter.num_key_value_heads,
        "head_dim": adapter.head_dim,
        "hidden_size": adapter.hidden_size,
    }


def check_space(space: str, adapter: Adapter) -> None:
    """Refuses a space that models of this family cannot be coded in."""
    if space == "differential" and not adapter.token_ids:
        raise ValueError(
            "space: differential codes need token ids, from which every rank embeds the others' "
            f"tokens; a model of type {adapter.model.config.model_type!r} has none: "
            "use 'kv' or 'hidden'"
        )


def check_groups(space: str, groups: int, shared: bool, sizes: dict[str, int]) -> None:
    """Refuses a number of groups that the model's channels cannot be split into."""
    if space == "kv" and shared:
        good: Sequence[int] = [g for g in range(1, 257) if sizes["head_dim"] % g == 0]
    elif space == "kv":
        heads = sizes["num_key_value_heads"]
        good = [heads * s for s in range(1, 257) if sizes["head_dim"] % s == 0]
    else:
        good = [g for g in range(1, 257) if sizes["hidden_size"] % g == 0]
    if groups not in good:
        raise ValueError(
            f"groups: expected one of {', '.join(map(str, good))} for space {space!r}"
            f"{' with shared codes' if shared else ''} and this model, got {groups}"
        )
