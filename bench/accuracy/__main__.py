"""Accuracy against bits.

    python -m bench.accuracy [COMMAND] [OPTIONS]

COMMAND is one of lm, ranks, encoder, codes, fitting, calibrate and corpora; without a word it is
`lm`, perplexity of SmolLM2. Each has a --help of its own.
"""

from __future__ import annotations

import importlib
import sys

COMMANDS = ("lm", "ranks", "encoder", "codes", "fitting", "calibrate", "corpora")


def main() -> None:
    given = sys.argv[1:]
    name = given.pop(0) if given and given[0] in COMMANDS else "lm"
    importlib.import_module(f"bench.accuracy.{name}").main(given)


if __name__ == "__main__":
    main()
