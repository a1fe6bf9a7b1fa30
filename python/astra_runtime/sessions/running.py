"""What sessions use of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ..call import Call, Endable
from ..codes.base import Codec
from ..codes.codebook import Codebook
from ..costs import Paces
from ..models import Adapter
from ..plan import Plan
from ..transport import Mesh


class EngineParts(ABC):
    """An engine, as far as its sessions know it; `Engine` explains each."""

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

    @property
    @abstractmethod
    def rank(self) -> int:
        """This rank's number."""

    @abstractmethod
    def plan(self, tokens: int, padding: int = 0) -> Plan:
        """The cut of an input."""

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


class Running(Endable):
    """One call of a mesh that is no single forward pass."""

    def __init__(self, mesh: Mesh, state: Any) -> None:
        self.mesh, self.state = mesh, state
