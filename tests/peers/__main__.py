"""Counts how the cases of other projects' kinds end, and writes docs/results/peers.md."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from . import flash_attention, flashinfer, pytorch
from .cases import OWN, REFUSED, TORCH, count

PAGE = Path(__file__).parents[2] / "docs" / "results" / "peers.md"
PROJECTS: dict[str, ModuleType] = {
    "PyTorch": pytorch,
    "FlashAttention": flash_attention,
    "FlashInfer": flashinfer,
}
INTRODUCTION = """# Cases of other projects' kinds

What the tests of PyTorch's `scaled_dot_product_attention` on a CPU, of FlashAttention and of
FlashInfer ask of an attention op, written anew as small cases (`tests/peers/`, where the sources
are named) and compared with torch's own answer or with the formula in float64, on a CPU. A case is
right by this package's own op, right by torch's op, to which `ak.scaled_dot_product_attention`
hands over what its own is not made for, or refused in words. `make test` runs them all;
`python -m tests.peers` writes this page.

| project | feature | tried | own op | torch's op | refused |
|---|---|--:|--:|--:|--:|
"""


def rows(project: str) -> str:
    """Of the page, what a project's cases give.

    AssertionError: a wrong number, or an error without a type.
    """
    kinds = (OWN, TORCH, REFUSED)
    found = count(PROJECTS[project].cases())
    total = {kind: sum(row.get(kind, 0) for row in found.values()) for kind in kinds}
    lines = []
    for feature, row in (*found.items(), ("**all**", total)):
        counts = [row.get(kind, 0) for kind in kinds]
        cells = " | ".join(str(number or "–") for number in (sum(counts), *counts))
        lines.append(f"| {project} | {feature} | {cells} |\n")
    return "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(INTRODUCTION + "".join(map(rows, PROJECTS)), "utf-8")
    print(f"written: {PAGE}")
