"""The list of benchmarks: it knows every result and every table, and `make bench` follows it."""

from __future__ import annotations

import importlib.util
import json

import pytest

from bench import __main__ as program
from bench import registry, tables
from bench.registry import Bench, Run
from bench.report import RESULTS


def test_every_committed_result_and_every_table_has_a_command():
    wanted = {f"{path.parent.name}/{path.stem}" for path in RESULTS.glob("*/*.json")}
    wanted |= {result for table in tables.TABLES.values() for result in table.files}
    assert [result for result in sorted(wanted) if not any(registry.writers(result))] == []


def test_commands_of_committed_results_still_run():
    for path in RESULTS.glob("*/*.json"):
        words = json.loads(path.read_text())["command"].split()
        assert words[0] == "make" or importlib.util.find_spec(words[2]), path


def test_every_command_is_there():
    assert len({bench.name for bench in registry.BENCHES}) == len(registry.BENCHES)
    for bench in registry.BENCHES:
        assert bench.minutes > 0
        for run in bench.runs:
            module = run.command.split()[0]
            assert module == "make" or importlib.util.find_spec(module), run.command


@pytest.fixture
def ran(monkeypatch):
    """Stands in for three benchmarks; returns what was run. The second one fails."""
    commands: list[str] = []
    benches = (
        Bench("one", "first", 1, (Run("bench.one"), Run("bench.more", ("cpu/x",)))),
        Bench("two", "fails", 2, (Run("make two"), Run("bench.never"))),
        Bench("three", "needs", 3, (Run("bench.three"),), ("root",)),
    )
    monkeypatch.setattr(registry, "DEFAULT", benches[:2])
    monkeypatch.setattr(registry, "BENCHES", benches)
    monkeypatch.setattr(program, "BENCHES", benches)
    monkeypatch.setattr(program, "AFTERWARDS", (Run("bench.tables"),))

    def execute(run: Run) -> bool:
        commands.append(run.line)
        return run.command != "make two"

    monkeypatch.setattr(program, "execute", execute)
    return commands


def test_it_says_what_it_runs_and_leaves_out_and_goes_on_after_a_failure(ran, capsys):
    assert program.main([]) == 1
    assert ran == ["python -m bench.one", "python -m bench.more", "make two"] + [
        "python -m bench.tables"
    ]
    told = capsys.readouterr().out
    runs, left_out = told.split("leaves out, about 3 min")
    assert "runs, about 3 min" in runs
    assert "one" in runs
    assert "three" in left_out
    assert "[needs root]" in left_out
    assert "failed, or could not run here: two" in left_out


@pytest.mark.parametrize(("reason", "status"), [("", 0), ("needs root", 1)])
def test_what_a_benchmark_lacks_is_told(ran, capsys, monkeypatch, reason, status):
    monkeypatch.setattr("bench.link.switch.unavailable", lambda: reason)
    assert program.main(["three"]) == status
    assert ("python -m bench.three" in ran) == (status == 0)
    assert ("three cannot run here: needs root" in capsys.readouterr().out) is bool(status)


def test_the_overview_names_the_tables_that_a_benchmark_makes(capsys):
    overview = program.overview(registry.chosen(["latency"]))
    runs, _, left_out = overview.partition("leaves out")
    assert (
        "tables: latency_vit, latency_vit_stages, latency_smollm2, latency_smollm2_stages" in runs
    )
    for name, table in tables.TABLES.items():
        assert name in overview or not table.files
    assert "accuracy_lm" in left_out


def test_an_unknown_name_is_refused(ran, capsys):
    with pytest.raises(SystemExit):
        program.main(["four"])
    assert "expected one of one, three, two, got 'four'" in capsys.readouterr().err
    assert ran == []


def test_the_list_runs_nothing(ran, capsys):
    assert program.main(["--list"]) == 0
    told = capsys.readouterr().out
    assert "goals (docs/results/README.md)\n    from all results" in told
    assert ran == []
