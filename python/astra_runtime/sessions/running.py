"""A call of a session, which is no single forward pass."""

from __future__ import annotations

from ..call import CallState, Endable
from ..transport import Mesh


class Running(Endable):
    """What ranks do for a session until all of them are done, or somebody ends it."""

    def __init__(self, mesh: Mesh, state: CallState) -> None:
        self.mesh, self.state = mesh, state
