"""What other projects' own tests ask of an attention op, as small cases of ours.

Each file stands for the tests of one project, named in its docstring: the same features, sizes and
tolerances that matter, written anew. A case is tried, and is right by this package's own op, right
by torch's (which `scaled_dot_product_attention` hands over to), or refused in words. A wrong number
or an error without a type fails the test. `python -m tests.peers` counts them and writes
docs/results/peers.md.
"""
