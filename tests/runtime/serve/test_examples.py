"""The programs of examples/ that serve."""

from __future__ import annotations

import io
import sys
import threading
from typing import Any

import pytest
import torch

from astra_runtime import Engine
from astra_runtime.evaluate import run_ranks
from tests.examples import load

from ..models import tiny
from ..ranks import free_ports
from .service import GREEDY, Numbers, alone


class Words(Numbers):
    """Texts are token ids."""

    def __call__(self, text: str) -> Any:
        return type("Encoding", (), {"input_ids": [int(word) for word in text.split()]})


def test_a_service_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example, model, peers = load("service"), tiny("llama"), free_ports(2)
    monkeypatch.setattr(example, "Sampling", lambda seed: GREEDY)
    monkeypatch.setattr(sys, "stdin", io.StringIO("5 6 7\n8 9\n"))
    other = threading.Thread(
        target=example.serve, args=(model, Words(), None, 1, peers), daemon=True
    )
    other.start()
    example.serve(model, Words(), None, 0, peers)
    other.join(60)
    assert not other.is_alive()
    lines = capsys.readouterr().out.splitlines()
    for line, ids in zip(lines, ([5, 6, 7], [8, 9]), strict=True):
        assert [int(word) for word in line.split()] == alone(model, ids, 32)


def test_a_camera_loop() -> None:
    """A frame whose deadline cannot be met is given up on both ranks, not the loop."""
    example = load("camera")
    model = tiny("vit", num_labels=4)
    settings = {"rate": 1000.0, "deadline_ms": 60_000.0}
    for seen in run_ranks(2, lambda mesh: example.run(model, mesh, frames=4, **settings)):
        assert [one.frame for one in seen] == [0, 1, 2, 3]
        for one in seen:
            with torch.no_grad():
                logits = model(pixel_values=_frame(one.frame)).logits[0]
            assert (one.label, one.degraded) == (int(logits.argmax()), False)


def test_a_frame_without_time_is_given_up_on_every_rank() -> None:
    example, model = load("camera"), tiny("vit", num_labels=4)

    def rank(mesh: Any) -> Any:
        with Engine(model, None, mesh) as engine:
            late = example.watch(engine, 2, 1000.0, 1e-3, 0.0)
            return late, example.watch(engine, 1, 1000.0, 60_000.0, 0.0)

    for late, seen in run_ranks(2, rank):
        assert [one.label for one in late] == [None, None]
        assert seen[0].label is not None


def _frame(number: int) -> Any:
    return torch.randn((1, 1, 20, 20), generator=torch.Generator().manual_seed(number))
