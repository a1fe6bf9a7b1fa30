"""The attention function that a model's modules are handed during a call."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ModelChanged
from .forward_pass import current_pass

ATTENTION = "astra"  # the name under which the attention is known to transformers
# Attention functions that compute softmax(q·kᵀ/√d + mask)·v and nothing else.
PLAIN = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# What a model may hand to its attention that plain attention does not know.
_OTHER_ATTENTION = ("softcap", "s_aux", "position_bias")


class AttentionConfig:
    """A model's configuration, as its attention modules see it during a call.

    In a copy or a pickle of the model it is the configuration itself.
    """

    _attn_implementation = ATTENTION

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self._original, memo)

    def __reduce__(self) -> Any:
        return _same, (self._original,)


def _same(value: Any) -> Any:
    return value


def astra_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """The function that transformers calls: query [B, H, M, d] in, [B, M, H, d] out."""
    running = current_pass()
    block = None if running is None else running.hooks.index.get(module)
    if running is not None and block is not None:
        strange = [name for name in _OTHER_ATTENTION if kwargs.get(name) is not None]
        if strange:
            raise ModelChanged(
                f"attention of block {block} was given {', '.join(strange)}, which is not supported"
            )
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if isinstance(scale, Tensor) and scale.numel() > 1:
            raise ModelChanged(
                f"attention of block {block} was given a scale of shape {list(scale.shape)}, which "
                "is not supported: expected one number"
            )
        scale = float(scale)
        out = running.attend(block, query, key, value, scale)
        if out is not None:
            return out.transpose(1, 2), None
    return own_attention(module)(module, query, key, value, attention_mask, **kwargs)


def own_attention(module: nn.Module) -> Callable[..., Any]:
    """The attention function that `module` was made with."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = module.config
    if isinstance(config, AttentionConfig):
        config = config._original
    eager = sys.modules[type(module).__module__].eager_attention_forward
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
        config._attn_implementation, eager
    )
    return function


def check_attention(attentions: Sequence[nn.Module], causal: bool) -> None:
    """Refuses attention that is not plain, by name.

    causal: whether the family's is.

    Raises:
        ValueError: an attention function of the user's own, a module that asks for none, a decoder
            that was made to see later tokens, or an encoder not to.
    """
    for block, module in enumerate(attentions):
        config: Any = module.__dict__.get("config")
        if config is None:
            raise ValueError(
                f"model: expected the attention of block {block} to be transformers' own, which "
                f"asks its AttentionInterface, got {type(module).__module__}."
                f"{type(module).__name__}"
            )
        if isinstance(config, AttentionConfig):
            config = config._original
        for owner, where in ((module, "attention"), (config, "configuration")):
            told = getattr(owner, "is_causal", None)
            if told is not None and bool(told) != causal:
                raise ValueError(
                    f"model: expected is_causal={causal}, as is usual for {config.model_type}, got "
                    f"{told} in the {where} of block {block}"
                )
        name = config._attn_implementation
        if name not in PLAIN:
            raise ValueError(
                f"model: expected plain attention ({', '.join(PLAIN)}), got {name!r} in block "
                f"{block}, whose formula is not known here"
            )


def register_attention() -> None:
    """Makes ASTRA's attention, and masks for it, known to transformers by the name `ATTENTION`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, astra_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
