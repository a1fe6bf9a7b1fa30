"""What a call is given, checked before any frame of it is sent.

Whatever a rank can find wrong by itself is refused here, on every rank alike, with a ValueError or
TypeError; mesh and engine stay as they are. Other ranks' inputs are compared by the tag of every
frame (`contents`), pictures by a few means (`picture_means`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from astra_kernels import _direct as direct

from .codes.rotary import Rope
from .models import EVERY, ROW, Adapter, vocabulary_of
from .plan import Plan

NAMES = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
LONGEST_MS = 1e9  # that a call may be given
_LARGEST_REQUEST = 2**63 - 1
_GRID = 4  # a picture's means are those of so many parts each way


def check_inputs(adapter: Adapter, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs of one forward pass: without those that are None, masks as bool.

    Raises:
        TypeError: something else than a tensor.
        ValueError: an unknown name, another device, an empty batch, ids or mask values that the
            model does not have, pictures of another size or with values that are not finite.
    """
    check_autocast(adapter.device)
    given = {name: value for name, value in inputs.items() if value is not None}
    unknown = sorted(given.keys() - set(NAMES))
    if unknown:
        raise ValueError(f"expected inputs among {', '.join(NAMES)}, got also {', '.join(unknown)}")
    for name, value in given.items():
        _check_tensor(name, value, adapter.device)
    batch, _ = adapter.count(given)
    if batch < 1:
        name, value = next(iter(given.items()))
        raise ValueError(f"{name}: expected at least one sequence, got shape {tuple(value.shape)}")
    if "pixel_values" in given:
        _check_picture(given["pixel_values"], adapter.model.config)
        return given
    vocabulary = vocabulary_of(adapter.model)
    _check_range("input_ids", given["input_ids"], vocabulary)
    if "token_type_ids" in given:
        types = given["token_type_ids"]
        if types.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"token_type_ids: expected integers, got {types.dtype}")
        _check_range("token_type_ids", types, int(adapter.model.config.type_vocab_size))
    if "attention_mask" in given:
        given["attention_mask"] = _as_mask(given["attention_mask"])
    return given


def check_autocast(device: torch.device) -> None:
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            "autocast: expected a call outside of torch.autocast, got one inside; convert the "
            "model with model.to(dtype)"
        )


def _check_tensor(name: str, value: Any, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided or value.is_quantized:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else value.layout
        raise ValueError(f"{name}: expected a dense tensor, got a {kind} one")
    if value.device != device:
        raise ValueError(f"{name}: expected the model's device, {device}, got {value.device}")


def _check_range(name: str, ids: Tensor, size: int) -> None:
    if not ids.numel():
        raise ValueError(f"{name}: expected at least one token, got shape {tuple(ids.shape)}")
    least, most = (int(bound) for bound in torch.aminmax(ids))
    if least < 0 or most >= size:
        got = least if least < 0 else most
        raise ValueError(f"{name}: expected values from 0 to {size - 1}, got {got}")


def _as_mask(mask: Tensor) -> Tensor:
    visible = mask != 0
    if mask.dtype != torch.bool and not bool((mask.eq(1) | ~visible).all()):
        wrong = mask[visible & mask.ne(1)].flatten()[0].item()
        raise ValueError(f"attention_mask: expected 1 for tokens and 0 for padding, got {wrong}")
    return visible


def _check_picture(pixels: Tensor, config: Any) -> None:
    if not pixels.is_floating_point():
        raise ValueError(f"pixel_values: expected floating-point values, got {pixels.dtype}")
    side = config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    expected = (int(config.num_channels), int(height), int(width))
    if tuple(pixels.shape[1:]) != expected:
        raise ValueError(
            f"pixel_values: expected [B, {', '.join(map(str, expected))}], as the model was made "
            f"for, got {list(pixels.shape)}"
        )
    if not bool(all_finite(pixels)):
        raise ValueError("pixel_values: expected finite values, got NaN or infinity")


def all_finite(*tensors: Tensor) -> bool | Tensor:
    """Whether tensors hold neither NaN nor an infinity: a bool tensor where C++ cannot look."""
    finite = direct.all_finite(tensors)
    if finite is not None:
        return finite
    if all(tensor.numel() and not tensor.is_cpu for tensor in tensors):
        # the largest size, by one kernel for each tensor; NaN is not smaller either
        largest = [torch.linalg.vector_norm(tensor, math.inf) for tensor in tensors]
        return (torch.stack(largest) < math.inf).all()
    return torch.stack([_extremes_are_finite(tensor) for tensor in tensors]).all()


def _extremes_are_finite(values: Tensor) -> Tensor:
    """One pass over memory where `isfinite` and `all` make five: the extremes are finite then, and
    only then."""
    if not values.numel():
        return torch.ones((), dtype=torch.bool, device=values.device)
    return torch.stack(values.aminmax()).isfinite().all()


@dataclass(frozen=True, eq=False)
class Views:
    """What one rank needs of a call's positions, padding and picture.

    Attributes:
        sent_rope, remote_rope: rotary cos and sin of the tokens sent and of those received.
        local_mask, remote_mask: bool [B, L] and [B, N], False at padding; None: no padding. The
            local one may reach beyond L, over tokens still to be generated.
        picture: means of this rank's picture, to be compared with the others'; None: token ids,
            which the tag names.
    """

    sent_rope: Rope = None
    remote_rope: Rope = None
    local_mask: Tensor | None = None
    remote_mask: Tensor | None = None
    picture: Tensor | None = None

    @classmethod
    def of(cls, adapter: Adapter, inputs: Mapping[str, Tensor], plan: Plan, rank: int) -> Views:
        visible, positions = adapter.visible(inputs), adapter.positions(inputs)
        rope = None if positions is None else adapter.rope(positions)
        sent, remote = plan.sent_slice(rank), bool(plan.sources(rank))
        sent_rope: Rope = None
        remote_rope: Rope = None
        if rope is not None:
            sent_rope = rope[0][:, sent], rope[1][:, sent]
        if rope is not None and remote:
            remote_rope = plan.remote_tokens(rope[0], rank), plan.remote_tokens(rope[1], rank)
        pixels = inputs.get("pixel_values") if plan.world_size > 1 else None
        return cls(
            sent_rope,
            remote_rope,
            None if visible is None else plan.local_tokens(visible, rank),
            plan.remote_tokens(visible, rank) if visible is not None and remote else None,
            None if pixels is None else picture_means(pixels),
        )


def check_answer(adapter: Adapter, logits: str) -> bool:
    """Refuses an answer that the model's head cannot give; whether the head picks a row's last
    token itself."""
    name = type(adapter.model).__name__
    if adapter.head == EVERY and logits != "all":
        raise ValueError(
            f"logits: expected 'all' for {name}, whose head reads every token, got {logits!r}"
        )
    if adapter.head == ROW and logits == "local":
        raise ValueError(
            f"logits: expected 'last' or 'all' for {name}, whose head reads the last token of "
            "a row, got 'local'"
        )
    return adapter.head == ROW


def contents(inputs: Mapping[str, Tensor]) -> list[bytes]:
    """What must be the same on every rank: shapes, and token ids to the last one.

    Pictures may differ by the rounding of each rank's own preprocessing, see `picture_means`.
    """
    parts = []
    for name, tensor in sorted(inputs.items()):
        parts.append(f"{name}{tuple(tensor.shape)}".encode())
        if not tensor.is_floating_point():
            parts.append(tensor.to("cpu", torch.int64).contiguous().numpy().tobytes())
    return parts


def picture_means(pixels: Tensor) -> Tensor:
    """fp32 [B, 17] on the CPU: the means of 16 parts of each picture, and its root mean square."""
    plain = pixels.float()
    # unlike shares, so that pictures whose channels changed places differ
    shares = torch.linspace(0.5, 1.5, plain.shape[1], dtype=plain.dtype, device=plain.device)
    parts = F.adaptive_avg_pool2d(plain, _GRID).flatten(2)  # of each channel
    parts = (parts * (shares / shares.mean())[:, None]).mean(1)
    size = torch.linalg.vector_norm(plain.flatten(1), dim=1) / plain[0].numel() ** 0.5
    return torch.cat([parts, size[:, None]], 1).cpu()


def num_padding(visible: Tensor | None) -> int:
    """The most tokens of padding in front of a sequence of the batch; `visible` is bool [B, T]."""
    return 0 if visible is None else int((visible.cumsum(-1) == 0).sum(-1).max())


def inferred_mask(ids: Any, pad: Any, ends: Sequence[int]) -> Tensor | None:
    """The attention mask that `model.generate` takes for granted where none is given: the padding
    token is padding, unless it also ends a text. None: no token is."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return None
    if not isinstance(pad, int) or pad in ends:
        return None
    mask = ids != pad
    return None if bool(mask.all()) else mask


def num_leading_padding(mask: Tensor | None, repeats: int) -> Tensor | None:
    """How many tokens of padding are in front of each row, int64 [B·repeats]; None: none are."""
    if mask is None or bool((mask != 0).all()):
        return None
    return (mask != 0).int().argmax(1).repeat_interleave(repeats)


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int: an int or whatever stands for one exactly, a bool aside."""
    wanted = f"at least {least}" if most is None else f"{least} to {most}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, {wanted}, got {value!r}") from None
    if number < least or (most is not None and number > most):
        raise ValueError(f"{name}: expected {wanted}, got {number}")
    return number


def check_kind(name: str, value: Any, kind: type) -> None:
    """None will do as well."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name}: expected {kind.__name__} or None, got {type(value).__name__}")


def check_numbers(name: str, values: Any) -> tuple[float, ...]:
    try:
        if isinstance(values, str | bytes):
            raise TypeError
        return tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected numbers, one for each rank, got {values!r}") from None


def check_request(request: Any) -> int | None:
    return None if request is None else check_integer("request", request, 0, _LARGEST_REQUEST)


def check_bound(within_ms: Any) -> float | None:
    if within_ms is None:
        return None
    if isinstance(within_ms, bool) or not isinstance(within_ms, Real):
        raise TypeError(f"within_ms: expected milliseconds, above 0, got {within_ms!r}")
    bound = float(within_ms)
    if not 0 < bound <= LONGEST_MS:
        raise ValueError(f"within_ms: expected above 0, at most 1e9, got {within_ms}")
    return bound


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_function(name: str, value: object) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected a function, got {type(value).__name__}")
