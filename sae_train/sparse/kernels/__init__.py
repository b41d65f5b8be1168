"""The parts of the sparse path as Pallas kernels for GPUs: `select`, `decode`, `update`.

Each replaces a function of pure JAX, with its arguments and results: `active_pairs.select_pairs`,
`segment_sums.decode_pairs`, `latent_updates.touched_pass`. `pallas` starts them, on a GPU or
interpreted, and `backend` has those that a config asks for.
The same inputs give the same bits: no float is added up in an order that depends on which program
ran first.
"""
