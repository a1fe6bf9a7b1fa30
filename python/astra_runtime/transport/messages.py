"""JSON between ranks, for control messages whose size the receiver does not know beforehand."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterable
from typing import Any

from astra_runtime.errors import WireError
from astra_runtime.transport.mesh import Mesh

LEAST_REST = 0.5  # seconds for the rest of a message whose first bytes came at the last moment


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

    timeout: seconds to wait for it, instead of the mesh's; what follows its first bytes has to come
    within those of the mesh as well.
    """
    seconds = mesh.timeout if timeout is None else timeout
    start = time.monotonic()
    first = mesh.receive({peer: 8}, block=blocks[0], plan=0, timeout=seconds)
    size = struct.unpack("<Q", first[peer])[0]
    if size > limit:
        raise WireError(f"{what} size", f"at most {limit}", size, peer)
    left = min(mesh.timeout, max(LEAST_REST, seconds - (time.monotonic() - start)))
    view = mesh.receive({peer: size}, block=blocks[1], plan=0, timeout=left)[peer]
    return json.loads(bytes(view))
