"""Joining a mesh over datagrams, and peers, links and firewalls with which that does not work."""

from __future__ import annotations

from typing import Any

import pytest

from astra_runtime import errors
from astra_runtime.transport import Mesh, datagram, local_mesh
from astra_runtime.transport.certificates import can_make_keys
from astra_runtime.transport.datagram import DatagramMesh, connect_datagrams

from ..ranks import free_ports, key_folder, together
from .datagrams import (
    LONG,
    content,
    told,
)


def test_a_way_that_datagrams_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datagram._Peer, "transmit", lambda self, pieces: None)
    meshes = local_mesh(2)

    def join(mesh: Mesh) -> None:
        with pytest.raises(errors.ConnectFailed, match="firewall") as caught:
            connect_datagrams(mesh, connect_timeout=0.2)
        assert caught.value.missing == (1 - mesh.rank,)

    together([lambda mesh=mesh: join(mesh) for mesh in meshes])
    together([mesh.close for mesh in meshes])


@pytest.mark.skipif(not can_make_keys(), reason="no cryptography")
def test_connect_and_connect_again() -> None:
    from astra_runtime.transport import connect

    peers, keys = free_ports(2), key_folder()

    def join(rank: int) -> Mesh:
        return connect(rank, 2, peers, backend="datagram", keys=keys, timeout=LONG)

    meshes = together([lambda rank=rank: join(rank) for rank in range(2)])
    assert all(mesh.encrypted and mesh.lossy and mesh.partial for mesh in meshes)
    assert all(found == {1 - rank: content(1 - rank, 0, 5000)} for rank, found in exchange(meshes))
    again = together([lambda mesh=mesh: mesh.reconnect() for mesh in meshes])
    assert all(found == {1 - rank: content(1 - rank, 0, 5000)} for rank, found in exchange(again))
    together([mesh.close for mesh in again])


def exchange(meshes: list[DatagramMesh]) -> Any:
    return enumerate(together([lambda mesh=mesh: told(mesh, 0, 5000) for mesh in meshes]))


def test_an_emulated_link_is_refused() -> None:
    from astra_runtime.transport import Link, connect

    with pytest.raises(ValueError, match="datagram"):
        connect(0, 1, backend="datagram", link=Link(10, 1))


def test_a_peer_that_sends_no_datagrams() -> None:
    meshes = local_mesh(2)

    def other() -> None:
        with pytest.raises(errors.AstraError, match="datagrams|block"), meshes[1]:
            meshes[1].agree({"model": "the same"})

    def ours() -> None:
        with pytest.raises(errors.HandshakeRefused, match="rank 1 sends no datagrams"), meshes[0]:
            connect_datagrams(meshes[0])

    together([ours, other])


@pytest.mark.parametrize("datagrams", [0, 1])
def test_a_transport_that_differs_is_named_on_both_sides(datagrams: int) -> None:
    """Whoever sees it first: the other one gets the same words."""
    meshes = local_mesh(2, timeout=LONG)

    def join(mesh: Mesh) -> None:
        with mesh:
            if mesh.rank == datagrams:
                connect_datagrams(mesh)  # type: ignore[arg-type]
            else:
                mesh.agree({"model": "a"})

    for error in together([lambda mesh=mesh: join(mesh) for mesh in meshes], errors_too=True):
        assert isinstance(error, errors.HandshakeRefused)
        assert f"rank {1 - datagrams}" in str(error)
        assert f"rank {datagrams}" in str(error)
        assert "--transport" in str(error)


@pytest.mark.parametrize("end", ["silent", "finished"])
def test_a_rank_that_is_content_with_tcp(end: str) -> None:
    """It has connected, and no more is to come of it."""
    sending, other = local_mesh(2, timeout=0.1)
    if end == "finished":
        other.close()
    words = "within 0.1 s" if end == "silent" else "before it finished and said BYE"
    with pytest.raises(errors.HandshakeRefused) as refused:
        connect_datagrams(sending, connect_timeout=0.1)  # type: ignore[arg-type]
    assert f"rank 1 sends no datagrams {words}, rank 0 does: " in str(refused.value)
    assert "same transport on all ranks (backend of connect, --transport)" in str(refused.value)
    if end == "silent":
        words = "rank 0 sends datagrams, rank 1 does not"
        with pytest.raises(errors.HandshakeRefused, match=words):
            other.agree({"model": "a"})
        other.close()
