"""The examples in the ops' docstrings run, and every public function has one."""

from __future__ import annotations

import doctest

import pytest
import torch

import astra_kernels as ak


@pytest.mark.parametrize("name", ak.__all__)
def test_the_example_runs(name):
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(getattr(ak, name), name, globs={"ak": ak, "torch": torch})
    assert test.examples
    failures = []
    result = doctest.DocTestRunner().run(test, out=failures.append)
    assert result.failed == 0, "".join(failures)
