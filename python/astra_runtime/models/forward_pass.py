"""A forward pass that somebody listens to, in the thread that runs it.

Every pass is checked: each block's hooks and attention have to run exactly once, in order, for the
modules that the listener knows. What does not, a fused attention module or a patched forward, would
leave a rank with its own shard alone; it is an error that names the module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor, nn

from ..errors import ModelChanged
from .patches import PatchRows


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


class Listened(Protocol):
    """The modules of a model that a pass has to run: what `Pass` knows of `Hooks`."""

    blocks: list[nn.Module]
    attentions: list[nn.Module]
    index: dict[nn.Module, int]  # of the attentions


class Pass:
    """A listener, and how far the forward pass that it hears of has come.

    `block` is the one whose input was heard of last, −1 between passes; `attended` whether its
    attention was. `passes` counts forward passes that were heard of from end to end.
    """

    def __init__(self, hooks: Listened, listener: Listener, rows: PatchRows | None) -> None:
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


_current: ContextVar[Pass | None] = ContextVar("astra_pass", default=None)


def current_pass() -> Pass | None:
    """What this thread runs for a listener; None: nobody listens."""
    return _current.get()


@contextlib.contextmanager
def listening_as(running: Pass | None) -> Iterator[None]:
    token = _current.set(running)
    try:
        yield
    finally:
        _current.reset(token)


def without_listener() -> contextlib.AbstractContextManager[None]:
    """In here nobody listens: a host's function may run the model in the middle of a pass."""
    return listening_as(None)


def is_running() -> bool:
    return _current.get() is not None


def has_listener(module: nn.Module) -> bool:
    """Whether the pass that runs listens to this attention module."""
    running = _current.get()
    return running is not None and module in running.hooks.index
