"""The documents of the repository: their code blocks and their links.

A block of Python or shell runs in a test unless a comment on the line before it says why not:

    <!-- not run: REASON -->
    <!-- run by tests/FILE.py::TEST -->     another test does what the block shows

`<!-- continues -->` before a block of Python keeps the names of the block before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LANGUAGES = ("python", "shell", "text", "cpp")  # of which the first two run

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<source>.*?)^```$", re.M | re.S
)
_FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.M)


def pages() -> list[Path]:
    """Every document, README first."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted(found, key=lambda page: (page.name != "README.md", str(page)))


@dataclass(frozen=True)
class Block:
    """One fenced block; `mark` is the comment before it, empty if there is none."""

    page: Path
    line: int
    language: str
    source: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in LANGUAGES[:2] and not self.mark.startswith(("not run", "run by"))


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("language")) + 1,
            found["language"],
            found["source"],
            found["mark"] or "",
        )
        for found in _BLOCK.finditer(text)
    ]


def links(page: Path) -> Iterator[str]:
    """The targets of a page's links that lead to no other host."""
    for target in _LINK.findall(_FENCED.sub("", page.read_text("utf-8"))):
        if not re.match(r"\w+:", target):
            yield target


def anchors(page: Path) -> set[str]:
    """The names under which a page's headings are reached, as GitHub and MkDocs make them."""
    headings = _HEADING.findall(_FENCED.sub("", page.read_text("utf-8")))
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def commands(source: str) -> list[str]:
    """The lines of a shell block, continued ones joined, comments left out."""
    lines = source.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
