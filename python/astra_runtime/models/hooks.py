"""How a model is listened to: its attention, its blocks' inputs, its final hidden states.

A model is left as it is. For the time of a call, and no longer, its attention modules are handed a
configuration that names ASTRA's attention function, and its blocks carry hooks; both call the
`Listener` of the thread that runs the call. Between calls nothing of ASTRA is in the model: it may
be copied, pickled, saved and run, and nothing is shared through a configuration object. A model's
own forward pass in another thread meanwhile goes to the attention that the model was made with.

Every pass is checked: each block's hooks and attention have to run exactly once, in order, for the
modules that the listener knows. What does not, a fused attention module or a patched forward, would
leave a rank with its own shard alone; it is an error that names the module.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn

from ..errors import ModelChanged
from .during_calls import CallForward
from .few_rows import few_rows_forwards
from .fused import fused_forwards
from .own_hooks import Watched, unwatched
from .packed import PackedForward, bytes_of, can_pack, packable
from .patches import PatchRows

ATTENTION = "astra"  # the name under which the attention is known to transformers
# Attention functions that compute softmax(q·kᵀ/√d + mask)·v and nothing else.
PLAIN = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# What a model may hand to its attention that plain attention does not know.
_OTHER_ATTENTION = ("softcap", "s_aux", "position_bias")


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


class _Pass:
    """A listener, and how far the forward pass that it hears of has come.

    `block` is the one whose input was heard of last, −1 between passes; `attended` whether its
    attention was. `passes` counts forward passes that were heard of from end to end.
    """

    def __init__(self, hooks: Hooks, listener: Listener, rows: PatchRows | None) -> None:
        self.hooks, self.listener, self.rows = hooks, listener, rows
        self.block, self.attended, self.passes = -1, True, 0

    def before_block(self, block: int, hidden: Tensor) -> None:
        if not self.attended:
            raise self._silent(self.block)
        if block != self.block + 1:
            raise ModelChanged(f"block {block} ran where block {self.block + 1} was to run")
        self.block, self.attended = block, False
        self.listener.before_block(block, hidden)

    def attend(
        self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor | None:
        if block != self.block or self.attended:
            raise ModelChanged(
                f"attention of block {block} ran "
                + ("twice" if block == self.block else f"while block {self.block} was running")
            )
        self.attended = True
        return self.listener.attend(block, query, key, value, scale)

    def finish(self, hidden: Tensor) -> Tensor:
        if not self.attended:
            raise self._silent(self.block)
        if self.block + 1 != len(self.hooks.blocks):
            whole = len(self.hooks.blocks)
            raise ModelChanged(
                f"{self.block + 1} of the model's {whole} blocks ran before the head"
            )
        self.block, self.passes = -1, self.passes + 1
        return self.listener.finish(hidden)

    def check_whole(self) -> None:
        if not self.attended:
            raise self._silent(self.block)
        if not self.passes or self.block >= 0:
            raise ModelChanged(
                f"the model's forward pass ended after {self.block + 1} of its "
                f"{len(self.hooks.blocks)} blocks: its modules were replaced"
            )

    def _silent(self, block: int) -> ModelChanged:
        module = self.hooks.attentions[block]
        return ModelChanged(
            f"the attention of block {block} ({type(module).__module__}.{type(module).__name__}) "
            "did not ask transformers' AttentionInterface for its attention, so it saw nothing of "
            "the other ranks; put the model's own attention module back"
        )


_current: ContextVar[_Pass | None] = ContextVar("astra_pass", default=None)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Nobody listens in here, of what a host's function does in the middle of a pass."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


_lock = threading.RLock()  # ranks that are threads share one model


class _Clean:
    """What is left of a hook in a copy of a model, made during a call: it does nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Hook:
    """A forward hook that calls `function(pass, …)` during a pass of the model that it is in."""

    def __init__(self, hooks: Hooks, function: Callable[..., Any]) -> None:
        self.hooks, self.function = hooks, function

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        running = _current.get()
        if running is None or running.hooks is not self.hooks:
            return None
        return self.function(running, *given)

    def __deepcopy__(self, memo: Any) -> _Clean:
        return _Clean()

    def __reduce__(self) -> Any:
        return _Clean, ()


class _AttentionConfig:
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


_patched: dict[nn.Module, tuple[Any, int]] = {}  # by attention module: configuration, how often
_watched: dict[nn.Module, int] = {}  # how often each module's own hooks are watched


class Hooks:
    """The hooks of one model; present while somebody is `installed`, or listens.

    Args:
        blocks, attentions: the Transformer blocks and their attention modules, in order.
        final: gives the module whose output is, or holds as last_hidden_state, what the head reads
            (it may be the model itself, which nothing here keeps alive).
        embedding: the module whose output is cut, for families that are cut after embedding.
        patch_product: gives the module that makes patches of pixels, where it may be given some.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        attentions: Sequence[nn.Module],
        final: Callable[[], nn.Module],
        embedding: nn.Module | None,
        patch_product: Callable[[], nn.Module | None],
    ) -> None:
        self.blocks, self.attentions = list(blocks), list(attentions)
        self.final, self.embedding, self.patch_product = final, embedding, patch_product
        self.index = {module: i for i, module in enumerate(self.attentions)}
        self._handles: list[Any] = []
        self._users = 0
        self._packed: list[PackedForward] = []
        self._packers = 0
        self._fused: list[CallForward] = []
        self._placed: list[CallForward] = []  # those of them that are in modules, during a call
        self._watching: list[nn.Module] = []
        self._watched_tops: list[Callable[[], nn.Module | None]] = []
        self._watched: list[nn.Module] = []  # those of them that have hooks, during a call
        self._changing: dict[int, Any] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Keeps the hooks in the model, for several passes in a row."""
        with _lock:
            self._users += 1
            if self._users == 1:
                self._install()
        try:
            yield
        finally:
            with _lock:
                self._users -= 1
                if not self._users:
                    self._remove()

    @contextlib.contextmanager
    def listening(self, listener: Listener, rows: PatchRows | None = None) -> Iterator[None]:
        """Lets `listener` hear of this model's forward passes in this thread.

        Args:
            rows: of a picture, those that it needs; None: all.

        Raises:
            ModelChanged: a pass in which a block's attention or hooks did not run exactly once.
        """
        running = _Pass(self, listener, rows)
        with self.installed():
            token = _current.set(running)
            try:
                yield
            finally:
                _current.reset(token)
        running.check_whole()

    def fuse(self, base: nn.Module) -> None:
        """Has small steps of `base` computed in one pass from now on, during calls, and products of
        few rows with weights as they are stored; see `fused` and `few_rows`."""
        _, *inside = base.modules()
        self._fused = fused_forwards(inside, _attention, _is_running, _is_heard)
        self._fused += few_rows_forwards(self.blocks)

    def watch(self, model: nn.Module, base: nn.Module) -> None:
        """Notes from now on, during calls, which hooks on `model` and in `base` change anything."""
        _, *self._watching = base.modules()
        tops = dict.fromkeys((model, base))
        self._watched_tops = [weakref.ref(top) for top in tops]  # nothing here keeps the model

    def changing(self, modules: Iterable[nn.Module]) -> list[Any]:
        """The hooks that have changed something, of those that are in `modules` now."""
        found: list[Any] = []
        if not self._changing:
            return found
        for module in modules:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for hook in list(hooks.values()) if hooks else ():
                    own = unwatched(hook)
                    if self._changing.get(id(own)) is own:
                        found.append(own)
        return found

    def pack(self) -> None:
        """Keeps copies of the blocks' weights for calls, see `packed`.

        Each of several users makes them anew, as weights may have been written to since the one
        before did; the last one that calls `unpack` ends them.

        Raises:
            ValueError: they cannot be made.
        """
        layers = packable(self.blocks) if can_pack() else []
        if not layers:
            raise ValueError(
                "pack_weights: expected layers of fp32 on a CPU with MKL, got none; leave it out"
            )
        with _lock:
            self._read_own()
            self._packed = []  # first, so that there are never two copies
            self._packed = [PackedForward(layer) for layer in layers]
            self._packers += 1
            if self._users:
                self._read_packed()

    def unpack(self) -> None:
        """Undoes one `pack`."""
        with _lock:
            self._packers -= 1
            if not self._packers:
                self._read_own()
                self._packed = []

    @property
    def packed_bytes(self) -> int:
        """Of the copies in memory."""
        return bytes_of(forward.layer for forward in self._packed)

    def _read_packed(self) -> None:
        """Copies come before whatever else a layer may have in place of its forward."""
        for forward in self._placed:
            forward.take()
        for forward in (*self._packed, *self._placed):
            forward.put()

    def _read_own(self) -> None:
        for packed in self._packed:
            packed.take()
        for forward in self._placed:
            forward.put()

    def _watch_hooks(self) -> None:
        tops = [top for kept in self._watched_tops if (top := kept()) is not None]
        modules = [*tops, *self._watching]
        with_hooks = [m for m in modules if m._forward_hooks or m._forward_pre_hooks]
        for module in with_hooks:
            _watched[module] = _watched.get(module, 0) + 1
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in hooks.items():
                    if not isinstance(hook, Watched | _Hook):
                        hooks[key] = Watched(hook, self._changing)
        self._watched = with_hooks

    def _leave_hooks(self) -> None:
        for module in self._watched:
            _watched[module] -= 1
            if _watched[module]:
                continue
            del _watched[module]
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in hooks.items():
                    hooks[key] = unwatched(hook)
        self._watched = []

    def _install(self) -> None:
        register_attention()
        self._watch_hooks()
        self._placed = list(self._fused)
        self._read_packed()
        for index, block in enumerate(self.blocks):
            hook = _Hook(self, _before_block(index))
            self._handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        self._handles.append(self.final().register_forward_hook(_Hook(self, _finish)))
        product = self.patch_product()
        if product is not None:
            self._handles.append(product.register_forward_pre_hook(_Hook(self, _crop)))
            self._handles.append(product.register_forward_hook(_Hook(self, _fill)))
        if self.embedding is not None:
            self._handles.append(self.embedding.register_forward_hook(_Hook(self, _embedded)))
        for module in self.attentions:
            config, users = _patched.get(module, (module.__dict__.get("config"), 0))
            _patched[module] = config, users + 1
            module.__dict__["config"] = _AttentionConfig(config)

    def _remove(self) -> None:
        for forward in self._placed:
            forward.take()
        self._placed = []
        self._read_own()
        self._leave_hooks()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self.attentions:
            config, users = _patched.pop(module)
            if users > 1:
                _patched[module] = config, users - 1
            else:
                module.__dict__["config"] = config


def _before_block(index: int) -> Callable[..., None]:
    def hook(running: _Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.before_block(index, args[0] if args else kwargs["hidden_states"])

    return hook


def _finish(running: _Pass, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return running.finish(output)
    if isinstance(output, tuple):  # a configuration that says return_dict=False
        return (running.finish(output[0]), *output[1:])
    output.last_hidden_state = running.finish(output.last_hidden_state)
    return output


def _embedded(running: _Pass, args: Any, output: Tensor) -> Tensor:
    return running.listener.embedded(output)


def _crop(running: _Pass, args: tuple[Tensor]) -> tuple[Tensor] | None:
    return None if running.rows is None else (running.rows.crop(args[0]),)


def _fill(running: _Pass, args: Any, output: Tensor) -> Tensor | None:
    return None if running.rows is None else running.rows.fill(output)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """The function that transformers calls: query [B, H, M, d] in, [B, M, H, d] out."""
    running = _current.get()
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


def _is_running() -> bool:
    return _current.get() is not None


def _is_heard(module: nn.Module) -> bool:
    running = _current.get()
    return running is not None and module in running.hooks.index


def own_attention(module: nn.Module) -> Callable[..., Any]:
    """The attention function that `module` was made with."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = module.config
    if isinstance(config, _AttentionConfig):
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
        if isinstance(config, _AttentionConfig):
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
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
