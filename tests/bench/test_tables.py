"""The pages' tables: they are what the results say, and the check notices where they are not."""

from __future__ import annotations

import json

import pytest

from bench import tables
from bench.report import goals
from bench.report.markdown import Table


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results, empty; returns a function that puts one there."""
    monkeypatch.setattr("bench.report.markdown.RESULTS", tmp_path)
    (tmp_path / "cpu-2core").mkdir()

    def put(name, **report):
        whole = {"command": "python -m bench.x", "device": "a CPU", "versions": {}, **report}
        (tmp_path / "cpu-2core" / f"{name}.json").write_text(json.dumps(whole))

    return put


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_pages_say_what_the_results_say(page):
    assert tables.stale(page.read_text("utf-8")) == []


def test_every_table_is_shown():
    shown = {name for page in tables.pages() for name in tables.names(page.read_text("utf-8"))}
    assert shown == set(tables.TABLES)


def test_a_place_for_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match=r"table: expected one of accuracy_encoder.*got 'weather'"):
        tables.filled("<!-- table weather -->\n<!-- end -->")


def test_the_check_names_what_is_stale_and_changes_nothing(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    body = tables.filled("<!-- table pack -->\n<!-- end -->\n\n<!-- table link -->\n<!-- end -->\n")
    page.write_text(body.replace("pack_10bit", "pack_11bit"), "utf-8")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "pages", lambda: [page])
    assert tables.main(["--check"]) == 1
    told = capsys.readouterr().out
    assert "README.md: table pack is not what bench/results says" in told
    assert "link" not in told
    assert "pack_11bit" in page.read_text("utf-8")
    assert tables.main([]) == 0
    assert page.read_text("utf-8") == body
    assert tables.main(["--check"]) == 0


def test_a_table_says_which_rows_it_shows(results):
    few = Table(
        ("cpu-2core/some", "cpu-2core/more"),
        lambda *reports: "".join(str(row["n"]) for report in reports for row in report["rows"]),
        lambda row: row["n"] > 1,
        "rows above one",
    )
    assert few.render() == "*not measured yet*"
    results("more", rows=[{"n": 1}, {"n": 2}, {"n": 3}])
    files = "`bench/results/cpu-2core/some.json`, `bench/results/cpu-2core/more.json`"
    assert few.render() == f"23\n\nShown: rows above one. All rows are in {files}."


def case(name, ours, **peers):
    return {"name": name, "ms": {"p50": ours, "p99": ours}, "peers": peers, "peers_p99": peers}


def test_goals_are_reached_missed_or_not_measured(results):
    def row(what):
        (line,) = (line for line in goals.goals().splitlines() if f"| {what} |" in line)
        return [cell.strip() for cell in line.split("|")[4:6]]

    gloo, zeromq = (f"one block's exchange over {name}, p50 and p99" for name in ("gloo", "ZeroMQ"))
    assert row(gloo) == ["–", "not measured"]
    results("exchange", cases=[case("a", 1, gloo=4, zeromq=1), case("b", 2, gloo=10, zeromq=1)])
    assert row(gloo) == ["4–5×", "reached"]
    assert row(zeromq) == ["0.5–1×, 2 of 4 cases", "**missed**"]
    results("faults", faults=[{"name": "stop", "tried": 30, "survived": 29}])
    assert row("SIGSTOP") == ["29 of 30", "**missed**"]
    results("faults", faults=[{"name": "stop", "tried": 29, "survived": 29}])
    assert row("SIGSTOP") == ["29 of 29", "**missed**"]  # too few to count
    results("faults", faults=[{"name": "stop", "tried": 30, "survived": 30}])
    assert row("SIGSTOP") == ["30 of 30", "reached"]
    wait = "the longest wait for a token while prompts are read"
    assert row(wait) == ["–", "not measured"]
    results("service", cases=[case("chats", 1) | {"longest_wait_ms": 512.3, "ratio": 1.7}])
    assert row(wait) == ["0.512 s", "**missed**"]
    struck, beaten = "workers stopped, killed, started again under load", {"tried": 150}
    faults = [beaten | {"survived": 150}, beaten | {"survived": 150}]
    results("service_faults", faults=faults, wrong=0)
    assert row(struck) == ["300 of 300, 0 wrong answers", "reached"]
    results("service_faults", faults=faults, wrong=1)
    assert row(struck) == ["300 of 300, 1 wrong answers", "**missed**"]
    fine = "SmolLM2, N=4, the same: fine codes, time over that with a halo in their place"
    assert row(fine) == ["–", "not measured"]
    timed = [("default", 90.0), ("transform:100", 100.0)]
    results(
        "latency_curve_smollm2",
        cases=[
            {"impl": f"astra {codes}", "shape": {"world_size": ranks}, "ms": {"p50": ms * ranks}}
            for codes, ms in timed
            for ranks in (4, 8)
        ],
    )
    assert row(fine) == ["0.90×", "reached"]
    assert row(fine.replace("N=4", "N=8")) == ["0.90×", "**missed**"]
    hour = "an hour of ordinary life: memory, threads, descriptors"
    held = {"bytes_an_hour": 3 * 2**20}
    results("service_soak", cases=[held, {"bytes_an_hour": 0}], minutes=60, wrong=[])
    assert row(hour)[1] == "reached"
    results("service_soak", cases=[held], minutes=60, wrong=["turn: ValueError: 503: busy"])
    assert row(hour) == ["+3.0 MiB/h, 1 requests got a 503 on a busy machine", "**missed**"]


@pytest.mark.parametrize(
    ("ratio", "without", "result"),
    [(1.05, 2.0, "reached"), (1.1, 2.0, "**missed**"), (1.05, 1.15, "does not count")],
)
def test_a_goal_counts_where_the_control_is_worse(results, ratio, without, result):
    row = {"group": "bits", "kind": "prose", "compression": 100, "flops_over_ideal": 1.2}
    row |= {"seen_in_training": True, "ratio_to_exact": ratio, "dropped_over_exact": without}
    results("accuracy_gpt2_wide", rows=[row, {**row, "ratio_to_exact": 1.0, "compression": 99}])
    (line,) = (line for line in goals.goals().splitlines() if "GPT-2 on prose" in line)
    assert line.split("|")[5].strip() == result
    assert f"{ratio - 1:+.1%}" in line


def test_accuracy_by_ranks_is_that_of_most_windows(results):
    row = {"codes": "transform:100+400", "world_size": 8, "seed": 0, "halo": 0, "windows": 4}
    row |= {"domain": "documentation", "gap_recovered": 0.9, "flops_over_ideal": 1.2}
    more = {**row, "windows": 16, "gap_recovered": 0.94}
    what = "| SmolLM2, N=8, 100 bits"
    results("accuracy_ranks", rows=[row, more])
    (line,) = (line for line in goals.goals().splitlines() if line.find(what) > 0)
    assert line.split("|")[5].strip() == "not measured"
    for gap, verdict in ((0.91, "reached"), (0.89, "**missed**")):
        results(
            "accuracy_ranks", rows=[row, more, {**more, "domain": "handbook", "gap_recovered": gap}]
        )
        (line,) = (line for line in goals.goals().splitlines() if line.find(what) > 0)
        cells = [cell.strip() for cell in line.split("|")[4:6]]
        assert cells == [f"0.940 and {gap:.3f} at 1.200 FLOPs", verdict]


def test_of_variants_of_a_kernel_the_fastest_counts(results, tmp_path):
    def kernel(name, ms, **shape):
        times = {"ms": {"p50": ms}, "peers": {"sdpa": 30.0}, "floor_ms": 1.0}
        return {"name": name, "dtype": "bfloat16", "shape": shape, **times}

    cases = [kernel(f"decode_plain_{n}", ms, N=131072) for n, ms in (("fused", 20), ("counts", 1))]
    cases += [kernel("decode_plain_counts", 20, N=4096), kernel("encode_bfloat16", 1, T=1)]
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "kernels.json").write_text(json.dumps({"cases": cases}))
    (line,) = (line for line in goals.goals().splitlines() if "decode without rotary" in line)
    assert [cell.strip() for cell in line.split("|")[4:6]] == ["30×", "reached"]


def test_every_goal_stands_once():
    names = [goal.what for goal in goals.GOALS]
    assert len(names) == len(set(names))
