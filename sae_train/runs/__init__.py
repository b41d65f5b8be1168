"""The files of a run's folder, read without JAX.

Status, report and sweeps learn here what a run has done.
"""
