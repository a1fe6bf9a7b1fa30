"""What imports what, read from the sources: late imports and those for types alone count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"astra_kernels": ROOT, "astra_runtime": ROOT / "python", "bench": ROOT}
CORE = "astra_kernels._C"  # the C++ extension, no file of Python
# `Codebook.fit` is a public name, and needs what fits.
PROMISED = ("astra_runtime.codes.codebook", "astra_runtime.train.fit")


def modules() -> dict[str, Path]:
    files = {}
    for package, base in PACKAGES.items():
        for file in (base / package).rglob("*.py"):
            name = ".".join(file.relative_to(base).with_suffix("").parts)
            files[name.removesuffix(".__init__")] = file
    return files


MODULES = modules()
KNOWN = {*MODULES, CORE}


def imported_names(name: str, file: Path) -> Iterator[str]:
    """Every dotted name that a module imports, or takes something from."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = [*base, node.module] if node.level and node.module else base
            source = ".".join(start) if node.level else node.module or ""
            yield from (
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in KNOWN else source
                for alias in node.names
            )


def imports(name: str) -> set[str]:
    found = set()
    for imported in imported_names(name, MODULES[name]):
        known = imported
        while known and known not in KNOWN:
            known = known.rpartition(".")[0]
        found |= {known} - {"", name}
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return {name: imports(name) for name in MODULES} | {CORE: set()}


def test_the_reader_sees_late_typed_and_relative_imports(graph: dict[str, set[str]]) -> None:
    assert "astra_runtime.train.fit" in graph["astra_runtime.codes.codebook"]  # in a function
    assert CORE in graph["astra_runtime.core"]  # for types
    assert "astra_runtime.plan" in graph["astra_runtime.models.base"]  # relative
    assert "astra_runtime.wire" in graph["astra_runtime.transport.tcp"]


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


@pytest.mark.parametrize("package", ["astra_runtime", "bench"])
def test_one_circle_at_most(package: str, graph: dict[str, set[str]]) -> None:
    inside = {
        name: {other for other in others if other.split(".")[0] == package}
        for name, others in graph.items()
        if name.split(".")[0] == package
    }
    if package == "astra_runtime":
        inside[PROMISED[0]] -= {PROMISED[1]}
    assert circle(inside) is None


@pytest.mark.parametrize(
    ("package", "above"),
    [
        ("astra_kernels", ("astra_runtime", "bench")),
        ("astra_runtime", ("bench",)),
        ("astra_runtime.codes", ("astra_runtime.train", "astra_runtime.engine")),
        ("astra_runtime.wire", ("astra_runtime.transport", "astra_runtime.models")),
        ("astra_runtime.transport", ("astra_runtime.codes", "astra_runtime.models")),
    ],
)
def test_imports_point_one_way(
    package: str, above: tuple[str, ...], graph: dict[str, set[str]]
) -> None:
    def within(name: str, room: str) -> bool:
        return name == room or name.startswith(f"{room}.")

    wrong = [
        (name, other)
        for name, others in graph.items()
        if within(name, package)
        for other in others
        if any(within(other, room) for room in above) and (name, other) != PROMISED
    ]
    assert not wrong
