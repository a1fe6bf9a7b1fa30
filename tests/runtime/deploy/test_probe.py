"""Measuring devices that are connected, and their links; `astra plan --peers` on top."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from astra_runtime import Codebook
from astra_runtime.cli import main
from astra_runtime.deploy.probe import Measurement, probe
from astra_runtime.errors import WireError
from astra_runtime.transport import Link, Mesh, local_mesh
from tests.processes import Fork

from ..cli.test_plan import word_tokenizer
from ..models import fitted, tiny
from ..ranks import as_ranks, free_ports


def test_links_and_rates_of_every_rank_are_found() -> None:
    model = tiny("gpt2")
    books = {"dense": Codebook.none(), "codes": fitted("gpt2", model, space="kv", groups=6)}

    def work(mesh: Mesh) -> Measurement | None:
        return probe(mesh, mesh, model, books, 40)

    found, *others = as_ranks(local_mesh(3, link=Link(40.0, 3.0)), work)
    assert others == [None, None]
    assert found.rtt_ms[0] is found.up_mbit[0] is None
    for rank in (1, 2):
        # the link bounds these on one side, as far as a busy machine lets the shortest trip be
        # known: without it they are above 1,000; on the other they may be as slow as they like
        assert found.rtt_ms[rank] >= 6
        assert 0 < found.up_mbit[rank] < 400
        assert 0 < found.down_mbit[rank] < 400
    assert found.link().mbit_per_s == min(found.up_mbit[1:] + found.down_mbit[1:])
    assert found.link().delay_ms == max(found.rtt_ms[1:]) / 2
    for rates in found.rates.values():
        assert len(rates) == 3
        assert all(min(vars(r).values()) >= 0 < max(vars(r).values()) for r in rates)


def test_rates_and_delay_come_from_the_trips(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own: 3 ms each way, 40 Mbit/s there, 20 back."""
    from astra_runtime.deploy import probe as module

    def trip(mesh: Mesh, peer: int, there: int, back: int) -> float:
        each = Link(40.0).seconds(there) if there > 8 else Link(20.0).seconds(back)
        return 0.006 + (each if max(there, back) > 8 else 0.0)

    monkeypatch.setattr(module, "_trip", trip)
    monkeypatch.setattr(module, "_ask", lambda *_: None)
    mesh = local_mesh(1)[0]
    assert module._measure_link(mesh, 1) == pytest.approx((6.0, 40.0, 20.0))


def test_a_probe_that_asks_for_too_much_is_refused() -> None:
    from astra_runtime.deploy.probe import MOST, _answer, _ask

    def work(mesh: Mesh) -> None:
        if mesh.rank:
            _answer(mesh)
        else:
            _ask(mesh, 1, MOST + 1, 8)

    found = as_ranks(local_mesh(2), work, errors_too=True)
    assert isinstance(found[1], WireError)
    assert found[1].field == "probe size"


def test_the_plan_of_connected_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    fitted("llama", model, space="kv", groups=3).save_pretrained(tmp_path / "codes")
    common = ["--model", str(tmp_path / "model"), "--codebook", str(tmp_path / "codes")]
    common += ["--peers", ",".join(free_ports(2))]
    asked = ["worker", "--once", "--rank", "1", *common, "--mbit", "50", "--delay-ms", "4"]
    worker = Fork(lambda: main(asked))
    try:
        assert main(["plan", "--json", "--tokens", "40", *common]) == 0
        worker.end()
    finally:
        worker.kill()
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    # as slow as a busy machine likes
    assert 0 < found["mbit_per_s"] < 500
    assert found["rtt_ms"] >= 4
    assert {row["codes"] for row in found["rows"]} >= {"codes", "dense int8"}
    assert {row["world_size"] for row in found["rows"]} == {2}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--flops", "1e9", "--codebook", "x"], "--flops: expected without --peers"),
        (["--codebook", "x", "y"], "--codebook: expected one with --peers"),
        (["--codebook", "x", "--world-size", "3"], "--world-size: expected at most the 2"),
    ],
)
def test_bad_plans_of_peers(
    asked: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = "127.0.0.1:7000,127.0.0.1:7001"
    assert main(["plan", "--peers", peers, *asked]) != 0
    assert message in capsys.readouterr().err
