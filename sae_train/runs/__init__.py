"""The files of a run's folder, read without JAX.

Status, report and sweeps read here what a run has done. It imports `sae_train.config` alone.
"""
