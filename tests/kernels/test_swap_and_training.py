"""The short programs of examples/ that use the ops alone."""

from __future__ import annotations

from tests import examples


def test_a_plain_module_gives_the_same() -> None:
    assert examples.load("plain_module").main() < 1e-4


def test_training_through_codes_lowers_the_error() -> None:
    before, after = examples.load("train_codebook").main(60)
    assert after < 0.75 * before
