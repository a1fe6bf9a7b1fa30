"""Every link between the documents leads somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.documents import ROOT, anchors, links, pages


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in links(page):
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if file.is_relative_to(ROOT / "docs" / "reference"):
            continue  # generated with the site; `make docs` checks these
        assert file.exists(), f"{page.name}: {target} leads to no file"
        if heading:
            assert heading in anchors(file), f"{page.name}: {target} leads to no heading"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_readme_leads_to_every_page() -> None:
    """In at most two steps, those from the pages that README links to."""
    reached, seen = {ROOT / "README.md"}, set()
    for _ in range(2):
        for page in reached - seen:
            seen.add(page)
            targets = (target.partition("#")[0] for target in links(page))
            found = {(page.parent / target).resolve() for target in targets if target}
            reached |= {file for file in found if file.suffix == ".md" and file.is_file()}
    assert set(pages()) <= reached
