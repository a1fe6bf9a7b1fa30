"""The committed table of cases of other projects' kinds is what the cases give."""

from __future__ import annotations

import pytest

from .__main__ import INTRODUCTION, PAGE, PROJECTS, rows


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("project", PROJECTS)
def test_the_page_says_how_the_cases_end(project: str) -> None:
    assert rows(project) in PAGE.read_text("utf-8"), "python -m tests.peers"


def test_the_page_has_nothing_else() -> None:
    lines = PAGE.read_text("utf-8").removeprefix(INTRODUCTION).splitlines()
    assert {line.split(" | ")[0] for line in lines} == {f"| {project}" for project in PROJECTS}
