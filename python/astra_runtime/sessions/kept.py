"""Sessions that are kept for prompts to come, found by their longest common prefix."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor

from ..inputs import check_integer
from .session import Session


class KeptSessions:
    """The sessions used last, within a budget of bytes.

    Collective like sessions themselves: ranks that make the same calls keep and find the same, as
    nothing here depends on a rank. Forks share memory, so the bytes counted are an upper bound.

    Args:
        max_bytes: of all sessions kept, counted by `Session.nbytes`, on each rank.

    Example:
        kept = KeptSessions(1 << 30)
        session = kept.find(prompt_ids) or engine.session()
        session.append(prompt_ids[:, len(session) :])
        answer = session.generate()
        kept.keep(session)
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = check_integer("max_bytes", max_bytes, 0)
        self._sessions: OrderedDict[int, Session] = OrderedDict()  # by id, used last at the end

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def nbytes(self) -> int:
        return sum(session.nbytes for session in self._sessions.values())

    def keep(self, session: Session) -> None:
        """Keeps a fork of a session, as the one used last.

        One that it continues is dropped, and so are those used least recently, beyond the budget.
        """
        if not isinstance(session, Session):
            raise TypeError(f"session: expected a session, got {type(session).__name__}")
        ids = session.ids
        for key, other in list(self._sessions.items()):
            if common_prefix(other.ids, ids) == len(other):
                del self._sessions[key]
        fork = session.fork()
        self._sessions[id(fork)] = fork
        while self._sessions and self.nbytes > self.max_bytes:
            self._sessions.popitem(last=False)

    def find(self, ids: Tensor, least: int = 1) -> Session | None:
        """A fork of the session that begins as `ids` [1, T] for longest, cut to what is common.

        At least the last token of `ids` is left to be appended. None: no session has `least` tokens
        in common with them.
        """
        _check_ids(ids)
        most, best = max(0, ids.shape[1] - 1), None
        found = max(1, check_integer("least", least, 0)) - 1
        for key, session in self._sessions.items():
            common = min(common_prefix(session.ids, ids), most)
            if common > found:
                best, found = key, common
        if best is None:
            return None
        self._sessions.move_to_end(best)
        fork = self._sessions[best].fork()
        fork.truncate(found)
        return fork

    def clear(self) -> None:
        self._sessions.clear()


def _check_ids(ids: Any) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids: expected a tensor, got {type(ids).__name__}")
    if ids.dim() != 2 or len(ids) != 1:
        raise ValueError(f"ids: expected shape [1, T], got {list(ids.shape)}")


def common_prefix(first: Tensor, second: Tensor) -> int:
    """How many tokens two sequences [1, T] have in common at their beginning."""
    length = min(first.shape[1], second.shape[1])
    differing = (first[0, :length] != second[0, :length].to(first.device)).nonzero().flatten()
    return int(differing[0]) if len(differing) else length
