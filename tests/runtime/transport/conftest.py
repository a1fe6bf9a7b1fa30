"""Meshes over datagrams, which several files of tests use."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from astra_runtime.transport.certificates import can_make_keys
from astra_runtime.transport.datagram import DatagramMesh

from ..ranks import together
from .datagrams import (
    LONG,
    datagram_mesh,
    tls_datagram_mesh,
)


@pytest.fixture(params=["plain", "tls"])
def make_datagrams(request: pytest.FixtureRequest) -> Callable[..., list[DatagramMesh]]:
    if request.param == "tls" and not can_make_keys():
        pytest.skip("no cryptography")
    return {"plain": datagram_mesh, "tls": tls_datagram_mesh}[request.param]


@pytest.fixture
def datagram_pair() -> Iterator[list[DatagramMesh]]:
    meshes = datagram_mesh(2, timeout=LONG)
    yield meshes
    together([mesh.close for mesh in meshes])
