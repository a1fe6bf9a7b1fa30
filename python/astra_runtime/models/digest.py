"""What names a model: its configuration, and of every tensor name, shape, dtype and a sample."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..limits import BEHIND_PADDING

# What a configuration says besides the function that the model computes.
_NOT_THE_MODEL = {
    "transformers_version",
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "_attn_implementation",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "use_cache",
}
# Words about tokens, labels and training: no activation between two blocks depends on them.
_NOT_WEIGHTS = {
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "initializer_range",
    "initializer_factor",
    "task_specific_params",
}
# That modules ask a configuration for, whether its class declares them or not.
_READ_ANYWAY = {"model_type", "head_dim", "is_causal"}
_NOT_WEIGHTS_ENDS = ("_token_id", "dropout", "_dropout_prob", "_pdrop", "layerdrop")
_ROPE = "rope_parameters"
_SAMPLE = 256  # values of a tensor, evenly spaced
_ADDRESS = re.compile(" at 0x[0-9a-f]+")


def entry_of(name: str, value: Any, dtype: torch.dtype | None = None) -> bytes:
    """What a digest says of one entry of a state dict; `dtype`: as it were in that dtype.

    Quantized layers of torch's own pack their weights in tuples.
    """
    said = b""
    for tensor in _tensors(value):
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].to("cpu", torch.float32).contiguous()
        said += f"{name}{tuple(tensor.shape)}{dtype or tensor.dtype}".encode()
        said += sample.numpy().tobytes()
    return said


def digests_of(config: Any, entries: Mapping[str, bytes]) -> tuple[str, ...]:
    """The name of a model with these entries, and those that codebooks fitted earlier know it by:
    one that also covered words of which the configuration's class knows nothing, and how rotary
    parameters were written; before version 0.2 one with ids of special tokens, labels and dropouts,
    too."""
    try:
        said = config.to_diff_dict()
    except TypeError as error:  # transformers copies it
        raise ValueError(
            f"model: expected a configuration that can be saved, got one that cannot: {error}"
        ) from error
    training = {name for name in said if _is_about_training(name)}
    if config.model_type in BEHIND_PADDING:
        training.discard("pad_token_id")  # its positions begin behind it
    unread = {name for name in said if _is_unread(config, name)}
    alike = {name: _alike(value) if name == _ROPE else value for name, value in said.items()}
    return (
        _digest(alike, entries, training | unread),
        _digest(said, entries, training),
        _digest(said, entries, set()),
    )


def _alike(rope: Any) -> Any:
    """Rotary parameters as one configuration writes them where another has 10000 for 10000.0, or
    the same words in another order."""
    if not isinstance(rope, dict):
        return rope
    return {
        name: float(value) if _is_real(name, value) else value
        for name, value in sorted(rope.items())
    }


def _is_real(name: str, value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and "position" not in name  # lengths are whole numbers everywhere


def is_beside_the_function(name: str) -> bool:
    """Whether a word of a configuration is not about the function that the model computes."""
    return name in _NOT_THE_MODEL or _is_about_training(name)


def _is_about_training(name: str) -> bool:
    return name in _NOT_WEIGHTS or name.endswith(_NOT_WEIGHTS_ENDS)


def _is_unread(config: Any, name: str) -> bool:
    """Whether a word is somebody's own note, or one for generation: transformers' class declares
    no such word, and its modules read none that it does not declare."""
    kind = type(config)
    if (
        name.startswith("_")
        or name in _READ_ANYWAY
        or not kind.__module__.startswith("transformers.")
    ):
        return False
    return dataclasses.is_dataclass(kind) and name not in _declared(kind)


@functools.cache
def _declared(kind: Any) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(kind))


def _digest(said: Mapping[str, Any], entries: Mapping[str, bytes], left_out: set[str]) -> str:
    content = hashlib.sha256()
    for name in sorted(said.keys() - _NOT_THE_MODEL - left_out):
        content.update(f"{name}={_text(said[name])};".encode())
    for _, entry in sorted(entries.items()):
        content.update(entry)
    return content.hexdigest()[:16]


def _text(value: Any) -> str:
    """What `value` is, but not where objects of unknown classes lie in memory."""
    return _ADDRESS.sub("", repr(value))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    if not isinstance(value, Tensor):
        return []
    return [value.int_repr() if value.is_quantized else value.detach()]
