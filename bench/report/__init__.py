"""What every benchmark shares: timing, the result file, markdown tables."""

from astra_runtime.contention import Contention, Watch

from .console import command_line, quiet_transformers, stages
from .machine import cores, cpu_name
from .markdown import load, source, sources, spread, table
from .results import (
    RESULTS,
    ROOT,
    Case,
    Times,
    commit,
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
    "Contention",
    "Rows",
    "Times",
    "Watch",
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
    "sources",
    "spread",
    "stages",
    "table",
    "write",
]
