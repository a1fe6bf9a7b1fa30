"""JSON between ranks, for control messages whose size the receiver does not know beforehand."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from typing import Any

from astra_runtime.errors import WireError
from astra_runtime.transport.mesh import Mesh


def send_json(mesh: Mesh, value: Any, *, blocks: tuple[int, int], to: Iterable[int]) -> None:
    """Sends its size in the first of two control messages, and its JSON in the second."""
    data, receivers = json.dumps(value).encode(), tuple(to)
    mesh.send(struct.pack("<Q", len(data)), block=blocks[0], plan=0, to=receivers)
    mesh.send(data, block=blocks[1], plan=0, to=receivers)


def receive_json(
    mesh: Mesh,
    peer: int,
    *,
    blocks: tuple[int, int],
    limit: int,
    what: str,
    timeout: float | None = None,
) -> Any:
    """What `peer` sent so; more than `limit` bytes of `what` are a WireError.

    timeout: seconds until its first bytes, instead of the mesh's.
    """
    first = mesh.receive({peer: 8}, block=blocks[0], plan=0, timeout=timeout)
    size = struct.unpack("<Q", first[peer])[0]
    if size > limit:
        raise WireError(f"{what} size", f"at most {limit}", size, peer)
    return json.loads(bytes(mesh.receive({peer: size}, block=blocks[1], plan=0)[peer]))
