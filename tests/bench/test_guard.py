"""The guard: what fell by more than a tenth is named, and nothing else."""

from __future__ import annotations

import json
import subprocess

import pytest

from bench import guard


def report(**ratios):
    return {
        "cases": [{"name": n, "impl": "astra", "ratio": r} for n, r in ratios.items()],
    }


def test_only_what_fell_by_more_than_a_tenth():
    before = report(same=2.0, little=2.0, much=2.0, gone=1.0, none=1.0)
    now = report(same=2.0, little=1.81, much=1.79, fresh=1.0, none=None)
    assert list(guard.slower(before, now, "f")) == [guard.Slower("f", "much", "astra", 2.0, 1.79)]


@pytest.mark.parametrize(("ratio", "status"), [(1.0, 0), (0.8, 1)])
def test_results_are_compared_with_a_commit(tmp_path, monkeypatch, capsys, ratio, status):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    path = tmp_path / "bench" / "results" / "cpu" / "file.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(report(case=1.0)))
    (path.parent / "fresh.json").write_text(json.dumps(report(case=0.1)))
    git("init")
    git("add", str(path))
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "results")
    path.write_text(json.dumps(report(case=ratio)))
    monkeypatch.setattr(guard, "ROOT", tmp_path)
    monkeypatch.setattr(guard, "RESULTS", tmp_path / "bench" / "results")
    assert guard.main(["--strict"]) == status
    assert guard.main([]) == 0
    said = capsys.readouterr().out
    assert ("SLOWER cpu/file.json: case (astra): 1× before, 0.8× now (-20%)" in said) == bool(
        status
    )
    assert "of 1 ratios fell by more than 10%" in said
