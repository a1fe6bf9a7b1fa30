"""Every link between the documents leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

import astra_kernels
import astra_runtime
from tests.documents import ROOT, anchors, links, pages


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in links(page):
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target} leads to no file"
        if heading:
            assert heading in anchors(file), f"{page.name}: {target} leads to no heading"


def test_files_that_pages_name_exist() -> None:
    """In backquotes, by their whole path or by its end."""
    folders = ("astra_kernels", "bench", "csrc", "docs", "examples", "python", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.*")]
    paths = [f"/{file.relative_to(ROOT)}" for file in [*files, *ROOT.glob("*.*")]]
    named = {
        (page.name, name)
        for page in pages()
        if page.name != "CHANGELOG.md"
        for name in re.findall(r"`([\w./-]+\.(?:py|cpp|hpp|md|toml))`", page.read_text("utf-8"))
    }
    absent = [it for it in named if not any(path.endswith(f"/{it[1]}") for path in paths)]
    assert not absent


@pytest.mark.parametrize("package", [astra_kernels, astra_runtime], ids=lambda p: p.__name__)
def test_the_reference_has_every_exported_name(package: ModuleType) -> None:
    page = ROOT / "docs/reference" / f"{package.__name__.removeprefix('astra_')}.md"
    named = set(re.findall(r"^::: ([\w.]+)$", page.read_text("utf-8"), re.M))
    assert {f"{package.__name__}.{name}" for name in package.__all__} <= named


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
