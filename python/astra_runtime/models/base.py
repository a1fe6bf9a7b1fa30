"""The seam between a Hugging Face model and ASTRA.

A model is left as it is: its attention is asked for through `AttentionInterface`, and a few hooks
tell of block inputs, embeddings and the final hidden states. Whoever wants to hear of them (the
engine during a forward pass, the recorder during calibration) is a `Listener`, set for the current
thread by `listening`. Without a listener the model behaves as if ASTRA were not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..plan import Plan

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
Inputs = dict[str, Any]  # the tensors of one forward pass
ATTENTION = "astra"  # the name under which the attention is known to transformers


class Listener(Protocol):
    """What the hooks call. `block` counts Transformer blocks from 0."""

    def embedded(self, hidden: Tensor) -> Tensor:
        """All embeddings [B, class_tokens + T, D] of a model that cuts after embedding."""

    def before_block(self, block: int, hidden: Tensor) -> None:
        """The block's input [B, M, D]."""

    def attend(
        self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor | None:
        """Attention output [B, H, M, d] for [B, H, M, d] and [B, Hkv, L, d]; None: the model's."""

    def finish(self, hidden: Tensor) -> Tensor:
        """The final hidden states [B, M, D], before the head."""


_listener: ContextVar[Listener | None] = ContextVar("astra_listener", default=None)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Lets `listener` hear of every forward pass in this thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class Adapter(ABC):
    """A model family: where its blocks are, and how to cut its inputs. See `families.py`.

    Attributes:
        causal: a decoder; its shards see earlier shards only.
        class_tokens: 1 for encoders, whose first token is copied to every rank.
        token_ids: the input is token ids, which every rank has: `embed` works.
        blocks, attentions: the Transformer blocks and their attention modules, in order.
        num_heads, num_key_value_heads, head_dim, hidden_size: H, Hkv, d and D.
    """

    causal: bool
    class_tokens: int
    token_ids = True
    mlp_matrices = 2  # of hidden_size × mlp_size each

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        self._model = weakref.ref(model)  # strong, it would keep its own key in adapters alive
        self.blocks: list[nn.Module] = self.find_blocks()
        self.attentions = [self.attention_of(block) for block in self.blocks]
        self.hidden_size = int(config.hidden_size)
        self.num_heads = int(config.num_attention_heads)
        self.num_key_value_heads = int(getattr(config, "num_key_value_heads", self.num_heads))
        self.head_dim = int(getattr(config, "head_dim", None) or self.hidden_size // self.num_heads)
        self._handles: list[Any] = []
        self._users = 0
        self._previous = ""
        self._index = {module: i for i, module in enumerate(self.attentions)}

    @property
    def model(self) -> Any:
        model = self._model()
        assert model is not None, "the adapter of a model that is gone"
        return model

    @property
    def base(self) -> Any:
        """The model without its head."""
        return getattr(self.model, getattr(self.model, "base_model_prefix", ""), self.model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def mlp_size(self) -> int:
        config = self.model.config
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
        return int(inner or 4 * self.hidden_size)

    def block_flops(self) -> tuple[float, float]:
        """FLOPs of a block: of one token's projections and MLP, and of one query over one key."""
        queries, keys = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        mlp = self.mlp_matrices * self.hidden_size * self.mlp_size
        return 2.0 * (2 * self.hidden_size * (queries + keys) + mlp), 4.0 * queries

    def digest(self) -> str:
        """Names the model: a hash over its configuration, and over every tensor's name, shape,
        dtype and a sample of its values."""
        config = self.model.config.to_diff_dict()
        told = hashlib.sha256()
        for name in sorted(config.keys() - _NOT_THE_MODEL):
            told.update(f"{name}={config[name]!r};".encode())
        for name, value in sorted(self.model.state_dict().items()):
            for tensor in _tensors(value):
                flat = tensor.reshape(-1)
                sample = flat[:: max(1, flat.numel() // 256)].to("cpu", torch.float32).contiguous()
                told.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                told.update(sample.numpy().tobytes())
        return told.hexdigest()[:16]

    # What a family says of itself.

    @abstractmethod
    def find_blocks(self) -> list[nn.Module]:
        """The Transformer blocks in order."""

    @abstractmethod
    def attention_of(self, block: nn.Module) -> nn.Module:
        """The module that calls the attention interface."""

    @abstractmethod
    def project(self, block: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, not rotated, [B, Hkv, N, d], of block inputs [B, N, D]."""

    @abstractmethod
    def count(self, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        """Batch size and number of tokens, the class token not counted. Checks the inputs."""

    @abstractmethod
    def local_inputs(self, inputs: Mapping[str, Tensor], plan: Plan, rank: int) -> dict[str, Any]:
        """The keyword arguments with which `rank` calls the model's own forward."""

    def embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Block 0's input of every token, [B, class_tokens + T, D], where `token_ids`.

        Positions and token types are in it where the family adds them to the embeddings.
        """
        raise NotImplementedError(f"{type(self).__name__} has no token ids")

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin [B, N, d] at positions [B, N], or None without rotary positions."""
        return None

    def positions(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Position of every token, [1 or B, T], where the model takes positions."""
        return None

    def visible(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Which tokens are not padding, bool [B, class_tokens + T], or None if all are."""
        return None

    @abstractmethod
    def final(self) -> nn.Module:
        """The module whose output is, or holds as last_hidden_state, what the head reads."""

    def install_extra(self) -> list[Any]:
        """Hooks of this family alone."""
        return []

    # Hooks, present while at least one engine uses the model.

    def install(self) -> None:
        with adapters_lock:
            self._users += 1
            if self._users == 1:
                self._install()

    def _install(self) -> None:
        _register_attention()
        for index, block in enumerate(self.blocks):
            hook = _block_hook(index)
            self._handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        self._handles.append(self.final().register_forward_hook(_final_hook))
        self._handles.extend(self.install_extra())
        self._previous = self.model.config._attn_implementation
        self.model.set_attn_implementation(ATTENTION)

    def uninstall(self) -> None:
        with adapters_lock:
            self._users -= 1
            if not self._users:
                self._uninstall()

    def _uninstall(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.model.set_attn_implementation(self._previous)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        self.install()
        try:
            yield
        finally:
            self.uninstall()


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of an entry of a state dict; quantized layers pack their weights in tuples."""
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    if not isinstance(value, Tensor):
        return []
    return [value.int_repr() if value.is_quantized else value.detach()]


def _block_hook(index: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        listener = _listener.get()
        if listener is not None:
            listener.before_block(index, args[0] if args else kwargs["hidden_states"])

    return hook


def _final_hook(module: nn.Module, args: Any, output: Any) -> Any:
    listener = _listener.get()
    if listener is None:
        return output
    if isinstance(output, Tensor):
        return listener.finish(output)
    output.last_hidden_state = listener.finish(output.last_hidden_state)
    return output


def embedding_hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """For families that are cut after embedding."""
    listener = _listener.get()
    return output if listener is None else listener.embedded(output)


adapters_lock = threading.RLock()  # ranks that are threads share one model, and so one adapter
adapters: weakref.WeakKeyDictionary[nn.Module, Adapter] = weakref.WeakKeyDictionary()


def is_language_model(model: Any) -> bool:
    return hasattr(model, "lm_head")


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The arguments that make a decoder's forward fill and use `cache`, a `DynamicCache`.

    transformers calls it `cache` since 5.24, `past_key_values` before.
    """
    taken = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in taken else "past_key_values": cache, "use_cache": True}


def _block_of(module: nn.Module) -> int | None:
    for adapter in list(adapters.values()):
        if module in adapter._index:
            return adapter._index[module]
    return None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls: query [B, H, M, d] in, [B, M, H, d] out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    listener = _listener.get()
    if listener is not None:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        block = _block_of(module)
        assert block is not None, "an attention module that belongs to no adapted model"
        out = listener.attend(block, query, key, value, float(scale))
        if out is not None:
            return out.transpose(1, 2), None
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out, None


def _register_attention() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
