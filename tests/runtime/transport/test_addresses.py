"""Addresses as people write them, and names that stand for several."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from astra_runtime import errors
from astra_runtime.transport import check_keys, connect, local_mesh
from astra_runtime.transport.addresses import parse_address, parse_host, unreachable_for_others
from astra_runtime.transport.credentials import KeysError
from astra_runtime.transport.process_group import INTERFACE, _listening_on_loopback
from astra_runtime.transport.rendezvous import store_listener
from astra_runtime.transport.sockets import check_host, listen

from ..ranks import all_to_all, as_ranks, free_ports, key_folder, together


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host:7000", ("host", 7000)),
        (" 10.0.0.1 : 7000 ", ("10.0.0.1", 7000)),
        ("[::1]:7000", ("::1", 7000)),
        ("[fe80::1%eth0]:65535", ("fe80::1%eth0", 65535)),
    ],
)
def test_an_address(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", ":7000", "host", "host:", "host:0", "host:65536", "host:-1", "host:7e3", "host:٣"]
    + ["::1:7000", "[::1]", "[::1:7000", "[]:7000", "a b:7000", "http://a:7000"],
)
def test_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="address: expected"):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        (" 10.0.0.1 ", "10.0.0.1"),
        ("[::1]", "::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("box.local", "box.local"),
        ("10.0.0.1:7000", None),
        ("[::1]:7000", None),
        ("", None),
        ("http://box", None),
        ("a b", None),
        ("a..b", None),
    ],
)
def test_a_host(text: str, host: str | None) -> None:
    if host is not None:
        assert parse_host(text) == host
        return
    with pytest.raises(ValueError, match="host: expected a name or an address, without a port"):
        parse_host(text)
    with pytest.raises(ValueError, match="host: expected a name or an address, without a port"):
        connect(0, 2, ["127.0.0.1:7000", "127.0.0.1:7001"], host=text)


def dual_stack(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """The name `box` stands for these."""
    genuine = socket.getaddrinfo

    def resolve(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
        hosts = addresses if host == "box" else (host,)
        return [answer for name in hosts for answer in genuine(name, port, *rest, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.parametrize("addresses", [("::1", "127.0.0.1"), ("127.0.0.1", "::1")])
@pytest.mark.parametrize("listens", ["box", "127.0.0.1", "::1"])
def test_every_address_of_a_name_is_tried(
    monkeypatch: pytest.MonkeyPatch, addresses: tuple[str, ...], listens: str
) -> None:
    """The listening rank calls itself by one of them, the dialing one by the name; or both do."""
    dual_stack(monkeypatch, *addresses)
    port, other = (address.rpartition(":")[2] for address in free_ports(2))
    own = [f"[{listens}]:{port}" if ":" in listens else f"{listens}:{port}", f"127.0.0.1:{other}"]
    dialed = [f"box:{port}", f"127.0.0.1:{other}"]
    meshes = together(
        [lambda: connect(0, 2, own, connect_timeout=20)]
        + [lambda: connect(1, 2, dialed, connect_timeout=20)]
    )
    as_ranks(meshes, lambda mesh: all_to_all(mesh, 2, 50))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_name_is_listened_at_by_all_its_addresses(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """Each dialer may know the rank by another one."""
    dual_stack(monkeypatch, "::1", "127.0.0.1", "127.0.0.1")
    port, other = (address.rpartition(":")[2] for address in free_ports(2))
    rest = f"127.0.0.1:{other}"
    dialed = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    meshes = together(
        [lambda: connect(0, 2, [f"box:{port}", rest], connect_timeout=20)]
        + [lambda: connect(1, 2, [dialed, rest], connect_timeout=20)]
    )
    together([mesh.close for mesh in meshes])


def test_an_address_of_another_machine() -> None:
    for look in (lambda: listen("192.0.2.1", 7000, 0), lambda: check_host("192.0.2.1", 0)):
        with pytest.raises(errors.ConnectFailed, match="no address of this machine; name one"):
            look()


def test_an_unknown_name() -> None:
    with pytest.raises(errors.ConnectFailed, match="rank 0 cannot resolve 'no-such-host.invalid'"):
        listen("no-such-host.invalid", 7000, 0)


def test_who_listens_on_loopback_and_is_dialed_from_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dual_stack(monkeypatch, "127.0.1.1")
    here, there = ("box", 7000), ("192.0.2.2", 7000)
    words = unreachable_for_others(0, "box", {0: here, 1: there, 2: ("127.0.0.1", 7001), 3: there})
    assert words.startswith(
        "rank 0 listens on loopback only, at 127.0.1.1, which box stands for on this machine: "
        "rank 1, 3 cannot reach it"
    )
    assert unreachable_for_others(1, "box", {0: there, 1: here}) == ""  # nobody dials rank 1
    assert unreachable_for_others(0, "192.0.2.1", {0: there, 1: there}) == ""
    assert unreachable_for_others(0, "box", {0: here, 1: ("127.0.0.1", 7001)}) == ""


def test_loopback_is_said_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Before the model is loaded, and at the deadline again."""
    keys, [own] = key_folder(), free_ports(1)
    peers = [own, "192.0.2.2:7000"]
    check_keys(0, peers, keys)
    assert "rank 0 listens on loopback only" in caplog.text
    with pytest.raises(errors.ConnectFailed, match="did not call; rank 0 listens on loopback only"):
        connect(0, 2, peers, keys=keys, connect_timeout=0.2)
    assert len(caplog.records) == 1


def test_the_address_to_listen_at_may_be_another_than_the_others_dial() -> None:
    """As behind address translation."""
    port, other = (address.rpartition(":")[2] for address in free_ports(2))
    seen = [f"127.0.0.2:{port}", f"127.0.0.1:{other}"]
    own = [f"localhost:{port}", seen[1]]
    meshes = together(
        [lambda: connect(0, 2, own, host="127.0.0.2", connect_timeout=20)]
        + [lambda: connect(1, 2, seen, connect_timeout=20)]
    )
    together([mesh.close for mesh in meshes])
    with pytest.raises(KeysError, match="since 192.0.2.1 is not on loopback"):
        check_keys(0, own, host="192.0.2.1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"peers": "127.0.0.1:7000,127.0.0.1:7001"}, "peers: expected a list of .*, got the text"),
        ({"peers": [7000, 7001]}, "peers: expected texts"),
        ({"rank": 0.0}, "rank: expected an integer, got 0.0"),
        ({"rank": True}, "rank: expected an integer, got True"),
        ({"world_size": "2"}, "world_size: expected an integer, got '2'"),
        ({"timeout": "30"}, "timeout: expected a number of seconds, got '30'"),
        ({"connect_timeout": None}, "connect_timeout: expected a number of seconds, got None"),
        ({"link": "fast"}, "link: expected Link or None"),
        ({"keys": 5}, "keys: expected Keys or str"),
    ],
)
def test_arguments_of_another_type(arguments: dict[str, Any], words: str) -> None:
    usual = {"rank": 0, "world_size": 2, "peers": ["127.0.0.1:7000", "127.0.0.1:7001"]}
    with pytest.raises(TypeError, match=words):
        connect(**usual | arguments)


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        ("http://127.0.0.1:7001", "without a scheme"),
        (".:7001", "expected the name of a host"),
        ("a" * 300 + ":7001", "expected the name of a host"),
        ("a\0b:7001", "expected the name of a host"),
        ("LOCALHOST:7000", "LOCALHOST:7000 for ranks 0 and 1"),
    ],
)
def test_addresses_that_no_rank_can_have(peer: str, words: str) -> None:
    """Before anybody waits: two ranks of one address waited for each other till the deadline."""
    with pytest.raises(ValueError, match=words):
        connect(0, 2, ["localhost:7000", peer])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANK", "one", "RANK: expected an integer, got 'one'"),
        ("MASTER_PORT", "0", "MASTER_PORT: expected rank 0's host and a port"),
        ("MASTER_ADDR", "no-such-host.invalid", "MASTER_ADDR: 'no-such-host.invalid' is not known"),
    ],
)
def test_variables_of_torchrun(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "7000"}
    for variable, usually in (usual | {name: value}).items():
        monkeypatch.setenv(variable, usually)
    with pytest.raises((ValueError, errors.ConnectFailed), match=words):
        connect(connect_timeout=1)


@pytest.mark.parametrize("arguments", [{"world_size": 0}, {"world_size": 2, "timeout": 0}], ids=str)
def test_meshes_of_no_ranks(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        local_mesh(**arguments)


def test_torch_listens_on_loopback_alone_where_all_ranks_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket(fileno=store_listener("127.0.0.1", 0)) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    monkeypatch.delenv(INTERFACE, raising=False)
    with _listening_on_loopback():
        assert os.environ[INTERFACE] == "lo"
    assert INTERFACE not in os.environ
    monkeypatch.setenv(INTERFACE, "eth7")  # asked for by name
    with _listening_on_loopback():
        assert os.environ[INTERFACE] == "eth7"
