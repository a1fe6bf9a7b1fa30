"""How a model is listened to: its attention, its blocks' inputs, its final hidden states.

A model is left as it is. For the time of a call, and no longer, its attention modules are handed a
configuration that names ASTRA's attention function, and its blocks carry hooks; both call the
`Listener` of the thread that runs the call. Between calls nothing of ASTRA is in the model: it may
be copied, pickled, saved and run, and nothing is shared through a configuration object. A model's
own forward pass in another thread meanwhile goes to the attention that the model was made with.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .attention import AttentionConfig, astra_attention, register_attention
from .during_calls import CallForward
from .few_rows import few_rows_forwards
from .forward_pass import Listener, Pass, current_pass, has_listener, is_running, listening_as
from .fused import fused_forwards
from .own_hooks import Watched, unwatched
from .packed import PackedForward, bytes_of, can_pack, packable
from .patches import PatchRows

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
        running = current_pass()
        if running is None or running.hooks is not self.hooks:
            return None
        return self.function(running, *given)

    def __deepcopy__(self, memo: Any) -> _Clean:
        return _Clean()

    def __reduce__(self) -> Any:
        return _Clean, ()


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
        running = Pass(self, listener, rows)
        with self.installed(), listening_as(running):
            yield
        running.check_whole()

    def fuse(self, base: nn.Module) -> None:
        """Has small steps of `base` computed in one pass from now on, during calls, and products of
        few rows with weights as they are stored; see `fused` and `few_rows`."""
        _, *inside = base.modules()
        self._fused = fused_forwards(inside, astra_attention, is_running, has_listener)
        self._fused += few_rows_forwards(self.blocks)

    @contextlib.contextmanager
    def unfused(self) -> Iterator[None]:
        """Has passes that begin in here be the model's own, whatever engines had it fuse before:
        what comes of them is the same to the bit, whether there were any or not."""
        with _lock:
            fused, self._fused = self._fused, []
        try:
            yield
        finally:
            with _lock:
                self._fused = fused or self._fused

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
            module.__dict__["config"] = AttentionConfig(config)

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
    def hook(running: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.before_block(index, args[0] if args else kwargs["hidden_states"])

    return hook


def _finish(running: Pass, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return running.finish(output)
    if isinstance(output, tuple):  # a configuration that says return_dict=False
        return (running.finish(output[0]), *output[1:])
    output.last_hidden_state = running.finish(output.last_hidden_state)
    return output


def _embedded(running: Pass, args: Any, output: Tensor) -> Tensor:
    return running.listener.embedded(output)


def _crop(running: Pass, args: tuple[Tensor]) -> tuple[Tensor] | None:
    return None if running.rows is None else (running.rows.crop(args[0]),)


def _fill(running: Pass, args: Any, output: Tensor) -> Tensor | None:
    return None if running.rows is None else running.rows.fill(output)
