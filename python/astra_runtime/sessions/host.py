"""The part of an engine that makes sessions."""

from __future__ import annotations

import os
import zlib

import torch

from ..codes.packed import PackedCodes
from ..codes.store import CodeStore
from ..engine_parts import EngineParts
from ..files import check_path, read_whole
from ..inputs import check_integer, check_kind
from .cache import KeyValues
from .decoder import Decoder
from .files import broadcast, refused, restored
from .session import Session, one_call
from .sharing import share
from .state import SessionState

_TAG = zlib.crc32(b"load a session")


class SessionHost(EngineParts):
    """Sessions of an engine; a class of its own, as the engine does without them."""

    def session(self) -> Session:
        """A new, empty session; collective. See `Session`.

        Raises:
            ValueError: a model without a language-model head, a codec that keeps no sessions, an
                engine that may leave ranks out.
        """
        self._check_sessions()
        with self._turn():
            return Session(self, self._new_state())

    def _check_sessions(self) -> None:
        codec = self.codebook.codec
        if not self.adapter.generates:
            raise ValueError("session: expected a decoder with a language-model head")
        if not codec.keeps_sessions:
            raise ValueError(
                f"session: expected a codebook of space none, kv or transform, got {codec.key!r}, "
                "whose codes cannot be made from keys and values"
            )
        if self.on_missing != "raise":
            raise ValueError(
                "session: expected on_missing='raise', as a session with holes is not used again, "
                f"got {self.on_missing!r}"
            )

    def load_session(self, path: str | os.PathLike[str]) -> Session:
        """A session that `Session.save` has written, with any number of ranks; collective.

        Rank 0 reads the file, the others get it from there.

        Raises:
            SessionRefused: on every rank, a ValueError: a file that cannot be read, is damaged, or
                is of another model or codebook. The mesh goes on.
        """
        check_path("path", path)
        self._check_sessions()
        with one_call(self, None, None):
            state = self._new_state()
            data = None if self.rank == 0 else broadcast(self, None, 0, _TAG)
            try:
                data = read_whole(path) if data is None else data
                restored(self, state, data)
            except (OSError, ValueError) as error:
                raise refused(self, path, error) from error
            if self.rank == 0:
                broadcast(self, data, 0, _TAG)
        return Session(self, state)

    def share_session(self, session: Session | None, source: int) -> Session:
        """Gives a session back to ranks that have lost it; collective.

        After `rejoin`, a rank that is another process now has no sessions. It passes None, the
        others the session that they have, and all go on with what is returned. The returned rank
        knows the tokens by their codes, and the last ones as `source` has them. Tokens whose codes
        some rank had not received are cut off: `len` says what is left.

        Args:
            session: this rank's; None: it has none.
            source: a rank that has the session.

        Raises:
            SessionRefused: ranks have different sessions, or `source` has none.
        """
        self._check_sessions()
        check_kind("session", session, Session)
        source = check_integer("source", source, 0, self.mesh.world_size - 1)
        with one_call(self, None, None):
            state = None if session is None else session._state.fork()
            state = share(self, state, self._new_state(), source, _TAG)
        return Session(self, state)

    def _new_state(self) -> SessionState:
        world_size = self.mesh.world_size
        return SessionState(
            KeyValues(len(self.adapter.blocks)),
            self._new_store(),
            world_size,
            self.codebook.prefix,
            world_size - 1,
            torch.zeros(1, 0, dtype=torch.int64, device=self.adapter.device),
        )

    def _new_store(self) -> list[CodeStore] | None:
        codec = self.codec
        if not isinstance(codec, PackedCodes):
            return None
        return [CodeStore(len(table), codec.bits, codec.codewords) for table in codec.tables]

    def decoder(self) -> Decoder:
        """Continues sessions on this rank alone, without the mesh; see `Decoder`."""
        return Decoder(self)
