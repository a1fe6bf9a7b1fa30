"""What ASTRA makes of ranks that die, stall or lie: a suite of its own, with figures.

Every kind of fault is tried a known number of times; a case *survives* when it ends in the
specified, typed result, in time. A few of each run with the other tests, all of them with
`make test-faults`, which writes the figures to bench/results.
"""
