"""The kernels' benchmark on a CPU, with tiny shapes: its checks, its rooflines, its file."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import pytest
import torch

from bench import tables
from bench.gpu.environment import device_folder
from bench.kernels import __main__ as program
from bench.kernels import _attention, crossovers, plots, run
from bench.kernels import cases as cases_of
from bench.kernels.ceilings import NOMINAL, Ceilings
from bench.kernels.spec import SHAPE_KEYS, Spec

REQUIRED = {"name", "shape", "dtype", "impl", "ms", "floor_ms", "peers", "ratio"}
CPU = run.Clock(torch.device("cpu"), NOMINAL, None, 0.005)
pytestmark = pytest.mark.usefixtures("one_thread")


def spec_named(name: str) -> Spec:
    return next(spec for spec in cases_of.specs() if name in spec.variants.values())


SOME = (
    "codeword_M1024_N4096_H32|codeword_counted_M1024_N4096_H32|lookup_(rotary|subvectors)_M64_N3072"
    "|packed_M256|decode_(rotary|plain).*N4096|D768_G32|mixed|lookup_linear_T768|merge|pack_|count_"
    "|decode_codes|plain_.*N512_"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--device", "cpu", "--small", "--samples", "1", "--output", str(folder)]
    assert program.main([*arguments, "--only", SOME]) == 0
    (path,) = folder.glob("*/kernels_small.json")
    return json.loads(path.read_text())


def test_the_file_has_what_was_agreed(report):
    top = {"command", "commit", "device", "versions", "link", "cases", "failed", "complete"}
    assert top <= set(report)
    assert report["complete"]
    assert report["failed"] == []
    assert set(report["ceilings"]["measured"]) == {"copy", "dense"}
    families = {case["name"].split("_M")[0] for case in report["cases"]}
    for prefix in ("codeword", "fused_lookup", "decode_rotary", "decode_plain", "encode", "pack"):
        assert any(name.startswith(prefix) for name in families)
    names = [case["name"] for case in report["cases"]]
    assert len(set(names)) == len(names)
    for case in report["cases"]:
        assert set(case) >= REQUIRED
        assert set(case["shape"]) <= set(SHAPE_KEYS)
        assert set(case["ms"]) == {"p20", "p50", "p80"}
        assert case["peers"]
        assert case["error"] is not None
        assert case["ratio"] == pytest.approx(
            min(case["peers"].values()) / case["ms"]["p50"], rel=1e-3
        )
        assert case["share_of_floor"] == pytest.approx(
            case["floor_ms"] / case["ms"]["p50"], rel=1e-3
        )
    assert set(report["crossovers"]) >= {
        "counted_from", "counted_from_few_rows", "expanded_from",
    }  # fmt: skip


def test_every_case_of_the_plan_is_there():
    names = [name for spec in cases_of.specs() for name in spec.variants.values()]
    assert len(set(names)) == len(names)
    for heads in ("H32_d128", "H12_d64"):
        for tokens in (1024, 4096, 32768, 131072):
            assert f"codeword_M1024_N{tokens}_{heads}" in names
        for kind in ("rotary", "subvectors"):
            for rows in (64, 256, 1024):
                for tokens in (3072, 8192, 32768):
                    for variant in ("fused", "expanded"):
                        assert f"{variant}_lookup_{kind}_M{rows}_N{tokens}_{heads}" in names
            assert f"fused_lookup_{kind}_packed_M256_N8192_{heads}" in names
    for tokens in (4096, 32768, 131072, 1048576):
        assert f"decode_rotary_fused_M1_N{tokens}_H32_d128" in names
        assert f"decode_rotary_fused_packed_M1_N{tokens}_H32_d128" in names
        assert f"decode_plain_counts_M1_N{tokens}_H32_d128" in names
    for spec in cases_of.specs():
        assert set(spec.shape) & set(SHAPE_KEYS)


def test_what_decides_is_measured_first():
    ranks = [cases_of.rank(spec) for spec in cases_of.specs()]
    assert ranks == sorted(ranks)
    assert set(ranks) == set(range(len(cases_of.DECISIVE) + 1))  # every pattern is some case's
    assert 18 <= sum(rank < len(cases_of.DECISIVE) for rank in ranks) <= 24
    first = cases_of.specs()[0].variants.values()
    assert "codeword_M1024_N32768_H32_d128" in first


def test_what_a_look_up_reads():
    """Of one tile of 128 rows: 8192 keys and values of 128 values, and half as many angles."""
    shape = {"M": 128, "N": 8192, "H": 1, "Hkv": 1, "d": 128}
    assert cases_of.gathered(shape) == 8192 * 2 * 128 * 2
    assert cases_of.gathered_rotary(shape) == 8192 * (2 * 128 + 128) * 2
    decode = spec_named("decode_rotary_fused_M1_N131072_H32_d128")
    assert decode.gathered(decode.shape) == 768 * 8 * 131072  # bytes a token and head


def test_probes_do_what_they_are_timed_for():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter, or a GPU")
    from bench.kernels import _probes

    table = torch.randint(-(2**30), 2**30, (50, _probes.ROW), dtype=torch.int32)
    codes = torch.randint(0, 50, (4 * _probes.BLOCK_CODES,), dtype=torch.int32)
    want = table[codes.view(2, -1).long()].sum(1, dtype=torch.int32)  # wraps, as the kernel does
    assert torch.equal(_probes.gather(codes, table, 2), want)
    x = -0.01 * (torch.arange(2 * _probes.BLOCK_EXP) % 128)
    for _ in range(3):
        x = -torch.exp2(x)
    torch.testing.assert_close(_probes.exponentials(2, 3, torch.device("cpu")), x)
    with pytest.raises(ValueError, match="multiple of 64 codes, got 33"):
        _probes.gather(codes[:33], table, 2)


def test_rooflines_are_the_formulae():
    top = Ceilings(copy=3.0e12, dense=800e12, fp32=100e12, exp=3.7e12)

    def roofline(name: str) -> float:
        return spec_named(name).roofline_ms(top) / 1e3

    at_128 = 4 * 1024 * 1024 * 128 * 32 / 800e12  # M K d H
    assert at_128 == pytest.approx(21.5e-6, rel=0.01)
    for tokens in (1024, 131072):
        assert roofline(f"codeword_M1024_N{tokens}_H32_d128") == pytest.approx(at_128)
    m, n = 256, 8192
    assert roofline("fused_lookup_rotary_M256_N8192_H32_d128") == pytest.approx(
        max(4 * m * n * 128 * 32 / 800e12, m * n * 32 / 3.7e12)
    )
    assert roofline("expanded_lookup_subvectors_M256_N8192_H12_d64") == pytest.approx(
        max(4 * m * n * 64 * 12 / 800e12, m * n * 12 / 3.7e12)
    )
    dense = roofline("decode_rotary_fused_M1_N131072_H32_d128")
    assert dense == pytest.approx(4 * 131072 * 8 * 128 / 3e12)
    assert dense == pytest.approx(179e-6, rel=0.01)
    products = 2 * 4096 * 1024 * 768
    assert roofline("encode_bfloat16_D768_G1") == pytest.approx(products / 800e12)
    assert roofline("encode_float32_D768_G32") == pytest.approx(products / 100e12)
    assert roofline("pack_10bit_1048576") == pytest.approx(2**20 * (4 + 10 / 8) / 3e12)


def wrong_spec(name: str, spoil) -> Spec:
    """The spec with a call of ours that is spoiled."""
    spec = cases_of.small(spec_named(name))

    def build(shape, dtype, device):
        calls = spec.build(shape, dtype, device)
        ours = {impl: (lambda call=call: spoil(call())) for impl, call in calls.ours.items()}
        return dataclasses.replace(calls, ours=ours)

    return dataclasses.replace(spec, build=build)


def off_by_a_little(result):
    out, lse = result
    return out * 1.02, lse


def one_row_zero(result):
    out, lse = result
    out = out.clone()
    out[:, :, out.shape[2] // 2] = 0
    return out, lse


def nan(result):
    return result[0] * math.nan, result[1]


def lse_in_base_2(result):
    return result[0], result[1] / math.log(2)


def raises(_):
    raise RuntimeError("out of resource: shared memory\nand more")


def test_the_backend_of_torch_is_noted(monkeypatch, report):
    noted = {case.get("sdpa_backend") for case in report["cases"] if "sdpa" in case["peers"]}
    assert "flash" in noted
    assert noted <= {"flash", "math", None}  # None: a mask that torch dispatches in Python
    query = torch.randn(1, 2, 3, 8)
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert _attention.chosen_backend(query, query, query) == "unknown (AttributeError)"


ATTENTION = "fused_lookup_rotary_M256_N8192_H32_d128"


@pytest.mark.parametrize(
    ("name", "spoil", "why"),
    [
        (ATTENTION, off_by_a_little, "error 2"),
        (ATTENTION, one_row_zero, ""),
        (ATTENTION, nan, "error nan"),
        (ATTENTION, lse_in_base_2, "error inf"),
        (ATTENTION, raises, "RuntimeError: out of resource: shared memory"),
        ("encode_bfloat16_D768_G1", lambda codes: (codes + 1) % 64, "error"),
        ("pack_10bit_8192", lambda data: data ^ 1, "error 1"),
    ],
)
def test_what_is_wrong_gets_no_time(name, spoil, why):
    outcome = run.run(wrong_spec(name, spoil), CPU)
    assert outcome.cases == []
    assert len(outcome.failed) == len(spec_named(name).variants)
    assert all(why in failure["why"] for failure in outcome.failed)
    assert "ms" not in outcome.failed[0]


def test_a_wrong_case_fails_the_run(monkeypatch, tmp_path, capsys):
    wrong = wrong_spec("merge_state_M1024_H32_d128", lambda state: (state[0] + 1, state[1]))
    right = cases_of.small(spec_named("pack_10bit_8192"))
    monkeypatch.setattr(program, "chosen", lambda args, done: [wrong, right])
    assert program.main(["--device", "cpu", "--small", "--output", str(tmp_path)]) == 1
    report = json.loads(next(tmp_path.glob("*/kernels_small.json")).read_text())
    assert [case["name"] for case in report["cases"]] == ["pack_10bit_8192"]
    assert [case["name"] for case in report["failed"]] == ["merge_state_M1024_H32_d128"]
    assert "FAILED" in capsys.readouterr().out


def test_a_baseline_that_cannot_run_is_left_out():
    spec = cases_of.small(spec_named("merge_state_M1024_H32_d128"))

    def build(shape, dtype, device):
        calls = spec.build(shape, dtype, device)
        return dataclasses.replace(
            calls, baselines={**calls.baselines, "absent": lambda: raises(0)}
        )

    outcome = run.run(dataclasses.replace(spec, build=build), CPU)
    assert set(outcome.cases[0].peers) == {"torch"}
    assert "absent" in outcome.notes[0]


def test_a_run_that_was_cut_goes_on(tmp_path):
    arguments = ["--device", "cpu", "--small", "--output", str(tmp_path), "--only", "pack_10bit"]
    assert program.main([*arguments, "--seconds", "1e-9"]) == 0
    path = next(tmp_path.glob("*/kernels_small.json"))
    assert json.loads(path.read_text())["complete"] is False
    assert program.main([*arguments, "--resume"]) == 0
    report = json.loads(path.read_text())
    assert report["complete"]
    assert len(report["cases"]) == 4


def test_crossings():
    assert crossovers.crossing([(1, 4.0), (4, 0.25)]) == pytest.approx(2.0)
    assert crossovers.crossing([(1, 0.5), (4, 0.25)]) == 1
    assert crossovers.crossing([(1, 2.0), (4, 1.5)]) is None
    assert crossovers.crossing([(1, 0.5), (2, 2.0), (8, 0.5)]) == pytest.approx(4.0)


def test_crossovers_have_the_form_of_the_table():
    from astra_kernels._triton.strategies import Crossover

    def case(prefix, impl, m, n, ms):
        shape = {"M": m, "N": n, "H": 32, "Hkv": 8, "d": 128, "K": 1024}
        return {
            "name": f"{prefix}_M{m}_N{n}_H32_d128", "impl": impl, "shape": shape,
            "ms": {"p50": ms},
        }  # fmt: skip

    cases = []
    for rows, ratio in ((64, 2.0), (256, 1.4), (1024, 1 / 1.4)):
        cases.append(case("fused_lookup_rotary", "fused", rows, 8192, 1.0))
        cases.append(case("expanded_lookup_rotary", "expanded", rows, 8192, ratio))
    for m, ratios in ((1024, (2.0, 0.5)), (1, (4.0, 0.25))):
        for n, ratio in zip((1024, 4096), ratios, strict=True):
            cases.append(case("plain_fused", "fused", m, n, 1.0))
            cases.append(case("plain_counted", "counted", m, n, ratio))
    found = crossovers.summary(cases)
    assert found["expanded_from"] == pytest.approx(512 * 4, rel=0.01)  # M * H / Hkv
    assert found["counted_from"] == pytest.approx(2.0)
    assert found["counted_from_few_rows"] == pytest.approx(2.0)
    code = crossovers.as_code(90, found)
    made = eval("{" + code + "}", {"Crossover": Crossover})
    assert made[90].expanded_from == found["expanded_from"]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_folders(name, folder):
    assert device_folder(name) == folder


def test_pictures(tmp_path, report):
    pytest.importorskip("matplotlib")
    cases = [
        {**case, "shape": {**case["shape"], "N": tokens}}
        for case in report["cases"]
        if case["name"].startswith("codeword_M")
        for tokens in (1024, 4096)
    ]
    written = plots.draw({**report, "cases": cases}, tmp_path)
    assert {path.suffix for path in written} == {".png", ".svg"}
    assert (tmp_path / "kernels_codeword.png").stat().st_size > 1000


def test_tables(report):
    text = tables.kernels(report)
    assert "fused_lookup" in text
    assert report["command"] in text
