"""The examples in the runtime's docstrings run, where they are written as a session of Python."""

from __future__ import annotations

import doctest
import gc
import importlib
import warnings
from pathlib import Path

import pytest

import astra_runtime

FOLDER = Path(astra_runtime.__file__).parent
WITH_EXAMPLES = sorted(
    ".".join(("astra_runtime", *file.relative_to(FOLDER).with_suffix("").parts))
    for file in FOLDER.rglob("*.py")
    if ">>> " in file.read_text("utf-8")
)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name.removesuffix(".__init__"))
    failures: list[str] = []
    runner = doctest.DocTestRunner()
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert tests
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # examples are short: they close nothing
        for test in tests:
            runner.run(test, out=failures.append)
        gc.collect()
    assert not failures, "".join(failures)
