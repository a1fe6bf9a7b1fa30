"""What the parts of an engine, its calls and its sessions, know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from .call import Call, Sizes
from .codes.base import Codec
from .codes.codebook import Codebook
from .costs import Paces
from .models import Adapter, Watch
from .plan import Plan
from .transport import Mesh


class EngineParts(ABC):
    """An engine, as far as its calls and sessions know it; `Engine` explains each."""

    model: nn.Module
    adapter: Adapter
    codebook: Codebook
    codec: Codec
    mesh: Mesh
    shard_weights: tuple[float, ...] | None
    halo: int | None
    paces: Paces
    deadline_ms: float | None
    on_missing: str
    seconds: float
    degraded: bool
    missing: dict[int, list[int]]
    bits_per_token_block: float
    bits_per_receiver: float

    _plan: Callable[..., Plan]  # `engine_plan` of this engine, remembered by shape
    _sizes: Callable[[int, Plan, int], Sizes]  # (rank, plan, batch), remembered as well
    _watch: Watch  # sees what has changed in the model
    _verified: bool  # blocks were seen to compute what other ranks compute from their codes

    @property
    @abstractmethod
    def rank(self) -> int:
        """This rank's number."""

    @abstractmethod
    def plan(self, tokens: int, padding: int = 0) -> Plan:
        """The cut of an input."""

    @abstractmethod
    def calling(self) -> AbstractContextManager[None]:
        """A turn of this thread to use model and mesh."""

    @abstractmethod
    def _check_model(self) -> None:
        """Refuses, with a ValueError, to compute with a model as it is now: in training, say."""

    @abstractmethod
    def _check_unchanged(self) -> None:
        """Raises ModelChanged unless the model is the one that the engine was made with."""

    @abstractmethod
    def _turn(self) -> AbstractContextManager[None]:
        """Keeps calls of other threads out."""

    @abstractmethod
    def _ending_together(
        self, call: Any, request: int | None, within_ms: float | None
    ) -> AbstractContextManager[None]:
        """One call of the mesh, which ends on all ranks alike."""

    @abstractmethod
    def _report(self, call: Call) -> None:
        """Leaves what is known of a prefill in the engine's attributes."""
