"""Links to measure on: `virtual` for any number of ranks on a core, `switch` for processes.

`model` says what a link is, `comm` puts the baselines on the virtual one, and
`python -m bench.link` compares the two with each other and with `astra_runtime`'s own emulation.
"""
