"""The one run on a GPU, without one: its stages, its limits, what it keeps, and a rehearsal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from bench import gpu_engine
from bench.gpu import __main__ as gpu
from bench.gpu import environment, plan, prepare, running
from bench.gpu.plan import Setup
from bench.gpu.running import Stage
from bench.kernels import __main__ as kernels


def python(code: str, **more) -> Stage:
    name, seconds = more.pop("name"), more.pop("seconds", 60)
    return Stage(name, ((sys.executable, "-c", code),), seconds, **more)


class Hurried:
    """In place of `time`: `seconds` have passed once a stage has written that it sleeps."""

    def __init__(self, seconds: float, marks: Path) -> None:
        self.ahead, self._seconds, self._marks = 0.0, seconds, marks
        marks.mkdir()

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        for mark in self._marks.iterdir():
            mark.unlink()
            self.ahead += self._seconds

    def sleeper(self, before: str = "pass") -> str:
        """A program that sleeps until it is ended; `before`: what it does first."""
        mark = f"open({str(self._marks)!r} + '/' + str(os.getpid()), 'w').close()"
        return f"import os, time\n{before}\nprint('begun', flush=True); {mark}; time.sleep(600)"


@pytest.fixture
def hurried(monkeypatch, tmp_path):
    clock = Hurried(300.0, tmp_path / "marks")
    for module in (gpu, running):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The caches of a run, in a folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(plan, "CACHE", folder)
    monkeypatch.setattr(gpu, "CACHE", folder)
    return folder


def run(monkeypatch, groups, output, *more) -> dict[str, dict]:
    monkeypatch.setitem(gpu.PLANS, "A", lambda setup: groups)
    gpu.main(["--part", "A", "--output", str(output), "--commit", "abc", *more])
    summary = json.loads((output / "summary.json").read_text())
    return {stage["stage"]: stage for stage in summary["stages"]}


def test_both_parts_are_planned(capsys):
    assert gpu.main(["--dry-run"]) == 0
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    names = {part: [name for p, name in lines if p == part] for part in "AB"}
    assert names["A"][-5:] == ["smoke", "smoke_cuda_ptxas", "compile", "decisive", "engine"]
    assert names["B"][3:] == [
        *("tests", "library", "memcheck", "racecheck", "compile", "benchmarks", "tuned")
    ]
    for part in "AB":
        assert names[part][:3] == ["environment", "build", "packages"]


@pytest.mark.parametrize("part", gpu.PLANS)
def test_least_times_fit_a_part(part, tmp_path):
    groups = gpu.PLANS[part](Setup(tmp_path, 16))
    assert sum(max(stage.least for stage in group) for group in groups) < plan.PARTS[part] / 1.5
    assert plan.PARTS[part] + running.GRACE <= 300


@pytest.mark.parametrize("rehearse", [0, 3])
def test_every_command_of_ours_knows_its_arguments(tmp_path, rehearse):
    parsers = {"bench.kernels": kernels.arguments, "bench.gpu_engine": gpu_engine.arguments}
    parsed = set()
    setup = Setup(tmp_path, 16, rehearse)
    for stage in [s for part in gpu.PLANS.values() for group in part(setup) for s in group]:
        for words in stage.commands:
            place = words.index("-m") if "-m" in words else -1
            module = words[place + 1]
            if place >= 0 and module in parsers:
                rest = ["9" if word == running.SECONDS else word for word in words[place + 2 :]]
                args = parsers[module](rest)
                assert args.device == ("cpu" if rehearse else "cuda")
                parsed.add((stage.name, module))
    assert {name for name, _ in parsed} == {"compile", "decisive", "engine", "benchmarks", "tuned"}


def test_a_stage_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "smoke", "smokes"])
    assert "no stage smokes" in capsys.readouterr().err


def test_a_failing_or_late_stage_stops_no_other(monkeypatch, tmp_path, cache, capsys, hurried):
    output = tmp_path / "out"
    written = output / "h100" / "kernels.json"
    write = f"import pathlib; p = pathlib.Path({str(written)!r}); p.parent.mkdir(parents=True); "
    write += 'p.write_text(\'{"commit": "abc"}\')'
    bad = "print('WRONG merge_state'); print('1 failed, 2 passed in 3s'); raise SystemExit(3)"
    late = hurried.sleeper()
    groups = [
        (python(bad, name="bad", note="perhaps not"),),
        (python(late, name="late", seconds=250), python("", name="beside", seconds=600)),
        (python("", name="absent", missing="no such tool"),),
        (python(write, name="good"),),
    ]
    stages = run(monkeypatch, groups, output, "--minutes", "60")
    assert {name: stage["result"] for name, stage in stages.items()} == {
        "bad": "failed", "late": "timed out", "beside": "passed", "absent": "skipped",
        "good": "passed",
    }  # fmt: skip
    assert stages["bad"]["counts"] == {"failed": 1, "passed": 2}
    assert stages["bad"]["wrong"] == ["WRONG merge_state"]
    assert stages["bad"]["note"] == "perhaps not"
    assert "begun" in stages["late"]["last_lines"]
    assert "begun" in (output / "log.txt").read_text()
    assert (cache / "results" / "h100" / "kernels.json").is_file()
    assert "failed: bad, late" in capsys.readouterr().out


def test_a_stage_gets_the_time_that_is_left(monkeypatch, tmp_path, cache, hurried):
    """Each that sleeps does so for five minutes, and there are ten."""
    limits = []

    def run_group(stages, *rest):
        limits.append(stages[0][1])
        return running.run_group(stages, *rest)

    monkeypatch.setattr(gpu, "run_group", run_group)
    groups = [
        (python(hurried.sleeper(), name="first", seconds=1000),),
        (python("", name="second", seconds=1000, least=301),),
        (python(hurried.sleeper(), name="spare", seconds=1000, least=0, spare=True),),
    ]
    stages = run(monkeypatch, groups, tmp_path / "out", "--minutes", "10")
    results = {name: stage["result"] for name, stage in stages.items()}
    assert results == {"first": "timed out", "second": "passed", "spare": "timed out"}
    assert stages["first"]["seconds"] >= 300
    # on a busy machine some of it was gone before
    assert 200 < limits[0] <= 299
    assert 200 < limits[1] <= 300
    assert 100 < limits[2] <= limits[1]


def test_what_there_is_is_kept_while_a_stage_runs(monkeypatch, tmp_path, cache):
    """A run that is killed has no last word."""
    output, scratch = tmp_path / "out", tmp_path / "logs"
    output.mkdir()
    scratch.mkdir()
    record = gpu.Record(output, scratch, {"part": "A"})
    record.began.append("slow")
    kept = []

    def keep():
        record.keep()
        kept.append(json.loads((output / "summary.json").read_text()))

    monkeypatch.setattr(running, "KEEP_EVERY", 0.05)
    code = (
        "import pathlib, sys, time; print('half way', flush=True)\n"
        "log = pathlib.Path(sys.argv[1])\n"
        "while not (log.exists() and 'half way' in log.read_text()): time.sleep(0.02)"
    )
    command = (sys.executable, "-S", "-c", code, str(output / "log.txt"))
    stage = Stage("slow", (command,), 60.0)
    running.run_group([(stage, 60.0)], {"PATH": ""}, scratch, keep)
    assert kept[-1]["running"] == ["slow"]
    assert "half way" in (output / "log.txt").read_text()


def test_the_second_part_goes_on_with_the_first_ones_results(tmp_path, cache):
    kept = cache / "results" / "h100" / "kernels.json"
    kept.parent.mkdir(parents=True)
    kept.write_text('{"commit": "abc"}')
    for commit, taken in (("abc", True), ("other", False), ("unknown", False)):
        output = tmp_path / commit
        gpu.take_up(output, commit)
        assert (output / "h100" / "kernels.json").is_file() == taken


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("x\n== 2 failed, 30 passed, 1 skipped in 12.3s ==\n", (30, 2, 1)),
        ("3 passed, 1 warning in 0.50s\n", (3, 0, 0)),
        ("[gw0] [ 10%] PASSED tests/a.py::b \n[gw1] [ 12%] FAILED tests/a.py::c[x]\n", (1, 1, 0)),
        ("tests/a.py::b PASSED      [ 10%]\ntests/a.py::c SKIPPED (no)   [ 20%]\n", (1, 0, 1)),
        ("there were 3 passed parameters in 2 calls\n", (0, 0, 0)),
    ],
)  # fmt: skip
def test_counts_of_tests(text, counted):
    counts = running.counts(text)
    assert tuple(counts.get(word, 0) for word in ("passed", "failed", "skipped")) == counted


def test_failures_are_reported_at_once(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('n', range(4))\n"
        "def test_n(n):\n    assert n != 0, 'reported early'\n    assert n != 2 or os._exit(1)\n"
    )
    words = setup_pytest(tmp_path, every=2)
    done = subprocess.run(words, cwd=tmp_path, env=gpu_env(), capture_output=True, text=True)
    assert "reported early" in done.stdout  # though the process died in the next test
    assert "test_n[0]" in done.stdout
    assert "test_n[1]" not in done.stdout  # each second one


def setup_pytest(folder, every):
    words = [sys.executable, "-m", "pytest", "-v", "-c", "/dev/null", "--rootdir", str(folder)]
    return [*words, "-p", "bench.gpu.pytest_log", "--every", str(every)]


def gpu_env():
    return dict(plan.environment(plan.CACHE, "abc", False))


def test_the_environment_is_described():
    about = environment.describe()
    assert about["python"] == sys.version.split()[0]
    assert about["cores"] >= 1
    assert json.loads(json.dumps(about)) == about
    assert about["versions"]["torch"] == about["torch"].partition("+")[0] or about["torch"]
    pytest.importorskip("triton")
    assert len(about["triton_key"]) > 20
    assert all("release" in version for version in about["ptxas"].values() if version)


def test_tools_outside_of_path_are_found(monkeypatch, tmp_path):
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(environment, "CUDA_FOLDERS", ("", str(tmp_path)))
    brought = tmp_path / "brought" / "ptxas"
    monkeypatch.setattr(environment, "PTXAS", brought)
    assert environment.find_tool("compute-sanitizer") == str(program)
    assert environment.cuda_ptxas() is None
    assert environment.find_tool("no-such-tool") is None
    own = tmp_path / "bin" / "ptxas"
    own.touch(mode=0o755)
    assert environment.cuda_ptxas() == str(own)
    wheel = tmp_path / "compiler.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some/bin/ptxas", "#!/bin/sh\necho release 13.1\n")
    prepare.unpack(wheel, "some/bin/ptxas", brought)
    assert environment.cuda_ptxas() == str(brought)
    assert environment.first_line([str(brought)], "release") == "release 13.1"


def test_the_extension_is_built_for_a_python_with_headers():
    this = ".".join(map(str, sys.version_info[:2]))
    assert prepare.interpreter(this) is not None
    assert prepare.interpreter("2.6") is None


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rehearsal(tmp_path, cache):
    """Both parts' ways, in Triton's interpreter: one in so many calls and cases of each kind."""
    pytest.importorskip("triton")
    output = tmp_path / "out"
    common = ["--output", str(output), "--rehearse", "60", "--commit", "abc", "--only"]
    assert gpu.main(["--part", "A", *common, "smoke", "decisive"]) == 0
    (path,) = output.glob("*/kernels_small.json")
    first = {case["name"] for case in json.loads(path.read_text())["cases"]}
    assert first
    path.unlink()  # the second part finds it among what is kept
    assert gpu.main(["--part", "B", *common, "benchmarks"]) == 0
    report = json.loads(path.read_text())
    assert first < {case["name"] for case in report["cases"]}
    assert report["failed"] == []
    assert set(report["ceilings"]["measured"]) == {"copy", "dense", "exp", "gather"}


def test_it_starts_with_nothing_built_or_installed():
    """Another machine has a Python with torch; the extension may have to be built there first."""
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [sys.executable, "-S", "-m", "bench.gpu", "--dry-run"]  # without installed packages
    done = subprocess.run(words, cwd=plan.ROOT, env=bare, capture_output=True, text=True)
    assert done.stderr == ""
    assert "A decisive" in done.stdout
