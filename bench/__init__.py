"""Benchmarks; their results are in bench/results. `python -m bench --list` names them all."""

from pathlib import Path

# Committed results name their commands, such as `python -m bench.encoder`, from the time before
# these modules had packages of their own. They still run.
__path__ += [str(Path(__file__).parent / package) for package in ("accuracy", "lossy")]
