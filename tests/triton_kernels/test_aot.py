"""Kernels compile for chips that are not here: no spills, shared memory within bounds."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations, product

import pytest
import torch
import triton

from astra_kernels._triton.launch import Launch, launch
from tests.triton_kernels import aot, aot_calls, aot_launches, sass, static


def in_a_process(module: str, *options: str) -> subprocess.CompletedProcess[str]:
    """In this one, kernels are interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", f"tests.triton_kernels.{module}", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def compiled(*options: str) -> list[dict]:
    done = in_a_process("aot", "--json", *options)
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [f"sm_{o['capability']} {o['call']}: {o['wrong']}" for o in outcomes if o["wrong"]]
    assert wrong == []
    assert done.returncode == 0, done.stderr
    return outcomes


@pytest.mark.timeout(600)
def test_decisive_kernels_are_as_quick_as_the_table_says():
    """No spills, shared memory within bounds, rows read by 16 bytes, loops as long as they were."""
    table = {version for version, _, _ in static.read()}
    assert table >= {"3.6.0", "3.9.0"}  # of the GPUs that we know, and ours
    if triton.__version__ not in table:
        pytest.skip(f"the table has no rows of Triton {triton.__version__}")
    done = in_a_process("static")
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 100])
def test_a_configuration_of_each_kind_compiles_elsewhere(capability):
    """The decisive ones are compiled for sm_90 above; `make test-aot` compiles more of each."""
    outcomes = compiled("--few", "--capability", str(capability), "--processes", "1")
    matrix = {80: "mma.sync", 100: "tcgen05.mma"}
    assert len({o["call"] for o in outcomes}) == len(aot_calls.few())
    for outcome in outcomes:
        if outcome["kernel"] == "attend" and "128x64" in outcome["tile"]:
            assert outcome["report"]["matrix"] == matrix[capability]
            assert outcome["report"]["copies"] > 0  # the look-up is pipelined


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_configurations_compile_without_spills():
    compiled()


LISTING = """
.text.attend:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
.L_x_2:
        /*0018*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR8][R2.64], P1 ;
        /*0020*/                   LDG.E.U16 R5, desc[UR8][R2.64] ;
        /*0030*/                   LDG.E R5, desc[UR8][R2.64] ;
        /*0040*/              @!P3 LDGSTS.E [R4], desc[UR8][R2.64] ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/              @!P5 BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
"""


def test_loops_are_read_from_a_listing():
    (loop,) = sass.loops_of(LISTING)
    assert loop.instructions == 6
    assert (loop.copies, loop.partial_copies) == ({16: 1}, {4: 1})
    assert (loop.loads, loop.matrix) == ({2: 1, 4: 1}, 1)
    assert "1 loads of 2 or 4 bytes" in aot.judge_loops([loop])
    good = sass.Loop(2, Counter({"LDGSTS.E.BYPASS.128": 1, "HGMMA.64x64x16.F32.BF16": 1}))
    assert aot.judge_loops([good]) == ""
    assert "no asynchronous" in aot.judge_loops([sass.Loop(1, Counter(["HMMA.16816.F32"]))])


def test_the_table_says_what_the_changes_were_for():
    """No logarithm's polynomial on every score."""
    rows = static.read().values()
    found = {(r["triton"], r["case"]): r for r in rows}
    for version in {row["triton"] for row in rows}:
        for case in ("codeword d=128", "codeword d=64"):
            row = found[version, case]
            size, warps = re.match(r"(\d+x\d+) warps=(\d+)", row["tile"]).groups()
            scores = math.prod(map(int, size.split("x"))) / (32 * int(warps))  # of a thread
            assert row["loops"][0]["multiply_adds"] < 2 * scores  # the scale takes one a score
        assert found[version, "decode rotary"]["loops"][0]["row_bytes"] == 768


def test_what_is_slower_than_the_table_is_said():
    loop = {"instructions": 700, "row_bytes": 512}
    kept = {"triton": "3.6.0", "case": "rotary", "kernel": "attend", "registers": 200}
    kept |= {"spilled": 0, "shared": 1000, "loops": [loop]}
    assert static.slower(kept | {"loops": [{"instructions": 710, "row_bytes": 512}]}, kept) == []
    (said,) = static.slower(kept | {"loops": [{"instructions": 720, "row_bytes": 512}]}, kept)
    assert said == "rotary: attend (Triton 3.6.0): instructions 700 -> 720"
    assert len(static.slower(kept | {"spilled": 8, "shared": 1100}, kept)) == 2


def test_what_is_wrong_is_said():
    fine = aot.Report(registers=255, stack=0, shared=1000, matrix="", copies=0)
    assert aot.judge(fine, 128, 2000, 1500) == ""
    assert "spilled" in aot.judge(aot.Report(255, 8, 1000, "", 0), 128, 2000, 1500)
    assert aot.judge(aot.Report(255, 8, 1000, "", 0), 256, 2000, 1500) == ""
    assert aot.judge(aot.Report(255, 16, 1000, "", 0), 0, 2000, 1500) == ""
    assert "spilled" in aot.judge(aot.Report(255, 24, 1000, "", 0), 0, 2000, 1500)
    assert "the chip has 900" in aot.judge(fine, 64, 900, None)
    assert "at most 999" in aot.judge(fine, 64, 2000, 999)
    assert aot.judge(aot.Report(255, 8, 1000, "", 0), 128, 2000, 1500, spill=8) == ""


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
    types, constants, aligned = aot_launches.signature(launch)
    assert types == {
        "rows": "i32", "one": "constexpr", "free": "i32", "odd": "i32", "nothing": "constexpr",
        "scale": "fp32", "TILE": "constexpr",
    }  # fmt: skip
    assert constants == {"TILE": 16, "one": 1, "nothing": None}
    assert list(aligned) == [(0,)]


def test_a_few_rows_show_every_two_options_that_occur_together():
    options = [dict(zip("abc", values, strict=True)) for values in product(range(3), repeat=3)]
    rows = [set(combinations(sorted(each.items()), 2)) for each in options]
    picked = aot_launches.covering(rows, start=[26, 13])
    assert picked[:2] == [26, 13]
    assert set().union(*(rows[index] for index in picked)) == set().union(*rows)
    assert 9 <= len(picked) <= 13
    assert aot_launches.covering(rows, start=[26, 13]) == picked
    assert aot_launches.covering([set(), rows[0], rows[0]]) == [1]


def test_launches_that_the_compiler_cannot_tell_apart_are_compiled_once():
    class Kernel:
        params = tuple(type("Parameter", (), {"name": name}) for name in ("ROWS", "KEYS"))

        @staticmethod
        def fn() -> None: ...

    def call(name: str, rows: int, keys: int) -> aot_calls.Call:
        def run() -> None:
            launch(
                *(Kernel, (1,)), device=torch.device("cpu"), warps=4, stages=1, ROWS=rows, KEYS=keys
            )  # fmt: skip

        return aot_calls.Call(name, 128, run, {"rows": rows, "keys": keys})

    # Of two calls of one name the first counts.
    calls = [call("one", 16, 16), call("same", 16, 16), call("wide", 16, 32), call("one", 64, 64)]
    uses = aot_launches.specializations(calls, 90)
    names = [[use.call.name for use in used] for used in uses.values()]
    assert names == [["one", "same"], ["wide"]]
    assert list(uses)[1].constants == (("ROWS", 16), ("KEYS", 32))
    assert list(aot_launches.subset(uses, ["wide"])) == list(uses)  # each has a pair of its own

    spilling = aot.Compilation(aot.Report(255, 8, 1000, "", 0), "", 2.0, cached=True)
    failing = aot.Compilation(None, "CompilationError: no", 1.0, cached=False)
    results = list(aot.outcomes(uses, lambda _, jobs: [spilling, failing][: len(jobs)]))
    spilled = "8 bytes of registers spilled"
    assert [[o.wrong for o in same] for same in results] == [[spilled] * 2, [failing.error]]
    tally = aot.Tally()
    for same in results:
        tally.add(same)
    assert str(tally) == "1 compiled, 1 cached, 2 not as they must be"
