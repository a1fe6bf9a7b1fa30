"""The committed table of cases of other projects' kinds is what the cases give."""

from __future__ import annotations

import pytest

from .__main__ import PAGE, page


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage:UserWarning")
def test_the_page_says_how_the_cases_end() -> None:
    assert PAGE.read_text("utf-8") == page(), "python -m tests.peers"
