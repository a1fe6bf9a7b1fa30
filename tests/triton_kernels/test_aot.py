"""Kernels compile for chips that are not here: no spills, shared memory within bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from astra_kernels._triton.launch import Launch
from tests.triton_kernels import aot


def compiled(*options: str) -> list[dict]:
    """In a process of its own: in this one, kernels are interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "tests.triton_kernels.aot", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [f"sm_{o['capability']} {o['call']}: {o['wrong']}" for o in outcomes if o["wrong"]]
    assert wrong == []
    assert done.returncode == 0, done.stderr
    return outcomes


@pytest.mark.timeout(600)
def test_a_configuration_of_each_kind_compiles_without_spills():
    outcomes = compiled("--few")
    calls = {(o["capability"], o["call"]) for o in outcomes}
    assert 40 <= len(calls) <= 60
    matrix = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    for outcome in outcomes:
        if outcome["kernel"] == "attend" and "128x64" in outcome["tile"]:
            assert outcome["report"]["matrix"] == matrix[outcome["capability"]]
            assert outcome["report"]["copies"] > 0  # the look-up is pipelined


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_configuration_compiles_without_spills():
    compiled()


def test_what_is_wrong_is_said():
    fine = aot.Report(registers=255, stack=0, shared=1000, matrix="", copies=0)
    assert aot.judge(fine, 128, 2000, 1500) == ""
    assert "spilled" in aot.judge(aot.Report(255, 8, 1000, "", 0), 128, 2000, 1500)
    assert aot.judge(aot.Report(255, 8, 1000, "", 0), 256, 2000, 1500) == ""
    assert aot.judge(aot.Report(255, 16, 1000, "", 0), 0, 2000, 1500) == ""
    assert "spilled" in aot.judge(aot.Report(255, 24, 1000, "", 0), 0, 2000, 1500)
    assert "the chip has 900" in aot.judge(fine, 64, 900, None)
    assert "at most 999" in aot.judge(fine, 64, 2000, 999)


def test_arguments_are_specialized_as_the_jit_does():
    class Parameter:
        def __init__(self, name, do_not_specialize=False):
            self.name, self.do_not_specialize = name, do_not_specialize

    class Kernel:
        params = [  # noqa: RUF012
            *(Parameter("rows"), Parameter("one"), Parameter("free", True), Parameter("odd")),
            *(Parameter("nothing"), Parameter("scale"), Parameter("TILE")),
        ]

    launch = Launch(Kernel, (1,), (32, 1, 1, 7, None, 0.5), {"TILE": 16}, 4, 2, {})
    types, constants, aligned = aot.signature(launch)
    assert types == {
        "rows": "i32", "one": "constexpr", "free": "i32", "odd": "i32", "nothing": "constexpr",
        "scale": "fp32", "TILE": "constexpr",
    }  # fmt: skip
    assert constants == {"TILE": 16, "one": 1, "nothing": None}
    assert list(aligned) == [(0,)]
