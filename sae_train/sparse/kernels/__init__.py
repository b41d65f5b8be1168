"""The parts of a step by pairs as Pallas kernels for GPUs: `select`, `decode`, `touched`.

Each stands for a function of pure JAX, with its arguments and results: `pairs.select_pairs`,
`pair_sums.decode_pairs`, `row_passes.touched_pass`. `launcher` starts them, on a GPU or
interpreted, and `parts` has those that a config asks for.
The same inputs give the same bits: no float is added up in an order that depends on which program
ran first.
"""
