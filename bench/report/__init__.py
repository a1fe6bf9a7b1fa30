"""What every benchmark shares: timing, the result file, markdown tables."""

from .console import command_line, quiet_transformers
from .markdown import load, source, spread, table
from .results import (
    RESULTS,
    ROOT,
    Case,
    Times,
    commit,
    cores,
    cpu_name,
    measure,
    percentiles,
    rounded,
    write,
)
from .rows import Rows

__all__ = [
    "RESULTS",
    "ROOT",
    "Case",
    "Rows",
    "Times",
    "command_line",
    "commit",
    "cores",
    "cpu_name",
    "load",
    "measure",
    "percentiles",
    "quiet_transformers",
    "rounded",
    "source",
    "spread",
    "table",
    "write",
]
