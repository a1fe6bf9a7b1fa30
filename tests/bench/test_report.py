"""What results say beside their figures: who else used the machine, and which command it was."""

from __future__ import annotations

import json
import os

import pytest

from astra_runtime import contention as of_machine
from bench import report
from bench.report import Case, Contention, Times, Watch, stages
from bench.report.console import command_line
from bench.report.markdown import source


def stat(core: int, user: int, idle: int, steal: int = 0) -> str:
    return f"cpu{core} {user} 0 0 {idle} 0 0 0 {steal} 0 0\n"


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Stands in for /proc/stat, cores 3 and 4 being this process's; none of their time is its."""
    path = tmp_path / "stat"
    monkeypatch.setattr(of_machine, "STAT", path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 4})
    monkeypatch.setattr(os, "times", lambda: (0.0,) * 5)
    path.write_text(stat(3, 100, 100) + stat(4, 0, 0) + stat(5, 0, 0))
    return path


def test_others_and_the_hypervisor_are_told(kernel):
    watch = Watch()
    # of 400 ticks of the two cores 60 were busy and 20 stolen; core 5 is not this process's
    kernel.write_text(stat(3, 140, 260) + stat(4, 20, 160, 20) + stat(5, 900, 0))
    contention = watch.contention()
    assert contention == Contention(others=60 / 400, steal=20 / 400)
    assert contention.disturbs
    assert str(contention) == "other processes took 15% of the cores' time, the hypervisor 5%"


def test_own_time_is_nobody_elses(kernel, monkeypatch):
    watch = Watch()
    kernel.write_text(stat(3, 200, 100) + stat(4, 0, 100) + stat(5, 0, 0))
    seconds = 100 / os.sysconf("SC_CLK_TCK")  # this process and its children were the busy ones
    monkeypatch.setattr(os, "times", lambda: (seconds / 2, 0.0, seconds / 2, 0.0, 9.0))
    assert watch.contention() == Contention(0.0, 0.0)
    assert not watch.contention().disturbs


def test_a_child_that_still_runs_is_nobody_else(kernel):
    watch = Watch()
    kernel.write_text(stat(3, 200, 100) + stat(4, 0, 100) + stat(5, 0, 0))
    assert watch.contention() == Contention(0.5, 0.0)
    assert watch.contention(ours=75 / os.sysconf("SC_CLK_TCK")) == Contention(0.125, 0.0)


def test_where_the_kernel_tells_nothing_nothing_is_seen(kernel):
    kernel.unlink()
    assert Watch().contention() == Contention(0.0, 0.0)


def test_a_moment_too_short_to_say_anything(kernel):
    assert Watch().contention() == Contention(0.0, 0.0)


@pytest.mark.parametrize(("others", "warned"), [(0.5, True), (0.01, False)])
def test_a_disturbed_result_says_so(tmp_path, monkeypatch, capsys, others, warned):
    contention = Contention(others, 0.0)
    monkeypatch.setattr(report.results.WATCH, "contention", lambda: contention)
    case = Case("a", {}, "float32", "ours", Times(1, 1, 1))
    path = report.write(
        "some", [case], command="python -m bench.some", packages=(), results=tmp_path
    )
    written = json.loads(path.read_text())
    assert written["contention"] == {"others": others, "steal": 0.0}
    assert ("some: other processes took 50%" in capsys.readouterr().err) is warned
    assert ("; other processes took 50%" in source(written)) is warned


def test_results_of_before_say_nothing_of_it():
    old = {"command": "python -m bench.some ", "device": "a CPU", "versions": {"torch": "2"}}
    assert source(old) == "\n\n`python -m bench.some` on a CPU, torch 2"


def test_the_command_is_that_of_the_process_or_the_one_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", "--tokens", "64"])
    assert command_line("bench.latency") == "python -m bench.latency --tokens 64"
    assert command_line("bench.latency", []) == "python -m bench.latency"


def test_a_stage_is_said_once():
    lines: list[str] = []
    show = stages(lines.append)
    for done in range(3):
        show("recording", done, 3)
    show("k-means", 0, 8)
    assert lines == ["recording (3 steps)", "k-means (8 steps)"]
