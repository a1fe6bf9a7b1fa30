"""Codebooks: what the codes stand for, known to every rank before it receives any.

On disk a folder with `astra_config.json` and `codebooks.safetensors`. The content hash names the
codebook in the handshake: two ranks with different codebooks refuse each other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..files import (
    CONFIG_FILE,
    TENSOR_FILE,
    check_codebook_folder,
    check_path,
    written_together,
)
from ..models import Adapter
from .base import GEOMETRY, Codec, geometry
from .checks import check_fields
from .dense import DenseExchange
from .fields import DENSE_DTYPES, CodebookFields
from .fine import FINE, FineCode
from .local_only import LocalOnly
from .predictive import Transform
from .registry import codec_named

FORMAT = 1
NOT_IN_CONFIG = ("tables", "scales", "transforms", "basis", "fine", "notes")
OF_FINE_CODES = ("fine_tokens", "fine_codewords")  # in the file where there are any


@dataclass(frozen=True, eq=False)
class Codebook(CodebookFields):
    """What a rank sends of its tokens, and what the others read in it.

    Made by `Codebook.fit` or `Codebook.from_pretrained`; `Codebook.dense()` and
    `Codebook.local_only()` need no fit. `CodebookFields` describes the attributes. Codebooks with
    the same `digest` are equal, whatever their notes say.

    Example:
        >>> codebook = Codebook.dense("int8")  # every rank has to have the same one
        >>> codebook.space, codebook.coded, codebook == Codebook.dense("int8")
        ('none', False, True)
    """

    def __post_init__(self) -> None:
        codec_named(self.space)
        if self.dtype not in DENSE_DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DENSE_DTYPES)}, got {self.dtype}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codebook) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @classmethod
    def dense(cls, dtype: str = "float32") -> Codebook:
        """Dense exchange: every rank computes what the single device would.

        Args:
            dtype: of keys and values on the wire, "float32", "float16" or "int8".
        """
        return cls(DenseExchange.key, dtype=dtype)

    @classmethod
    def local_only(cls) -> Codebook:
        """The control: remote tokens are not seen at all."""
        return cls(LocalOnly.key)

    none, drop = dense, local_only  # the names that these had before

    @classmethod
    def fit(cls, model: nn.Module, calibration: Any, **options: Any) -> Codebook:
        """Learns the codewords of every block.

        Args:
            model: a supported Hugging Face model, in evaluation mode.
            calibration: token windows, int64 [W, T] or a list of [T], or images [W, C, h, w]. Never
                what is then prompted or evaluated.
            options: keywords, those of `astra_runtime.train.options.FitOptions`: `space`, `groups`,
                `codewords`, `bits` …

        Raises:
            TypeError, ValueError: what cannot be fitted, found before the work begins.

        Example:
            codebook = Codebook.fit(model, windows, space="transform", bits=100)
            codebook.save_pretrained("codebook")
        """
        from ..train.fit import fit

        return fit(model, calibration, **options)

    @property
    def codec(self) -> type[Codec]:
        """The class that knows what codebooks of this kind send, cost and are worth."""
        return codec_named(self.space)

    def make_codec(self, adapter: Adapter) -> Codec:
        """The codec that a rank runs, with its tables on the model's device and dtype.

        Raises:
            ValueError: the codewords were made for another model.
        """
        self.check_model(adapter)
        return self.codec.create(self, adapter)

    @property
    def coded(self) -> bool:
        """It has codewords that were fitted to a model."""
        return self.codec.coded

    @property
    def bits(self) -> float:
        """Bits of codes a token and block, on average over the blocks; 0 where nothing is coded."""
        return self.codec.mean_bits(self, self.geometry) if self.coded else 0

    def token_bits(self, sizes: Adapter | Mapping[str, int], block: int | None = None) -> float:
        """Bits that a token takes in one block, or, None, on average over the blocks.

        `sizes`: the model, or its `geometry`, on which the bits of dense tokens depend.
        """
        if isinstance(sizes, Adapter):
            sizes = geometry(sizes)
        if block is None:
            return self.codec.mean_bits(self, sizes)
        return self.codec.token_bits(self, sizes, block)

    @property
    def digest(self) -> str:
        """Names the content: every field that changes what a code means."""
        content = hashlib.sha256(json.dumps(self._config(), sort_keys=True).encode())
        for _, tensor in sorted(self._tensors().items()):
            content.update(tensor.numpy().tobytes())
        return content.hexdigest()[:16]

    def _config(self) -> dict[str, Any]:
        bare = replace(self, tables=None, scales=None, transforms=(), basis=None, fine=(), notes={})
        skipped = NOT_IN_CONFIG if self.fine else (*NOT_IN_CONFIG, *OF_FINE_CODES)
        return {k: v for k, v in asdict(bare).items() if k not in skipped}

    def _tensors(self) -> dict[str, Tensor]:
        """What the safetensors file holds, by name."""
        return {name: tensor.contiguous() for name, tensor in self.tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        """All that it has, by the names in its file."""
        tensors = {"tables": self.tables, "scales": self.scales, "basis": self.basis}
        for block, transform in enumerate(self.transforms):
            tensors |= {f"{block:03}.{name}": t for name, t in transform.tensors().items()}
        for block, fine in enumerate(self.fine):
            tensors |= {f"{block:03}.{name}": t for name, t in fine.tensors().items()}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def check_fields(self) -> None:
        """Refuses what no fit writes: see `checks.py`."""
        sizes = self.geometry
        width = self.codec.coded_width(sizes) if self.coded and _is_whole(sizes) else None
        check_fields(self, width)

    def check_model(self, adapter: Adapter) -> None:
        """Refuses a model that the codewords were not made for, saying what differs.

        Any form of the checkpoint will do: half-precision, quantized.
        """
        self.check_fields()
        if not self.coded:
            return
        self.codec.check_model(adapter)
        sizes = geometry(adapter)
        if sizes != self.geometry:
            wrong = [
                f"{name} {self.geometry.get(name)} (codebook) and {value} (model)"
                for name, value in sizes.items()
                if self.geometry.get(name) != value
            ]
            raise ValueError(f"codebook: made for another model: {'; '.join(wrong)}")
        if self.model in adapter.digests():
            return
        made, form = f"codebook: made for a model with weights {self.model}", adapter.form()
        if form == "float32" or adapter.checkpoint() != adapter.digest():
            raise ValueError(
                f"{made}, this model has {adapter.checkpoint()}; fit a codebook for this model"
            )
        raise ValueError(
            f"{made}; this model is of {form}, and its weights do not tell what they were made "
            f"from: where it is a form of the same checkpoint, say checkpoint={self.model!r}"
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the codebook into `folder`: both of its files, or neither where one fails."""
        from safetensors.torch import save

        check_path("folder", folder)
        config = {"format": FORMAT, "digest": self.digest, **self._config(), "notes": self.notes}
        with written_together(folder) as part:
            (part / TENSOR_FILE).write_bytes(save(self._tensors()))
            (part / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Codebook:
        """Reads a codebook and checks its content against the hash it was saved with.

        Raises:
            FileNotFoundError, PermissionError: a file is not there, or cannot be read.
            ValueError: a file is damaged, or of another format.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        check_path("folder", folder)
        path = Path(folder)
        check_codebook_folder(path)
        try:
            config = json.loads((path / CONFIG_FILE).read_text("utf-8"))
            tensors = load((path / TENSOR_FILE).read_bytes())
            if config.pop("format") != FORMAT:
                raise ValueError(f"expected format {FORMAT}")
            digest = config.pop("digest")
            codebook = cls(**config, **_fields_of(tensors))
        except (SafetensorError, *_DAMAGED) as error:
            raise ValueError(f"codebook: {path} cannot be read: {error}") from error
        if codebook.digest != digest:
            raise ValueError(
                f"codebook: {path} is damaged: expected content {digest}, got {codebook.digest}"
            )
        try:
            codebook.check_fields()
        except ValueError as error:
            raise ValueError(f"codebook: {path} cannot be read: {error}") from error
        return codebook


_DAMAGED = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)


def _is_whole(sizes: Any) -> bool:
    """Whether a geometry says all that a model's does, in numbers."""
    return isinstance(sizes, dict) and all(
        type(sizes.get(name)) is int and sizes[name] > 0 for name in GEOMETRY
    )


def _fields_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The inverse of `Codebook._tensors`, as keyword arguments."""
    transforms: dict[str, dict[str, Tensor]] = {}
    fields: dict[str, Any] = {}
    for name, tensor in sorted(tensors.items()):
        block, _, part = name.partition(".")
        if part:
            transforms.setdefault(block, {})[part] = tensor
        else:
            fields[name] = tensor
    parts = list(transforms.values())
    fields["transforms"] = tuple(map(Transform.from_tensors, parts))
    has_fine = any(name.startswith(FINE) for part in parts for name in part)
    return fields | {"fine": tuple(map(FineCode.from_tensors, parts)) if has_fine else ()}
