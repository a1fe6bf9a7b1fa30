"""The kernels on a GPU beside what they have to beat; `python -m bench.kernels --help`.

spec.py        what a case consists of
cases.py       what is measured, as data; _attention.py and _codes.py make the tensors
timing.py      how it is timed
run.py         first the check, then the clock
crossovers.py  what the measurements say of the strategies' constants
plots.py       pictures of the result file
smoke.py       every kernel once, small: for sanitizers
"""
