"""The training step that pays for active latents alone, in pure JAX or Pallas kernels.

It gives the results of the dense step; `step` says when it is chosen.
"""
