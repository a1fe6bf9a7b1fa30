"""The codecs, by the key that a codebook's field `space` names. A new one is listed here."""

from __future__ import annotations

from .base import Codec
from .dense import DenseExchange
from .differential import DifferentialCodes
from .hidden import HiddenCodes
from .kv import KeyValueCodes
from .local_only import LocalOnly
from .transform import TransformCodes

CODECS: dict[str, type[Codec]] = {
    codec.key: codec
    for codec in (
        KeyValueCodes,
        HiddenCodes,
        DifferentialCodes,
        TransformCodes,
        DenseExchange,
        LocalOnly,
    )
}


def codec_named(key: str) -> type[Codec]:
    """The codec of a key. ValueError: there is none."""
    if key not in CODECS:
        raise ValueError(f"space: expected one of {', '.join(CODECS)}, got {key!r}")
    return CODECS[key]


def default_space(groups: bool) -> str:
    """The key of the codec to fit where nobody names one; `groups`: their number was given."""
    return KeyValueCodes.key if groups else TransformCodes.key


def coded_keys() -> list[str]:
    """The keys of the codecs whose codewords are fitted."""
    return [key for key, codec in CODECS.items() if codec.coded]
